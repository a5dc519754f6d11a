"""MQAR: the form of a sequence, the distributions behind it, and what a stream depends on."""

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ssmlens.errors import UserError
from ssmlens.tasks import IGNORED, Batch
from ssmlens.tasks.base import bits
from ssmlens.tasks.mqar import (
    CHUNK,
    MqarConfig,
    MqarStream,
    Segment,
    _distinct,
    draw,
    paper_test_segments,
    paper_text_mix,
    released_mix,
    sample,
)


def check_form(batch: Batch, pairs: int, vocab_size: int) -> None:
    """Asserts everything that SPEC.md §5 says about every single sequence."""
    lower = vocab_size // 2
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.shape == batch.targets.shape
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < lower for key in keys)
        assert all(lower <= value < vocab_size for value in values)
        value_of = dict(zip(keys, values, strict=True))
        assert all(label == IGNORED for label in targets[: 2 * pairs])
        asked = []
        for position in range(2 * pairs, len(tokens)):
            token, label = tokens[position], targets[position]
            if token == 0:
                assert label == IGNORED
            else:
                assert position % 2 == 0
                assert label == value_of[token]  # at the query's own position
                asked.append(token)
        assert sorted(asked) == sorted(keys)


def sizes() -> st.SearchStrategy[tuple[int, int, int, int]]:
    """(batch, length, pairs, vocab_size), from the smallest to the whole lower half as keys."""
    return st.integers(1, 12).flatmap(
        lambda pairs: st.tuples(
            st.integers(0, 5),
            st.integers(2 * pairs, 2 * pairs + 20).map(lambda half: 2 * half),
            st.just(pairs),
            st.integers(2 * pairs + 2, 4 * pairs + 300),
        )
    )


@given(sizes(), st.integers(0, 2**40), st.floats(-2, 3))
@settings(max_examples=60, deadline=None)
def test_form(size: tuple[int, int, int, int], seed: int, power_a: float) -> None:
    batch, length, pairs, vocab_size = size
    made = sample(batch, length, pairs, vocab_size, power_a, (seed,))
    assert made.tokens.shape == (batch, length)
    check_form(made, pairs, vocab_size)


@pytest.mark.parametrize(("length", "pairs", "vocab_size"), [(1024, 256, 8192), (64, 4, 200_000), (4, 1, 4)])
def test_form_at_real_sizes(length: int, pairs: int, vocab_size: int) -> None:
    made = sample(40, length, pairs, vocab_size)
    check_form(made, pairs, vocab_size)
    assert made.tokens.max() >= vocab_size * 3 // 4  # the upper half is used to its end


def test_every_random_part_varies_between_rows() -> None:
    draws = draw(50, 64, 16, 8192, 0.01, (5,))
    for part in draws:
        assert len({tuple(row) for row in part.tolist()}) == 50


# --------------------------------------------------------------------------------------------- distributions


SURPRISING = 1e-3  # seeds are fixed; over 400 seeds these p-values were uniform (Kolmogorov-Smirnov)


def sequential(weights: list[float], order: tuple[int, ...]) -> float:
    """The probability of drawing `order`, one after the other without replacement."""
    left, chance = sum(weights), 1.0
    for item in order:
        chance *= weights[item] / left
        left -= weights[item]
    return chance


def p_value(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    assert set(seen) <= set(expected)
    total = sum(seen.values())
    return float(chisquare([seen[k] for k in expected], [total * p for p in expected.values()]).pvalue)


@pytest.mark.parametrize("power_a", [0.01, 1.0, 2.5])
def test_slots_are_drawn_in_turn_without_replacement(power_a: float) -> None:
    length, pairs, space = 14, 3, 4  # 24 ordered outcomes; the default's rarest has probability 0.008
    slots = draw(60_000, length, pairs, 100, power_a, (11,)).slots
    weights = [(g + 1) ** (power_a - 1) for g in range(space)]
    expected = {order: sequential(weights, order) for order in permutations(range(space), pairs)}
    assert sum(expected.values()) == pytest.approx(1)
    assert p_value(Counter(map(tuple, slots.tolist())), expected) > SURPRISING


def test_slot_test_has_power() -> None:
    """The chi-square above would notice weights that are only a little different."""
    slots = draw(60_000, 14, 3, 100, 0.06, (11,)).slots
    weights = [(g + 1) ** (0.01 - 1) for g in range(4)]
    expected = {order: sequential(weights, order) for order in permutations(range(4), 3)}
    assert p_value(Counter(map(tuple, slots.tolist())), expected) < SURPRISING


@pytest.mark.parametrize("vocab_size", [10, 13])  # 4 or 5 keys, 5 or 7 values: no power of two, one, none
def test_keys_and_values_are_uniform(vocab_size: int) -> None:
    draws = draw(40_000, 12, 3, vocab_size, 0.01, (3,))
    lower = vocab_size // 2
    for part, range_ in ((draws.keys, range(1, lower)), (draws.values, range(lower, vocab_size))):
        orders = list(permutations(range_, 3))
        seen = Counter(map(tuple, part.tolist()))
        assert p_value(seen, {order: 1 / len(orders) for order in orders}) > SURPRISING


def test_keys_are_uniform_at_full_size() -> None:
    """256 of 4,095 keys in bins of 65 tokens: all, the last column alone, and the mean of every column."""
    keys = draw(2000, 1024, 256, 8192, 0.01, (9,)).keys.astype(np.int64) - 1
    assert chisquare(np.bincount(keys.ravel() // 65, minlength=63)).pvalue > SURPRISING
    assert chisquare(np.bincount(keys[:, -1] // 65, minlength=63)).pvalue > SURPRISING  # the most often redrawn column
    assert abs(keys.mean(axis=0) - 2047).max() < 5 * 4095 / np.sqrt(12 * 2000)


def test_parts_are_independent() -> None:
    draws = draw(60_000, 8, 1, 8, 1.0, (4,))  # one pair: 3 keys, 4 values, 3 slots
    seen = Counter(zip(*(part[:, 0].tolist() for part in draws), strict=True))
    cells = [(k, v, s) for k in (1, 2, 3) for v in (4, 5, 6, 7) for s in (0, 1, 2)]
    assert p_value(seen, dict.fromkeys(cells, 1 / 36)) > SURPRISING


@given(st.integers(1, 40), st.integers(0, 60), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_distinct_numbers_of_any_range(count: int, more: int, seed: int) -> None:
    made = _distinct(bits((seed,)), 7, count, count + more)
    assert made.shape == (7, count)
    assert all(len(set(row)) == count and max(row) < count + more for row in made.tolist())


# ----------------------------------------------------------------------------------------------- determinism


def test_sample_is_a_function_of_its_seed() -> None:
    def made(seed: tuple[int, ...]) -> Any:
        return sample(8, 64, 8, 512, 0.01, seed).tokens.tolist()

    assert made((1, 2)) == made((1, 2))
    seeds = [(1,), (1, 0), (1, 0, 0), (0, 1), (1, 2), (2, 1), (1, 2**31), (2**33, 1)]
    assert len({str(made(seed)) for seed in seeds}) == len(seeds)


def test_data_of_a_seed_never_change() -> None:
    """Results name a seed; if this fails, old records no longer say what was trained on."""
    made = sample(1, 16, 3, 64, 0.01, (2025, 1))
    assert made.tokens.tolist() == [[21, 38, 11, 43, 23, 55, 23, 0, 21, 0, 0, 0, 11, 0, 0, 0]]


def config(**changes: Any) -> MqarConfig:
    train = [
        Segment(length=32, pairs=4, examples=50),
        Segment(length=16, pairs=2, examples=33),
        Segment(length=32, pairs=8, examples=CHUNK + 20),
    ]
    test = [Segment(length=32, pairs=k, examples=20) for k in (4, 8)]
    return MqarConfig(**{"vocab_size": 64, "train": train, "test": test, "batch_size": 16, **changes})


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.group == b.group


@pytest.mark.parametrize("order", ["shuffled", "released"])
@pytest.mark.parametrize("on_the_fly", [False, True])
def test_random_access_equals_sequence(order: str, on_the_fly: bool) -> None:
    settings_ = config(order=order, on_the_fly=on_the_fly)
    stream = MqarStream(settings_)
    steps = 2 * stream.batches_per_epoch + 3
    sequence = [stream.batch(step) for step in range(steps)]
    for step in (steps - 1, 0, stream.batches_per_epoch, 7, stream.batches_per_epoch - 1, 7):
        assert equal(MqarStream(settings_).batch(step), sequence[step])  # a resumed run starts anywhere
        assert equal(stream.batch(step), sequence[step])
    for batch in sequence:
        assert len({len(row) for row in batch.tokens.tolist()}) == 1
        if batch.group is not None:
            check_form(batch, batch.group.pairs, 64)


def test_shuffled_epochs_show_every_example_once() -> None:
    stream = MqarStream(config())
    n = stream.batches_per_epoch
    assert n == -(-(50 + CHUNK + 20) // 16) + -(-33 // 16)
    epochs = [[stream.batch(e * n + i) for i in range(n)] for e in range(2)]
    first, second = (rows_of(epoch) for epoch in epochs)
    assert len(first) == 50 + 33 + CHUNK + 20
    assert len(set(first)) == len(first)
    assert sorted(first) == sorted(second)
    assert first != second
    lengths = [batch.tokens.shape[1] for batch in epochs[0]]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)
    targets = [(batch.targets != IGNORED).sum(1) for batch in epochs[0] if batch.tokens.shape[1] == 32]
    assert sum(len(set(t.tolist())) == 2 for t in targets) > len(targets) / 2  # both numbers of pairs in a batch


def test_mixed_rows_are_well_formed() -> None:
    stream = MqarStream(config(on_the_fly=True))
    for step in range(stream.batches_per_epoch):
        batch = stream.batch(step)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            row = Batch(tokens[None], targets[None])
            check_form(row, int((targets != IGNORED).sum()), 64)


def test_on_the_fly_is_fresh_with_the_same_mix() -> None:
    fixed, fresh = MqarStream(config()), MqarStream(config(on_the_fly=True))
    n = fixed.batches_per_epoch
    assert n == fresh.batches_per_epoch
    rows = rows_of([fresh.batch(step) for step in range(3 * n)])
    assert len(set(rows)) == len(rows)
    for step in range(n):
        a, b = fixed.batch(step), fresh.batch(step)
        assert torch.equal((a.targets != IGNORED).sum(1), (b.targets != IGNORED).sum(1))


def test_released_order_is_one_segment_after_the_other() -> None:
    stream = MqarStream(config(order="released"))
    batches = [stream.batch(step) for step in range(2 * stream.batches_per_epoch)]
    groups = [batch.group for batch in batches]
    expected = [s for s in stream.config.train for _ in range(-(-s.examples // 16))]
    assert groups == expected * 2
    half = stream.batches_per_epoch
    assert all(equal(a, b) for a, b in zip(batches[:half], batches[half:], strict=True))
    assert [len(batch.tokens) for batch in batches[:4]] == [16, 16, 16, 2]


def test_splits_and_seeds_are_separate() -> None:
    segments = [Segment(length=32, pairs=8, examples=300)]
    streams = [MqarStream(config(train=segments, test=segments, seed=seed)) for seed in (0, 1)]
    parts = []
    for stream in streams:
        train = rows_of([stream.batch(step) for step in range(stream.batches_per_epoch)])
        parts += [train, rows_of(list(stream.validation())), rows_of(list(stream.test()))]
    assert all(len(part) == 300 for part in parts)
    everything = [row for part in parts for row in part]
    assert len(set(everything)) == len(everything)


def test_measured_batches() -> None:
    stream = MqarStream(config())
    for make in (stream.validation, stream.test):
        batches = list(make())
        assert [(b.group.length, b.group.pairs, len(b.tokens)) for b in batches] == [
            (32, 4, 16),
            (32, 4, 4),
            (32, 8, 16),
            (32, 8, 4),
        ]
        for batch in batches:
            check_form(batch, batch.group.pairs, 64)
        assert all(equal(a, b) for a, b in zip(batches, make(), strict=True))


def test_test_set_depends_on_neither_batch_size_nor_training_mix() -> None:
    other = config(batch_size=7, train=[Segment(length=8, pairs=1, examples=9)], on_the_fly=True)
    assert rows_of(list(MqarStream(config()).test())) == rows_of(list(MqarStream(other).test()))


def test_more_examples_keep_the_first() -> None:
    few, many = ([Segment(length=32, pairs=8, examples=n)] for n in (CHUNK + 5, 2 * CHUNK + 100))
    short, long = (rows_of(list(MqarStream(config(test=test)).test())) for test in (few, many))
    assert long[: len(short)] == short


def test_paper_scale_is_small_and_at_once() -> None:
    stream = MqarStream(MqarConfig(train=paper_text_mix(), test=paper_test_segments(), batch_size=128))
    assert stream.batches_per_epoch == 5 * 469
    batch = stream.batch(64 * stream.batches_per_epoch - 1)
    assert 4 * int((batch.targets != IGNORED).sum(1).max()) == batch.tokens.shape[1]
    assert (
        sum(part.nbytes for s in paper_text_mix() for part in draw(1, s.length, s.pairs, 8192, 0.01, (0,))) * (20_000)
        < 110e6
    )


# ---------------------------------------------------------------------------------------- mixes and mistakes


def test_mixes() -> None:
    text = [(s.length, s.pairs, s.examples) for s in paper_text_mix()]
    assert text[:4] == [(64, 4, 20_000), (64, 8, 20_000), (64, 16, 20_000), (128, 8, 20_000)]
    assert len(text) == 15
    assert text[-1] == (1024, 256, 20_000)
    released = [(s.length, s.pairs, s.examples) for s in released_mix()]
    assert released[:3] == [(64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000)]
    assert len(released) == 11
    assert sum(s[2] for s in released) == 300_000
    assert [(s.length, s.pairs) for s in released_mix(256)] == [s[:2] for s in released[:5]]
    assert [(s.length, s.pairs, s.examples) for s in paper_test_segments()] == [
        (1024, 64, 1000),
        (1024, 128, 1000),
        (1024, 256, 1000),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample(1, 64, 17), "17 pairs need a length of at least 68, not 64"),
        (lambda: sample(1, 65, 4), "even length, not 65"),
        (lambda: sample(1, 64, 0), "at least one pair"),
        (lambda: sample(1, 64, 16, 33), "vocabulary of at least 34 tokens, not 33"),
        (lambda: Segment(length=16, pairs=5, examples=1), "5 pairs need a length of at least 20"),
        (lambda: Segment(length=16, pairs=4, examples=0), "Segment: examples"),
        (lambda: Segment(lenght=16, pairs=4, examples=1), "no key 'lenght'; did you mean 'length'"),
        (lambda: config(vocab_size=12), "8 pairs need a vocabulary of at least 18"),
        (lambda: config(ordr="released"), "did you mean 'order'"),
        (lambda: config(order="sorted"), "MqarConfig: order"),
        (lambda: config(train=[]), "MqarConfig: train"),
        (lambda: config(test=paper_test_segments(32) * 2), "test has two segments of length 32 and 2 pairs"),
        (lambda: config(train=[{"length": 8, "pairs": 1, "example": 1}]), "did you mean 'examples'"),
        (lambda: MqarStream(config()).batch(-1), "steps count from 0"),
    ],
)
def test_mistakes_are_user_errors(call: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_configs_survive_json_and_are_frozen() -> None:
    made = config(order="released", seed=7)
    assert MqarConfig.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(Exception, match="frozen"):
        made.seed = 8  # type: ignore[misc]
