# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="import-not-found,import-untyped,misc,assignment,var-annotated"
# ruff: noqa: RUF005, SIM102  (kernels are not Python: no starred tuples)
"""h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = (C_t h_t + D x_t) · silu(z_t), forward and backward, A real.

x, dt, z: (batch, length, d_inner)   A: (d_inner, d_state)   B, C: (batch, length, d_state) or (d_inner, d_state)
A program scans BLOCK inner channels of one sequence over one chunk of time, one token after another, their states in
registers as a tile (d_state, BLOCK). d_state is covered by one or two tiles whose heights are powers of two (18 = 16 + 2), so
that pinned channels that were added to 16 do not double the work. Within the kernels matrices lie as (d_state, d_inner):
neighbouring lanes are neighbouring inner channels, in memory too, and a sum over d_state stays almost within a thread.

exp(dt A) = exp2(dt A log2(e) + pin), with A replaced by 0 and pin = -inf where A is -inf: exactly 0 at every dt, and free.

The backward pass goes through a chunk from its end in segments, whose first states the forward pass saved. A segment's states
are recomputed: first one every U tokens, kept in a scratch buffer, then those between. The gradients to B_t and C_t are sums
over inner channels: within a block at once, over blocks by a program that takes several blocks, one after another, and adds
to its own partial result, then over these; always in the same order.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ssmlens.ops.triton import _common, _linear
from ssmlens.ops.triton._common import LN2, LOG2E, sigmoid, step_size, step_size_slope

SEGMENT = 32  # tokens between saved states; twice as many for a large state, whose copies would outweigh the inputs
UNROLL = 4
UNROLL_BACKWARD = 2
WARPS_AT_ONCE = 2048  # of the backward pass; each has its scratch


# ------------------------------------------------------------------------------- tiles (d_state, BLOCK), one or two of them


@triton.jit
def _heights(N1: tl.constexpr, N2: tl.constexpr):
    ns = (tl.arange(0, N1).to(tl.int64),)
    if N2 > 0:
        ns = ns + (N1 + tl.arange(0, N2).to(tl.int64),)
    return ns


@triton.jit
def _zeros(N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    tiles = (tl.zeros([N1, BLOCK], ACC),)
    if N2 > 0:
        tiles = tiles + (tl.zeros([N2, BLOCK], ACC),)
    return tiles


@triton.jit
def _load(p, ns, d, inside, d_state, d_inner, ACC: tl.constexpr, TILES: tl.constexpr):
    """From a matrix (d_state, d_inner) at p."""
    tiles = ()
    for k in tl.static_range(TILES):
        mask = (ns[k] < d_state)[:, None] & inside[None, :]
        tiles = tiles + (tl.load(p + ns[k][:, None] * d_inner + d[None, :], mask=mask, other=0.0).to(ACC),)
    return tiles


@triton.jit
def _store(p, tiles, ns, d, inside, d_state, d_inner, TILES: tl.constexpr):
    for k in tl.static_range(TILES):
        mask = (ns[k] < d_state)[:, None] & inside[None, :]
        tl.store(p + ns[k][:, None] * d_inner + d[None, :], tiles[k], mask=mask)


@triton.jit
def _row(p, ns, d_state, live, ACC: tl.constexpr, TILES: tl.constexpr):
    """One token's B or C, as columns (d_state, 1)."""
    tiles = ()
    for k in tl.static_range(TILES):
        tiles = tiles + (tl.load(p + ns[k], mask=(ns[k] < d_state) & live, other=0.0).to(ACC)[:, None],)
    return tiles


@triton.jit
def _exponents(A, TILES: tl.constexpr):
    """A in units of log2, 0 where it is -inf, and what to add to dt A: -inf there."""
    scaled, pins = (), ()
    for k in tl.static_range(TILES):
        dead = A[k] == float("-inf")
        scaled = scaled + (tl.where(dead, 0.0, A[k] * LOG2E),)
        pins = pins + (tl.where(dead, float("-inf"), 0.0).to(A[k].dtype),)
    return scaled, pins


@triton.jit
def _program(blocks, chunks):
    """Which block, chunk and sequence."""
    pid = tl.program_id(0).to(tl.int64)
    return pid % blocks, pid // blocks % chunks, pid // blocks // chunks


# ------------------------------------------------------------------------------------------------------------ forward

# Not specialised on sizes: nothing is compiled anew for another length, and as the compiler cannot count on aligned rows, it
# keeps one lane an inner channel, so that the sums over d_state and all that is one number a channel stay within a thread.
_SIZES = [
    "length",
    "d_inner",
    "d_state",
    "blocks",
    "chunks",
    "chunk",
    "segments",
    "inputs",
    "groups",
    "blocks_each",
    "items",
]


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    x, dt, A, B, C, D, z, bias, h0, reset, ends, y, final, saved, product, end,
    x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, C_b, C_t, length, d_inner, d_state, blocks, chunks, chunk, segments,
    LOCAL: tl.constexpr, SOFTPLUS: tl.constexpr, B_VARIES: tl.constexpr, C_VARIES: tl.constexpr, SEGMENT: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """LOCAL: product, end (batch, chunks, d_state, d_inner), so that a chunk takes the state h to product h + end.
    Otherwise: y, final and saved, with ends (batch, chunks, d_state, d_inner) the states after each chunk."""
    TILES: tl.constexpr = 1 + (N2 > 0)
    block, c, b = _program(blocks, chunks)
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_inner
    ns = _heights(N1, N2)
    matrix = tl.cast(d_state, tl.int64) * d_inner
    A2, pins = _exponents(_load(A, ns, d, inside, d_state, d_inner, ACC, TILES), TILES)
    shift = tl.zeros([BLOCK], ACC)
    if bias is not None:
        shift += tl.load(bias + d, mask=inside, other=0.0).to(ACC)
    skip = tl.zeros([BLOCK], ACC)
    if D is not None:
        skip += tl.load(D + d, mask=inside, other=0.0).to(ACC)
    if not B_VARIES:
        Bt = _load(B, ns, d, inside, d_state, d_inner, ACC, TILES)
    if not C_VARIES:
        Ct = _load(C, ns, d, inside, d_state, d_inner, ACC, TILES)

    h = _zeros(N1, N2, BLOCK, ACC)
    if not LOCAL:
        if h0 is not None:
            h = _load(h0 + b * matrix, ns, d, inside & (c == 0), d_state, d_inner, ACC, TILES)
        if ends is not None:
            h_c = _load(ends + (b * chunks + c - 1) * matrix, ns, d, inside & (c > 0), d_state, d_inner, ACC, TILES)
            summed = ()
            for k in tl.static_range(TILES):
                summed = summed + (h[k] + h_c[k],)
            h = summed
    total = tl.zeros([BLOCK], ACC)
    emptied = c < 0
    first = c * chunk
    steps = tl.minimum(length - first, chunk)
    for g in range(0, steps, U):
        if saved is not None:
            if g % SEGMENT == 0:
                _store(
                    saved + (b * segments + (first + g) // SEGMENT) * matrix, h, ns, d, inside, d_state, d_inner, TILES
                )
        xs, dts, gates, Bs, Cs, starts = (), (), (), (), (), ()
        for j in tl.static_range(U):  # all loads of a group before its first store, so that they overlap
            t = first + g + j
            live = t < length
            xs = xs + (tl.load(x + b * x_b + t * x_t + d, mask=inside & live, other=0.0).to(ACC),)
            dts = dts + (tl.load(dt + b * dt_b + t * dt_t + d, mask=inside & live, other=0.0).to(ACC),)
            if B_VARIES:
                Bs = Bs + (_row(B + b * B_b + t * B_t, ns, d_state, live, ACC, TILES),)
            if not LOCAL:
                if z is not None:
                    gates = gates + (tl.load(z + b * z_b + t * z_t + d, mask=inside & live, other=0.0).to(ACC),)
                if C_VARIES:
                    Cs = Cs + (_row(C + b * C_b + t * C_t, ns, d_state, live, ACC, TILES),)
            if reset is not None:
                starts = starts + (tl.load(reset + b * length + t, mask=live, other=0) != 0,)
        ys = ()
        for j in tl.static_range(U):
            live = first + g + j < length
            delta = tl.where(live, step_size(dts[j], shift, SOFTPLUS), 0.0)
            total += delta
            u = delta * xs[j]
            out = skip * xs[j]
            following = ()
            for k in tl.static_range(TILES):
                a = tl.exp2(delta[None, :] * A2[k] + pins[k])
                before = h[k]
                if reset is not None:
                    before = tl.where(starts[j], 0.0, before)
                if B_VARIES:
                    after = a * before + Bs[j][k] * u[None, :]
                else:
                    after = a * before + Bt[k] * u[None, :]
                after = tl.where(live, after, before)  # a pinned channel's a is 0 after the end too
                following = following + (after,)
                if not LOCAL:
                    if C_VARIES:
                        out += tl.sum(after * Cs[j][k], 0)
                    else:
                        out += tl.sum(after * Ct[k], 0)
            h = following
            if reset is not None:
                emptied = emptied | starts[j]
            if not LOCAL:
                if z is not None:
                    out = out * (gates[j] * sigmoid(gates[j]))
                ys = ys + (out,)
        if not LOCAL:
            for j in tl.static_range(U):
                t = first + g + j
                tl.store(y + (b * length + t) * d_inner + d, ys[j].to(y.dtype.element_ty), mask=inside & (t < length))

    if LOCAL:
        products = ()
        for k in tl.static_range(TILES):
            p = tl.exp2(total[None, :] * A2[k] + pins[k])
            products = products + (tl.where(emptied, 0.0, p),)
        _store(product + (b * chunks + c) * matrix, products, ns, d, inside, d_state, d_inner, TILES)
        _store(end + (b * chunks + c) * matrix, h, ns, d, inside, d_state, d_inner, TILES)
    else:
        _store(final + b * matrix, h, ns, d, inside & (c == chunks - 1), d_state, d_inner, TILES)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=_SIZES)
def _backward_local(
    dy, dt, A, C, z, bias, reset, product, end,
    dy_b, dy_t, dt_b, dt_t, z_b, z_t, C_b, C_t, length, d_inner, d_state, blocks, chunks, chunk, inputs,
    SOFTPLUS: tl.constexpr, C_VARIES: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """product, end: with e the gradient to the state after a chunk, that to the state before it is product e + end."""
    TILES: tl.constexpr = 1 + (N2 > 0)
    block, c, b = _program(blocks, chunks)
    own = b % inputs
    d = block * BLOCK + tl.arange(0, BLOCK)
    inside = d < d_inner
    ns = _heights(N1, N2)
    matrix = tl.cast(d_state, tl.int64) * d_inner
    A2, pins = _exponents(_load(A, ns, d, inside, d_state, d_inner, ACC, TILES), TILES)
    shift = tl.zeros([BLOCK], ACC)
    if bias is not None:
        shift += tl.load(bias + d, mask=inside, other=0.0).to(ACC)
    if not C_VARIES:
        Ct = _load(C, ns, d, inside, d_state, d_inner, ACC, TILES)
    e = _zeros(N1, N2, BLOCK, ACC)
    total = tl.zeros([BLOCK], ACC)
    emptied = c < 0
    first = c * chunk
    steps = tl.minimum(length - first, chunk)
    for g in range(0, steps, U):
        for j in tl.static_range(U):
            t = first + steps - 1 - (g + j)
            live = t >= first
            dyt = tl.load(dy + b * dy_b + t * dy_t + d, mask=inside & live, other=0.0).to(ACC)
            delta = step_size(
                tl.load(dt + own * dt_b + t * dt_t + d, mask=inside & live, other=0.0).to(ACC), shift, SOFTPLUS
            )
            delta = tl.where(live, delta, 0.0)
            if z is not None:
                gate = tl.load(z + own * z_b + t * z_t + d, mask=inside & live, other=0.0).to(ACC)
                dyt = dyt * (gate * sigmoid(gate))
            if C_VARIES:
                Ct = _row(C + own * C_b + t * C_t, ns, d_state, live, ACC, TILES)
            start = c < 0
            if reset is not None:
                start = tl.load(reset + own * length + t, mask=live, other=0) != 0
            emptied = emptied | start
            total += delta
            earlier = ()
            for k in tl.static_range(TILES):
                a = tl.exp2(delta[None, :] * A2[k] + pins[k])
                passed = a * (Ct[k] * dyt[None, :] + e[k])
                passed = tl.where(start, 0.0, passed)
                earlier = earlier + (tl.where(live, passed, e[k]),)
            e = earlier
    products = ()
    for k in tl.static_range(TILES):
        p = tl.exp2(total[None, :] * A2[k] + pins[k])
        products = products + (tl.where(emptied, 0.0, p),)
    _store(product + (b * chunks + c) * matrix, products, ns, d, inside, d_state, d_inner, TILES)
    _store(end + (b * chunks + c) * matrix, e, ns, d, inside, d_state, d_inner, TILES)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    dy, dfinal, later, saved, x, dt, A, B, C, D, z, bias, reset, scratch, dx, ddt, dA, dB, dC, dD, dz, dbias, dh0,
    dy_b, dy_t, x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, C_b, C_t, length, d_inner, d_state, blocks, chunks, chunk,
    segments, inputs, groups, blocks_each, items,
    SOFTPLUS: tl.constexpr, B_VARIES: tl.constexpr, C_VARIES: tl.constexpr, SEGMENT: tl.constexpr,
    N1: tl.constexpr, N2: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """An item is one group of blocks of inner channels, of one chunk and sequence; a program takes one item after another,
    each block by block, so that there is only so much scratch. later: (batch, chunks, d_state, d_inner), the gradient to the state
    before each chunk. dA, and dB, dC where constant: (batch, chunks, d_state, d_inner). dD, dbias: (batch, chunks, d_inner).
    dB, dC: (groups, batch, length, d_state). scratch: (programs, SEGMENT / U, N1 + N2, BLOCK)."""
    TILES: tl.constexpr = 1 + (N2 > 0)
    SLOT: tl.constexpr = (N1 + N2) * BLOCK
    pid = tl.program_id(0).to(tl.int64)
    ns = _heights(N1, N2)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    everywhere = lanes >= 0
    matrix = tl.cast(d_state, tl.int64) * d_inner
    own_scratch = scratch + pid * (SEGMENT // U * SLOT)

    for turn in range((items - pid + tl.num_programs(0) - 1) // tl.num_programs(0) * blocks_each):
        item = pid + (turn // blocks_each) * tl.num_programs(0)
        one = turn % blocks_each
        group, c, b = item % groups, item // groups % chunks, item // groups // chunks
        own = b % inputs
        first = c * chunk
        steps = tl.minimum(length - first, chunk)
        rows = (group * (items // groups // chunks) + b) * length  # of dB and dC
        block = group * blocks_each + one
        d = block * BLOCK + lanes
        inside = d < d_inner
        A2, pins = _exponents(_load(A, ns, d, inside, d_state, d_inner, ACC, TILES), TILES)
        shift = tl.zeros([BLOCK], ACC)
        if bias is not None:
            shift += tl.load(bias + d, mask=inside, other=0.0).to(ACC)
        skip = tl.zeros([BLOCK], ACC)
        if D is not None:
            skip += tl.load(D + d, mask=inside, other=0.0).to(ACC)
        if not B_VARIES:
            B_all = _load(B, ns, d, inside, d_state, d_inner, ACC, TILES)
        if not C_VARIES:
            C_all = _load(C, ns, d, inside, d_state, d_inner, ACC, TILES)
        e = _zeros(N1, N2, BLOCK, ACC)  # gradient to the state after the current token, from later ones
        if dfinal is not None:
            e = _load(dfinal + b * matrix, ns, d, inside & (c == chunks - 1), d_state, d_inner, ACC, TILES)
        if later is not None:
            e_c = _load(
                later + (b * chunks + c + 1) * matrix, ns, d, inside & (c + 1 < chunks), d_state, d_inner, ACC, TILES
            )
            summed = ()
            for k in tl.static_range(TILES):
                summed = summed + (e[k] + e_c[k],)
            e = summed
        sum_A = _zeros(N1, N2, BLOCK, ACC)
        sum_B = _zeros(N1, N2, BLOCK, ACC)
        sum_C = _zeros(N1, N2, BLOCK, ACC)
        sum_D = tl.zeros([BLOCK], ACC)
        sum_bias = tl.zeros([BLOCK], ACC)

        n_segments = (steps + SEGMENT - 1) // SEGMENT
        for s in range(n_segments):
            begin = first + (n_segments - 1 - s) * SEGMENT
            n_slots = (tl.minimum(first + steps - begin, SEGMENT) + U - 1) // U
            h = _load(saved + (own * segments + begin // SEGMENT) * matrix, ns, d, inside, d_state, d_inner, ACC, TILES)
            for slot in range(n_slots):
                _store(own_scratch + slot * SLOT, h, ns, lanes, everywhere, N1 + N2, BLOCK, TILES)
                for j in tl.static_range(U):
                    t = begin + slot * U + j
                    live = t < length
                    xt = tl.load(x + own * x_b + t * x_t + d, mask=inside & live, other=0.0).to(ACC)
                    raw = tl.load(dt + own * dt_b + t * dt_t + d, mask=inside & live, other=0.0).to(ACC)
                    delta = step_size(raw, shift, SOFTPLUS)
                    u = delta * xt
                    if B_VARIES:
                        Bt = _row(B + own * B_b + t * B_t, ns, d_state, live, ACC, TILES)
                    else:
                        Bt = B_all
                    following = ()
                    for k in tl.static_range(TILES):
                        before = h[k]
                        if reset is not None:
                            start = tl.load(reset + own * length + t, mask=live, other=0) != 0
                            before = tl.where(start, 0.0, before)
                        a = tl.exp2(delta[None, :] * A2[k] + pins[k])
                        following = following + (a * before + Bt[k] * u[None, :],)
                    h = following
            tl.debug_barrier()  # what one thread wrote into scratch another may read

            for back in range(n_slots):
                slot = n_slots - 1 - back
                h = _load(own_scratch + slot * SLOT, ns, lanes, everywhere, N1 + N2, BLOCK, ACC, TILES)
                xs, dts, decays, states = (), (), (), (h,)
                for j in tl.static_range(U):
                    t = begin + slot * U + j
                    live = t < length
                    xt = tl.load(x + own * x_b + t * x_t + d, mask=inside & live, other=0.0).to(ACC)
                    raw = tl.load(dt + own * dt_b + t * dt_t + d, mask=inside & live, other=0.0).to(ACC)
                    delta = tl.where(live, step_size(raw, shift, SOFTPLUS), 0.0)
                    u = delta * xt
                    if B_VARIES:
                        Bt = _row(B + own * B_b + t * B_t, ns, d_state, live, ACC, TILES)
                    else:
                        Bt = B_all
                    if reset is not None:
                        start = tl.load(reset + own * length + t, mask=live, other=0) != 0
                    own_decays, following = (), ()
                    for k in tl.static_range(TILES):
                        a = tl.exp2(delta[None, :] * A2[k] + pins[k])
                        if reset is not None:
                            a = tl.where(start, 0.0, a)
                        own_decays = own_decays + (a,)
                        following = following + (a * h[k] + Bt[k] * u[None, :],)
                    h = following
                    xs, dts = xs + (xt,), dts + (raw,)
                    decays, states = decays + (own_decays,), states + (h,)
                for j in tl.static_range(U - 1, -1, -1):
                    t = begin + slot * U + j
                    live = t < length
                    here = inside & live
                    dyt = tl.load(dy + b * dy_b + t * dy_t + d, mask=here, other=0.0).to(ACC)
                    if B_VARIES:
                        Bt = _row(B + own * B_b + t * B_t, ns, d_state, live, ACC, TILES)
                    else:
                        Bt = B_all
                    if C_VARIES:
                        Ct = _row(C + own * C_b + t * C_t, ns, d_state, live, ACC, TILES)
                    else:
                        Ct = C_all
                    if z is not None:
                        gate = tl.load(z + own * z_b + t * z_t + d, mask=here, other=0.0).to(ACC)
                        s_gate = sigmoid(gate)
                        read = skip * xs[j]
                        for k in tl.static_range(TILES):
                            read += tl.sum(states[j + 1][k] * Ct[k], 0)
                        dgate = dyt * read * s_gate * (1 + gate * (1 - s_gate))
                        tl.store(dz + (b * length + t) * d_inner + d, dgate.to(dz.dtype.element_ty), mask=here)
                        dyt = dyt * gate * s_gate
                    delta = tl.where(live, step_size(dts[j], shift, SOFTPLUS), 0.0)
                    u = delta * xs[j]
                    through_B = tl.zeros([BLOCK], ACC)
                    through_A = tl.zeros([BLOCK], ACC)
                    earlier, sums_A, sums_B, sums_C = (), (), (), ()
                    for k in tl.static_range(TILES):
                        gk = e[k] + Ct[k] * dyt[None, :]
                        w = gk * (decays[j][k] * states[j][k])  # gradient to dt A
                        through_B += tl.sum(gk * Bt[k], 0)
                        through_A += tl.sum(w * A2[k], 0)
                        sums_A = sums_A + (sum_A[k] + w * delta[None, :],)
                        earlier = earlier + (tl.where(live, decays[j][k] * gk, e[k]),)
                        n = ns[k]
                        if B_VARIES:
                            at_B = dB + (rows + t) * d_state + n
                            partial = tl.sum(gk * u[None, :], 1)
                            partial += tl.load(at_B, mask=(n < d_state) & live & (one > 0), other=0.0)
                            tl.store(at_B, partial, mask=(n < d_state) & live)
                        else:
                            sums_B = sums_B + (sum_B[k] + gk * u[None, :],)
                        if C_VARIES:
                            at_C = dC + (rows + t) * d_state + n
                            partial = tl.sum(states[j + 1][k] * dyt[None, :], 1)
                            partial += tl.load(at_C, mask=(n < d_state) & live & (one > 0), other=0.0)
                            tl.store(at_C, partial, mask=(n < d_state) & live)
                        else:
                            sums_C = sums_C + (sum_C[k] + states[j + 1][k] * dyt[None, :],)
                    e, sum_A = earlier, sums_A
                    if not B_VARIES:
                        sum_B = sums_B
                    if not C_VARIES:
                        sum_C = sums_C
                    sum_D += dyt * xs[j]
                    draw = (through_B * xs[j] + through_A * LN2) * step_size_slope(dts[j], shift, SOFTPLUS)
                    sum_bias += tl.where(live, draw, 0.0)
                    dxt = through_B * delta + skip * dyt
                    tl.store(dx + (b * length + t) * d_inner + d, dxt.to(dx.dtype.element_ty), mask=here)
                    tl.store(ddt + (b * length + t) * d_inner + d, draw.to(ddt.dtype.element_ty), mask=here)
            tl.debug_barrier()

        at_chunk = b * chunks + c
        _store(dA + at_chunk * matrix, sum_A, ns, d, inside, d_state, d_inner, TILES)
        if not B_VARIES:
            _store(dB + at_chunk * matrix, sum_B, ns, d, inside, d_state, d_inner, TILES)
        if not C_VARIES:
            _store(dC + at_chunk * matrix, sum_C, ns, d, inside, d_state, d_inner, TILES)
        if D is not None:
            tl.store(dD + at_chunk * d_inner + d, sum_D, mask=inside)
        if bias is not None:
            tl.store(dbias + at_chunk * d_inner + d, sum_bias, mask=inside)
        if dh0 is not None:
            _store(dh0 + b * matrix, e, ns, d, inside & (c == 0), d_state, d_inner, TILES)
        tl.debug_barrier()  # the next block adds to dB and dC


# ---------------------------------------------------------------------------------------------------------- launching


def _heights_for(d_state: int) -> tuple[int, int]:
    """Heights of the one or two tiles, powers of two, that cover d_state."""
    high = 1 << (d_state.bit_length() - 1)
    rest = d_state - high
    low = _common.power_of_two(rest) if rest else 0
    return (2 * high, 0) if low >= high else (high, low)


def _shape(d_inner: int, d_state: int, per_lane: int) -> tuple[int, dict[str, Any]]:
    """Inner channels a block and what the kernels are compiled for, with about `per_lane` numbers of a state a thread."""
    n1, n2 = _heights_for(d_state)
    block = min(128, max(8, 32 * per_lane // n1), max(8, _common.power_of_two(d_inner)))
    warps = min(8, max(1, n1 * block // (32 * per_lane)))
    return block, {"N1": n1, "N2": n2, "BLOCK": block, "SEGMENT": segment_length(d_state), "num_warps": warps}


def segment_length(d_state: int) -> int:
    return SEGMENT if d_state <= 32 else 2 * SEGMENT


def _chunks(length: int, warps: int, segment: int) -> tuple[int, int]:
    chunk = _common.chunk_length(length, warps)
    if chunk < length:
        chunk = -(-chunk // segment) * segment
    return -(-length // chunk), chunk


def _matrix_strides(m: Tensor | None) -> tuple[int, int]:
    return (m.stride(0), m.stride(1)) if m is not None and m.dim() == 3 else (0, 0)


def _transposed(m: Tensor | None) -> Tensor | None:
    """(..., d_inner, d_state) as the kernels have it."""
    return None if m is None else m.transpose(-1, -2).contiguous()


def _constant(m: Tensor) -> Tensor:
    return m if m.dim() == 3 else m.T.contiguous()


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, h0: Tensor | None, reset: Tensor | None, *, y: Tensor, final: Tensor, saved: Tensor | None,
) -> None:  # fmt: skip
    """Fills y, final (batch, d_state, d_inner) and, if given, saved (batch, segments, d_state, d_inner)."""
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    block, constants = _shape(d_inner, d_state, 16)
    blocks = -(-d_inner // block)
    segment = constants["SEGMENT"]
    chunks, chunk = _chunks(length, batch * blocks * constants["num_warps"], segment)
    constants |= {
        "SOFTPLUS": dt_softplus, "B_VARIES": B.dim() == 3, "C_VARIES": C.dim() == 3, "U": UNROLL,
        "ACC": _common.accumulator(A.dtype),
    }  # fmt: skip
    flags = _common.flags(reset)
    start = _transposed(h0)
    inputs = (x, dt, _transposed(A), _constant(B), _constant(C), D, z, dt_bias, start, flags)
    strides = (*_matrix_strides(x), *_matrix_strides(dt), *_matrix_strides(z), *_matrix_strides(B), *_matrix_strides(C))
    sizes = (length, d_inner, d_state, blocks, chunks, chunk, -(-length // segment))
    ends = None
    if chunks > 1:
        product, end = (A.new_empty(batch, chunks, d_state, d_inner) for _ in range(2))
        _common.launch(_forward, batch * blocks * chunks, x, *inputs, None, None, None, None, product, end, *strides,
                       *sizes, LOCAL=True, **constants)  # fmt: skip
        ends = _linear.scan(product.flatten(2), end.flatten(2), None if start is None else start.flatten(1))
    _common.launch(_forward, batch * blocks * chunks, x, *inputs, ends, y, final, saved, None, None, *strides, *sizes,
                   LOCAL=False, **constants)  # fmt: skip


def backward(
    dy: Tensor, dfinal: Tensor | None, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, h0: Tensor | None,
    reset: Tensor | None, *, samples: int, dx: Tensor, ddt: Tensor, dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Fills dx, ddt, dz; returns dA, dB, dC, dD, ddt_bias and dh0, those of parameters with a first dimension `samples`."""
    (batch, length, d_inner), d_state = dy.shape, A.shape[1]
    block, constants = _shape(d_inner, d_state, 8)
    blocks = -(-d_inner // block)
    blocks_each = -(-blocks // max(1, min(blocks, d_inner // d_state)))  # so that the partial dB is no larger than x
    groups = -(-blocks // blocks_each)
    segment, warps = constants["SEGMENT"], constants["num_warps"]
    chunks, chunk = _chunks(length, batch * groups * warps, segment)
    B_varies, C_varies = B.dim() == 3, C.dim() == 3
    constants |= {"SOFTPLUS": dt_softplus, "C_VARIES": C_varies, "ACC": _common.accumulator(A.dtype)}
    del constants["SEGMENT"]
    flags = _common.flags(reset)
    dfinal = _transposed(dfinal)
    A_, B_, C_ = _transposed(A), _constant(B), _constant(C)
    s_dy, s_x, s_dt, s_z, s_B, s_C = (_matrix_strides(m) for m in (dy, x, dt, z, B, C))
    inputs = x.shape[0]

    later = None
    if chunks > 1:
        product, end = (A.new_empty(batch, chunks, d_state, d_inner) for _ in range(2))
        _common.launch(
            _backward_local, batch * blocks * chunks, dy, dy, dt, A_, C_, z, dt_bias, flags, product, end,
            *s_dy, *s_dt, *s_z, *s_C, length, d_inner, d_state, blocks, chunks, chunk, inputs,
            U=UNROLL, **constants,
        )  # fmt: skip
        start = None if dfinal is None else dfinal.flatten(1)
        later = _linear.scan(product.flatten(2), end.flatten(2), start, reverse=True)

    items = batch * groups * chunks
    programs = min(items, max(1, WARPS_AT_ONCE // warps))
    scratch = A.new_empty(programs, segment // UNROLL_BACKWARD, constants["N1"] + constants["N2"], block)
    dA = A.new_empty(batch, chunks, d_state, d_inner)
    over_time, fixed = (groups, batch, length, d_state), (batch, chunks, d_state, d_inner)
    dB, dC = A.new_empty(over_time if B_varies else fixed), A.new_empty(over_time if C_varies else fixed)
    dD, dbias = (None if p is None else A.new_empty(batch, chunks, d_inner) for p in (D, dt_bias))
    dh0 = None if h0 is None else A.new_empty(batch, d_state, d_inner)
    _common.launch(
        _backward, programs, dy, dy, dfinal, later, saved, x, dt, A_, B_, C_, D, z, dt_bias, flags, scratch,
        dx, ddt, dA, dB, dC, dD, dz, dbias, dh0, *s_dy, *s_x, *s_dt, *s_z, *s_B, *s_C, length, d_inner, d_state, blocks,
        chunks, chunk, -(-length // segment), inputs, groups, blocks_each, items,
        B_VARIES=B_varies, SEGMENT=segment, U=UNROLL_BACKWARD, **constants,
    )  # fmt: skip

    def parameter(partial: Tensor) -> Tensor:
        return partial.unflatten(0, (samples, -1)).sum((1, 2))

    return (
        parameter(dA).transpose(1, 2),
        dB.sum(0) if B_varies else parameter(dB).transpose(1, 2),
        dC.sum(0) if C_varies else parameter(dC).transpose(1, 2),
        None if dD is None else parameter(dD),
        None if dbias is None else parameter(dbias),
        None if dh0 is None else dh0.transpose(1, 2),
    )
