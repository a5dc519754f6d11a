"""Linear attention with decay over one sequence of chunks: forward and backward as batched matrix products, no autograd here.

Within a chunk the outputs are scores times values, and each chunk reads the state at its beginning and writes to the one at its end:

    y = scores V + rows S_c        S_{c+1} = exp(total_c) S_c + colsᵀ V

(scores, rows, cols, total: `decay`.) The states between chunks are all that is kept for the backward pass.
Sequences are worked through in pieces (some sequences, some chunks) small enough to stay in cache; a piece is laid out as
(chunks, sequences, groups, ...), so that every product is one batched call. Half-precision input is widened a piece at a time.
Masked scores are zeros that are multiplied: an infinity or NaN among v reaches all of its chunk.

Shapes as in `ssmlens.ops.gated_linear_attention`, but bonus: (batch, heads, d_key); states: (chunks + 1, batch, heads, d_key, d_value).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens.ops import _check
from ssmlens.ops.chunked.decay import Decays, dots

CHUNK = 64  # tokens; measured against 32 and 128 by benchmarks/gated_linear_attention.py
PIECE = 1 << 17  # numbers of a (tokens, heads, width) array in one piece: on a CPU the dozen of them stay in cache
PIECE_ON_ACCELERATOR = 1 << 23  # there fewer and larger calls are faster
Maybe = Tensor | None


def chunk_size(length: int) -> int:
    """A power of two: CHUNK, less for a shorter sequence."""
    size = CHUNK
    while size >= 2 * length:  # comparisons, since under torch.compile length may be a symbol
        size //= 2
    return size


@dataclass(frozen=True)
class Place:
    """Where a piece lies: which gradients of each sequence, which sequences, which chunks."""

    samples: slice
    rows: slice
    chunks: slice

    @property
    def count(self) -> int:
        return self.chunks.stop - self.chunks.start

    @property
    def n_samples(self) -> int:
        return self.samples.stop - self.samples.start


class Layout:
    """How the work on arguments of these shapes is divided into pieces.

    samples: how many gradients there are for each sequence, one after another in the gradients' batch."""

    def __init__(self, q: Tensor, v: Tensor, samples: int = 1) -> None:
        self.batch, self.length, self.heads, self.d_value = v.shape
        self.groups, self.d_key = q.shape[2:]
        self.samples = samples
        self.dtype = _check.state_dtype(v)
        self.size = chunk_size(self.length)
        self.chunks = -(-self.length // self.size)
        room = PIECE if v.device.type == "cpu" else PIECE_ON_ACCELERATOR
        one = max(1, self.heads * self.size * max(self.d_key, self.d_value))
        self.rows = max(1, min(self.batch, room // one))  # sequences in a piece
        self.each = max(1, min(samples, room // (one * max(1, self.batch))))  # samples; several only with all sequences
        pieces = -(-self.chunks // max(1, room // (one * self.rows * self.each)))
        self.step = -(-self.chunks // pieces)  # chunks in a piece, all pieces of about the same size

    def sequences(self) -> Iterator[list[Place]]:
        """Some samples and sequences at a time, as the pieces that they consist of."""
        for i in range(0, self.samples, self.each):
            for j in range(0, self.batch, self.rows):
                which = slice(i, min(i + self.each, self.samples)), slice(j, min(j + self.rows, self.batch))
                yield [
                    Place(*which, slice(c, min(c + self.step, self.chunks))) for c in range(0, self.chunks, self.step)
                ]


class Strip:
    """x (batch or samples · batch, length, groups or heads, width) as chunks, without a copy: pieces are copied from it and to it."""

    def __init__(self, layout: Layout, x: Tensor) -> None:
        x = x.unflatten(0, (-1, layout.batch))
        self.whole, self.rest = divmod(layout.length, layout.size)
        tokens = self.whole * layout.size
        self.main = x[:, :, :tokens].unflatten(2, (self.whole, layout.size)).permute(2, 0, 1, 4, 3, 5)
        self.tail = x[:, :, tokens:].permute(0, 1, 3, 2, 4)  # (samples, rows, groups or heads, tokens, width)
        self.size, self.dtype, self.repeated = layout.size, layout.dtype, x.shape[0] == 1

    def _parts(self, at: Place) -> tuple[Tensor, Tensor | None]:
        samples = slice(None) if self.repeated else at.samples
        tail = self.tail[samples, at.rows] if at.chunks.stop > self.whole else None
        return self.main[at.chunks, samples, at.rows], tail

    def take(self, at: Place, out: Maybe = None) -> Tensor:
        """(chunks, sequences in the piece, groups or heads, size, width), contiguous, in `out` if given; zeros beyond the end."""
        main, tail = self._parts(at)
        count, _, rows, *inner = main.shape
        shape = (at.count, at.n_samples, rows, *inner)
        out = main.new_empty(shape, dtype=self.dtype) if out is None else out.view(shape)
        out[:count].copy_(main)
        if tail is not None:
            out[-1, ..., : self.rest, :].copy_(tail)
            out[-1, ..., self.rest :, :] = 0
        return out.flatten(1, 2)

    def put(self, x: Tensor, at: Place) -> None:
        """Write what `take` would read."""
        main, tail = self._parts(at)
        x = x.view(at.count, at.n_samples, -1, *x.shape[2:])
        main.copy_(x[: len(main)])
        if tail is not None:
            tail.copy_(x[-1, ..., : self.rest, :])


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe, reset: Maybe, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states at the beginnings of chunks and at the end of the last (empty unless `save`)."""
    layout = Layout(q, v)
    state = (layout.batch, layout.heads, layout.d_key, layout.d_value)
    final = v.new_zeros(state, dtype=layout.dtype) if h0 is None else _copy(h0, layout.dtype)
    states = v.new_empty((layout.chunks + 1, *state) if save else 0, dtype=layout.dtype)
    if v.numel() == 0 or final.numel() == 0:
        return v.new_zeros(v.shape), final, states
    y = v.new_empty(v.shape)
    place = Strip(layout, y)
    work = _Work(layout, q, k, v, log_a, bonus, reset, keep=False)
    for pieces in layout.sequences():
        for at in pieces:
            work.load(at)
            S = work.states(final[at.rows], states[at.chunks.start : at.chunks.stop + 1, at.rows] if save else None)
            final[at.rows] = S[-1]
            place.put(work.read(S[:-1]), at)
    return y, final, states


def backward(
    dy: Tensor, dfinal: Maybe, states: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe,
    reset: Maybe, samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to q, k, v, log_a, bonus and h0 (the last two empty where there is none)."""
    layout = Layout(q, v, samples)
    many, state = samples * layout.batch, states.shape[1:]
    nothing = q.numel() == 0 or v.numel() == 0
    new = torch.zeros if nothing else torch.empty
    dq, dk, dv, dlog_a = (new(many, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (q, k, v, log_a))
    dstate = v.new_zeros(many, *state[1:], dtype=layout.dtype) if dfinal is None else _copy(dfinal, layout.dtype)
    dstate = dstate.view(samples, *state)
    dbonus = v.new_zeros(samples, *state[:3], dtype=layout.dtype)
    if not nothing:
        work = _Work(layout, q, k, v, log_a, bonus, reset, keep=True)
        places = [Strip(layout, x) for x in (dq, dk, dv, dlog_a)]
        source = Strip(layout, dy)
        for pieces in layout.sequences():
            for at in reversed(pieces):
                work.load(at)
                dout = source.take(at).flatten(0, 2)
                S = states[at.chunks.start : at.chunks.stop + 1, None, at.rows].expand(-1, at.n_samples, *([-1] * 4))
                here = dstate[at.samples, at.rows]
                dS = work.dstates(dout, here.flatten(0, 1))
                here.copy_(dS[0].view(here.shape))
                *gradients, dbonus_here = work.gradients(dout, S.flatten(1, 2), dS[1:].flatten(0, 2))
                for gradient, place in zip(gradients, places, strict=True):
                    place.put(gradient, at)
                if dbonus_here is not None:
                    dbonus[at.samples, at.rows] += dbonus_here.unflatten(0, (at.n_samples, -1))

    def given(gradient: Tensor, x: Maybe) -> Tensor:
        return v.new_empty(0) if x is None else gradient.flatten(0, 1).to(x.dtype)

    return dq, dk, dv, dlog_a, given(dbonus, bonus), given(dstate, h0)


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


class _Work:
    """One piece after another. M: chunks × sequences × groups; R: heads in a group; N: chunks × sequences × heads."""

    def __init__(
        self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, reset: Maybe, *, keep: bool
    ) -> None:
        self.layout, self.bonus_given = layout, bonus
        self.strips = [Strip(layout, x) for x in (q, k, v, log_a)]
        self.reset = None if reset is None else Strip(layout, reset[:, :, None, None])
        self.decays, self.keeping = log_a.shape[-1], keep
        self.R = layout.heads // layout.groups
        self.arrays: dict[int, Decays] = {}  # by size: only the last pieces are smaller

    def load(self, at: Place) -> None:
        """Take a piece's arguments, and compute what its tokens have to do with each other and with the states."""
        q, k, v, decays = self.strips
        layout, bonus, R = self.layout, self.bonus_given, self.R
        self.at, self.v = at, v.take(at)
        self.shape = self.v.shape[:3]  # chunks, sequences, heads
        self.v = self.v.flatten(0, 2)
        M = self.v.shape[0] // R
        if M not in self.arrays:
            self.arrays[M] = Decays(
                M, R, layout.size, layout.d_key, self.decays, self.v[:0], inclusive=bonus is None, keep=self.keeping
            )
        self.array = array = self.arrays[M]
        for x, out in zip((q, k), array.qk, strict=True):
            x.take(at, out)
        self.q, self.k = array.qk[:, :, 0]
        log_a = decays.take(at, array.log_a)
        self.fresh = None
        if self.reset is not None:
            fresh = self.reset.take(at) != 0
            log_a.masked_fill_(fresh, -torch.inf)
            if bonus is not None:  # the state is read before log_a acts on it, but after it has been emptied
                self.fresh = fresh.expand(-1, -1, layout.groups, -1, -1).flatten(0, 2)
                self.q = self.q.clone()
                array.qk[0].masked_fill_(self.fresh[:, None], 0)
        self.scores, self.rows, self.cols, self.keep = array.forward()
        diagonal = self.scores.view(M, R, layout.size, layout.size).diagonal(dim1=2, dim2=3)
        if bonus is None:
            if not array.has_diagonal:
                diagonal.copy_(dots(self.q, self.k)[:, None])
        else:
            u = bonus[at.rows].to(layout.dtype).expand(at.n_samples, *([-1] * 3))
            self.bonus = u.reshape(-1, layout.groups, R, layout.d_key)
            self.qk = self.q * self.k
            weighted = torch.matmul(self._grouped(self.qk), self.bonus.mT)  # (chunks, sequences, groups, size, R)
            diagonal.copy_(weighted.flatten(0, 2).mT)

    def _grouped(self, x: Tensor) -> Tensor:
        """(M, ...) → (chunks, sequences, groups, ...)"""
        return x.view(*self.shape[:2], -1, *x.shape[1:])

    def states(self, start: Tensor, out: Maybe) -> Tensor:
        """The states at the chunks' beginnings and, last, at the end of all: (chunks + 1, sequences, heads, d_key, d_value)."""
        S = out if out is not None and out.is_contiguous() else start.new_empty(self.at.count + 1, *start.shape)
        S[0] = start
        torch.bmm(self.cols.mT, self.v, out=S[1:].flatten(0, 2))
        keep = self.keep.view(*self.shape, -1, 1)
        for now, before, kept in zip(S[1:].unbind(), S[:-1].unbind(), keep.unbind(), strict=True):
            now.addcmul_(kept, before)
        if out is not None and S is not out:
            out.copy_(S)
        return S

    def read(self, S: Tensor) -> Tensor:
        """y, given the states at the chunks' beginnings."""
        y = torch.bmm(self.scores, self.v).baddbmm_(self.rows, S.flatten(0, 2))
        return y.view(*self.shape, *y.shape[1:])

    def dstates(self, dy: Tensor, end: Tensor) -> Tensor:
        """Gradients to `states`, given that to the last of them."""
        dS = end.new_empty(self.at.count + 1, *end.shape)
        dS[-1] = end
        torch.bmm(self.rows.mT, dy, out=dS[:-1].flatten(0, 2))
        keep = self.keep.view(*self.shape, -1, 1)
        steps = list(zip(dS[:-1].unbind(), dS[1:].unbind(), keep.unbind(), strict=True))
        for now, later, kept in reversed(steps):
            now.addcmul_(kept, later)
        return dS

    def gradients(self, dy: Tensor, S: Tensor, dS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Maybe]:
        """To q, k, v, log_a, bonus. S: states at the chunks' beginnings and at the last one's end; dS: gradients to those at ends."""
        before, after = S[:-1].flatten(0, 2), S[1:].flatten(0, 2)
        dv = torch.bmm(self.scores.mT, dy).baddbmm_(self.cols, dS)
        dscores = torch.bmm(dy, self.v.mT)
        drows, dcols = self.array.dends.flatten(1, 2)
        torch.bmm(dy, before.mT, out=drows)
        torch.bmm(self.v, dS.mT, out=dcols)
        dtotal = (dots(after, dS) if self.array.whole else dots(before, dS) * self.keep[..., 0])[:, None]
        dq, dk, dlog_a = self.array.gradients(dscores, dtotal)
        if self.fresh is not None:
            dq.masked_fill_(self.fresh, 0)
        dbonus = None
        if not self.array.has_diagonal:
            dqk = dscores.diagonal(dim1=1, dim2=2).reshape(-1, self.R, dy.shape[1])
            if self.bonus_given is None:
                dqk = dqk.sum(1)[..., None]
            else:
                grouped = self._grouped(dqk)
                dqk = torch.matmul(grouped.mT, self.bonus).flatten(0, 2)
                dbonus = torch.matmul(grouped, self._grouped(self.qk)).sum(0).flatten(1, 2)
            dq.addcmul_(dqk, self.k)
            dk.addcmul_(dqk, self.q)
        heads = (*self.shape, dy.shape[1], -1)
        return self._grouped(dq), self._grouped(dk), dv.view(heads), dlog_a.view(heads), dbonus
