"""The noise floor: below which size are a model's gradients rounding error?

A far token's gradient is small because it is a *product* of many factors below one, and products keep their relative accuracy in
floating point until they underflow: the floor is therefore not eps times the largest score. But what comes after may cancel (sums over
paths, FFT convolutions, half precision), and no rule of thumb knows where. So it is measured: one sequence and one probe are run
again on a float64 copy of the model, and every position whose gradient is off by more than a tenth counts as noise. The floor is the
largest score among those, and at least 10 √d times the smallest normal number of the model's dtype, where underflow begins to cost digits.
It takes about as long as four probes on one sequence. No more than the last LONGEST tokens before a target are run; the error at the farthest quarter of them is
then taken for that of all that lies farther, and what is not ten times as large counts as noise.

Where there is no float64, or with `floor="eps"`, it is eps times the largest score: right for an FFT, far too cautious for a scan.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssmlens.errors import UserError
from ssmlens.lens.jacobian import Ask, Backward
from ssmlens.lens.subject import Subject

Array = np.ndarray
LONGEST = 512
WRONG = 0.1  # a gradient off by more than this share of itself is noise


@dataclass(frozen=True)
class Floor:
    """Scores at or below `value` are numerical noise; `how` says how that was found out."""

    value: float
    how: str


def noise_floor(
    subject: Subject,
    tokens: Tensor,
    target: int,
    largest: float,
    *,
    output: str,
    floor: Any = "measured",
    seed: int = 0,
    in_blocks: bool | None = None,
) -> Floor:
    """tokens: one sequence (1, length). largest: the largest score of the measurement. floor: "measured", "eps", or the number itself.

    Raises UserError for any other word."""
    if not isinstance(floor, str):
        return Floor(float(floor), "as given")
    if floor not in ("measured", "eps"):
        raise UserError(f"floor is 'measured', 'eps' or a number, not {floor!r}")
    precision = torch.finfo(subject.dtype)
    cautious = Floor(precision.eps * largest, f"a priori: the resolution of {subject.dtype} times the largest score")
    if floor == "eps" or subject.dtype == torch.float64:
        return cautious
    try:
        error, size, width = _against_double(subject, tokens, target, output, seed, in_blocks)
    except (RuntimeError, TypeError, NotImplementedError) as e:  # no float64 on this device, or no memory for it
        return Floor(cautious.value, f"{cautious.how} (a float64 copy could not be run: {type(e).__name__})")
    noisy = error > WRONG * size
    unseen = error[: len(error) // 4].max() / WRONG if target >= LONGEST else 0.0
    return Floor(
        max(float(size[noisy].max(initial=0.0)), float(unseen), 10 * precision.tiny * math.sqrt(width)),
        f"measured: {int(noisy.sum())} of {len(size)} positions of one sequence are off by more than a tenth against float64",
    )


def _against_double(
    subject: Subject, tokens: Tensor, target: int, output: str, seed: int, in_blocks: bool | None
) -> tuple[Float[Array, " length"], Float[Array, " length"], int]:
    """Per position, for one sequence and one probe: ‖gradient - float64 gradient‖ and ‖float64 gradient‖; and d_model."""
    gradients = []
    for one in (subject, subject.in_double()):
        with one.still(), torch.no_grad():
            y = _ask(one, output)(one.run(one.embed(tokens[:, :1])))
        v = torch.from_numpy(np.random.default_rng([seed, 0]).integers(0, 2, y.shape) * 2.0 - 1.0).to(y)
        run = Backward(one, tokens, in_blocks)(
            tokens[:, max(0, target + 1 - LONGEST) : target + 1], _ask(one, output), [v]
        )
        *_, (_, (gradient,)) = run
        gradients.append(gradient[0].cpu().double())
    single, double = gradients
    return (single - double).norm(dim=-1).numpy(), double.norm(dim=-1).numpy(), double.shape[-1]


def _ask(subject: Subject, output: str) -> Ask:
    """What is asked of the hidden states: the last one, or its logits."""
    return lambda hidden: subject.logits(hidden[:, -1]) if output == "logits" else hidden[:, -1]
