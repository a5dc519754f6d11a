"""What polarization adds to recall, from finished runs, and what may be said of it.

    gain_s = accuracy(polarized, seed s) - accuracy(default, seed s)      in points, averaged over the numbers of pairs

A run finds the association between key and value or stays near guessing, so beside each mean stands how many runs found it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ssmlens.experiments.base import Outcome, Request, helps, holm
from ssmlens.experiments.recall import FOUND, work
from ssmlens.results import Column, Table, Value
from ssmlens.training import Job, sweep

MARGIN = 1.0  # points: what a gain must reach to be called one
CEILING = 97.0  # %: where both arms are above it, neither shows how much it can hold
HOW_FOUND = (
    f"Found: {FOUND:.0%} right on short sequences, or better than half way from guessing among the values in the sequence to one on those of the "
    "test, when it was looked at or at the end."
)
RULES = (
    f"Agrees (or helps): beyond chance by Holm's correction over the gains of this page, at 5 %, and at least {MARGIN:g} point. Differs: a loss "
    f"beyond chance, or a 95 % interval wholly within ±{MARGIN:g} point. Not comparable: in both arms fewer than half of the runs found the "
    f"association, or both are above {CEILING:g} % on average. The gains of one variant and depth share their default runs, so they are not independent."
)


def trained(jobs: Sequence[Job], request: Request, title: str) -> dict[str, Any]:
    """Results by id, of all; of those that are finished where the sweep is stopped (and there are any)."""
    try:
        return sweep(
            jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
            progress=request.progress, title=title, keep=True,
        )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        paths = {name: request.out / "runs" / name / "result.json" for name, _ in jobs}
        done = {name: json.loads(p.read_text(encoding="utf-8"))["result"] for name, p in paths.items() if p.exists()}
        if not done:
            raise
        return done


def average(run: Mapping[str, Any]) -> float:
    return 100 * sum(run["accuracy"].values()) / len(run["accuracy"])


def mean(samples: Iterable[float], unit: str = "points") -> Value | None:
    """None of none."""
    values = list(samples)
    return Value.mean(values, unit) if values else None


@dataclass(frozen=True)
class Arm:
    """The finished runs of one cell, by seed. guess: accuracy of answering with any value of the sequence."""

    runs: Mapping[int, Mapping[str, Any]]
    guess: float

    @property
    def scores(self) -> dict[int, float]:
        return {seed: average(run) for seed, run in self.runs.items()}

    @property
    def found(self) -> dict[int, float]:
        """The scores of the runs that found the association (HOW_FOUND)."""
        half = 50 * (1 + self.guess)
        return {s: score for s, score in self.scores.items() if score > half or self.runs[s].get("found") is not None}

    @property
    def accuracy(self) -> Value | None:
        return mean(self.scores.values(), "%")

    @property
    def among(self) -> Value | None:
        """The accuracy of those that found it."""
        return mean(self.found.values(), "%")

    @property
    def count(self) -> str:
        return f"{len(self.found)} of {len(self.runs)}"


@dataclass(frozen=True)
class Gain:
    default: Arm
    polarized: Arm

    @property
    def by_seed(self) -> dict[int, float]:
        """As far as both have the seed: the same data stream, so what a seed has in common cancels."""
        before, after = self.default.scores, self.polarized.scores
        return {seed: after[seed] - before[seed] for seed in before if seed in after}

    @property
    def value(self) -> Value | None:
        return mean(self.by_seed.values())

    @property
    def chance(self) -> float | None:
        """Fisher's exact p, two-sided, of the two arms' counts of runs that found it; None where their shares are equal."""
        from scipy.stats import fisher_exact

        table = [[len(arm.found), len(arm.runs) - len(arm.found)] for arm in (self.default, self.polarized)]
        (a, b), (c, d) = table
        return None if a * d == b * c else float(fisher_exact(table).pvalue)

    @property
    def floor(self) -> str | None:
        """Why the gain says nothing where too few have learned anything; None where enough have."""
        arms = (self.default, self.polarized)
        if all(2 * len(arm.found) < len(arm.runs) for arm in arms):
            return f"neither arm found the association in half of its runs (default {arms[0].count}, polarized {arms[1].count})"
        return None

    @property
    def ceiling(self) -> str | None:
        """Why the gain says nothing where both arms hold nearly all; None where one does not."""
        scores = [list(arm.scores.values()) for arm in (self.default, self.polarized)]
        full = all(of and sum(of) / len(of) > CEILING for of in scores)
        return f"ceiling (both arms above {CEILING:g} %)" if full else None

    @property
    def blocked(self) -> str | None:
        return self.floor or self.ceiling

    def cells(self) -> list[Any]:
        """What stands under COUNTED."""
        return [self.default.count, self.polarized.count, self.chance, self.default.among, self.polarized.among]


COUNTED = (
    Column(name="found, default"),
    Column(name="found, polarized"),
    Column(
        name="p", meaning="Fisher's exact test of the two counts, each by itself; none where their shares are equal"
    ),
    Column(name="default, of those", unit="%"),
    Column(name="polarized, of those", unit="%"),
)


@dataclass(frozen=True)
class Change:
    """Between two gains: what having something adds to what polarization adds."""

    without: Gain
    having: Gain

    @property
    def by_seed(self) -> dict[int, float]:
        return less(self.having.by_seed, self.without.by_seed)

    @property
    def value(self) -> Value | None:
        return mean(self.by_seed.values())

    @property
    def blocked(self) -> str | None:
        """One of the two where nothing is learned, or both at the ceiling. One at the ceiling is a finding: there is nothing to gain."""
        return self.without.floor or self.having.floor or (self.without.ceiling and self.having.ceiling)


def less(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """a - b, for the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


class Judged(NamedTuple):
    """p: adjusted; None where there is none, or nothing to be said."""

    outcome: Outcome
    words: str
    p: float | None = None


def judged(
    values: Mapping[str, Value], blocked: Mapping[str, str | None], more: str = "helps", less: str = "hurts"
) -> dict[str, Judged]:
    """What may be said of each, all of them together. blocked: why nothing can be; those are in nobody's way."""
    tests = {name: p for name, v in values.items() if not blocked.get(name) and (p := v.p_value()) is not None}
    adjusted = holm(tests)
    out = {}
    for name, value in values.items():
        if reason := blocked.get(name):
            out[name] = Judged("not comparable", f"not comparable: {reason}")
        elif name not in tests:
            out[name] = Judged("undecided", "nothing can be said about chance")
        else:
            outcome, sure = helps(value, adjusted[name], MARGIN), adjusted[name] < 0.05
            if sure and value.value < 0:
                words = less
            elif outcome == "agrees":
                words = more
            elif outcome == "differs":
                words = f"no difference of {MARGIN:g} point or more"
            elif sure:
                words = f"more than chance, but less than {MARGIN:g} point"
            elif tests[name] < 0.05:
                words = f"alone it would count, among {len(tests)} it may be chance"
            else:
                words = "no difference that these seeds can show"
            out[name] = Judged(outcome, words, adjusted[name])
    return out


def interval(value: Value, unit: str = "points") -> str:
    bounds = value.interval()
    return f"{value.value:+.1f} {unit}" + (
        f" (95 % interval {bounds[0]:+.1f} to {bounds[1]:+.1f})" if bounds else " from one seed"
    )


def unfinished(expected: Iterable[str], results: Mapping[str, Any]) -> list[str]:
    """The note that names the cells with runs that are missing."""
    wanted = [name.rpartition("-seed")[0] for name in expected]
    there = [name.rpartition("-seed")[0] for name in results]
    short = [cell for cell in dict.fromkeys(wanted) if there.count(cell) < wanted.count(cell)]
    if not short:
        return []
    cells = ", ".join(f"{cell} ({there.count(cell)} of {wanted.count(cell)})" for cell in short)
    return [f"Incomplete: {len(results)} of {len(wanted)} runs are finished. Missing in: {cells}."]


def ruled(table: Table) -> Table:
    """The table of claims with the rule that these were decided by."""
    return table.model_copy(
        update={
            "meaning": RULES,
            "method": "The number that decided is ± standard error over seeds, taken seed by seed.",
        }
    )
