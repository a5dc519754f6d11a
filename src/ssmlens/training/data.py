"""What the loop needs of its data: batches by number, cut into the pieces that one process works on.

tokens: (batch, length) int64     targets: (batch, length) int64, IGNORED where there is no target
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmlens.errors import UserError
from ssmlens.targets import IGNORED


class Batch(Protocol):
    """tokens and targets: int64 torch tensors or numpy arrays, the same length in the first dimension."""

    @property
    def tokens(self) -> Any: ...
    @property
    def targets(self) -> Any: ...


class Stream(Protocol):
    """A source with random access: batch(step) is the same for ever, also for a run that was resumed."""

    @property
    def batches_per_epoch(self) -> int | None: ...  # None: no epochs, every batch is drawn afresh
    def batch(self, step: int, /) -> Batch: ...


@dataclass(frozen=True)
class Piece:
    """The part of a batch that one forward pass sees, on the device."""

    tokens: Tensor
    targets: Tensor
    n_targets: int
    weight: float  # its share in the mean over the whole batch's targets, times the number of processes


@dataclass(frozen=True)
class Share:
    """One process's part of a batch."""

    pieces: list[Piece]
    n_tokens: int  # of the whole batch


def share(batch: Batch, *, pieces: int, rank: int, world: int, device: torch.device) -> Share:
    """Cuts out the rows of process `rank` of `world`, in `pieces` for gradient accumulation.

    The weights make the sum of the pieces' mean losses, averaged over processes, the mean over all targets of
    the batch. Raises UserError: when a piece would be empty.
    """
    tokens, targets = torch.as_tensor(batch.tokens), torch.as_tensor(batch.targets)
    parts = world * pieces
    if tokens.shape[0] != targets.shape[0]:
        raise ValueError(f"a batch has {tokens.shape[0]} rows of tokens and {targets.shape[0]} of targets")
    if tokens.shape[0] < parts:
        raise UserError(
            f"a batch of {tokens.shape[0]} cannot be cut into {parts} pieces "
            f"({world} processes × grad_accumulation {pieces})"
        )
    wanted = targets != IGNORED
    total, n_tokens = int(wanted.sum()), tokens.shape[0] * tokens.shape[1]  # a token may be a vector
    if parts == 1:
        return Share([Piece(_move(tokens, device), _move(targets, device), total, 1.0)], n_tokens)
    mine = slice(rank * pieces, (rank + 1) * pieces)
    cut = zip(*(torch.tensor_split(part, parts)[mine] for part in (tokens, targets, wanted)), strict=True)
    done = []
    for piece_tokens, piece_targets, piece_wanted in cut:
        n_targets = int(piece_wanted.sum())
        weight = n_targets * world / max(1, total)
        done.append(Piece(_move(piece_tokens, device), _move(piece_targets, device), n_targets, weight))
    return Share(done, n_tokens)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def shares(
    stream: Stream, start: int, stop: int, *, pieces: int, rank: int, world: int, device: torch.device
) -> Iterator[Share]:
    """The process's shares of batches start..stop-1. Beside a device the next one is made while it works."""

    def make(step: int) -> Share:
        return share(stream.batch(step), pieces=pieces, rank=rank, world=world, device=device)

    if device.type == "cpu":  # a second thread would only take time from the first
        yield from map(make, range(start, stop))
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, start) if start < stop else None
        for step in range(start, stop):
            assert ahead is not None
            now, ahead = ahead.result(), pool.submit(make, step + 1) if step + 1 < stop else None
            yield now
