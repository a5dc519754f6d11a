"""Scores within a chunk of linear attention with decay, and their gradients, by halving; no overflow, no cancellation.

    score_ts = Σ_d q_td k_sd exp(Σ_{r=s+1..t} log_a_rd)   for s < t  (r up to t - 1 where the state is read before it is written)

Take a block of 2b tokens, and s in its first half, t in its second: the sum in the exponent splits at the middle m into a part that
belongs to t and one that belongs to s, both ≤ 0. So all those pairs are one product of two matrices,

    rows_t = q_t f_t,  f_t = exp(Σ_{r=m+1..t} log_a_r)        cols_s = k_s g_s,  g_s = exp(Σ_{r=s+1..m} log_a_r)

and b = 1, 2, 4, .. C/2 covers every pair of a chunk. From b to 2b, f of second halves is multiplied by the decay of the whole first
half, g of first halves by that of the second: sums of log_a are added up, never subtracted, so -inf (a = 0) and 0 (a = 1) are
exact wherever they stand. The gradient to log_a_r goes back along the same tree: a sum of the terms that pass over r,
with nothing in it that would have to cancel.

Where decays are mild, blocks of several b at once are one product, with rows_t = q_t F_t and cols_s = k_s / F_s, F the decay since the
block's beginning: on a CPU, where looking at numbers costs nothing, the largest blocks in which no F is below 2^-MILD. Dimensions that
are zero throughout a chunk (polarization's) do not hinder that: there only a token itself is read, or, read before it is written, the one
before, which is a product along a diagonal of the scores; the rest is computed as if they were one, with rows of zero.

M: chunks × sequences × groups   R: heads in a group   C: chunk size, a power of two   d: d_key   N = M · R   m = C / 2b
q, k: (M, C, d)   log_a: (M, R, C, e), e = d or, for one decay a head, 1   scores: (N, C, C), lower triangular
rows: (N, C, d), what reads the state at the chunk's beginning   cols: (N, C, d), what is written to the one at its end
keep: (N, e, 1), the decay over the whole chunk

Decays are flushed to zero below `smallest`: numbers between that and the smallest normal one would make a product of matrices a
hundred times slower on a CPU.
"""

import math

import torch
from torch import Tensor


def smallest(dtype: torch.dtype) -> int:
    """The exponent of two below which a decay is zero, so that products of two of them are still normal numbers."""
    return -500 if dtype == torch.float64 else -60


def facing(x: Tensor, b: int) -> Tensor:
    """(2, M, R, C, d): f and g, or what is like them → (2, M, R, C / 2b, b, d), a view: of f the second halves of blocks of 2b tokens,
    of g the first halves. One call then does for both what a level asks for."""
    _, M, R, C, d = x.shape
    whole, *rest, token, one = x.stride()
    stride = (whole - b * token, *rest, 2 * b * token, token, one)
    return x.as_strided((2, M, R, C // (2 * b), b, d), stride, x.storage_offset() + b * token)


def corners(x: Tensor, b: int) -> Tensor:
    """The (b, b) squares of (N, C, C) where a second half of 2b tokens meets its first: (N, C / 2b, b, b), a view."""
    n, C, _ = x.shape
    return x.as_strided((n, C // (2 * b), b, b), (C * C, 2 * b * (C + 1), C, 1), x.storage_offset() + b * C)


MILD = 32  # such an F has an exponent that is right to 32 ulp, and so a weight that is right to a few in a million
SMALL = 2  # up to here a sum over b is faster term by term than as a product of matrices or a reduction


class Decays:
    """Arrays for pieces of one shape, used again for every piece."""

    def __init__(self, M: int, R: int, C: int, d: int, e: int, like: Tensor, *, inclusive: bool, keep: bool) -> None:
        """inclusive: rows_t includes a_t itself (the state is read after it is written). keep: for `gradients`."""
        new = like.new_empty
        self.inclusive, self.low, self.start = inclusive, smallest(like.dtype), 0
        self.dead: Tensor | None = None  # (M, R, 1, e): where decays are zero throughout, and treated apart
        self.columns: slice | Tensor = slice(None)  # in which there are any
        self.qk, self.log_a, self.fg = new(2, M, 1, C, d), new(M, R, C, e), new(2, M, R, C, e)
        self.scores, self.ends = like.new_zeros(M * R, C, C), new(2, M, R, C, d)
        self.dends = new(2 if keep else 0, M, R, C, d)  # gradients to rows and cols
        self.base, self.factors = new(2, M, R, C, d), new(2, M, R, C, e)  # where decays are mild
        self.sums = [self.log_a]  # over blocks of 1, 2, 4, .. C tokens
        half = M * R * C * d // 2
        self.spare = new(2, half)
        self.levels: list[_Level] = []
        for b in (1 << i for i in range(C.bit_length() - 1)):
            self.levels.append(_Level(self, b, new(2, half) if keep else self.spare))
            self.sums.append(self.levels[-1].total)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """scores, rows, cols and keep, from what has been put into qk and log_a (which is overwritten)."""
        self._find_dead()
        self._clear(self.log_a)
        for at in self.levels:
            torch.add(*at.halves, out=at.total)
        self.start = self._mild()
        if self.dead is not None and not self.start:
            for total in self.sums:
                total.masked_fill_(self.dead, -torch.inf)
            self.dead = None
        if self.whole:
            self.sums[-1].exp_()
        else:  # sums of log a become decays; exp would be slow where they are small
            for total in self.sums[self.start :]:
                torch.threshold_(total.mul_(math.log2(math.e)), self.low, -torch.inf).exp2_()
        if self.start:
            self._base_scores()
        else:
            self.fg.fill_(1)
            if self.inclusive:
                self.fg[0].copy_(self.log_a)
        for at in self.levels[self.start :]:
            torch.mul(at.qk, at.fg, out=at.scaled)
            torch.bmm(at.rows, at.cols.mT, out=at.product)
            at.corner.copy_(at.product.view(at.corner.shape))
            torch.threshold_(at.fg.mul_(at.over), 2.0**self.low, 0)
        rows, cols = self.ends
        if self.whole:
            rows = self.base[0]
            torch.mul(self.base[1], self.sums[-1], out=cols)
        else:
            torch.mul(self.qk, self.fg, out=self.ends)
        if self.dead is not None:
            self._dead_scores(rows, cols)
        return self.scores, rows.flatten(0, 1), cols.flatten(0, 1), self.sums[-1].view(len(self.scores), -1, 1)

    def _find_dead(self) -> None:
        """Where a decay is zero throughout a chunk; nowhere, where it would cost to look."""
        self.dead = None
        if self.log_a.device.type != "cpu":
            return
        first = torch.isneginf(self.log_a[:, :, :1])
        if first.any():
            columns = first.flatten(0, 2).any(0).nonzero().squeeze(1)
            self.dead = torch.zeros_like(first)
            self.dead[..., columns] = torch.isneginf(self.log_a[..., columns].amax(2, keepdim=True))
            self.columns = slice(None) if first.shape[-1] == 1 else columns

    def _clear(self, x: Tensor) -> None:
        """x (M, R, ..) = 0 where decays are zero throughout. (A mask over all of it would take as long as a product of matrices.)"""
        if self.dead is None:
            return
        if self.dead.shape[-1] == 1:
            x[self.dead[:, :, 0, 0]] = 0
        else:
            x[..., self.columns] = x[..., self.columns].masked_fill_(self.dead[..., self.columns], 0)

    def _mild(self) -> int:
        """How many of the lowest levels one product can cover: none, or at least 3. In blocks of 8 or more the mean decay is then above
        2^-4, and the gradient to log_a, which does cancel here, still has terms beside which the rounding of what cancels is small."""
        if self.log_a.device.type == "cpu":
            for level in range(len(self.levels), 2, -1):
                if self.sums[level].min() >= -MILD * math.log(2):
                    return level
        return 0

    @property
    def whole(self) -> bool:
        """Whether one product covers the chunk."""
        return self.start == len(self.levels) > 0

    def _base_scores(self) -> None:
        """Scores within blocks of 2^start tokens; f from the blocks' beginnings and g to their ends, where there are larger ones."""
        (rows, cols), (shifted, since) = self.base, self.factors
        size = 1 << self.start
        since.copy_(self.log_a)
        for at in self.levels[: self.start]:
            at.later.add_(at.over[0])
        since.exp_()
        if not self.inclusive:  # a row sees the decay up to the token before
            _blocks(shifted, size)[..., 0, :] = 1
            _blocks(shifted, size)[..., 1:, :] = _blocks(since, size)[..., :-1, :]
        own = since if self.inclusive else shifted
        torch.mul(self.qk[0], own, out=rows)
        torch.div(self.qk[1], since, out=cols)
        self._clear(rows)
        if not self.whole:
            self.fg[0].copy_(own)
            torch.div(self.sums[self.start][..., None, :], _blocks(since, size), out=_blocks(self.fg[1], size))
            for x in self.fg:
                self._clear(x)
        rows, cols = (x.view(-1, size, x.shape[-1]) for x in (rows, cols))
        below = 0 if self.inclusive else -1
        if len(rows) == len(self.scores):
            torch.bmm(rows, cols.mT, out=self.scores).tril_(below)
        else:
            squares(self.scores, size).copy_(torch.bmm(rows, cols.mT).tril_(below).unflatten(0, (len(self.scores), -1)))

    def _dead_scores(self, rows: Tensor, cols: Tensor) -> None:
        """A token meets itself or the one before; the first reads the state, if it is read before it is written; the last writes to it."""
        dead, shift = self.dead, 0 if self.inclusive else 1
        assert dead is not None
        near = (self._dead_part(0)[:, :, shift:] * self._dead_part(1)[:, :, : self.qk.shape[3] - shift]).sum(-1)
        self.scores.diagonal(-shift, 1, 2).add_(near.flatten(0, 1))
        for x in (self.sums[-1], cols):
            self._clear(x)
        cols[:, :, -1:].add_(self.qk[1, :, :, -1:] * dead)
        if not self.inclusive:
            rows[:, :, :1].add_(self.qk[0, :, :, :1] * dead)

    def _dead_part(self, i: int) -> Tensor:
        """q or k where decays are zero throughout, of the columns in which there are any: (M, R, C, columns)."""
        assert self.dead is not None
        dead = self.dead if self.dead.shape[-1] == 1 else self.dead[..., self.columns]
        return self.qk[i][..., self.columns] * dead

    def _dead_gradients(self, dscores: Tensor, dlog_a: Tensor, dfirst: Tensor, dlast: Tensor) -> None:
        """What `_dead_scores` did. dfirst, dlast: to the first of rows and the last of cols."""
        dead, (drows, dcols), shift = self.dead, self.dends, 0 if self.inclusive else 1
        assert dead is not None
        for x in (drows, dcols, dlog_a):
            self._clear(x)
        dcols[:, :, -1:].add_(dlast * dead)
        if not self.inclusive:
            drows[:, :, :1].add_(dfirst * dead)
        stop = drows.shape[2] - shift
        dnear = dscores.diagonal(-shift, 1, 2).view(*drows.shape[:2], stop, 1)
        drows[:, :, shift:, self.columns] += dnear * self._dead_part(1)[:, :, :stop]
        dcols[:, :, :stop, self.columns] += dnear * self._dead_part(0)[:, :, shift:]

    @property
    def has_diagonal(self) -> bool:
        """Whether scores_tt = q_t k_t is among the scores already."""
        return self.inclusive and self.start > 0

    def gradients(self, dscores: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """To q, k (M, C, d) and log_a (M, R, C, e), given those to scores, to log keep (N, 1, d) and, in `dends`, to rows and cols.
        Where `whole`, the gradient to log keep includes what it does to cols."""
        drows, dcols = self.dends
        dfirst, dlast = drows[:, :, :1].clone(), dcols[:, :, -1:].clone()
        dtotal = self._for_decays(dtotal.view(*drows.shape[:2], 1, -1))
        for at in reversed(self.levels[self.start :]):
            at.dscaled.mul_(at.over)
            passed = self._for_decays(_sum_product(at.dscaled, at.scaled, at.spare))
            torch.add(passed, dtotal, out=at.dhalves)
            dtotal = at.dsums
            at.dcorner.copy_(corners(dscores, at.b))
            if at.b <= SMALL:
                _add_small_product(at.dscaled[0], at.dcorner, at.scaled[1])
                _add_small_product(at.dscaled[1], at.dcorner.mT, at.scaled[0])
            else:
                torch.bmm(at.product, at.cols, out=at.spare_rows)
                torch.bmm(at.product.mT, at.rows, out=at.spare_cols)
                at.dscaled.add_(at.spare)
        if self.start:
            dtotal = self._base_gradients(dscores, dtotal)
            if self.dead is not None:
                self._dead_gradients(dscores, dtotal, dfirst, dlast)
        elif self.inclusive:
            drows.mul_(self.log_a)  # which is a, since `forward`
            dtotal.add_(self._for_decays(drows * self.qk[0]))
        return over_heads(drows), over_heads(dcols), dtotal

    def _base_gradients(self, dscores: Tensor, dtotal: Tensor) -> Tensor:
        """To log_a, given that to sums over blocks of 2^start tokens; turns `dends` from those to rows and cols into those to q and k."""
        drows, dcols = self.dends
        (rows, cols), (shifted, since) = self.base, self.factors
        size, d = 1 << self.start, rows.shape[-1]
        over = self.sums[self.start][..., None, :]
        _blocks(dcols, size).mul_(over)  # a block's end gets cols times the decay over it
        if not self.whole:
            dtotal = dtotal + _blocks(self._products(dcols, cols), size).sum(3)
        dsquares = squares(dscores, size).flatten(0, 1).tril(0 if self.inclusive else -1)
        drows.view(-1, size, d).baddbmm_(dsquares, cols.view(-1, size, d))
        dcols.view(-1, size, d).baddbmm_(dsquares.mT, rows.view(-1, size, d))
        reads = self._products(drows, rows)
        if rows.shape == reads.shape:
            passing = torch.addcmul(reads, dcols, cols, value=-1)
        else:
            passing = reads - self._products(dcols, cols)
        passing = passing.view(-1, size, reads.shape[-1])
        later = torch.ones(size, size, dtype=rows.dtype, device=rows.device).triu_()
        dlog_a = torch.bmm(later.expand(len(passing), -1, -1), passing).view(reads.shape)
        _blocks(dlog_a, size).add_(dtotal[..., None, :])
        drows.mul_(since if self.inclusive else shifted)
        dcols.div_(since)
        return dlog_a if self.inclusive else dlog_a.sub_(reads)

    def _for_decays(self, x: Tensor) -> Tensor:
        """(..., d) → (..., e)"""
        return x.sum(-1, keepdim=True) if self.fg.shape[-1] == 1 else x

    def _products(self, x: Tensor, y: Tensor) -> Tensor:
        """x y, (..., d), for each decay: (..., e)"""
        return dots(x, y)[..., None] if self.fg.shape[-1] == 1 else x * y


class _Level:
    """Views and arrays for one size of half blocks. b: tokens in a half; m = C / 2b: blocks in a chunk."""

    def __init__(self, whole: Decays, b: int, room: Tensor) -> None:
        _, M, R, C, d = whole.ends.shape
        m = C // (2 * b)
        self.b = b
        self.halves = _pairs(whole.sums[-1])  # sums over first and over second halves, (2, M, R, m, e)
        self.total = room.new_empty(self.halves.shape[1:])
        self.over = self.halves[..., None, :]
        self.qk, self.fg = facing(whole.qk, b), facing(whole.fg, b)
        self.scaled = room.view(2, M, R, m, b, d)
        self.rows, self.cols = room.view(2, M * R * m, b, d)
        self.product, self.corner = room.new_empty(M * R * m, b, b), corners(whole.scores, b)
        self.later = whole.factors[1].unflatten(2, (m, 2, b))[:, :, :, 1]
        if len(whole.dends):
            self.dscaled, self.dcorner = facing(whole.dends, b), self.product.view(self.corner.shape)
            self.dsums = torch.empty_like(whole.sums[-1])
            self.dhalves = _pairs(self.dsums)
            self.spare = whole.spare.view(self.scaled.shape)
            self.spare_rows, self.spare_cols = whole.spare.view(2, M * R * m, b, d)


def squares(x: Tensor, size: int) -> Tensor:
    """The squares on the diagonal of (N, C, C): (N, C / size, size, size), a view."""
    n, C, _ = x.shape
    return x.as_strided((n, C // size, size, size), (C * C, size * (C + 1), C, 1), x.storage_offset())


def _blocks(x: Tensor, size: int) -> Tensor:
    """(M, R, C, d) → (M, R, C / size, size, d), a view."""
    return x.unflatten(2, (-1, size))


def _pairs(x: Tensor) -> Tensor:
    """(M, R, 2m, e) → (2, M, R, m, e), a view."""
    return x.unflatten(2, (-1, 2)).movedim(3, 0)


def _sum_product(x: Tensor, y: Tensor, spare: Tensor) -> Tensor:
    """Σ_b x y of (..., b, d)"""
    if x.shape[-2] > SMALL:
        return torch.mul(x, y, out=spare).sum(-2)
    out = x[..., 0, :] * y[..., 0, :]
    return out.addcmul_(x[..., 1, :], y[..., 1, :]) if x.shape[-2] == 2 else out


def _add_small_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out (M, R, m, b, d) += x (N, m, b, b) y (M, R, m, b, d)"""
    x = x.unflatten(0, out.shape[:2])
    for j in range(x.shape[-1]):
        out.addcmul_(x[..., j, None], y[..., j, None, :])


def over_heads(x: Tensor) -> Tensor:
    """(M, R, C, d) → (M, C, d), the sum over the heads of a group."""
    return x[:, 0] if x.shape[1] == 1 else x.sum(1)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """(x * y).sum(-1) of contiguous arrays, as products of matrices: faster on a CPU."""
    d = x.shape[-1]
    return torch.bmm(x.view(-1, 1, d), y.view(-1, d, 1)).view(x.shape[:-1])
