"""A time-invariant recurrence whose transition is a dense matrix, for every inner channel its own (S4), in chunks of tokens.

    h_t = Ā h_{t-1} + B̄ x_t        y_t = C h_t
    inside a chunk  y = K ∗ x with K_j = C Ā^j B̄, as a matrix product;  between chunks  h ← Ā^size h + what the chunk leaves

x, y: (batch, length, d_inner)   Ā: (d_inner, state, state)   B̄, C: (d_inner, state)   h: (batch, d_inner, state)
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK = 64  # tokens; about S4's d_state, where the products inside and between chunks cost the same


class Discrete(NamedTuple):
    """Ā, B̄ and the read-out C of every inner channel, real."""

    A: Float[Tensor, "d_inner state state"]
    B: Float[Tensor, "d_inner state"]
    C: Float[Tensor, "d_inner state"]


def dense_recurrence(
    system: Discrete,
    x: Float[Tensor, "batch length d_inner"],
    *,
    h0: Float[Tensor, "batch d_inner state"] | None = None,
    reset: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch length d_inner"], Float[Tensor, "batch d_inner state"]]:
    """y and h_T, in the dtype of the system. reset: the state is emptied before such a token (packed sequences)."""
    return _in_chunks(system, x, h0) if reset is None else _packed(system, x, h0, reset)


def _packed(system: Discrete, x: Tensor, h: Tensor | None, reset: Tensor) -> tuple[Tensor, Tensor]:
    """y and h_T where the state is emptied before some tokens. Each sequence is moved behind as many zeros as make it whole chunks,
    since zeros leave no trace in an empty state; what h does before the first reset is added."""
    batch, length, _ = x.shape
    here = torch.arange(length, device=x.device)
    begins = reset | (here == 0)
    sequence = begins.cumsum(1) - 1  # which one a token belongs to
    size = _chunk(batch * length // max(1, int(begins.sum())))
    lengths = torch.zeros_like(sequence).scatter_add(1, sequence, torch.ones_like(sequence))
    zeros = -lengths % size  # in front of each
    at = here + zeros.cumsum(1).gather(1, sequence)
    total = int(at[:, -1].max()) + 1
    at = at + (total - 1 - at[:, -1:])  # all end together
    first = (at - zeros.gather(1, sequence)) // size  # at a sequence's first token: the chunk in which its zeros begin
    fresh = (
        torch.zeros(batch, total // size, dtype=torch.long, device=x.device).scatter_add(1, first, begins.long()) > 0
    )
    index = at[..., None].expand_as(x)
    y, last = _in_chunks(system, x.new_zeros(batch, total, x.shape[2]).scatter(1, index, x), None, fresh, size)
    y = y.gather(1, index)
    if h is not None:
        untouched = reset.cumsum(1) == 0
        more, left = _in_chunks(system, torch.zeros_like(x), h)
        y = y + more * untouched[..., None]
        last = last + left * untouched[:, -1:, None]
    return y, last


def _chunk(length: int) -> int:
    """A power of two, CHUNK at most, that holds a sequence of this length where one does."""
    return min(CHUNK, 1 << max(0, length - 1).bit_length())


def _in_chunks(
    system: Discrete, x: Tensor, h: Tensor | None, fresh: Tensor | None = None, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """y and h_T. Powers by doubling; per inner channel, matrix products over all chunks of all sequences at once.
    fresh: (batch, chunks) bool, the state is emptied before such a chunk. size: of a chunk, a power of two."""
    batch, length, d = x.shape
    size = size or _chunk(length)
    squares = [system.A]  # Ā^(2^i)
    written, read = system.B[..., None], (system.C[..., None, :] @ system.A).mT  # Ā^j B̄ and (C Ā^(j+1))ᵀ, j < size
    while written.shape[-1] < size:
        power = squares[-1]
        written = torch.cat([written, power @ written], -1)
        read = torch.cat([read, power.mT @ read], -1)
        squares.append(power @ power)
    whole = squares[-1]
    kernel = (system.C[..., None, :] @ written)[..., 0, :]  # (d, size): C Ā^j B̄
    lag = torch.arange(size, device=x.device)[:, None] - torch.arange(size, device=x.device)
    inside = kernel[:, lag.clamp_min(0)] * (lag >= 0)  # (d, t, s)

    chunks, rest = divmod(length, size)
    full = x[:, : chunks * size].unflatten(1, (chunks, size)).permute(3, 2, 0, 1).reshape(d, size, batch * chunks)
    added = (written.flip(-1) @ full).unflatten(-1, (batch, chunks))  # what a chunk leaves in the state
    state = x.new_zeros(d, system.B.shape[-1], batch) if h is None else h.permute(1, 2, 0)
    starts = []
    for c in range(chunks):
        if fresh is not None:
            state = state.masked_fill(fresh[:, c], 0)
        starts.append(state)
        state = whole @ state + added[..., c]
    before = torch.stack(starts, -1).flatten(2) if starts else x.new_zeros(d, system.B.shape[-1], 0)
    y = (inside @ full + read.mT @ before).reshape(d, size, batch, chunks).permute(2, 3, 1, 0).flatten(1, 2)
    if rest:
        last = x[:, chunks * size :].permute(2, 1, 0)
        tail = inside[:, :rest, :rest] @ last + read.mT[:, :rest] @ state
        for i, power in enumerate(squares):  # Ā^rest
            if rest >> i & 1:
                state = power @ state
        state = state + written[..., :rest].flip(-1) @ last
        y = torch.cat([y, tail.permute(2, 1, 0)], 1)
    return y, state.permute(2, 0, 1)
