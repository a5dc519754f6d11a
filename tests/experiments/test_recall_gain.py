"""What may be said of a gain: on made-up runs."""

import pytest

from ssmlens.experiments.base import helps
from ssmlens.experiments.recall_gain import Arm, Change, Gain, judged, unfinished
from ssmlens.results import Value

GUESS = 0.15


def arm(*shares):
    return Arm({seed: {"accuracy": {"4": a, "8": a}} for seed, a in enumerate(shares)}, GUESS)


def test_gains_are_paired_by_seed():
    gain = Gain(arm(0.6, 0.8), arm(0.7, 0.9))
    assert gain.value.value == pytest.approx(10)
    assert gain.value.stderr == pytest.approx(0, abs=1e-9), "what a seed has in common cancels"
    assert Gain(arm(0.6), arm(0.7, 0.9)).by_seed == {0: pytest.approx(10)}
    assert Gain(arm(), arm(0.7)).value is None


def test_found_or_not_is_counted_apart_from_how_much_is_held():
    gain = Gain(arm(0.16, 0.15, 0.9, 0.17, 0.16, 0.15), arm(0.9, 0.92, 0.88, 0.9, 0.9, 0.9))
    before, after, p, held_before, held_after = gain.cells()
    assert (before, after) == ("1 of 6", "6 of 6")
    assert p == pytest.approx(2 * 6 / 792)  # both tails of C(12, 5) = 792: 1 and 6, 6 and 1
    assert held_before.value == pytest.approx(90)
    assert held_after.value == pytest.approx(90), "those that learn hold as much"
    assert gain.value.value == pytest.approx((74 + 77 - 2 + 73 + 74 + 75) / 6)
    assert Gain(arm(0.9, 0.9), arm(0.95, 0.95)).chance is None


def test_who_found_it_early_and_holds_little_has_found_it():
    early = Arm({0: {"accuracy": {"4": 0.3}, "found": 150}, 1: {"accuracy": {"4": 0.3}, "found": None}}, GUESS)
    assert early.count == "1 of 2"
    assert early.among.value == pytest.approx(30)


@pytest.mark.parametrize(
    ("default", "polarized", "reason"),
    [
        ((0.15, 0.16, 0.9), (0.9, 0.15, 0.15), "neither arm found"),
        ((0.15, 0.16, 0.15), (0.9, 0.9, 0.15), None),
        ((0.98, 0.99, 0.97), (0.99, 0.99, 0.99), "ceiling"),
        ((0.90, 0.99, 0.97), (0.99, 0.99, 0.99), None),
    ],
)
def test_what_cannot_be_compared(default, polarized, reason):
    blocked = Gain(arm(*default), arm(*polarized)).blocked
    assert blocked is None if reason is None else reason in blocked


def test_a_change_at_one_ceiling_is_a_finding_and_one_without_learning_is_not():
    full, half, none = (
        Gain(arm(0.99, 0.99), arm(0.99, 0.99)),
        Gain(arm(0.6, 0.6), arm(0.9, 0.9)),
        Gain(arm(0.1, 0.1), arm(0.1, 0.1)),
    )
    assert Change(full, half).blocked is None
    assert "ceiling" in Change(full, full).blocked
    assert "neither" in Change(none, half).blocked
    assert "neither" in Change(half, none).blocked


@pytest.mark.parametrize(
    ("value", "stderr", "adjusted", "outcome"),
    [
        (3.0, 0.5, 0.01, "agrees"),
        (3.0, 0.5, 0.06, "undecided"),
        (0.9, 0.2, 0.01, "undecided"),
        (0.2, 0.1, 0.2, "differs"),
        (0.3, 0.1, 0.04, "differs"),
        (-3.0, 0.5, 0.01, "differs"),
        (-3.0, 0.5, 0.06, "undecided"),
    ],
)
def test_a_gain_must_be_sure_and_large_enough(value, stderr, adjusted, outcome):
    assert helps(Value(value=value, stderr=stderr, n=5), adjusted, 1.0) == outcome


def test_a_single_seed_says_nothing():
    assert judged({"a": Value(value=9.0, n=1)}, {})["a"].outcome == "undecided"


def test_the_words_and_the_outcome_are_one_decision():
    weak = Value(value=10.0, stderr=2.2, n=3)  # p = 0.045 alone
    assert weak.p_value() == pytest.approx(0.045, abs=0.002)
    clear = Value(value=10.0, stderr=0.1, n=3)
    alone = judged({"a": weak}, {})["a"]
    assert (alone.outcome, alone.words) == ("agrees", "helps")
    many = judged({"a": weak, "b": weak, "c": clear, "d": clear}, {"d": "ceiling"})
    assert (many["a"].outcome, many["a"].words) == ("undecided", "alone it would count, among 3 it may be chance")
    assert many["c"].words == "helps"
    assert (many["d"].outcome, many["d"].p) == ("not comparable", None)
    assert all(("may be chance" in j.words) <= (j.outcome == "undecided") for j in many.values())


def test_missing_runs_are_named_by_cell():
    expected = [f"{cell}-seed{seed}" for cell in ("a-default-2", "a-both-2") for seed in range(2)]
    assert unfinished(expected, dict.fromkeys(expected)) == []
    (note,) = unfinished(expected, dict.fromkeys(expected[:3]))
    assert "3 of 4" in note
    assert "a-both-2 (1 of 2)" in note
    assert "default" not in note
