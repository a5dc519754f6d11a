# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="import-not-found,import-untyped,misc,assignment,var-annotated"
# ruff: noqa: SIM102  (kernels are not Python: no starred tuples)
"""y_t = act(Σ_j weight_j x_{t-width+1+j} + bias): the short causal convolution, forward and backward.

x: (batch, length, d_inner)   weight: (d_inner, width), within the kernels (width, d_inner)   initial: (batch, width - 1, d_inner)
A program takes TIME tokens of BLOCK inner channels of one sequence. The token `age` steps back counts unless a reset lies
after it, up to and including t.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlens.ops.triton import _common
from ssmlens.ops.triton._common import sigmoid

TIME = 32
BLOCK = 64

_SIZES = ["length", "d_inner", "blocks", "pieces", "inputs"]


@triton.jit
def _window(x, initial, t, x_t, initial_t, d, inside, live, before, ACC: tl.constexpr):
    """Tokens t, which may lie up to `before` tokens ahead of x, in `initial`; (t, d)."""
    mask = (live & (t >= 0))[:, None] & inside[None, :]
    xt = tl.load(x + t[:, None] * x_t + d[None, :], mask=mask, other=0.0).to(ACC)
    if initial is not None:
        mask = (live & (t < 0))[:, None] & inside[None, :]
        xt += tl.load(initial + (t + before)[:, None] * initial_t + d[None, :], mask=mask, other=0.0).to(ACC)
    return xt


@triton.jit
def _starts(reset, t, length):
    """Whether nothing before token t is to be seen from t on."""
    return tl.load(reset + t, mask=(t >= 0) & (t < length), other=0) != 0


@triton.jit
def _before_activation(
    x, weight, bias, initial, reset, t, x_t, initial_t, d, inside, length, d_inner,
    WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    y = tl.zeros([t.shape[0], d.shape[0]], ACC)
    if bias is not None:
        y += tl.load(bias + d, mask=inside, other=0.0).to(ACC)[None, :]
    live = t < length
    for age in tl.static_range(WIDTH):
        if age > 0:
            if reset is not None:
                live = live & (_starts(reset, t - (age - 1), length) == 0)
        w = tl.load(weight + tl.cast(d_inner, tl.int64) * (WIDTH - 1 - age) + d, mask=inside, other=0.0).to(ACC)
        y += w[None, :] * _window(x, initial, t - age, x_t, initial_t, d, inside, live, WIDTH - 1, ACC)
    return y


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    x, weight, bias, initial, reset, y, x_b, x_t, initial_b, initial_t, length, d_inner, blocks, pieces,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    block, piece, b = pid % blocks, pid // blocks % pieces, pid // blocks // pieces
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_inner
    t = piece * TIME + tl.arange(0, TIME)
    if initial is not None:
        initial += b * initial_b
    if reset is not None:
        reset += b * length
    yt = _before_activation(
        x + b * x_b, weight, bias, initial, reset, t, x_t, initial_t, d, inside, length, d_inner, WIDTH, ACC
    )
    if SILU:
        yt = yt * sigmoid(yt)
    mask = (t < length)[:, None] & inside[None, :]
    tl.store(y + (b * length + t)[:, None] * d_inner + d[None, :], yt.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _backward_weights(
    dy, x, weight, bias, initial, reset, dsum, dweight, dbias, dy_b, dy_t, x_b, x_t, initial_b, initial_t,
    length, d_inner, blocks, pieces, inputs,
    SILU: tl.constexpr, WIDTH: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dsum: (batch, length, d_inner), the gradient to what the activation takes. dweight: (batch, pieces, width, d_inner)."""
    pid = tl.program_id(0).to(tl.int64)
    block, piece, b = pid % blocks, pid // blocks % pieces, pid // blocks // pieces
    own = b % inputs
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_inner
    t = piece * TIME + tl.arange(0, TIME)
    live = t < length
    mask = live[:, None] & inside[None, :]
    x += own * x_b
    if initial is not None:
        initial += own * initial_b
    if reset is not None:
        reset += own * length
    g = tl.load(dy + b * dy_b + t[:, None] * dy_t + d[None, :], mask=mask, other=0.0).to(ACC)
    if SILU:
        y = _before_activation(
            x, weight, bias, initial, reset, t, x_t, initial_t, d, inside, length, d_inner, WIDTH, ACC
        )
        s = sigmoid(y)
        g = g * (s * (1 + y * (1 - s)))
    tl.store(dsum + (b * length + t)[:, None] * d_inner + d[None, :], g, mask=mask)
    at = b * pieces + piece
    if bias is not None:
        tl.store(dbias + at * d_inner + d, tl.sum(g, 0), mask=inside)
    for age in tl.static_range(WIDTH):
        if age > 0:
            if reset is not None:
                live = live & (_starts(reset, t - (age - 1), length) == 0)
        seen = _window(x, initial, t - age, x_t, initial_t, d, inside, live, WIDTH - 1, ACC)
        tl.store(dweight + (at * WIDTH + WIDTH - 1 - age) * d_inner + d, tl.sum(g * seen, 0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward_inputs(
    dsum, weight, reset, dx, dinitial, length, d_inner, blocks, pieces, inputs,
    WIDTH: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_t = Σ_age weight_{width-1-age} dsum_{t+age}, and for the tokens before the first, dinitial."""
    pid = tl.program_id(0).to(tl.int64)
    block, piece, b = pid % blocks, pid // blocks % pieces, pid // blocks // pieces
    own = b % inputs
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_inner
    t = piece * TIME + tl.arange(0, TIME) - (WIDTH - 1)
    if reset is not None:
        reset += own * length
    g = tl.zeros([TIME, BLOCK], ACC)
    live = t < length
    for age in tl.static_range(WIDTH):
        if age > 0:
            if reset is not None:
                live = live & (_starts(reset, t + age, length) == 0)
        mask = (live & (t + age >= 0) & (t + age < length))[:, None] & inside[None, :]
        later = tl.load(dsum + (b * length + t + age)[:, None] * d_inner + d[None, :], mask=mask, other=0.0)
        w = tl.load(weight + tl.cast(d_inner, tl.int64) * (WIDTH - 1 - age) + d, mask=inside, other=0.0).to(ACC)
        g += w[None, :] * later
    mask = ((t >= 0) & (t < length))[:, None] & inside[None, :]
    tl.store(dx + (b * length + t)[:, None] * d_inner + d[None, :], g.to(dx.dtype.element_ty), mask=mask)
    if dinitial is not None:
        mask = ((t < 0) & (t >= 1 - WIDTH))[:, None] & inside[None, :]
        at = (b * (WIDTH - 1) + t + (WIDTH - 1))[:, None] * d_inner + d[None, :]
        tl.store(dinitial + at, g.to(dinitial.dtype.element_ty), mask=mask)


def _cut(batch: int, length: int, d_inner: int, width: int, state: torch.dtype) -> tuple[int, int, int, dict[str, Any]]:
    block = min(BLOCK, max(16, _common.power_of_two(d_inner)))
    blocks, pieces = -(-d_inner // block), -(-length // TIME)
    constants = {"WIDTH": width, "TIME": TIME, "BLOCK": block, "ACC": _common.accumulator(state), "num_warps": 4}
    return batch * blocks * pieces, blocks, pieces, constants


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial: Tensor | None, reset: Tensor | None, y: Tensor
) -> None:
    """Fills y."""
    batch, length, d_inner = x.shape
    programs, blocks, pieces, constants = _cut(batch, length, d_inner, weight.shape[1], weight.dtype)
    _common.launch(
        _forward, programs, x, x, weight.T.contiguous(), bias, initial, _common.flags(reset), y, *_strides(x),
        *_strides(initial), length, d_inner, blocks, pieces, SILU=silu, **constants,
    )  # fmt: skip


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial: Tensor | None, reset: Tensor | None,
    samples: int, dx: Tensor, dinitial: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Fills dx and dinitial; returns dweight (samples, d_inner, width) and dbias (samples, d_inner)."""
    (batch, length, d_inner), width, inputs = dy.shape, weight.shape[1], x.shape[0]
    programs, blocks, pieces, constants = _cut(batch, length, d_inner, width, weight.dtype)
    w, flags = weight.T.contiguous(), _common.flags(reset)
    dsum = weight.new_empty(batch, length, d_inner)
    dweight = weight.new_empty(batch, pieces, width, d_inner)
    dbias = None if bias is None else weight.new_empty(batch, pieces, d_inner)
    _common.launch(
        _backward_weights, programs, dy, dy, x, w, bias, initial, flags, dsum, dweight, dbias, *_strides(dy), *_strides(x),
        *_strides(initial), length, d_inner, blocks, pieces, inputs, SILU=silu, **constants,
    )  # fmt: skip
    programs, blocks, pieces, constants = _cut(batch, length + width - 1, d_inner, width, weight.dtype)
    _common.launch(
        _backward_inputs,
        programs,
        dy,
        dsum,
        w,
        flags,
        dx,
        dinitial,
        length,
        d_inner,
        blocks,
        pieces,
        inputs,
        **constants,
    )
    return (
        dweight.unflatten(0, (samples, -1)).sum((1, 2)).transpose(1, 2),
        None if dbias is None else dbias.unflatten(0, (samples, -1)).sum((1, 2)),
    )
