# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="import-not-found,import-untyped,misc,assignment,var-annotated"
# ruff: noqa: RUF005  (kernels are not Python: no starred tuples)
"""h_t = a_t h_{t-1} + u_t entry by entry, forward and backward, and the scan over chunks that the other kernels use.

a, u: (batch, length, width), last dimension contiguous, any other stride; an entry of `a` may serve `repeat` neighbours of u.
reset: (batch, length) as bytes. One lane an entry; a program takes BLOCK entries and one chunk of time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlens.ops.triton import _common

BLOCK = 128
UNROLL = 8


@triton.jit
def _local(
    a, u, reset, product, end, a_b, a_t, u_b, u_t, repeat, length, width, blocks, chunks, chunk, inputs,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """product, end: (batch, chunks, width), so that a chunk takes the state h to product h + end. GRADIENT: u stands for
    the gradient to h, and the state is the one that leaves a token: a (u + state). a and reset hold `inputs` sequences."""
    pid = tl.program_id(0).to(tl.int64)
    block, c, b = pid % blocks, pid // blocks % chunks, pid // blocks // chunks
    own = b % inputs
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    first = c * chunk
    steps = tl.minimum(length - first, chunk)
    p = tl.full([BLOCK], 1.0, ACC)
    h = tl.zeros([BLOCK], ACC)
    for g in range(0, steps, U):
        for j in tl.static_range(U):
            t = first + (steps - 1 - (g + j) if REVERSE else g + j)
            live = (t >= first) & (t < first + steps)
            at = tl.load(a + own * a_b + t * a_t + i // repeat, mask=inside & live, other=1.0).to(ACC)
            ut = tl.load(u + b * u_b + t * u_t + i, mask=inside & live, other=0.0).to(ACC)
            if reset is not None:
                at = tl.where(tl.load(reset + own * length + t, mask=live, other=0) != 0, 0.0, at)
            h = at * (ut + h) if GRADIENT else at * h + ut
            p = at * p
    at_chunk = (b * chunks + c) * width + i
    tl.store(product + at_chunk, p, mask=inside)
    tl.store(end + at_chunk, h, mask=inside)


@triton.jit
def _states(
    a, u, h0, reset, ends, out, a_b, a_t, u_b, u_t, repeat, length, width, blocks, chunks, chunk,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out: (batch, length, width). ends: (batch, chunks, width), the state after each chunk; REVERSE: time runs backwards."""
    pid = tl.program_id(0).to(tl.int64)
    block, c, b = pid % blocks, pid // blocks % chunks, pid // blocks // chunks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    first = c * chunk
    steps = tl.minimum(length - first, chunk)
    h = tl.zeros([BLOCK], ACC)
    earlier = c + 1 if REVERSE else c - 1
    has_earlier = (earlier >= 0) & (earlier < chunks)
    if h0 is not None:
        h += tl.load(h0 + b * width + i, mask=inside & (has_earlier == 0), other=0.0).to(ACC)
    if ends is not None:
        h += tl.load(ends + (b * chunks + earlier) * width + i, mask=inside & has_earlier, other=0.0)
    for g in range(0, steps, U):
        transitions, inputs = (), ()
        for j in tl.static_range(U):  # all loads of a group before its first store, so that they overlap
            t = first + (steps - 1 - (g + j) if REVERSE else g + j)
            live = (t >= first) & (t < first + steps)
            at = tl.load(a + b * a_b + t * a_t + i // repeat, mask=inside & live, other=1.0).to(ACC)
            if reset is not None:
                at = tl.where(tl.load(reset + b * length + t, mask=live, other=0) != 0, 0.0, at)
            transitions = transitions + (at,)
            inputs = inputs + (tl.load(u + b * u_b + t * u_t + i, mask=inside & live, other=0.0).to(ACC),)
        for j in tl.static_range(U):
            t = first + (steps - 1 - (g + j) if REVERSE else g + j)
            h = transitions[j] * h + inputs[j]
            tl.store(out + (b * length + t) * width + i, h, mask=inside & (t >= first) & (t < first + steps))


@triton.jit
def _gradients(
    dh, a, h, h0, reset, later, da, du, dh0, dh_b, dh_t, a_b, a_t, length, width, blocks, chunks, chunk, inputs,
    BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g_t = dh_t + a_{t+1} g_{t+1} from the end of a chunk; da_t = g_t h_{t-1}, du_t = g_t. later: (batch, chunks, width), the
    gradient to the state before each chunk. a, h, h0, reset hold `inputs` sequences, which the gradients go through in turn."""
    pid = tl.program_id(0).to(tl.int64)
    block, c, b = pid % blocks, pid // blocks % chunks, pid // blocks // chunks
    own = b % inputs
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    first = c * chunk
    steps = tl.minimum(length - first, chunk)
    e = tl.zeros([BLOCK], ACC)
    if later is not None:
        e += tl.load(later + (b * chunks + c + 1) * width + i, mask=inside & (c + 1 < chunks), other=0.0)
    for g in range(0, steps, U):
        transitions, gradients, states, starts = (), (), (), ()
        for j in tl.static_range(U):
            t = first + steps - 1 - (g + j)
            live = t >= first
            transitions = transitions + (tl.load(a + own * a_b + t * a_t + i, mask=inside & live, other=1.0).to(ACC),)
            gradients = gradients + (tl.load(dh + b * dh_b + t * dh_t + i, mask=inside & live, other=0.0).to(ACC),)
            states = states + (
                tl.load(h + (own * length + t - 1) * width + i, mask=inside & live & (t > 0), other=0.0).to(ACC),
            )
            if reset is not None:
                starts = starts + (tl.load(reset + own * length + t, mask=live, other=0) != 0,)
        for j in tl.static_range(U):
            t = first + steps - 1 - (g + j)
            live = inside & (t >= first)
            before = states[j]
            if h0 is not None:
                before += tl.load(h0 + own * width + i, mask=live & (t == 0), other=0.0).to(ACC)
            at = transitions[j]
            gt = gradients[j] + e
            dat = gt * before
            if reset is not None:
                at = tl.where(starts[j], 0.0, at)
                dat = tl.where(starts[j], 0.0, dat)
            e = at * gt
            tl.store(du + (b * length + t) * width + i, gt.to(du.dtype.element_ty), mask=live)
            tl.store(da + (b * length + t) * width + i, dat.to(da.dtype.element_ty), mask=live)
    if dh0 is not None:
        tl.store(dh0 + b * width + i, e, mask=inside & (c == 0))


def _cut(batch: int, length: int, width: int) -> tuple[int, int, int, dict[str, Any]]:
    """Blocks of entries, chunks of time, the length of these, and what the kernels are compiled for."""
    block = min(BLOCK, max(16, _common.power_of_two(width)))
    warps = max(1, block // 32)
    blocks = -(-width // block)
    chunk = _common.chunk_length(length, batch * blocks * warps)
    return blocks, -(-length // chunk), chunk, {"BLOCK": block, "U": UNROLL, "num_warps": warps}


def scan(
    a: Tensor, u: Tensor, h0: Tensor | None, reset: Tensor | None = None, *, reverse: bool = False, repeat: int = 1,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All states (batch, length, width), float32 or float64, in `out` if given. a: (batch, length, width / repeat),
    h0: (batch, width); a, u with their last dimension contiguous."""
    batch, length, width = u.shape
    state = torch.float64 if u.dtype == torch.float64 else torch.float32
    blocks, chunks, chunk, constants = _cut(batch, length, width)
    constants |= {"REVERSE": reverse, "ACC": _common.accumulator(state)}
    strides = (a.stride(0), a.stride(1), u.stride(0), u.stride(1), repeat, length, width, blocks, chunks, chunk)
    flags = _common.flags(reset)
    ends = None
    if chunks > 1:
        product, end = (u.new_empty(batch, chunks, width, dtype=state) for _ in range(2))
        _common.launch(_local, batch * blocks * chunks, u, a, u, flags, product, end, *strides, batch,
                       GRADIENT=False, **constants)  # fmt: skip
        ends = scan(product, end, h0, reverse=reverse)
    out = u.new_empty(batch, length, width, dtype=state) if out is None else out
    _common.launch(_states, batch * blocks * chunks, u, a, u, h0, flags, ends, out, *strides, **constants)
    return out


def gradients(
    dh: Tensor,
    a: Tensor,
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    da: Tensor,
    du: Tensor,
    dh0: Tensor | None,
) -> None:
    """Fills da, du, dh0 from dh, all states h and a. dh may hold several times as many sequences as the rest."""
    batch, length, width = dh.shape
    inputs = a.shape[0]
    flags = _common.flags(reset)
    blocks, chunks, chunk, constants = _cut(batch, length, width)
    constants["ACC"] = _common.accumulator(h.dtype)
    later = None
    if chunks > 1:
        product, end = (torch.empty(batch, chunks, width, dtype=h.dtype, device=h.device) for _ in range(2))
        strides = (
            a.stride(0),
            a.stride(1),
            dh.stride(0),
            dh.stride(1),
            1,
            length,
            width,
            blocks,
            chunks,
            chunk,
            inputs,
        )
        _common.launch(_local, batch * blocks * chunks, dh, a, dh, flags, product, end, *strides,
                       REVERSE=True, GRADIENT=True, **constants)  # fmt: skip
        later = scan(product, end, None, reverse=True)
    strides = (dh.stride(0), dh.stride(1), a.stride(0), a.stride(1), length, width, blocks, chunks, chunk, inputs)
    _common.launch(
        _gradients, batch * blocks * chunks, dh, dh, a, h, h0, flags, later, da, du, dh0, *strides, **constants
    )
