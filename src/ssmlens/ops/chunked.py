"""Pure torch on any device: vectorised over everything but a short loop over time, memory linear in length.

`linear_scan` runs in place over tokens where a token is wide, and in two levels (inside chunks of √length, then over chunks)
where it is narrow. There is no division and no cumulative log: a = 0 and a = 1 are exact and long decays cannot overflow.
The other functions expand a_t and u_t for one block of tokens at a time and recompute them in the backward pass.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmlens.ops import reference

WIDE = 4096  # numbers a token: above it one more torch call a token costs less than a second pass over memory
BLOCK = 1 << 20  # numbers (a_t or u_t) a block: a few MB, which stay in cache


def _scan(a: Tensor, u: Tensor, h0: Tensor | None) -> Tensor:
    """h of shape (batch, length, m) for a, u of the same shape; no graph."""
    batch, length, m = u.shape
    h = u.clone(memory_format=torch.contiguous_format)
    if h0 is not None:
        h[:, 0].addcmul_(a[:, 0], h0)
    if batch * m >= WIDE or length < 16:
        for t in range(1, length):
            h[:, t].addcmul_(a[:, t], h[:, t - 1])
        return h
    size = math.isqrt(length - 1) + 1
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:  # tokens that change nothing
        h = torch.cat([h, h.new_zeros(batch, missing, m)], 1)
        a = torch.cat([a, a.new_ones(batch, missing, m)], 1)
    h = h.view(batch, chunks, size, m)
    decay = a.reshape(batch, chunks, size, m).clone()
    for i in range(1, size):
        h[:, :, i].addcmul_(decay[:, :, i], h[:, :, i - 1])
        decay[:, :, i].mul_(decay[:, :, i - 1])
    carry = [torch.zeros_like(h[:, 0, -1])]  # the state with which a chunk begins (h0 is already inside the first)
    for c in range(chunks - 1):
        carry.append(torch.addcmul(h[:, c, -1], decay[:, c, -1], carry[-1]))
    h.addcmul_(decay, torch.stack(carry, 1)[:, :, None])
    return h.view(batch, chunks * size, m)[:, :length]


class LinearScan(torch.autograd.Function):
    """(a, u, h0) → h, all (batch, length, m), h0 (batch, m). Its gradient is the same scan from the end to the beginning,
    g_t = dh_t + ā_{t+1} g_{t+1}, written with itself: so it can be differentiated again."""

    @staticmethod
    def forward(a: Tensor, u: Tensor, h0: Tensor) -> Tensor:
        return _scan(a, u, h0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, _, h0 = inputs
        ctx.save_for_backward(a, h0, output)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h0, h = ctx.saved_tensors
        a = a.conj() if a.is_complex() else a
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).flip(1)
        g = LinearScan.apply(later, dh.flip(1), torch.zeros_like(h0)).flip(1)
        before = torch.cat([h0[:, None], h[:, :-1]], 1)
        return g * (before.conj() if before.is_complex() else before), g, a[:, 0] * g[:, 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        """A vmapped dimension is only more batch."""
        moved = [
            x.movedim(d, 0) if d is not None else x.expand(info.batch_size, *x.shape)
            for x, d in zip(args, in_dims, strict=True)
        ]
        h = LinearScan.apply(*(x.flatten(0, 1) for x in moved))
        return h.unflatten(0, (info.batch_size, -1)), 0


def linear_scan(a: Tensor, u: Tensor, *, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, *state = u.shape
    a = a.expand_as(u)
    if reset is not None:  # emptying the state before a token is a = 0 at that token
        a = a.masked_fill(reset.reshape(batch, length, *(1 for _ in state)), 0)
    dtype = torch.promote_types(a.dtype, u.dtype)
    h0 = torch.zeros_like(u[:, 0]) if h0 is None else h0
    h = LinearScan.apply(a.flatten(2).to(dtype), u.flatten(2).to(dtype), h0.flatten(1).to(dtype))
    h = h.view(batch, length, *state)
    return h, h[:, -1]


def _in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]], h: Tensor, over_time: list[Tensor | None], width: int
) -> tuple[Tensor, Tensor]:
    """Run block(h, *slices) → (y, h) over blocks of tokens, carrying h; each block is recomputed in the backward pass."""
    length = next(x.shape[1] for x in over_time if x is not None)
    size = max(16, BLOCK // max(1, width))
    if size >= length:
        return block(h, *over_time)
    ys = []
    for start in range(0, length, size):
        parts = [None if x is None else x[:, start : start + size] for x in over_time]
        if torch.is_grad_enabled():
            y, h = checkpoint(block, h, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = block(h, *parts)
        ys.append(y)
    return torch.cat(ys, 1), h


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    h0: Tensor | None, reset: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, d_inner = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, A.dtype), B.dtype)
    if h0 is None:
        h0 = torch.zeros(batch, d_inner, A.shape[1], dtype=dtype, device=x.device)
    constant_B, constant_C = B.dim() == 2, C.dim() == 2

    def block(h, x, dt, z, reset, B_t, C_t):  # type: ignore[no-untyped-def]
        dt = reference.step_size(dt, dt_bias, dt_softplus)
        B_now = B if constant_B else B_t[:, :, None]
        C_now = C if constant_C else C_t[:, :, None]
        u = (dt * x)[..., None] * B_now
        h, last = linear_scan(reference.transition(dt[..., None], A), u.to(dtype), h0=h, reset=reset)
        return reference.read_out(h, C_now, x, D, z), last

    over_time = [x, dt, z, reset, None if constant_B else B, None if constant_C else C]
    return _in_blocks(block, h0, over_time, batch * d_inner * A.shape[1])


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, bonus: Tensor | None, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, _, heads, d_value = v.shape
    d_key = k.shape[-1]
    if h0 is None:
        h0 = torch.zeros(batch, heads, d_key, d_value, dtype=v.dtype, device=v.device)

    def block(H, q, k, v, log_a, reset):  # type: ignore[no-untyped-def]
        q, k = reference.per_head(q, v), reference.per_head(k, v)
        u = k[..., :, None] * v[..., None, :]
        states, last = linear_scan(log_a.exp()[..., None], u, h0=H, reset=reset)
        if bonus is None:
            return torch.einsum("blhk,blhkv->blhv", q, states), last
        before = torch.cat([H[:, None], states[:, :-1]], 1)
        if reset is not None:
            before = before.masked_fill(reset[:, :, None, None, None], 0)
        return torch.einsum("blhk,blhkv->blhv", q, before) + (q * bonus * k).sum(-1, keepdim=True) * v, last

    return _in_blocks(block, h0, [q, k, v, log_a, reset], batch * heads * d_key * d_value)


def rwkv4_attention(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
    state: tuple[Tensor, Tensor, Tensor] | None, reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The running maximum is a bookkeeping of scale: the result does not depend on it, so no gradient goes through it."""
    low = reference.lowest(v.dtype)
    if state is None:
        zero = torch.zeros_like(v[:, 0])
        state = (zero, zero, torch.full_like(zero, low))
    p, s, m = state
    with torch.no_grad():
        tops, before = [], []
        for t in range(v.shape[1]):
            if reset is not None:
                m = m.masked_fill(reset[:, t, None], low)
            before.append(m)
            m = torch.maximum((m - w).clamp_min(low), k[:, t])
            tops.append(m)
        top, top_before = torch.stack(tops, 1), torch.stack(before, 1)
    a = torch.exp((top_before - w).clamp_min(low) - top)
    new = torch.exp(k - top)
    written = torch.stack([new * v, new], -1)
    h0 = torch.stack([p, s], -1)
    h, last = linear_scan(a[..., None], written, h0=h0, reset=reset)
    h_before = torch.cat([h0[:, None], h[:, :-1]], 1)
    if reset is not None:
        h_before = h_before.masked_fill(reset[:, :, None, None], 0)
    here = u + k
    both = torch.maximum(top_before, here.detach())
    old, new = torch.exp(top_before - both), torch.exp(here - both)
    y = reference.weighted_mean(old * h_before[..., 0] + new * v, old * h_before[..., 1] + new)
    return torch.sigmoid(r) * y, (last[..., 0], last[..., 1], m)


def lti_convolution(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, *, D: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The impulse response K_j = Re(C ā^j b̄), then one FFT convolution; O(length · (d_state + log length)) a inner channel."""
    length = x.shape[1]
    a, b = reference.zero_order_hold(A, B, dt)
    powers = _powers(a, length)  # (length, d_inner, d_state): ā^j
    kernel = (powers * (C * b)).sum(-1)
    kernel = kernel.real if kernel.is_complex() else kernel
    size = 2 * length
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=0)
    y = torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]
    last = torch.einsum("lds,bld->bds", powers.flip(0), x.to(powers.dtype)) * b
    if h0 is not None:
        grown = torch.einsum("lds,bds->bld", powers * (a * C), h0.to(powers.dtype))
        y = y + (grown.real if grown.is_complex() else grown)
        last = last + powers[-1] * a * h0
    if D is not None:
        y = y + D * x
    return y, last


def _powers(a: Tensor, length: int) -> Tensor:
    """a^0 .. a^(length-1) along a new first dimension, by doubling: exact for 0 and 1, log(length) products deep."""
    powers = torch.ones_like(a)[None]
    step = a
    while powers.shape[0] < length:
        powers = torch.cat([powers, powers * step])
        step = step * step
    return powers[:length]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_j weight_j x_{t-width+1+j} + bias, then SiLU where asked."""
    width, length = weight.shape[1], x.shape[1]
    if initial is None:
        initial = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([initial, x], 1)
    alive = None
    if reset is not None:
        started = torch.cat([torch.zeros_like(reset[:, :1]).expand(-1, width - 1), reset], 1).cumsum(1)
    y = torch.zeros_like(x) if bias is None else bias.to(x.dtype).expand_as(x)
    for j in range(width):
        tap = padded[:, j : j + length]
        if reset is not None:
            alive = started[:, j : j + length] == started[:, width - 1 :]
            tap = tap * alive[..., None]
        y = y + tap * weight[:, j]
    last = padded[:, length:]
    if reset is not None:
        last = last * (started[:, length:] == started[:, -1:])[..., None]
    return torch.nn.functional.silu(y) if activation == "silu" else y, last
