"""Multi-query associative recall (MQAR): remember K pairs, then answer for each key once (SPEC.md §5).

    position  0   1   2   3   ...  2K-2 2K-1 | 2K  2K+1  2K+2  2K+3  ...
    token     k₁  v₁  k₂  v₂  ...  k_K  v_K  | 0   0     k₂    0     ...   filler is token 0
    label     -   -   -   -   ...  -    -    | -   -     v₂    -     ...   the value is at the query itself

Keys are distinct tokens of 1 .. V/2-1, values distinct tokens of V/2 .. V-1. Behind the pairs lie (length -
2K)/2 slots of two positions; slot g = 1, 2, ... has weight g^(power_a - 1). The i-th pair is asked at the
start of the i-th slot drawn without replacement. (The released code aligns targets in the same way: built one
position longer, then cut by the first column.)

Everything is drawn for many rows at once and kept as (keys, values, slots) in 16 bits: the whole training mix
of the paper, 300,000 sequences, is 105 MB. `Segment` is a shape, `sample` a batch, `MqarStream` epochs.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt
from numpy.random import SFC64
from pydantic import Field, model_validator

from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.targets import IGNORED
from ssmlens.tasks.base import Batch, Seed, bits, check_step, permutation, words

POWER_A = 0.01
VOCAB_SIZE = 8192
CHUNK = 256  # rows drawn together when a fixed example is first needed; part of what a seed means
_TRAIN, _VALIDATION, _TEST, _ORDER = range(4)  # the second number of every seed: streams of their own


class Segment(Config):
    """`examples` sequences of `length` tokens that hold `pairs` keys with their values."""

    length: int
    pairs: int
    examples: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits(self) -> "Segment":
        check(self.length, self.pairs)
        return self


def check(length: int, pairs: int, vocab_size: int | None = None) -> None:
    """Raises: UserError when such sequences don't exist, or their vocabulary is too small."""
    if pairs < 1:
        raise UserError(f"MQAR needs at least one pair, not {pairs}")
    if length % 2:
        raise UserError(f"MQAR needs an even length, not {length}: keys stand at even positions")
    if 4 * pairs > length:
        raise UserError(
            f"{pairs} pairs need a length of at least {4 * pairs}, not {length}: two positions to tell each "
            "pair and two to ask for it"
        )
    if vocab_size is not None and pairs > vocab_size // 2 - 1:
        raise UserError(
            f"{pairs} pairs need a vocabulary of at least {2 * pairs + 2} tokens, not {vocab_size}: "
            "keys are distinct tokens of its lower half without 0"
        )


# ---------------------------------------------------------------------------------------------------- drawing


Rows = Int64[np.ndarray, " rows"]
Table = Int64[np.ndarray, "rows length"]


class Draws(NamedTuple):
    """What is random in some rows. The query of pair i is at position 2 pairs + 2 slots[:, i]."""

    keys: UInt[np.ndarray, "rows pairs"]
    values: UInt[np.ndarray, "rows pairs"]
    slots: UInt[np.ndarray, "rows pairs"]


def sample(
    batch: int,
    length: int,
    pairs: int,
    vocab_size: int = VOCAB_SIZE,
    power_a: float = POWER_A,
    seed: Seed = (0,),
) -> Batch:
    """`batch` sequences, a function of the arguments alone: tokens, targets (batch, length) int64.

    seed: non-negative integers; any two tuples give independent batches.
    Raises: UserError for impossible sizes.
    """
    tokens, targets = _blank(batch, length)
    write(draw(batch, length, pairs, vocab_size, power_a, seed), np.arange(batch), tokens, targets)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def draw(rows: int, length: int, pairs: int, vocab_size: int, power_a: float, seed: Seed) -> Draws:
    """The random part of `rows` sequences, in 16 bits if they suffice. Raises: UserError as `check` does."""
    check(length, pairs, vocab_size)
    source, lower = bits(seed), vocab_size // 2
    store = _store(length, vocab_size)
    keys = _distinct(source, rows, pairs, lower - 1).astype(store) + store(1)
    values = _distinct(source, rows, pairs, vocab_size - lower).astype(store) + store(lower)
    slots = _slots(source, rows, pairs, length // 2 - pairs, power_a).astype(store)
    return Draws(keys, values, slots)


def write(draws: Draws, rows: Rows, tokens: Table, targets: Table) -> None:
    """Writes sequences into the given rows of blank tables, in place."""
    pairs, length = draws.keys.shape[1], tokens.shape[1]
    begin = rows[:, None] * length
    key = begin + 2 * np.arange(pairs)
    query = begin + 2 * pairs + 2 * draws.slots.astype(np.int64)
    flat = tokens.reshape(-1)
    flat[key], flat[key + 1], flat[query] = draws.keys, draws.values, draws.keys
    targets.reshape(-1)[query] = draws.values


def _blank(rows: int, length: int) -> tuple[Table, Table]:
    return np.zeros((rows, length), np.int64), np.full((rows, length), IGNORED, np.int64)


def _store(length: int, vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if max(length, vocab_size) <= 2**16 else np.uint32


def _distinct(source: SFC64, rows: int, count: int, below: int) -> UInt[np.ndarray, "rows count"]:
    """In every row `count` distinct numbers of 0 .. below-1, every sequence of them equally likely.

    Draws with replacement and skips what is out of range or was there before, which is exactly drawing
    without replacement, and needs no array as wide as the vocabulary. One sort of (number, position) finds
    all repeats.
    """
    mask = (1 << (below - 1).bit_length()) - 1
    chance = (below - np.arange(count)) / (mask + 1)  # that a draw is of use when i numbers are taken
    spread = math.sqrt(float(np.sum((1 - chance) / chance**2)))
    width = math.ceil(float(np.sum(1 / chance)) + 4.5 * spread)
    drawn = _numbers(source, rows, width, mask)
    while True:
        place = np.arange(drawn.shape[1], dtype=np.uint64)
        ordered = np.sort(drawn.astype(np.uint64) << np.uint64(32) | place, axis=1)
        number, place = ordered >> np.uint64(32), ordered & np.uint64(2**32 - 1)
        useful = drawn < below
        row, rank = np.nonzero(number[:, 1:] == number[:, :-1])
        useful[row, place[row, rank + 1]] = False
        so_far = useful.cumsum(axis=1, dtype=np.int32)
        if so_far[:, -1].min(initial=count) >= count:
            return drawn[useful & (so_far <= count)].reshape(rows, count)
        # Rare: some row had too many repeats.
        drawn = np.hstack([drawn, _numbers(source, rows, 1 + width // 4, mask)])


def _numbers(source: SFC64, rows: int, width: int, mask: int) -> UInt[np.ndarray, "rows width"]:
    """Uniform numbers of 0 .. mask, cut from 64-bit words in little-endian order."""
    kind = np.dtype("<u2" if mask < 2**16 else "<u4")
    count = rows * width
    raw = words(source, -(-count * kind.itemsize // 8)).astype("<u8", copy=False)
    return raw.view(kind)[:count].reshape(rows, width) & kind.type(mask)


def _slots(source: SFC64, rows: int, count: int, space: int, power_a: float) -> Table:
    """In every row `count` of `space` slots, drawn in turn without replacement.

    Slot 0, 1, ... has weight (slot + 1)^(power_a - 1) and waits for an exponential time of that rate; the
    order in which the times run out is that of the draws. (Gumbel noise on log weights does the same.)
    """
    uniform = (words(source, rows * space) >> np.uint64(11)).reshape(rows, space) * 2.0**-53
    waiting = -np.log1p(-uniform) * np.arange(1, space + 1) ** (1 - power_a)
    return np.argsort(waiting, axis=1)[:, :count]


# ------------------------------------------------------------------------------------------------------ mixes


def paper_text_mix(lengths: Iterable[int] = (64, 128, 256, 512, 1024), examples: int = 20_000) -> tuple[Segment, ...]:
    """The training mix of the paper's text: pairs 12.5, 25, 50 % of half the length (length/16, /8, /4)."""
    return tuple(
        Segment(length=length, pairs=length // share, examples=examples) for length in lengths for share in (16, 8, 4)
    )


def released_mix(longest: int = 1024, examples: int = 20_000) -> tuple[Segment, ...]:
    """The training mix of the released code: five times as many of length 64, none longer than `longest`."""
    shapes = [(64, 4), (128, 8), *((256, k) for k in (16, 32, 64)), *((512, k) for k in (32, 64, 128))]
    shapes += [(1024, k) for k in (64, 128, 256)]
    return tuple(
        Segment(length=length, pairs=pairs, examples=examples * (5 if length == 64 else 1))
        for length, pairs in shapes
        if length <= longest
    )


def paper_test_segments(length: int = 1024, examples: int = 1000) -> tuple[Segment, ...]:
    """What the paper measures on: length/16, /8 and /4 pairs, which is 64, 128 and 256 at length 1024."""
    return paper_text_mix([length], examples)


class MqarConfig(Config):
    """A training mix and what it is measured on.

    order: "shuffled" (batches of one length in random order, rows of all its numbers of pairs in each, every
        example once an epoch) or "released" (one segment after the other, never shuffled).
    on_the_fly: fresh examples in every epoch instead of a finite set; their mix is the same.
    """

    vocab_size: Annotated[int, Field(ge=4, le=2**31)] = VOCAB_SIZE
    power_a: Annotated[float, Field(allow_inf_nan=False)] = POWER_A
    train: Annotated[tuple[Segment, ...], Field(min_length=1)]
    test: Annotated[tuple[Segment, ...], Field(min_length=1)]
    order: Literal["shuffled", "released"] = "shuffled"
    batch_size: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    on_the_fly: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "MqarConfig":
        for name, segments in (("train", self.train), ("test", self.test)):
            shapes = [(s.length, s.pairs) for s in segments]
            for length, pairs in shapes:
                check(length, pairs, self.vocab_size)
                if shapes.count((length, pairs)) > 1:
                    # Examples depend on the shape, not on the place in the list, so both would hold the same.
                    raise UserError(f"{name} has two segments of length {length} and {pairs} pairs: make them one")
        return self


# ---------------------------------------------------------------------------------------------------- streams


class MqarStream:
    """Batches of an MqarConfig. `batch(step)` depends on nothing but the config and the step.

    validation() and test() draw the test segments from two streams of their own, the same at every call.
    """

    def __init__(self, config: MqarConfig) -> None:
        self.config = config
        self._fixed: dict[tuple[int, Segment], _Fixed] = {}
        self._plan: tuple[int, list[Rows]] | None = None
        # Training examples are numbered through; a batch has those of one length (released: one segment).
        self._first = np.cumsum([0, *(s.examples for s in config.train)])
        each = [np.arange(a, b) for a, b in zip(self._first[:-1], self._first[1:], strict=True)]
        released = config.order == "released"
        keys = [(s.length, s.pairs if released else 0) for s in config.train]
        self._groups: list[Rows] = [
            np.concatenate([n for n, k in zip(each, keys, strict=True) if k == key]) for key in dict.fromkeys(keys)
        ]

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must find again beside the config: nothing."""
        return {}

    @property
    def batches_per_epoch(self) -> int:
        """Batches until every example was there once; the last of a length (or segment) may be smaller."""
        return sum(math.ceil(len(numbers) / self.config.batch_size) for numbers in self._groups)

    def batch(self, step: int) -> Batch:
        """The training batch of global step 0, 1, ...; `group`: its Segment, None if of several."""
        check_step(step)
        config = self.config
        epoch, index = divmod(step, self.batches_per_epoch)
        numbers = self._planned(epoch)[index]
        home = np.searchsorted(self._first, numbers, side="right") - 1
        tokens, targets = _blank(len(numbers), config.train[home[0]].length)
        homes = np.unique(home)
        for i in homes:
            segment, rows = config.train[i], np.nonzero(home == i)[0]
            if config.on_the_fly:
                draws = _draw(config, segment, len(rows), _TRAIN, epoch, index)
            else:
                draws = self._store(_TRAIN, segment).rows(numbers[rows] - self._first[i])
            write(draws, rows, tokens, targets)
        group = config.train[homes[0]] if len(homes) == 1 else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), group)

    def validation(self) -> Iterator[Batch]:
        """Batches to choose by, one segment of `config.test` after the other; `group` is the Segment."""
        return self._measured(_VALIDATION)

    def test(self) -> Iterator[Batch]:
        """Batches to report, of the same segments as validation and from another stream."""
        return self._measured(_TEST)

    def _measured(self, split: int) -> Iterator[Batch]:
        for segment in self.config.test:
            for start in range(0, segment.examples, self.config.batch_size):
                index = np.arange(start, min(start + self.config.batch_size, segment.examples))
                tokens, targets = _blank(len(index), segment.length)
                write(self._store(split, segment).rows(index), np.arange(len(index)), tokens, targets)
                yield Batch(torch.from_numpy(tokens), torch.from_numpy(targets), segment)

    def _store(self, split: int, segment: Segment) -> "_Fixed":
        key = (split, segment)
        if key not in self._fixed:
            self._fixed[key] = _Fixed(self.config, segment, split)
        return self._fixed[key]

    def _planned(self, epoch: int) -> list[Rows]:
        """The example numbers of every batch of an epoch; the last epoch asked for is kept."""
        if self._plan is None or self._plan[0] != epoch:
            size, seed, shuffled = self.config.batch_size, self.config.seed, self.config.order == "shuffled"
            plan: list[Rows] = []
            for i, numbers in enumerate(self._groups):
                if shuffled:
                    numbers = numbers[permutation(len(numbers), (seed, _ORDER, epoch, i))]
                plan += [numbers[start : start + size] for start in range(0, len(numbers), size)]
            if shuffled:
                plan = [plan[i] for i in permutation(len(plan), (seed, _ORDER, epoch))]
            self._plan = (epoch, plan)
        return self._plan[1]


class _Fixed:
    """The finite examples of one segment: drawn in chunks when first asked for, then kept."""

    def __init__(self, config: MqarConfig, segment: Segment, split: int) -> None:
        self.config, self.segment, self.split = config, segment, split
        shape, store = (segment.examples, segment.pairs), _store(segment.length, config.vocab_size)
        self.draws = Draws(np.empty(shape, store), np.empty(shape, store), np.empty(shape, store))
        self.drawn = np.zeros(math.ceil(segment.examples / CHUNK), dtype=bool)

    def rows(self, index: Rows) -> Draws:
        """The examples of these numbers, each 0 .. examples-1."""
        for chunk in np.unique(index // CHUNK):
            if not self.drawn[chunk]:
                self._fill(int(chunk))
        return Draws(*(part[index] for part in self.draws))

    def _fill(self, chunk: int) -> None:
        # The last chunk is drawn whole too: with more examples, the first ones stay what they were.
        draws = _draw(self.config, self.segment, CHUNK, self.split, chunk)
        for kept, new in zip(self.draws, draws, strict=True):
            part = kept[chunk * CHUNK : (chunk + 1) * CHUNK]
            part[:] = new[: len(part)]
        self.drawn[chunk] = True


def _draw(config: MqarConfig, segment: Segment, rows: int, split: int, *place: int) -> Draws:
    length, pairs = segment.length, segment.pairs
    seed = (config.seed, split, length, pairs, *place)
    return draw(rows, length, pairs, config.vocab_size, config.power_a, seed)
