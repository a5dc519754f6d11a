"""How a batch is cut: every row once, and weights that add up to the mean over all targets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_tiny import Batch, Stream

from ssmlens.errors import UserError
from ssmlens.training.data import share, shares

CPU = torch.device("cpu")


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_the_pieces_of_all_processes_are_the_batch(rows, world, pieces, seed):
    rng = np.random.default_rng(seed)
    tokens = np.arange(rows * 5).reshape(rows, 5)
    targets = np.where(rng.random((rows, 5)) < 0.5, tokens, -100)
    cut = {"pieces": pieces, "world": world, "device": CPU}
    if rows < world * pieces:
        with pytest.raises(UserError, match=f"a batch of {rows} cannot be cut into {world * pieces}"):
            share(Batch(tokens, targets), rank=0, **cut)
        return
    parts = [share(Batch(tokens, targets), rank=rank, **cut) for rank in range(world)]
    each = [piece for part in parts for piece in part.pieces]
    assert torch.cat([piece.tokens for piece in each]).tolist() == tokens.tolist()
    assert torch.cat([piece.targets for piece in each]).tolist() == targets.tolist()
    assert [piece.n_targets for piece in each] == [int((piece.targets != -100).sum()) for piece in each]
    assert all(part.n_tokens == tokens.size for part in parts)
    # the loss of a token is itself: the mean of the processes' sums of weighted means is the mean over all targets
    total = sum(
        piece.weight * float(piece.targets[piece.targets != -100].double().sum()) / max(1, piece.n_targets)
        for piece in each
    )
    wanted = targets[targets != -100]
    assert total / world == pytest.approx(wanted.mean() if len(wanted) else 0.0)


def test_rows_must_agree():
    with pytest.raises(ValueError, match="2 rows of tokens and 3 of targets"):
        share(Batch(np.zeros((2, 4)), np.zeros((3, 4))), pieces=1, rank=0, world=1, device=CPU)


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])  # meta: as beside a GPU, with the thread ahead
def test_batches_come_in_order(device):
    drawn = []

    class Spy(Stream):
        def batch(self, step):
            drawn.append(step)
            return super().batch(step)

    got = list(shares(Spy(), 3, 8, pieces=1, rank=0, world=1, device=device))
    assert drawn == [3, 4, 5, 6, 7]
    assert len(got) == 5
    assert {part.pieces[0].tokens.device.type for part in got} == {device.type}
    assert list(shares(Spy(), 8, 8, pieces=1, rank=0, world=1, device=device)) == []
