"""What the families whose state is a matrix for each head share.

H_t = diag(a_t) H_{t-1} + k_t v_tᵀ        y_t = H_tᵀ q_t, or, read before it is written, (H_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t

H: (batch, heads, d_key, d_value)   q, k: (batch, length, heads, d_key)   v: (batch, length, heads, d_value)
log_a: (batch, length, heads, d_key), or (..., 1) where a head has one decay   u (bonus): (heads, d_key)
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers.base import at_least_float32
from ssmlens.ops.reference import per_head
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


def heads_of(width: int, d_head: int) -> tuple[int, int]:
    """How many heads of at most d_head cover `width`, and how wide each is: `width / d_head` and d_head where that divides."""
    n_heads = math.ceil(width / d_head)
    return n_heads, math.ceil(width / n_heads)


def sizes(units: int, polarization: Polarization | None) -> tuple[int, int]:
    """How many of the `units` as configured are learned, and how many there are with the pinned ones."""
    return (polarization.learned(units), polarization.total(units)) if polarization else (units, units)


def split(x: Tensor, n_heads: int) -> Tensor:
    """(..., heads · d) → (..., heads, d)."""
    return x.unflatten(-1, (n_heads, -1))


def visible(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with its padding set to zero: to a convolution or a token shift, padding is what comes before the beginning.
    x: (batch, length, ...), mask: (batch, length), False at padding."""
    return x if mask is None else x.masked_fill(~mask.reshape(*mask.shape, *(1 for _ in x.shape[2:])), 0)


def token_shift(x: Tensor, last: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token, zero before the first and at a reset, and the last token: `last` of what follows.
    x: (batch, length, d)   last: (batch, d) or None   reset: (batch, length)"""
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
    previous = torch.cat([first, x[:, :-1]], 1)
    return previous if reset is None else previous.masked_fill(reset[..., None], 0), x[:, -1]


def positions(
    x: Tensor, start: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """How many tokens of its sequence come before each token (padding is not counted), and before the one to follow.
    x: (batch, length, ...)   start: (batch,), how many came before x, or None"""
    here = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
    count = here.cumsum(1) if start is None else here.cumsum(1) + start[:, None]
    before = count - here
    if reset is None:
        return before, count[:, -1]
    base = torch.where(reset, before, 0).cummax(1).values
    return before - base, count[:, -1] - base[:, -1]


def rotation(at: Int[Tensor, "batch length"], pairs: int, base: float, last: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (batch, length, 1, pairs), of the angles at · base^{-e_i}, e evenly spaced from 0 to `last`."""
    return turns(at, base ** -torch.linspace(0, last, pairs, dtype=_exact(at), device=at.device))


def turns(at: Int[Tensor, "batch length"], frequencies: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (batch, length, 1, pairs), of the angles at · frequency."""
    angle = at[..., None, None] * torch.as_tensor(frequencies, dtype=_exact(at), device=at.device)
    return angle.cos(), angle.sin()


def _exact(at: Tensor) -> torch.dtype:
    """float32 angles are off by 0.01 after 10^5 tokens."""
    return torch.float32 if at.device.type == "mps" else torch.float64


def turned(left: Tensor, right: Tensor, by: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each (left, right) turned by its angle, at least float32."""
    left, right = at_least_float32(left), at_least_float32(right)
    cos, sin = (part.to(left.dtype) for part in by)
    return left * cos - right * sin, right * cos + left * sin


def pinned(log_a: Tensor, polarization: Polarization | None) -> Tensor:
    """log a of the learned units along the last dimension → of all of them, -inf for a unit at zero."""
    return polarization.join(log_a) if polarization else log_a


def pinned_masks(units: int, polarization: Polarization | None) -> tuple[Tensor, Tensor]:
    """Which of the units (`units`: as configured) are held at one, which at zero."""
    if polarization is None:
        return torch.zeros(units, dtype=torch.bool), torch.zeros(units, dtype=torch.bool)
    return polarization.masks(units)


def matrix_coefficients(
    log_a: Tensor, k: Tensor, v: Tensor, ones: Tensor, zeros: Tensor, dt: Tensor | None = None
) -> Coefficients:
    """This recurrence with a_t = exp(log_a), u_t = k_t v_tᵀ, or dt_t k_t v_tᵀ where dt (batch, length, heads) is given.
    ones, zeros: over the d_key dimensions, or (heads, 1) where heads are pinned."""
    k = per_head(k, v)
    batch, length, heads, d_key = k.shape
    shape = (heads, d_key, v.shape[-1])
    log_a, k, v = at_least_float32(log_a), at_least_float32(k), at_least_float32(v)

    def content(t: slice) -> Tensor:
        return k[:, t, :, :, None] * v[:, t, :, None, :]

    def written(t: slice) -> Tensor:
        return content(t) if dt is None else dt[:, t, :, None, None] * content(t)

    return Coefficients(
        batch=batch, length=length, state_shape=shape,
        a_at=lambda t: log_a[:, t].exp()[..., None].expand(-1, -1, *shape),
        u_at=written, b_at=(lambda t: None) if dt is None else content, dt=dt,
        ones=ones[..., None].expand(shape), zeros=zeros[..., None].expand(shape),
    )  # fmt: skip


def read(q: Tensor, states: Tensor) -> Tensor:
    """y_t = H_tᵀ q_t for all states (batch, length, heads, d_key, d_value)."""
    return torch.einsum("blhk,blhkv->blhv", q.to(states.dtype), states)


def read_before_writing(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor, states: Tensor) -> Tensor:
    """y_t = (H_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t, from the states H_1 .. H_T; H_0 = 0."""
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    q, k, v = q.to(states.dtype), k.to(states.dtype), v.to(states.dtype)
    return read(q, before) + (q * bonus.to(states.dtype) * k).sum(-1, keepdim=True) * v


def head_rms_norm(y: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """y / sqrt(mean(y²) + eps), over the values of each head. weight: (d_value,), the same for every head, or none."""
    y = at_least_float32(y)
    return ops.rms_norm(y, None if weight is None else weight.to(y.dtype), eps=eps)


def head_group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(y - mean) / sqrt(variance + eps) over the values of each head, then weight and bias, each (heads, d_value)."""
    y = F.layer_norm(at_least_float32(y), (y.shape[-1],), None, None, eps)
    return y * weight.to(y.dtype) + bias.to(y.dtype)
