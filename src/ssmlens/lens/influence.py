"""Influence: how much token s moves output t, as a function of how far back it lies (SPEC §2; the paper's influential score, §3.1).

    score(d) = √ mean over sequences, targets t and probes v of ‖vᵀ ∂y_t/∂x_{t-d}‖²  =  root mean square of ‖∂y_t/∂x_{t-d}‖_F

x_s is the input embedding of token s (d_model), y_t the last hidden state before the head (or the logits on request). Two methods for
the same number: `exact`, one vector-Jacobian product per output dimension, and `probes`, k random ±1 vectors v, for which
E‖vᵀJ‖² = ‖J‖_F² (the mean of *squares* is unbiased, the mean of norms is not). Either goes backwards through the model block by block
(`ssmlens.lens.jacobian`), so memory is linear in the length and does not grow with the depth's graphs; what it will take is said first.

On the way every layer's share comes by: ‖∂y_t/∂xˡ_s‖, xˡ what enters block l. It says from which depth on a distant token still reaches the output. How fast one
layer alone forgets, of which Theorem 3.1 speaks, is measured from its mixer's input to its mixer's output, in `ssmlens.lens.bounds`.

Only what lies above the noise floor is fitted (`ssmlens.lens.floor`, which measures it).

The score's size depends on the scale of the embeddings; its slope, its shares and its half-life do not, so those are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens import decay
from ssmlens.lens.cost import Cost, plan
from ssmlens.lens.floor import Floor, noise_floor
from ssmlens.lens.influence_views import figure, figures, position_figure, ratio_figure, table, tables
from ssmlens.lens.jacobian import Ask, Backward
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import Subject
from ssmlens.results import Cell, Figure, Table, Value

__all__ = ["Influence", "figure", "figures", "measure", "position_figure", "ratio_figure", "table", "tables"]

Array = np.ndarray
_LONG = 10.0  # seconds, from which on the noise floor has a bar of its own


@dataclass(frozen=True, eq=False)
class Influence(Shown):
    """by_depth[l, i, d]: for sequence i, the sum over its targets of the (mean over probes of the) squared score at distance d, from the input of block
    l + 1; squares: the first of these, from the embeddings. counts[i, d]: of how many targets. Everything else follows from these.
    cost: what it was expected to take."""

    name: str
    method: str
    output: str
    length: int
    targets: str
    seed: int
    by_depth: Float[Array, "layers n D"] = field(repr=False)
    counts: Float[Array, "n D"]
    floor: Floor
    fit: decay.Fit | None = field(repr=False)
    cost: Cost | None = field(default=None, repr=False, compare=False)

    @property
    def squares(self) -> Float[Array, "n D"]:
        return self.by_depth[0]

    @property
    def n_sequences(self) -> int:
        return len(self.squares)

    @property
    def distances(self) -> Int[Array, " D"]:
        """t - s in tokens: 0 is the token at the target itself."""
        return np.arange(self.squares.shape[1])

    @cached_property
    def score(self) -> Float[Array, " D"]:
        return decay.pooled_curve(self.squares, self.counts)

    @cached_property
    def stderr(self) -> Float[Array, " D"] | None:
        """By bootstrap over sequences; None for one sequence."""
        n = self.n_sequences
        if n < 2:
            return None
        weights = decay.resampling_weights(n, self.seed)
        return decay.spread(decay.resampled_curves(self.squares, self.counts, weights), n)

    def share_within(self, fraction: float) -> Value:
        """Share of the squared influence that the last `fraction` of the context holds (the token at the target included)."""
        tokens = max(1, math.ceil(fraction * self.squares.shape[1]))
        return self._value(lambda curve: decay.share_within(curve, tokens))

    @cached_property
    def effective_context(self) -> Value:
        """How many of the most recent tokens hold 90 % of the squared influence."""
        return self._value(decay.effective_context, "tokens")

    @cached_property
    def far_fit(self) -> decay.Fit | None:
        """The line through the farther half of the distances alone: where a short convolution or the residual path make the nearest tokens
        special, this is what the recurrence itself does."""
        far = self.squares.shape[1] // 2
        return decay.fit_decay(self.squares, self.counts, floor=self.floor.value, seed=self.seed, first=far)

    @cached_property
    def tail(self) -> Value:
        """Root mean square score over the farther half of the distances, relative to the score at distance 1: how strong a trace is left."""
        half = self.squares.shape[1] // 2

        def trace(curve: Float[Array, "... D"]) -> Float[Array, "..."]:
            far, near = np.sqrt(np.square(curve[..., half:]).mean(-1)), curve[..., 1]
            return np.divide(far, near, out=np.zeros_like(far), where=near > 0)

        return self._value(trace)

    @property
    def kappa(self) -> Value | None:
        if self.fit is None:
            return None
        return Value(value=self.fit.kappa, stderr=self.fit.stderr, n=self.n_sequences, unit="1/token")

    @property
    def half_life(self) -> Value | None:
        return decay.half_life_value(self.fit)

    def _value(self, statistic: Any, unit: str = "", squares: Float[Array, "n D"] | None = None) -> Value:
        value, error = decay.with_stderr(
            statistic, self.squares if squares is None else squares, self.counts, self.seed
        )
        return Value(value=value, stderr=error, n=self.n_sequences, unit=unit)

    @property
    def n_layers(self) -> int:
        """From how many depths influence was measured; 1: from the embeddings alone."""
        return len(self.by_depth)

    @cached_property
    def layer_fits(self) -> list[decay.Fit | None]:
        """The decay of influence from every block's input (the first: the embeddings). The noise floor is as far below each largest score."""
        curves = [decay.pooled_curve(squares, self.counts) for squares in self.by_depth]
        floors = [self.floor.value * float(curve.max() / (curves[0].max() or 1)) for curve in curves]
        return [
            decay.fit_decay(squares, self.counts, floor=floor, seed=self.seed)
            for squares, floor in zip(self.by_depth, floors, strict=True)
        ]

    @cached_property
    def layer_contexts(self) -> list[Value]:
        """The effective context from every block's input, tokens."""
        return [self._value(decay.effective_context, "tokens", squares) for squares in self.by_depth]

    def figure(self) -> Figure:
        return figure([self])

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return tables([self])

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows

    def __str__(self) -> str:
        fit = self.fit
        decay_words = (
            "no decay could be fitted" if fit is None else f"half-life {fit.half_life:.3g} tokens (R² {fit.r2:.2f})"
        )
        return f"{self.name}: {decay_words}; 90 % of the squared influence in the last {self.effective_context.value:.0f} tokens"


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    method: Literal["probes", "exact"] = "probes",
    probes: int = 8,
    targets: Literal["last"] | int | Sequence[int] = "last",
    output: Literal["hidden", "logits"] = "hidden",
    floor: Literal["measured", "eps"] | float = "measured",
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Influence:
    """Influence of every token of `inputs` (sequences, length) on the outputs at the targets, from the embeddings and from every layer's input.

    targets: "last"; a number k (k positions of each sequence's second half, drawn at random); or the positions themselves.
    batch_size: sequences run together; it changes memory and speed, not what is measured (probes are drawn per sequence).
    Raises UserError for bad tokens, targets or options, where the model answers with NaN, and where it would not fit into memory."""
    subject = Subject.of(model)
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    if method not in ("probes", "exact") or output not in ("hidden", "logits"):
        raise UserError(
            f"method is 'probes' or 'exact' and output is 'hidden' or 'logits', not {method!r} and {output!r}"
        )
    if probes < 1:
        raise UserError(f"at least one probe is needed, not {probes}")
    positions, described = _targets(targets, n, length, np.random.default_rng(seed))
    width = _output_width(subject, tokens, output)
    k = positions.shape[1]
    reach = int(positions.max(1).min()) + 1  # distances that every sequence has
    vectors = _Vectors(method, probes, n, k, width, seed)
    backward = Backward(subject, tokens)
    count = k * vectors.per_target
    cost = plan(
        backward, tokens, _asked(subject, output), [torch.ones(1, width, device=tokens.device)] * 3, count,
        batch_size or max(1, 2**19 // (length * width)),
    )  # fmt: skip
    progress.say(f"{subject.name}: influence will take {cost}")
    progress.begin(f"{subject.name}: influence", n * count * backward.depths)
    squares, counts = np.zeros((backward.depths, n, reach)), np.zeros((n, reach))
    for start in range(0, n, cost.batch):
        rows = range(start, min(start + cost.batch, n))
        at = torch.as_tensor(positions[start : rows.stop], device=tokens.device)
        ask = _asked(subject, output, at)
        for first in range(0, count, cost.group):
            some = [divmod(i, vectors.per_target) for i in range(first, min(first + cost.group, count))]
            given = [vectors.placed(rows, j, p, k).to(tokens.device) for j, p in some]

            def step(done: int, size: int = len(rows)) -> None:
                progress.step(done * size)

            for depth, gradients in backward(tokens[start : rows.stop], ask, given, step=step):
                for (j, _), gradient in zip(some, gradients, strict=True):
                    norms = _squared_norms(gradient) / vectors.mean_over
                    for row, i in enumerate(rows):
                        d = min(int(positions[i, j]) + 1, reach)
                        squares[depth - 1, i, :d] += norms[row, int(positions[i, j]) - np.arange(d)]
        for i in rows:
            for j in range(k):
                counts[i, : min(int(positions[i, j]) + 1, reach)] += 1
    if not np.isfinite(squares).all():
        raise UserError(
            f"{subject.name} answers these inputs with NaN or infinite gradients: its influence cannot be measured"
        )
    largest = float(decay.pooled_curve(squares[0], counts).max())
    if floor == "measured" and not cost.in_double:
        floor = "eps"
    if cost.seconds > _LONG:
        progress.begin(f"{subject.name}: influence, noise floor", 1)
    found = noise_floor(
        subject, tokens[:1], int(positions[0, 0]), largest, output=output, floor=floor, seed=seed, in_blocks=backward.in_blocks
    )  # fmt: skip
    if cost.seconds > _LONG:
        progress.step()
    return Influence(
        name=subject.name, method=f"{probes} probes" if method == "probes" else "exact",
        output="last hidden state" if output == "hidden" else "logits", length=length, targets=described, seed=seed,
        by_depth=squares, counts=counts, floor=found, fit=decay.fit_decay(squares[0], counts, floor=found.value, seed=seed), cost=cost,
    )  # fmt: skip


def _asked(subject: Subject, output: str, at: Int[Tensor, "batch k"] | None = None) -> Ask:
    """y: the hidden states at the positions `at` (None: the last one), or the logits there."""

    def ask(hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        y = hidden[:, -1] if at is None else hidden[rows[:, None], at]
        return subject.logits(y) if output == "logits" else y

    return ask


class _Vectors:
    """The vectors that multiply the Jacobian from the left: ±1 ones, or one after the other of the standard basis."""

    def __init__(self, method: str, probes: int, n: int, k: int, width: int, seed: int) -> None:
        self.exact, self.width = method == "exact", width
        self.per_target = width if self.exact else probes
        self.mean_over = 1 if self.exact else probes
        if not self.exact:
            # one stream per sequence, so that neither the batch size nor further sequences change a sequence's probes
            self.signs = np.stack(
                [np.random.default_rng([seed, i]).integers(0, 2, (k, probes, width), np.int8) for i in range(n)]
            )

    def __call__(self, rows: range, k: int, p: int) -> Float[Tensor, "batch width"]:
        if self.exact:
            return torch.eye(self.width)[p].expand(len(rows), -1)
        return torch.from_numpy(self.signs[rows.start : rows.stop, k, p] * 2.0 - 1.0)

    def placed(self, rows: range, j: int, p: int, k: int) -> Float[Tensor, "batch k width"]:
        """The vector p of target j, and zeros for the other targets."""
        v = self(rows, j, p)
        out = torch.zeros(len(rows), k, self.width)  # float32 holds ±1 exactly, and every device has it
        out[:, j] = v
        return out


def _squared_norms(gradient: Float[Tensor, "batch length d_model"]) -> Float[Array, "batch length"]:
    """In float64: the square of anything below 1e-19 would underflow in float32."""
    squared: Array = gradient.detach().cpu().double().square().sum(-1).numpy()
    return squared


def _output_width(subject: Subject, tokens: Tensor, output: str) -> int:
    with subject.still(), torch.no_grad():
        y = subject.run(subject.embed(tokens[:1, :2]))
        return int((subject.logits(y) if output == "logits" else y).shape[-1])


def _targets(targets: Any, n: int, length: int, rng: np.random.Generator) -> tuple[Int[Array, "n k"], str]:
    if isinstance(targets, str):
        if targets != "last":
            raise UserError(f"targets is 'last', a number of positions or the positions themselves, not {targets!r}")
        return np.full((n, 1), length - 1), "the last position"
    if isinstance(targets, int):
        half = np.arange(length // 2, length)
        if not 1 <= targets <= len(half):
            raise UserError(f"{targets} targets cannot be drawn from the {len(half)} positions of the second half")
        drawn = np.stack([rng.choice(half, targets, replace=False) for _ in range(n)])
        return drawn, f"{targets} positions of each sequence's second half"
    positions = np.unique(np.asarray(list(targets), dtype=int))
    if not len(positions) or positions[0] < 0 or positions[-1] >= length or positions[-1] < 3:
        raise UserError(f"targets must lie in 0..{length - 1} and reach beyond 3, not {list(targets)}")
    return np.tile(positions, (n, 1)), f"positions {', '.join(map(str, positions))}"
