"""S4D, time-invariant: as a selective scan with one Δ, or as one FFT convolution with the impulse response K_j = Re(Σ_n C_n b̄_n ā_n^j); h_T beside it.

Powers are taken in two parts, ā^{iT + j} = (ā^T)^i · ā^j with j < T: every sum over them is then a product of matrices for each
inner channel, and no (length, d_inner, d_state) array exists. Both parts are exp of multiples of dt A in float64, since a phase
of j dt Im(A) radians, rounded to float32, would be wrong by as much as j; A = 0 and A = -inf give 1 and 0 exactly.

x: (batch, length, d_inner)   A, B, C: (d_inner, d_state)   dt, D: (d_inner,)   h: (batch, d_inner, d_state)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ssmlens.ops import _check, reference
from ssmlens.ops.chunked.scan import in_blocks, linear_scan, widened


def lti_convolution(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, *, D: Tensor | None, h0: Tensor | None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ssmlens.ops.lti_convolution`. y has x's dtype. reset: (batch, length) bool; with it the recurrence itself is run."""
    given, real = x.dtype, _check.state_dtype(x)
    is_complex = any(p.is_complex() for p in (A, B, C) + (() if h0 is None else (h0,)))
    dtype = real.to_complex() if is_complex else real
    x, D = x.to(real), _check.promoted(D, real)
    wide = torch.float64 if x.device.type != "mps" else real
    A, dt = widened(A, wide), dt.to(wide)
    b = reference.zero_order_hold(A, widened(B, wide), dt)[1].to(dtype)
    C = C.to(dtype)
    h0 = None if h0 is None else h0.to(dtype)
    if reset is None and x.shape[1] > 1:
        y, last = _convolution(x, A, b, C, dt, h0)
    else:
        y, last = _recurrence(x, reference.transition(dt[:, None], A).to(dtype), b, C, h0, reset)
    if D is not None:
        y = y + D * x
    return y.to(given), last


def by_scan(
    scan: Callable[..., tuple[Tensor, Tensor]], x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, *,
    D: Tensor | None, h0: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by a backend's `selective_scan`, which multiplies its B by Δ where the hold has (exp(Δ A) - 1)/A."""
    real = _check.state_dtype(x)
    A, dt = widened(A, real), dt.to(real)
    nothing = dt == 0  # then B is the limit
    wide = torch.where(nothing, 1, dt).double()
    hold = reference.zero_order_hold(widened(A, torch.float64), widened(B, torch.float64), wide)[1] / wide[:, None]
    gain = torch.where(nothing[:, None], B, hold.to(dtype=torch.promote_types(A.dtype, B.dtype)))
    return scan(x, dt.expand(x.shape), A, gain, C, D=D, h0=h0, reset=reset)


def _recurrence(
    x: Tensor, a: Tensor, b: Tensor, C: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For a single token, or where the state is emptied in between: the scan, a block of tokens at a time."""
    batch, _, d_inner = x.shape
    start = torch.zeros(batch, d_inner, a.shape[1], dtype=a.dtype, device=x.device) if h0 is None else h0

    def block(h, x, reset):  # type: ignore[no-untyped-def]
        h, last = linear_scan(a.expand(*x.shape, -1), b * x[..., None], h0=h, reset=reset)
        return reference.read_out(h, C, x, None, None), last

    return in_blocks(block, start, [x, reset], start.numel())


def _convolution(x: Tensor, A: Tensor, b: Tensor, C: Tensor, dt: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, d_inner = x.shape
    size = min(length, max(math.isqrt(length - 1) + 1, 2 * A.shape[1]))  # T: each part then has no more numbers than x
    parts = -(-length // size)
    fine = _powers(A, dt, torch.arange(size + 1, device=x.device), b.dtype)  # (d_inner, size + 1, d_state): ā^0 .. ā^T
    coarse = _powers(A, dt, size * torch.arange(parts, device=x.device), b.dtype)  # (d_inner, parts, d_state): ā^{iT}
    a, fine = fine[:, 1], fine[:, :size]
    kernel = _real_product((C * b)[:, None] * coarse, fine).flatten(1)[:, :length]
    n = _fast_size(2 * length - 1)
    spectrum = torch.fft.rfft(x, n=n, dim=1) * torch.fft.rfft(kernel, n=n, dim=1).T
    y = torch.fft.irfft(spectrum, n=n, dim=1)[:, :length]
    # h_T: token T - 1 - (i T + j) with weight ā^{iT + j}
    backward = torch.nn.functional.pad(x.flip(1), (0, 0, 0, parts * size - length)).view(batch, parts, size, d_inner)
    if fine.is_complex():
        inner = torch.view_as_complex(torch.einsum("bijd,djnc->bdinc", backward, torch.view_as_real(fine)).contiguous())
    else:
        inner = torch.einsum("bijd,djn->bdin", backward, fine)
    last = (inner * coarse).sum(2) * b
    if h0 is not None:
        y = y + _real_product((h0 * (C * a))[:, :, None] * coarse, fine).flatten(2)[..., :length].mT
        rest = length - 1 - (parts - 1) * size
        last = last + h0 * (coarse[:, -1] * fine[:, rest] * a)
    return y, last


def _powers(A: Tensor, dt: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(j dt A) for each j, (d_inner, exponents, d_state); where A is -inf 1 for j = 0 and 0 for any other."""
    steps = exponents[:, None] * dt[:, None, None]
    at_once = torch.isneginf(A.real if A.is_complex() else A)[:, None] & (exponents == 0)[:, None]
    return reference.transition(steps, A[:, None]).masked_fill(at_once, 1).to(dtype)


def _real_product(x: Tensor, y: Tensor) -> Tensor:
    """Re(Σ_n x_in y_jn), (..., i, j)."""
    if x.is_complex():
        x, y = torch.cat([x.real, -x.imag], -1), torch.cat([y.real, y.imag], -1)
    return x @ y.mT


def _fast_size(n: int) -> int:
    """The next size with a fast FFT: m 2^k."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15))
