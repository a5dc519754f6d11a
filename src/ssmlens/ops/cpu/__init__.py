"""C++ kernels for the recurrence on a CPU, compiled for this machine on first use. See DESIGN.md, "The kernels".

Shapes and meaning as in `ssmlens.ops`, whose functions check the arguments and call these; every function returns its
output and the final state. float32 and float64; bfloat16 and float16 are computed in float32. Results are bitwise the
same for any number of threads.
"""

from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops.cpu import _autograd, _library  # noqa: F401  (_library defines the operators)
from ssmlens.ops.cpu.build import available, why_unavailable

__all__ = [
    "available", "causal_conv1d", "linear_scan", "selective_scan", "supports_causal_conv1d", "supports_linear_scan",
    "supports_selective_scan", "why_unavailable",
]  # fmt: skip

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _supported(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype in _DTYPES and t.device.type == "cpu") for t in tensors)


def supports_selective_scan(x: Tensor, A: Tensor | None = None) -> bool:
    """Real A only; complex A is left to the chunked backend."""
    return _supported(x, A)


def supports_linear_scan(u: Tensor, a: Tensor | None = None) -> bool:
    return _supported(u, a)


def supports_causal_conv1d(x: Tensor, weight: Tensor | None = None) -> bool:
    return _supported(x, weight)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.selective_scan` for real A. Raises ValueError where A is positive or NaN."""
    tensors = [_promoted(t, x) for t in (x, dt, A, B, C, D, z, dt_bias, h0)]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    *most, state = tensors
    y, final_state, _ = _autograd.SelectiveScan.apply(*most, dt_softplus, state, reset, save)
    return y.to(x.dtype), final_state


def linear_scan(
    a: Tensor, u: Tensor, *, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.linear_scan` for real a, which broadcasts to u."""
    batch, length, *state = u.shape
    flat = [_promoted(t, u).reshape(batch, length, -1) for t in (a.expand_as(u), u)]
    start = None if h0 is None else _promoted(h0, u).reshape(batch, -1)
    h = _autograd.LinearScan.apply(*flat, start, reset).view(batch, length, *state)
    return h.to(u.dtype), h[:, -1]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.causal_conv1d`. The final state is zero where a later token could not reach it because of a reset."""
    width = weight.shape[1]
    xs, first = _promoted(x, x), _promoted(initial, x)
    y = _autograd.CausalConv1d.apply(xs, _promoted(weight, x), _promoted(bias, x), activation == "silu", first, reset)
    return y.to(x.dtype), _last_tokens(xs, width - 1, first, reset)


def _last_tokens(x: Tensor, count: int, initial: Tensor | None, reset: Tensor | None) -> Tensor:
    """The last `count` tokens of initial and x, zeros before the last reset."""
    missing = max(0, count - x.shape[1])
    last = x[:, x.shape[1] - (count - missing) :]
    if missing:
        before = F.pad(last, (0, 0, missing, 0)) if initial is None else torch.cat([initial[:, -missing:], last], 1)
        last = before
    if reset is not None and count:
        resets = F.pad(reset, (missing, 0))[:, -count:]
        later = resets.flip(1).cumsum(1).flip(1) - resets.long()  # resets after each token
        last = last.masked_fill((later > 0)[..., None], 0)
    return last


@overload
def _promoted(t: Tensor, like: Tensor) -> Tensor: ...
@overload
def _promoted(t: Tensor | None, like: Tensor) -> Tensor | None: ...
def _promoted(t: Tensor | None, like: Tensor) -> Tensor | None:
    """t in the dtype of the state: float64 for float64 input, else float32."""
    return None if t is None else t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
