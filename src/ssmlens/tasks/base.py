"""What the tasks share: the batch, the manner of their configs, and seeded random numbers.

Everything random is made from the raw words of NumPy's SFC64. NumPy promises that those stay the same from
version to version, which it does not for `Generator.integers`, `permutation` and the like.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt64
from numpy.random import SFC64, SeedSequence
from torch import Tensor

from ssmlens.errors import UserError

Seed = tuple[int, ...]


class Batch(NamedTuple):
    """Token sequences of one length. targets[i, t] is what to predict at position t: nothing is shifted."""

    tokens: Int[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"]
    group: Any = None  # what the rows have in common, so as to report it apart: in MQAR their Segment


def bits(seed: Seed) -> SFC64:
    """The bit stream of a seed tuple. Different tuples, prefixes included, have independent streams."""
    entropy, *key = seed
    return SFC64(SeedSequence(entropy, spawn_key=key))


def words(source: SFC64, count: int) -> UInt64[np.ndarray, " count"]:
    """The next `count` words of 64 random bits."""
    return np.asarray(source.random_raw(count), dtype=np.uint64)


def permutation(count: int, seed: Seed) -> Int64[np.ndarray, " count"]:
    """A uniformly random order of 0..count-1: that of as many random words of 64 bits."""
    return np.argsort(words(bits(seed), count), kind="stable")


def check_step(step: int) -> None:
    """Raises: UserError for a negative step, which would otherwise quietly count from the end."""
    if step < 0:
        raise UserError(f"step {step}: steps count from 0")
