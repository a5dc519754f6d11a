"""What a part of the benchmark is: units of measurement that stand alone, and how what they found becomes tables and sentences.

A unit's result is JSON: it is kept as soon as it is there, and a part shows what its finished units allow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ssmlens.bench.scales import Scale
from ssmlens.bench.timing import Ratio, Report, Times, median, ratio
from ssmlens.results import Cell, Column, Figure, Table, Value

Results = Mapping[str, Any]  # by unit, those that are finished


@dataclass(frozen=True)
class Expectation:
    """Something the project promises on two cores with AVX2, and what came out. holds: None where that can't be told."""

    what: str
    asked: str
    measured: str
    holds: bool | None


@dataclass(frozen=True)
class Found:
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)


class Part(Protocol):
    """A module of this package."""

    def units(self, s: Scale) -> dict[str, float]:
        """The units by name (fit for a directory), and the seconds each is expected to take on two cores with AVX2."""

    def measure(self, unit: str, s: Scale, report: Report) -> Any: ...
    def found(self, s: Scale, results: Results) -> Found: ...


def seconds_of_turns(calls: Mapping[str, float], s: Scale) -> float:
    """What `in_turns` is expected to take, from the seconds of a call of each contender."""
    return sum(call + min(s.rounds * call, s.budget + call) for call in calls.values())


def loading(s: Scale, seconds: float) -> float:
    """What a process of its own needs to import and build what it measures."""
    return seconds if s.apart else 0.0


def slug(name: str) -> str:
    """A contender's name as part of a unit's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.replace("+", "p")).split()).lower()


def quick_and_slow(calls: Mapping[str, float], s: Scale) -> tuple[list[str], list[str]]:
    """Contenders whose call is expected to be short enough for turns, and the others."""
    slow = [name for name, seconds in calls.items() if seconds > s.slow]
    return [name for name in calls if name not in slow], slow


def method(s: Scale, slow: bool = False) -> str:
    """slow: there may be contenders that get a single call."""
    said = (
        f"Contenders take turns in one process, {s.rounds} rounds after an untimed one; medians over rounds with robust standard errors, "
        f"ratios taken within a round. One that has used {s.budget:g} seconds sits out the rest. "
    )
    if slow:
        said += (
            f"One whose call is expected to take more than {s.slow:g} seconds is called once (n = 1, so without a spread), in a process in "
            "which ours is timed right after it. "
        )
    return said + "float32, CPU."


def together(turns: Times, alone: Mapping[str, Times]) -> Callable[[str, str], tuple[Value, Ratio]]:
    """name, own → (median seconds, ratio to `own`): from the turns, or from the process that a slow contender had."""

    def of(name: str, own: str) -> tuple[Value, Ratio]:
        times = turns if name in turns else alone[name]
        return median(times[name]), ratio(times, name, own)

    return of


def scaled(value: Value, by: float, unit: str) -> Value:
    stderr = None if value.stderr is None else value.stderr * by
    return Value(value=value.value * by, stderr=stderr, n=value.n, unit=unit)


def expectations(these: list[Expectation]) -> Table:
    words = {True: "yes", False: "no", None: "–"}
    rows: list[list[Cell]] = [[e.what, words[e.holds], e.asked, e.measured] for e in these]
    return Table(
        id="expected", title="What is promised, and what this run measured",
        columns=[Column(name="what"), Column(name="holds"), Column(name="promised"), Column(name="measured")],
        rows=rows, meaning="Promised for two cores with AVX2 that have nothing else to do; other machines may differ.",
    )  # fmt: skip
