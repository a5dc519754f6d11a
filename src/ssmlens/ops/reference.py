"""The definition: h_t = a_t h_{t-1} + u_t, one token after another. The judge of every backend; slow and plain on purpose.

Any floating or complex dtype; the state is kept in the dtype of the arguments as they come (`ops.__init__` has already
promoted them). Shapes as in `ssmlens.ops`; every function returns (y, final state).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmlens.recurrence import run


def transition(dt: Tensor, A: Tensor) -> Tensor:
    """exp(dt A), exactly 0 where A (or its real part) is -inf, whatever dt.

    dt · -inf would be NaN at dt = 0, and its gradient NaN anywhere; so those entries are cut out of the graph: gradient zero
    to A, no contribution to dt. A = 0 needs nothing special: exp(0) = 1 exactly, with the ordinary gradient."""
    dead = torch.isneginf(A.real if A.is_complex() else A)
    return torch.exp(dt * A.masked_fill(dead, 0)).masked_fill(dead, 0)


def step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """Δ_t from its pre-activation. (softplus with torch's threshold of 20, above which it is the identity in fp32.)"""
    if dt_bias is not None:
        dt = dt + dt_bias
    return F.softplus(dt) if dt_softplus else dt


def _expand(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def linear_scan(a: Tensor, u: Tensor, *, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    a = a.expand_as(u)
    if reset is not None:  # a state that is emptied before a token is one that is multiplied by zero there
        a = a.masked_fill(_expand(reset, u), 0)
    states = run(a, u, torch.zeros_like(u[:, 0]) if h0 is None else h0)
    return torch.stack(states, 1), states[-1]


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    h0: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dt = step_size(dt, dt_bias, dt_softplus)[..., None]  # (batch, length, d_inner, 1)
    B = B[:, :, None, :] if B.dim() == 3 else B
    C = C[:, :, None, :] if C.dim() == 3 else C
    u = dt * B * x[..., None]
    a = transition(dt, A)
    u = u.to(torch.promote_types(u.dtype, a.dtype))
    h, h_T = linear_scan(a, u, h0=h0, reset=reset)
    return read_out(h, C, x, D, z), h_T


def read_out(h: Tensor, C: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """y = (Re(C h) + D x) · silu(z); h and C end in (d_inner, d_state)."""
    y = (C * h).sum(-1)
    y = y.real if y.is_complex() else y
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, bonus: Tensor | None, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """H_t = diag(a_t) H_{t-1} + k_t v_tᵀ; y_t = H_tᵀ q_t, or with `bonus` (H_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t."""
    q, k = per_head(q, v), per_head(k, v)
    u = k[..., :, None] * v[..., None, :]  # (batch, length, heads, d_key, d_value)
    a = log_a.exp()[..., None]
    H = torch.zeros_like(u[:, 0]) if h0 is None else h0
    ys = []
    for t in range(v.shape[1]):
        if reset is not None:
            H = H.masked_fill(_expand(reset[:, t], H), 0)
        before = H
        H = a[:, t] * H + u[:, t]
        read = H if bonus is None else before + bonus[..., None] * u[:, t]
        ys.append((q[:, t, ..., None] * read).sum(-2))
    return torch.stack(ys, 1), H


def per_head(q: Tensor, v: Tensor) -> Tensor:
    """Repeat (batch, length, groups, d_key) to the heads of v: head i reads group i // (heads / groups)."""
    return q.repeat_interleave(v.shape[2] // q.shape[2], dim=2)


def rwkv4_attention(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
    state: tuple[Tensor, Tensor, Tensor] | None, reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """With p_t = e^{-w} p_{t-1} + e^{k_t} v_t and s_t the same without v (each kept times e^{-m}, m its running maximum):
    y_t = σ(r_t) (p_{t-1} + e^{u+k_t} v_t) / (s_{t-1} + e^{u+k_t}), and 0 where no token has any weight (k = -inf, padding)."""
    if state is None:
        zero = torch.zeros_like(v[:, 0])
        state = (zero, zero, torch.full_like(zero, lowest(v.dtype)))
    p, s, m = state
    ys = []
    for t in range(v.shape[1]):
        if reset is not None:
            fresh = reset[:, t, None]
            p, s, m = p.masked_fill(fresh, 0), s.masked_fill(fresh, 0), m.masked_fill(fresh, lowest(m.dtype))
        here = u + k[:, t]
        top = torch.maximum(m, here)
        old, new = torch.exp(m - top), torch.exp(here - top)
        ys.append(torch.sigmoid(r[:, t]) * weighted_mean(old * p + new * v[:, t], old * s + new))
        faded = m - w  # -inf where w is: nothing is left of earlier tokens, whether or not this one is visible
        top = torch.maximum(faded.clamp_min(lowest(m.dtype)), k[:, t])
        old, new = torch.exp(faded - top), torch.exp(k[:, t] - top)
        p, s, m = old * p + new * v[:, t], old * s + new, top
    return torch.stack(ys, 1), (p, s, m)


def lowest(dtype: torch.dtype) -> float:
    """The running maximum of no tokens: finite, so that the difference of two of them is 0 and not NaN."""
    return torch.finfo(dtype).min / 4


def weighted_mean(numerator: Tensor, weight: Tensor) -> Tensor:
    empty = weight == 0
    return (numerator / weight.masked_fill(empty, 1)).masked_fill(empty, 0)


def lti_convolution(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    *,
    D: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S4D as a recurrence: h_t = ā h_{t-1} + b̄ x_t, y_t = Re(C h_t) + D x_t, with `zero_order_hold`'s ā and b̄."""
    a, b = zero_order_hold(A, B, dt)
    u = b * x[..., None]
    h, h_T = linear_scan(a.expand_as(u), u, h0=h0, reset=reset)
    return read_out(h, C, x, D, None), h_T


def zero_order_hold(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """ā = exp(dt A), b̄ = (exp(dt A) - 1)/A · B; where A is 0 or -inf, b̄ = dt B (a pinned channel keeps an input weight:
    at A = 0 that is the limit, at -inf the limit would be a dead channel)."""
    dt = dt[:, None]
    real = A.real if A.is_complex() else A
    dead = torch.isneginf(real)
    pinned = dead | (A == 0)
    safe = A.masked_fill(pinned, -1)
    a = transition(dt, A)
    gain = torch.where(pinned, dt.to(a.dtype), torch.expm1(dt * safe) / safe)
    return a, gain * B


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_j weight_j x_{t-width+1+j} + bias over a window of the last `width` tokens, emptied by a reset."""
    window = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if initial is None else initial
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            window = window.masked_fill(reset[:, t, None, None], 0)
        window = torch.cat([window, x[:, t : t + 1]], 1)
        y = (window * weight.T).sum(1)
        ys.append(y if bias is None else y + bias)
        window = window[:, 1:]
    y = torch.stack(ys, 1)
    return F.silu(y) if activation == "silu" else y, window


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight
