"""The recurrence itself: h_t = a_t h_{t-1} + u_t, entry by entry, on any device, and what expands into it.

`linear_scan` runs in place over tokens where a token is wide, and in two levels (inside chunks of √length, then over chunks)
where it is narrow. There is no division and no cumulative log: a = 0 and a = 1 are exact and long decays cannot overflow.
`selective_scan` expands a_t and u_t for one block of tokens at a time and computes them again in the backward pass; inputs in
half precision are widened there too, a block at a time.

a, u: (batch, length, ...), real or complex; other shapes as in `ssmlens.ops`
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmlens.ops import _check, reference
from ssmlens.ops._vmap import fold, one_call, unfold

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
    @one_call
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
        folded = (fold(x, d, info.batch_size) for x, d in zip(args, in_dims, strict=True))
        return unfold(LinearScan.apply(*folded), info.batch_size), 0


def widened(x: Tensor, real: torch.dtype) -> Tensor:
    """x in this real dtype, or in its complex counterpart."""
    return x.to(real.to_complex() if x.is_complex() else real)


def linear_scan(a: Tensor, u: Tensor, *, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.linear_scan`. h has u's dtype (complex where a is), the final state that of the recurrence."""
    batch, length, *state = u.shape
    given, real = u.dtype, _check.state_dtype(u.real if u.is_complex() else u)
    dtype = real.to_complex() if a.is_complex() or u.is_complex() else real
    a = a.expand_as(u)
    if reset is not None:  # emptying the state before a token is a = 0 at that token
        a = a.masked_fill(reset.reshape(batch, length, *(1 for _ in state)), 0)
    h0 = torch.zeros_like(u[:, 0]) if h0 is None else h0
    h = LinearScan.apply(*(x.to(dtype) for x in (a.flatten(2), u.flatten(2), h0.flatten(1))))
    h = h.view(batch, length, *state)
    return h if h.is_complex() and not given.is_complex else h.to(given), h[:, -1]


def in_blocks(
    block: Callable[..., tuple[Tensor, Tensor]], h: Tensor, over_time: list[Tensor | None], width: int
) -> tuple[Tensor, Tensor]:
    """Run block(h, *slices) → (y, h) over blocks of tokens, carrying h; each block is recomputed in the backward pass (but under
    torch.func, which has no way to, kept)."""
    length = next(x.shape[1] for x in over_time if x is not None)
    size = max(16, BLOCK // max(1, width))
    if size >= length:
        return block(h, *over_time)
    keep = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    ys = []
    for start in range(0, length, size):
        parts = [None if x is None else x[:, start : start + size] for x in over_time]
        if torch.is_grad_enabled() and not keep:
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
    """`ssmlens.ops.selective_scan`. y has x's dtype; state, A and dt are float32, or float64 where x is."""
    batch, _, d_inner = x.shape
    given, real = x.dtype, _check.state_dtype(x)
    is_complex = A.is_complex() or B.is_complex()
    dtype = real.to_complex() if is_complex else real
    A, D, dt_bias = widened(A, real), _check.promoted(D, real), _check.promoted(dt_bias, real)
    constant_B, constant_C = B.dim() == 2, C.dim() == 2
    B, C = (widened(p, real) if p.dim() == 2 else p for p in (B, C))
    h0 = torch.zeros(batch, d_inner, A.shape[1], dtype=dtype, device=x.device) if h0 is None else h0.to(dtype)

    def block(h, x, dt, z, reset, B_t, C_t):  # type: ignore[no-untyped-def]
        x, dt, z, B_t, C_t = (_check.promoted(p, real) for p in (x, dt, z, B_t, C_t))
        dt = reference.step_size(dt, dt_bias, dt_softplus)
        B_now = B if constant_B else B_t[:, :, None]
        C_now = C if constant_C else C_t[:, :, None]
        u = (dt * x)[..., None] * B_now
        h, last = linear_scan(reference.transition(dt[..., None], A), u.to(dtype), h0=h, reset=reset)
        return reference.read_out(h, C_now, x, D, z).to(given), last

    over_time = [x, dt, z, reset, None if constant_B else B, None if constant_C else C]
    return in_blocks(block, h0, over_time, batch * d_inner * A.shape[1])


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.causal_conv1d`: y_t = Σ_j weight_j x_{t-width+1+j} + bias, then SiLU where asked; y has x's dtype."""
    width, length = weight.shape[1], x.shape[1]
    given, dtype = x.dtype, _check.state_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    bias, initial = _check.promoted(bias, dtype), _check.promoted(initial, dtype)
    if initial is None:
        initial = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([initial, x], 1)
    alive = None
    if reset is not None:
        started = torch.cat([torch.zeros_like(reset[:, :1]).expand(-1, width - 1), reset], 1).cumsum(1)
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for j in range(width):
        tap = padded[:, j : j + length]
        if reset is not None:
            alive = started[:, j : j + length] == started[:, width - 1 :]
            tap = tap * alive[..., None]
        y = y + tap * weight[:, j]
    last = padded[:, length:]
    if reset is not None:
        last = last * (started[:, length:] == started[:, -1:])[..., None]
    return (torch.nn.functional.silu(y) if activation == "silu" else y).to(given), last
