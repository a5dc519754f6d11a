# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="import-not-found,import-untyped,misc,assignment,var-annotated"

"""H_t = diag(a_t) H_{t-1} + k_t v_tᵀ, y_t = H_tᵀ q_t, or with a bonus y_t = (H_{t-1} + diag(bonus) k_t v_tᵀ)ᵀ q_t.

q, k: (batch, length, groups, d_key)   v: (batch, length, heads, d_value)   log_a: (batch, length, heads, d_key or 1)

Time is cut into chunks. With P_ts the score of token s for token t of the same chunk,

    y_t = Σ_{s ≤ t} P_ts v_s + (q_t r_t)ᵀ H       P_ts = Σ_k q_tk k_sk w_tsk,  w_tsk = exp(log a_{s+1,k} + .. + log a_tk)
    H'  = diag(a_begin .. a_end) H + Σ_s (k_s f_s) v_sᵀ

where r_t decays from the chunk's beginning to token t (with a bonus to the token before it, at which y_t reads), f_s from token s
to the chunk's end, and H, H' are the states before and after. Every exponent is a sum of log a ≤ 0, formed by adding and never
by a difference of running sums: no overflow, and log a = 0 and -inf are exact. With one decay a head w is a matrix. With one a
key, the chunk is cut into blocks of SUB tokens: between two of them w is a product of two such decays, which a matrix product
takes, inside one it is formed key by key. The gradient to log a_r sums q k w over the pairs s < r ≤ t, again only by adding.

A reset is log a = -inf. In the backward pass the first dimension of dy may be several times `inputs`, that of q, k, v, log_a.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlens.ops.triton import _common, _linear

CHUNK, WIDTH = 64, 64  # of time, and of keys and values a block: on tensor cores, for bfloat16 and float16
EXACT_CHUNK, EXACT_WIDTH = 32, 32  # for float32 and float64, whose products take more registers
GRADIENT_WIDTH = 32
SUB = 16


@triton.jit
def _program(blocks, heads, chunks):
    pid = tl.program_id(0).to(tl.int64)
    return pid % blocks, pid // blocks % heads, pid // blocks // heads % chunks, pid // blocks // heads // chunks


@triton.jit
def _tile(p, t, stride, live, columns, width, ACC: tl.constexpr):
    """Rows t of a matrix with `width` columns, zero outside."""
    return tl.load(
        p + t[:, None] * stride + columns[None, :], mask=live[:, None] & (columns < width)[None, :], other=0.0
    ).to(ACC)


@triton.jit
def _logs(la, reset, t, stride, begin, stop, columns, width, ACC: tl.constexpr):
    """log a of tokens t, -inf at a reset, 0 outside [begin, stop)."""
    live = (t >= begin) & (t < stop)
    x = _tile(la, t, stride, live, columns, width, ACC)
    if reset is not None:
        x = tl.where((tl.load(reset + t, mask=live, other=0) != 0)[:, None], float("-inf"), x)
    return x


@triton.jit
def _log_row(la, reset, t, stride, begin, stop, ACC: tl.constexpr):
    """The same as a row (1, t), one decay a head."""
    live = (t >= begin) & (t < stop)
    x = tl.load(la + t * stride, mask=live, other=0.0).to(ACC)
    if reset is not None:
        x = tl.where(tl.load(reset + t, mask=live, other=0) != 0, float("-inf"), x)
    return x[None, :]


@triton.jit
def _until(la, reset, t, stride, begin, stop, columns, width, BONUS: tl.constexpr, ACC: tl.constexpr):
    """Log decay from the end of token begin - 1 to where y_t reads, for consecutive tokens t: t = begin, begin + 1, ..."""
    if columns.shape[0] == 1:  # a running sum of a single column is more than some versions of Triton can compile
        row = _log_row(la, reset, t, stride, begin, stop, ACC)
        earlier = tl.sum(tl.where(t[None, :] < t[:, None], row, 0.0), 1)[:, None]
    else:
        earlier = tl.cumsum(_logs(la, reset, t - 1, stride, begin, stop, columns, width, ACC), 0)
    if not BONUS:
        return earlier + _logs(la, reset, t, stride, begin, stop, columns, width, ACC)
    if reset is not None:
        live = (t >= begin) & (t < stop)
        earlier = tl.where((tl.load(reset + t, mask=live, other=0) != 0)[:, None], float("-inf"), earlier)
    return earlier


@triton.jit
def _after(la, reset, t, stride, begin, stop, columns, width, ACC: tl.constexpr):
    """Log decay from token t to token stop - 1, for consecutive tokens t = begin, begin + 1, ..."""
    if columns.shape[0] == 1:
        row = _log_row(la, reset, t, stride, begin, stop, ACC)
        return tl.sum(tl.where(t[None, :] > t[:, None], row, 0.0), 1)[:, None]
    return tl.cumsum(_logs(la, reset, t + 1, stride, begin, stop, columns, width, ACC), 0, reverse=True)


@triton.jit
def _pair_decay(la, reset, t, stride, begin, stop, BONUS: tl.constexpr, ACC: tl.constexpr):
    """w_ts for s < t, one decay a head; 0 elsewhere. (t, s)"""
    one = tl.arange(0, 1)
    before = _logs(la, reset, t - 1, stride, begin, stop, one, 1, ACC)
    exponent = tl.cumsum(tl.where(t[:, None] - 1 > t[None, :], before, 0.0), 0)  # of tokens strictly between
    if BONUS:
        if reset is not None:
            live = (t >= begin) & (t < stop)
            exponent = tl.where((tl.load(reset + t, mask=live, other=0) != 0)[:, None], float("-inf"), exponent)
    else:
        exponent += _logs(la, reset, t, stride, begin, stop, one, 1, ACC)
    return tl.where(t[:, None] > t[None, :], tl.exp(exponent), 0.0)


@triton.jit
def _state(ends, edge, b, own_b, h, c, other, chunks, heads, k, v, d_key, d_value, ACC: tl.constexpr):
    """The state (k, v) of chunk `other` in ends (batch, chunks, heads, d_key, d_value), or `edge` where there is no such."""
    at = k[:, None] * d_value + v[None, :]
    mask = (k < d_key)[:, None] & (v < d_value)[None, :]
    there = (other >= 0) & (other < chunks)
    matrix = tl.cast(d_key, tl.int64) * d_value
    x = tl.load(ends + ((b * chunks + other) * heads + h) * matrix + at, mask=mask & there, other=0.0).to(ACC)
    if edge is not None:
        x += tl.load(edge + (own_b * heads + h) * matrix + at, mask=mask & (there == 0), other=0.0).to(ACC)
    return x


_SIZES = ["length", "heads", "chunks", "inputs"]


@triton.jit(do_not_specialize=_SIZES)
def _chunk_sums(
    m, n, la, reset, out, decay, m_b, m_t, m_h, n_b, n_t, n_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, d_value, chunks, k_blocks, v_blocks, inputs,
    READ: tl.constexpr, BONUS: tl.constexpr, PER_KEY: tl.constexpr, CHUNK: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out: (batch, chunks, heads, d_key, d_value): Σ_s (k_s f_s) v_sᵀ, and decay the product of a over the chunk; or READ, for
    the gradient to the state before a chunk, Σ_t (q_t r_t) dy_tᵀ."""
    block, h, c, b = _program(tl.cast(k_blocks, tl.int64) * v_blocks, heads, chunks)
    own = b % inputs
    k = block // v_blocks * BK + tl.arange(0, BK)
    v = block % v_blocks * BV + tl.arange(0, BV)
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    t = begin + tl.arange(0, CHUNK)
    la += own * la_b + h * la_h
    if reset is not None:
        reset += own * length
    columns = k if PER_KEY else tl.arange(0, 1)
    width = d_key if PER_KEY else 1
    if READ:
        weight = tl.exp(_until(la, reset, t, la_t, begin, stop, columns, width, BONUS, ACC))
    else:
        weight = tl.exp(_after(la, reset, t, la_t, begin, stop, columns, width, ACC))
        whole = tl.exp(tl.sum(_logs(la, reset, t, la_t, begin, stop, columns, width, ACC), 0))
        first = block % v_blocks == 0 if PER_KEY else block == 0
        at = ((b * chunks + c) * heads + h) * width + columns
        tl.store(decay + at, whole, mask=(columns < width) & first)
    mt = _tile(m + own * m_b + h // per_group * m_h, t, m_t, t < stop, k, d_key, ACC)
    nt = _tile(n + b * n_b + h * n_h, t, n_t, t < stop, v, d_value, ACC)
    x = tl.dot(tl.trans(mt * weight), nt, input_precision=PRECISION)
    at = ((b * chunks + c) * heads + h) * d_key * d_value + k[:, None] * d_value + v[None, :]
    tl.store(out + at, x, mask=(k < d_key)[:, None] & (v < d_value)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _scores(
    q, k, la, reset, bonus, out, q_b, q_t, q_h, k_b, k_t, k_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, chunks, inputs,
    DECAY: tl.constexpr, BONUS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out: (batch, length, heads, CHUNK), P_ts at column s - begin, one decay a head. Without DECAY all products of rows of q
    and k with s ≤ t, where q may have several times the sequences of k: that is the gradient to P, from dy and v."""
    _, h, c, b = _program(1, heads, chunks)
    own = b % inputs
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    column = tl.arange(0, CHUNK)
    t = begin + column
    products = tl.zeros([CHUNK, CHUNK], ACC)
    now = tl.zeros([CHUNK], ACC)
    for start in range(0, d_key, BK):
        i = start + tl.arange(0, BK)
        qt = _tile(q + b * q_b + h // per_group * q_h, t, q_t, t < stop, i, d_key, ACC)
        kt = _tile(k + own * k_b + h // per_group * k_h, t, k_t, t < stop, i, d_key, ACC)
        products += tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        if BONUS:
            now += tl.sum(qt * kt * tl.load(bonus + h * d_key + i, mask=i < d_key, other=0.0).to(ACC)[None, :], 1)
    if DECAY:
        if reset is not None:
            reset += own * length
        weight = _pair_decay(la + own * la_b + h * la_h, reset, t, la_t, begin, stop, BONUS, ACC)
    else:
        weight = tl.where(t[:, None] > t[None, :], tl.full([CHUNK, CHUNK], 1.0, ACC), 0.0)
    same = t[:, None] == t[None, :]
    if BONUS:
        x = tl.where(same, now[:, None], products * weight)
    else:
        x = tl.where(same, products, products * weight)
    tl.store(out + ((b * length + t) * heads + h)[:, None] * CHUNK + column[None, :], x, mask=(t < stop)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _scores_by_key(
    q, k, la, reset, bonus, out, q_b, q_t, q_h, k_b, k_t, k_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, chunks,
    BONUS: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with one decay a key; a program has the rows of one block of SUB tokens."""
    block, h, c, b = _program(CHUNK // SUB, heads, chunks)
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    inner = tl.arange(0, SUB)
    first = tl.minimum(begin + block * SUB, stop)
    t = first + inner
    whole = begin + tl.arange(0, CHUNK)
    q += b * q_b + h // per_group * q_h
    k += b * k_b + h // per_group * k_h
    la += b * la_b + h * la_h
    if reset is not None:
        reset += b * length
    out += ((b * length + t) * heads + h)[:, None] * CHUNK
    for earlier in range(CHUNK // SUB):  # blocks of keys, those after the rows' own hold zeros
        x = tl.zeros([SUB, SUB], ACC)
        begin_s = begin + earlier * SUB
        s = begin_s + inner
        if earlier < block:
            for start in range(0, d_key, BK):
                i = start + tl.arange(0, BK)
                between = tl.sum(_logs(la, reset, whole, la_t, begin_s + SUB, first, i, d_key, ACC), 0)
                until = _until(la, reset, t, la_t, first, stop, i, d_key, BONUS, ACC) + between[None, :]
                after = _after(la, reset, s, la_t, begin_s, tl.minimum(begin_s + SUB, stop), i, d_key, ACC)
                qt = _tile(q, t, q_t, t < stop, i, d_key, ACC) * tl.exp(until)
                ks = _tile(k, s, k_t, s < stop, i, d_key, ACC) * tl.exp(after)
                x += tl.dot(qt, tl.trans(ks), input_precision=PRECISION)
        if earlier == block:
            for start in range(0, d_key, BK):
                i = start + tl.arange(0, BK)
                qt = _tile(q, t, q_t, t < stop, i, d_key, ACC)
                here = tl.zeros([SUB, BK], ACC)  # log decay that is part of reading at t itself
                if not BONUS:
                    here = _logs(la, reset, t, la_t, first, stop, i, d_key, ACC)
                elif reset is not None:
                    here += tl.where(tl.load(reset + t, mask=t < stop, other=0) != 0, float("-inf"), 0.0)[:, None]
                strictly = tl.zeros([SUB, BK], ACC)  # log decay of the tokens between s and t
                for back in range(SUB):
                    column = SUB - 1 - back
                    at = first + column
                    one = (i < d_key) & (at < stop)
                    row = tl.load(k + at * k_t + i, mask=one, other=0.0).to(ACC)
                    if BONUS:
                        now = row * tl.load(bonus + h * d_key + i, mask=one, other=0.0).to(ACC)
                    else:
                        now = row
                    later = (inner > column)[:, None]
                    weighted = tl.where(later, tl.exp(strictly + here) * row[None, :], now[None, :])
                    value = tl.sum(qt * weighted, 1)
                    x += tl.where((inner[None, :] == column) & (inner >= column)[:, None], value[:, None], 0.0)
                    own = tl.load(la + at * la_t + i, mask=one, other=0.0).to(ACC)
                    if reset is not None:
                        own = tl.where(tl.load(reset + at, mask=at < stop, other=0) != 0, float("-inf"), own)
                    strictly = tl.where(later, strictly + own[None, :], 0.0)
        tl.store(out + (earlier * SUB + inner)[None, :], x, mask=(t < stop)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _outputs(
    scores, n, m, la, reset, ends, edge, out, n_b, n_t, n_h, m_b, m_t, m_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, d_value, chunks, v_blocks, inputs, states,
    KEYS: tl.constexpr, BONUS: tl.constexpr, PER_KEY: tl.constexpr, CHUNK: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_t = Σ_s P_ts v_s + (q_t r_t)ᵀ H; or KEYS, the gradient to v: dv_s = Σ_t P_ts dy_t + (k_s f_s)ᵀ dH', with dH' the gradient
    to the state after the chunk. ends holds `states` sequences, of chunks before or after; edge is the state of none."""
    block, h, c, b = _program(v_blocks, heads, chunks)
    own = b % inputs
    v = block * BV + tl.arange(0, BV)
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    column = tl.arange(0, CHUNK)
    t = begin + column
    la += own * la_b + h * la_h
    if reset is not None:
        reset += own * length
    mask = (t < stop)[:, None] & (t < stop)[None, :]
    P = tl.load(scores + ((own * length + t) * heads + h)[:, None] * CHUNK + column[None, :], mask=mask, other=0.0)
    if KEYS:
        P = tl.trans(P)
    y = tl.dot(P, _tile(n + b * n_b + h * n_h, t, n_t, t < stop, v, d_value, ACC), input_precision=PRECISION)
    for start in range(0, d_key, BK):
        k = start + tl.arange(0, BK).to(tl.int64)
        columns = k if PER_KEY else tl.arange(0, 1)
        width = d_key if PER_KEY else 1
        if KEYS:
            weight = tl.exp(_after(la, reset, t, la_t, begin, stop, columns, width, ACC))
            other = c + 1
        else:
            weight = tl.exp(_until(la, reset, t, la_t, begin, stop, columns, width, BONUS, ACC))
            other = c - 1
        H = _state(ends, edge, b % states, b % states, h, c, other, chunks, heads, k, v, d_key, d_value, ACC)
        mt = _tile(m + own * m_b + h // per_group * m_h, t, m_t, t < stop, k, d_key, ACC)
        y += tl.dot(mt * weight, H, input_precision=PRECISION)
    at = ((b * length + t) * heads + h)[:, None] * d_value + v[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(t < stop)[:, None] & (v < d_value)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _gradients_by_states(
    dy, q, k, v, la, reset, before, h0, after, dfinal, dq, dk, dla,
    dy_b, dy_t, dy_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, d_value, chunks, k_blocks, inputs,
    BONUS: tl.constexpr, PER_KEY: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of the gradients that goes through the states between chunks: dq_t = r_t H dy_t, dk_s = f_s dH' v_s, and to log
    a_r what is read behind r, what is written before r, and H dH', which passes the whole chunk.

    dq, dk: (batch, length, heads, d_key)   dla: (batch, length, heads, d_key), or (batch, length, heads, k_blocks) with one decay a head"""
    block, h, c, b = _program(k_blocks, heads, chunks)
    own = b % inputs
    i = block * BK + tl.arange(0, BK)
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    t = begin + tl.arange(0, CHUNK)
    live = t < stop
    columns = i if PER_KEY else tl.arange(0, 1)
    width = d_key if PER_KEY else 1
    dy += b * dy_b + h * dy_h
    v += own * v_b + h * v_h
    la += own * la_b + h * la_h
    if reset is not None:
        reset += own * length

    to_q, to_k = tl.zeros([CHUNK, BK], ACC), tl.zeros([CHUNK, BK], ACC)
    passing = tl.zeros([BK], ACC)
    for start in range(0, d_value, BV):
        j = start + tl.arange(0, BV).to(tl.int64)
        H = _state(before, h0, own, own, h, c, c - 1, chunks, heads, i, j, d_key, d_value, ACC)
        G = _state(after, dfinal, b, b, h, c, c + 1, chunks, heads, i, j, d_key, d_value, ACC)
        passing += tl.sum(H * G, 1)
        to_q += tl.dot(_tile(dy, t, dy_t, live, j, d_value, ACC), tl.trans(H), input_precision=PRECISION)
        to_k += tl.dot(_tile(v, t, v_t, live, j, d_value, ACC), tl.trans(G), input_precision=PRECISION)
    to_q *= tl.exp(_until(la, reset, t, la_t, begin, stop, columns, width, BONUS, ACC))
    to_k *= tl.exp(_after(la, reset, t, la_t, begin, stop, columns, width, ACC))
    rows = ((b * length + t) * heads + h)[:, None]
    mask = live[:, None] & (i < d_key)[None, :]
    tl.store(dq + rows * d_key + i[None, :], to_q, mask=mask)
    tl.store(dk + rows * d_key + i[None, :], to_k, mask=mask)

    read = to_q * _tile(q + own * q_b + h // per_group * q_h, t, q_t, live, i, d_key, ACC)
    written = to_k * _tile(k + own * k_b + h // per_group * k_h, t, k_t, live, i, d_key, ACC)
    whole = tl.exp(tl.sum(_logs(la, reset, t, la_t, begin, stop, columns, width, ACC), 0))
    GAP: tl.constexpr = 1 if BONUS else 0  # with a bonus y_r reads before a_r
    behind = t[:, None] + GAP <= t[None, :]
    ahead = t[:, None] > t[None, :]
    if PER_KEY:
        dlog = tl.dot(behind.to(ACC), read, input_precision=PRECISION) + (passing * whole)[None, :]
        dlog += tl.dot(ahead.to(ACC), written, input_precision=PRECISION)
        tl.store(dla + rows * d_key + i[None, :], dlog, mask=mask)
    else:
        dlog = tl.sum(tl.where(behind, tl.sum(read, 1)[None, :], 0.0), 1) + tl.sum(passing, 0) * whole
        dlog += tl.sum(tl.where(ahead, tl.sum(written, 1)[None, :], 0.0), 1)
        tl.store(dla + ((b * length + t) * heads + h) * k_blocks + block, dlog, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _gradients_by_pairs(
    scores, q, k, la, reset, bonus, dq, dk, dla, dbonus, q_b, q_t, q_h, k_b, k_t, k_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, chunks, k_blocks, inputs,
    BONUS: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the part within a chunk, one decay a head. scores: the gradient to P; dbonus: (batch, chunks, heads, d_key)."""
    block, h, c, b = _program(k_blocks, heads, chunks)
    own = b % inputs
    i = block * BK + tl.arange(0, BK)
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    column = tl.arange(0, CHUNK)
    t = begin + column
    live = t < stop
    if reset is not None:
        reset += own * length
    qt = _tile(q + own * q_b + h // per_group * q_h, t, q_t, live, i, d_key, ACC)
    kt = _tile(k + own * k_b + h // per_group * k_h, t, k_t, live, i, d_key, ACC)
    rows = ((b * length + t) * heads + h)[:, None]
    dP = tl.load(scores + rows * CHUNK + column[None, :], mask=live[:, None] & live[None, :], other=0.0)
    now = tl.sum(tl.where(t[:, None] == t[None, :], dP, 0.0), 1)[:, None]
    pairs = dP * _pair_decay(la + own * la_b + h * la_h, reset, t, la_t, begin, stop, BONUS, ACC)
    mask = live[:, None] & (i < d_key)[None, :]
    dqt = tl.load(dq + rows * d_key + i[None, :], mask=mask, other=0.0)
    dkt = tl.load(dk + rows * d_key + i[None, :], mask=mask, other=0.0)
    if BONUS:
        u = tl.load(bonus + h * d_key + i, mask=i < d_key, other=0.0).to(ACC)[None, :]
        tl.store(dbonus + ((b * chunks + c) * heads + h) * d_key + i, tl.sum(qt * kt * now, 0), mask=i < d_key)
        dqt += now * u * kt
        dkt += now * u * qt
    else:
        dqt += now * kt
        dkt += now * qt
    dqt += tl.dot(pairs, kt, input_precision=PRECISION)
    dkt += tl.dot(tl.trans(pairs), qt, input_precision=PRECISION)
    tl.store(dq + rows * d_key + i[None, :], dqt, mask=mask)
    tl.store(dk + rows * d_key + i[None, :], dkt, mask=mask)

    GAP: tl.constexpr = 1 if BONUS else 0
    upto = tl.cumsum(pairs * tl.dot(qt, tl.trans(kt), input_precision=PRECISION), 1)  # (t, s): over tokens up to s
    dlog = tl.sum(tl.where(t[:, None] > t[None, :] + GAP, upto, 0.0), 0)  # for r = s + 1
    dla += ((b * length + t + 1) * heads + h) * k_blocks + block
    next_live = t + 1 < stop
    tl.store(dla, dlog + tl.load(dla, mask=next_live, other=0.0), mask=next_live)


@triton.jit(do_not_specialize=_SIZES)
def _gradients_by_pairs_and_key(
    scores, q, k, la, reset, bonus, dq, dk, dla, dbonus, q_b, q_t, q_h, k_b, k_t, k_h, la_b, la_t, la_h,
    length, heads, per_group, d_key, chunks, k_blocks, inputs,
    BONUS: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with one decay a key. Block after block of SUB tokens, each as the one that reads from those before it, as the one
    that those after it read from, and as one that lies between two others."""
    BLOCKS: tl.constexpr = CHUNK // SUB
    GAP: tl.constexpr = 1 if BONUS else 0
    k_block, h, c, b = _program(k_blocks, heads, chunks)
    own = b % inputs
    i = k_block * BK + tl.arange(0, BK)
    inside = i < d_key
    begin = c * CHUNK
    stop = tl.minimum(begin + CHUNK, length)
    inner = tl.arange(0, SUB)
    whole = begin + tl.arange(0, CHUNK)
    q += own * q_b + h // per_group * q_h
    k += own * k_b + h // per_group * k_h
    la += own * la_b + h * la_h
    if reset is not None:
        reset += own * length
    behind = (inner[:, None] + GAP <= inner[None, :]).to(ACC)  # (r, t): y_t reads behind a_r
    ahead = (inner[:, None] > inner[None, :]).to(ACC)  # (r, s): s is written before a_r
    if BONUS:
        u = tl.load(bonus + h * d_key + i, mask=inside, other=0.0).to(ACC)[None, :]
        du = tl.zeros([BK], ACC)

    for m in range(BLOCKS):
        first = tl.minimum(begin + m * SUB, stop)
        last = tl.minimum(first + SUB, stop)
        t = first + inner
        live = t < stop
        rows = ((b * length + t) * heads + h)[:, None]
        qt = _tile(q, t, q_t, live, i, d_key, ACC)
        kt = _tile(k, t, k_t, live, i, d_key, ACC)
        until = _until(la, reset, t, la_t, first, last, i, d_key, BONUS, ACC)
        after = _after(la, reset, t, la_t, first, last, i, d_key, ACC)
        to_q, to_k = tl.zeros([SUB, BK], ACC), tl.zeros([SUB, BK], ACC)
        passing = tl.zeros([BK], ACC)
        for other in range(BLOCKS):
            first_o = tl.minimum(begin + other * SUB, stop)
            last_o = tl.minimum(first_o + SUB, stop)
            s = first_o + inner
            live_s = s < stop
            if other < m:  # block m reads from it
                at = scores + rows * CHUNK + (other * SUB + inner)[None, :]
                dP = tl.load(at, mask=live[:, None] & live_s[None, :], other=0.0)
                between = tl.sum(_logs(la, reset, whole, la_t, last_o, first, i, d_key, ACC), 0)
                after_s = _after(la, reset, s, la_t, first_o, last_o, i, d_key, ACC)
                ks = _tile(k, s, k_t, live_s, i, d_key, ACC) * tl.exp(after_s)
                to_q += tl.exp(until + between[None, :]) * tl.dot(dP, ks, input_precision=PRECISION)
            if other > m:  # it reads from block m, and from those before
                at = scores + ((b * length + s) * heads + h)[:, None] * CHUNK
                dP = tl.load(at + (m * SUB + inner)[None, :], mask=live_s[:, None] & live[None, :], other=0.0)
                between = tl.sum(_logs(la, reset, whole, la_t, last, first_o, i, d_key, ACC), 0)
                until_s = _until(la, reset, s, la_t, first_o, last_o, i, d_key, BONUS, ACC)
                qs = _tile(q, s, q_t, live_s, i, d_key, ACC) * tl.exp(until_s)
                to_k += tl.exp(after + between[None, :]) * tl.dot(tl.trans(dP), qs, input_precision=PRECISION)
                for origin in range(m):
                    first_p = begin + origin * SUB
                    p = first_p + inner
                    dP = tl.load(
                        at + (origin * SUB + inner)[None, :], mask=live_s[:, None] & (p < stop)[None, :], other=0.0
                    )
                    between = tl.sum(_logs(la, reset, whole, la_t, first_p + SUB, first_o, i, d_key, ACC), 0)
                    after_p = _after(la, reset, p, la_t, first_p, tl.minimum(first_p + SUB, stop), i, d_key, ACC)
                    kp = _tile(k, p, k_t, p < stop, i, d_key, ACC) * tl.exp(after_p)
                    passing += tl.sum(qs * tl.dot(dP, kp, input_precision=PRECISION), 0) * tl.exp(between)
        dlog = tl.dot(behind, qt * to_q, input_precision=PRECISION)
        dlog += tl.dot(ahead, kt * to_k, input_precision=PRECISION) + passing[None, :]

        here = tl.zeros([SUB, BK], ACC)  # within the block, from one key token to another; as in _scores_by_key
        if not BONUS:
            here = _logs(la, reset, t, la_t, first, last, i, d_key, ACC)
        elif reset is not None:
            here += tl.where(tl.load(reset + t, mask=live, other=0) != 0, float("-inf"), 0.0)[:, None]
        strictly = tl.zeros([SUB, BK], ACC)
        for back in range(SUB):
            column = SUB - 1 - back
            at = first + column
            one = inside & (at < last)
            later = (inner > column)[:, None]
            dPs = tl.load(scores + rows * CHUNK + m * SUB + column, mask=live[:, None] & (at < last), other=0.0)
            row = tl.load(k + at * k_t + i, mask=one, other=0.0).to(ACC)[None, :]
            pair = tl.where(later, dPs * tl.exp(strictly + here), 0.0)
            to_q += pair * row
            to_k += tl.where((inner == column)[:, None], tl.sum(pair * qt, 0)[None, :], 0.0)
            dlog += tl.where(later, tl.dot(behind, pair * row * qt, input_precision=PRECISION), 0.0)
            own_log = tl.load(la + at * la_t + i, mask=one, other=0.0).to(ACC)
            if reset is not None:
                own_log = tl.where(tl.load(reset + at, mask=at < last, other=0) != 0, float("-inf"), own_log)
            strictly = tl.where(later, strictly + own_log[None, :], 0.0)

        now = tl.load(scores + rows * CHUNK + (m * SUB + inner)[:, None], mask=live[:, None], other=0.0)
        if BONUS:
            du += tl.sum(qt * kt * now, 0)
            to_q += now * u * kt
            to_k += now * u * qt
        else:
            to_q += now * kt
            to_k += now * qt
        mask = live[:, None] & inside[None, :]
        at = rows * d_key + i[None, :]
        tl.store(dq + at, to_q + tl.load(dq + at, mask=mask, other=0.0), mask=mask)
        tl.store(dk + at, to_k + tl.load(dk + at, mask=mask, other=0.0), mask=mask)
        tl.store(dla + at, dlog + tl.load(dla + at, mask=mask, other=0.0), mask=mask)
    if BONUS:
        tl.store(dbonus + ((b * chunks + c) * heads + h) * d_key + i, du, mask=inside)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


class _Plan:
    """What the launches of one call have in common."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Tensor | None, reset: Tensor | None
    ) -> None:
        self.batch, self.length, self.heads, self.d_value = v.shape
        self.d_key = k.shape[3]
        self.per_group = self.heads // k.shape[2]
        self.q, self.k, self.v, self.log_a, self.bonus = q, k, v, log_a, bonus
        self.reset = _common.flags(reset)
        self.per_key = log_a.shape[3] > 1
        self.state = torch.float64 if v.dtype == torch.float64 else torch.float32
        narrow = v.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
        self.chunk, width = (CHUNK, WIDTH) if narrow else (EXACT_CHUNK, EXACT_WIDTH)
        self.chunks = -(-self.length // self.chunk)
        self.bk, self.bv = (min(width, max(16, _common.power_of_two(n))) for n in (self.d_key, self.d_value))
        self.constants = {
            "BONUS": bonus is not None, "CHUNK": self.chunk, "ACC": _common.accumulator(self.state),
            "PRECISION": "tf32" if narrow else "ieee", "num_warps": 4, "num_stages": 1,
        }  # fmt: skip

    def new(self, *shape: int) -> Tensor:
        return self.v.new_empty(shape, dtype=self.state)

    def state_sums(self, m: Tensor, n: Tensor, *, read: bool) -> tuple[Tensor, Tensor]:
        """What every chunk adds to the state, or with `read` to the gradient to it, and its decay; (batch, chunks, -1) each."""
        batch = n.shape[0]
        out = self.new(batch, self.chunks, self.heads * self.d_key * self.d_value)
        decay = self.new(batch, self.chunks, self.heads * self.log_a.shape[3])
        k_blocks, v_blocks = -(-self.d_key // self.bk), -(-self.d_value // self.bv)
        _common.launch(
            _chunk_sums, batch * self.chunks * self.heads * k_blocks * v_blocks, n, m, n, self.log_a, self.reset, out, decay,
            *_strides(m), *_strides(n), *_strides(self.log_a), self.length, self.heads, self.per_group, self.d_key,
            self.d_value, self.chunks, k_blocks, v_blocks, self.batch, READ=read, PER_KEY=self.per_key, BK=self.bk,
            BV=self.bv, **self.constants,
        )  # fmt: skip
        return out, decay

    def scan(self, sums: Tensor, decay: Tensor, start: Tensor | None, *, reverse: bool = False) -> Tensor:
        repeat = self.d_value if self.per_key else self.d_key * self.d_value
        start = None if start is None else start.flatten(1).contiguous()
        return _linear.scan(decay, sums, start, reverse=reverse, repeat=repeat)

    def scores(self) -> Tensor:
        out = self.new(self.batch, self.length, self.heads, self.chunk)
        arguments = (
            self.q, self.k, self.log_a, self.reset, self.bonus, out, *_strides(self.q), *_strides(self.k),
            *_strides(self.log_a), self.length, self.heads, self.per_group, self.d_key, self.chunks,
        )  # fmt: skip
        programs = self.batch * self.chunks * self.heads
        if self.per_key:
            _common.launch(_scores_by_key, programs * (self.chunk // SUB), self.v, *arguments, SUB=SUB, BK=self.bk,
                           **self.constants)  # fmt: skip
        else:
            _common.launch(_scores, programs, self.v, *arguments, self.batch, DECAY=True, BK=self.bk, **self.constants)
        return out

    def outputs(
        self, scores: Tensor, n: Tensor, m: Tensor, ends: Tensor, edge: Tensor | None, out: Tensor, *, keys: bool
    ) -> None:
        edge = None if edge is None else edge.contiguous()
        v_blocks = -(-self.d_value // self.bv)
        _common.launch(
            _outputs, n.shape[0] * self.chunks * self.heads * v_blocks, n, scores, n, m, self.log_a, self.reset, ends,
            edge, out, *_strides(n), *_strides(m), *_strides(self.log_a), self.length, self.heads, self.per_group, self.d_key,
            self.d_value, self.chunks, v_blocks, self.batch, ends.shape[0], KEYS=keys, PER_KEY=self.per_key, BK=self.bk,
            BV=self.bv, **self.constants,
        )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    bonus: Tensor | None,
    h0: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
) -> Tensor:
    """Fills y; returns the state (batch, heads, d_key, d_value) after the last token."""
    plan = _Plan(q, k, v, log_a, bonus, reset)
    ends = plan.scan(*plan.state_sums(k, v, read=False), h0)
    plan.outputs(plan.scores(), v, q, ends, h0, y, keys=False)
    return ends[:, -1].reshape(plan.batch, plan.heads, plan.d_key, plan.d_value)


def backward(
    dy: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Tensor | None,
    h0: Tensor | None, reset: Tensor | None, samples: int, dv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Fills dv; returns dq, dk, dlog_a, dbonus (with a first dimension `samples`) and dh0. Nothing is saved by the forward pass:
    the states between chunks are formed again."""
    plan = _Plan(q, k, v, log_a, bonus, reset)
    batch, length, heads, groups = dy.shape[0], plan.length, plan.heads, k.shape[2]
    sums, decay = plan.state_sums(k, v, read=False)
    before = plan.scan(sums, decay, h0)
    sums, _ = plan.state_sums(q, dy, read=True)
    after = plan.scan(sums, decay.repeat(batch // plan.batch, 1, 1), dfinal, reverse=True)
    del sums
    plan.outputs(plan.scores(), dy, k, after, dfinal, dv, keys=True)

    d_scores = plan.new(batch, length, heads, plan.chunk)
    _common.launch(
        _scores, batch * plan.chunks * heads, dy, dy, v, log_a, None, None, d_scores, *_strides(dy), *_strides(v),
        *_strides(log_a), length, heads, 1, plan.d_value, plan.chunks, plan.batch, DECAY=False, BK=plan.bv,
        **(plan.constants | {"BONUS": False}),
    )  # fmt: skip
    bk, bv = min(GRADIENT_WIDTH, plan.bk), min(GRADIENT_WIDTH, plan.bv)
    k_blocks = -(-plan.d_key // bk)
    dq, dk = (plan.new(batch, length, heads, plan.d_key) for _ in range(2))
    dlog_a = plan.new(batch, length, heads, plan.d_key if plan.per_key else k_blocks)
    dbonus = None if bonus is None else plan.new(batch, plan.chunks, heads, plan.d_key)
    h0 = None if h0 is None else h0.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    programs = batch * plan.chunks * heads * k_blocks
    strides = (*_strides(q), *_strides(k))
    sizes = (length, heads, plan.per_group, plan.d_key)
    _common.launch(
        _gradients_by_states, programs, dy, dy, q, k, v, log_a, plan.reset, before, h0, after, dfinal, dq, dk, dlog_a,
        *_strides(dy), *strides, *_strides(v), *_strides(log_a), *sizes, plan.d_value, plan.chunks, k_blocks, plan.batch,
        PER_KEY=plan.per_key, BK=bk, BV=bv, **plan.constants,
    )  # fmt: skip
    kernel, constants = (_gradients_by_pairs_and_key, {"SUB": SUB}) if plan.per_key else (_gradients_by_pairs, {})
    _common.launch(
        kernel, programs, dy, d_scores, q, k, log_a, plan.reset, bonus, dq, dk, dlog_a, dbonus, *strides,
        *_strides(log_a), *sizes, plan.chunks, k_blocks, plan.batch, BK=bk, **constants, **plan.constants,
    )  # fmt: skip

    def grouped(x: Tensor) -> Tensor:
        return x if groups == heads else x.unflatten(2, (groups, plan.per_group)).sum(3)

    return (
        grouped(dq), grouped(dk), dlog_a if plan.per_key else dlog_a.sum(3, keepdim=True),
        None if dbonus is None else dbonus.unflatten(0, (samples, -1)).sum((1, 2)),
        after[:, 0].reshape(batch, heads, plan.d_key, plan.d_value),
    )  # fmt: skip
