"""Times that can be compared on a machine that others use too: contenders take turns, round after round, in one process, and a
ratio is taken inside a round, so that a slow moment hits both. Reported are medians over rounds with their robust standard error."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssmlens.results import Value

Report = Callable[[float], None]  # told what share of a measurement is done


@dataclass(frozen=True)
class Contender:
    """Something to time. run: one call, whose result is thrown away."""

    name: str
    run: Callable[[], object]


Times = dict[str, list[float]]  # seconds by contender, one a round it took part in


def contenders(calls: dict[str, Callable[[], object]]) -> list[Contender]:
    return [Contender(name, run) for name, run in calls.items()]


def in_turns(these: Sequence[Contender], *, rounds: int, budget: float, report: Report = lambda _: None) -> Times:
    """Seconds of every contender in each of `rounds` rounds, after one untimed call. One that has used up its `budget` of seconds
    sits out the later rounds (it has been timed at least once). One whose first call takes longer than that is not called again."""
    times: Times = {c.name: [] for c in these}
    turns, done = len(these) * (rounds + 1), 0
    for turn in range(rounds + 1):
        for c in these:
            spent = times[c.name]
            if sum(spent) < budget:
                seconds = _seconds(c.run)
                if turn > 0 or seconds > budget:
                    spent.append(seconds)
            done += 1
            report(done / turns)
    return times


def beside(own: Contender, slow: Contender, *, rounds: int, report: Report = lambda _: None) -> Times:
    """One call of a contender too slow for turns, then `rounds` of our own (after an untimed one), in the same process."""
    times: Times = {own.name: [], slow.name: [_seconds(slow.run)]}
    report(0.95)
    _seconds(own.run)
    times[own.name] = [_seconds(own.run) for _ in range(rounds)]
    return times


def _seconds(run: Callable[[], object]) -> float:
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        result = run()
        spent = time.perf_counter() - begin
    finally:
        if collecting:
            gc.enable()
    del result
    return spent


def median(samples: Sequence[float], unit: str = "", scale: float = 1.0) -> Value:
    """The median times `scale`; its standard error from the median absolute deviation, which one slow moment does not move."""
    centre = statistics.median(samples)
    n = len(samples)
    if n < 2:
        return Value(value=centre * scale, n=n, unit=unit)
    deviation = 1.4826 * statistics.median(abs(s - centre) for s in samples)
    return Value(value=centre * scale, stderr=1.2533 * deviation / math.sqrt(n) * scale, n=n, unit=unit)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


@dataclass(frozen=True)
class Ratio:
    """How many times as long one takes as another: median and quartiles. calls: how often the one (never more often the other) ran."""

    value: float
    low: float
    high: float
    calls: int

    def __str__(self) -> str:
        digits = 0 if self.value >= 20 else 1 if self.value >= 2 else 2
        spread = f"quartiles {self.low:,.{digits}f} to {self.high:,.{digits}f}"
        return f"{self.value:,.{digits}f} times ({spread if self.calls > 1 else 'from a single call'})"

    def cell(self) -> str:
        """The same for a cell of a table, to three digits."""
        if self.value == self.low == self.high:
            return _short(self.value)
        spread = f"{_short(self.low)} to {_short(self.high)}" if self.calls > 1 else "a single call"
        return f"{_short(self.value)} ({spread})"


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def ratio(times: Times, of: str, to: str) -> Ratio:
    """Seconds of `of` over seconds of `to`: round by round where both took part; against a single call, each one of the others."""
    a, b = times[of], times[to]
    rounds = [x / y for x in a for y in b] if min(len(a), len(b)) == 1 else [x / y for x, y in zip(a, b, strict=False)]
    low, high = quartiles(rounds)
    return Ratio(statistics.median(rounds), low, high, len(a) if len(b) > 1 else 1)
