"""Times that can be compared on a machine that others use too: contenders take turns, round after round, in one process, and a
ratio is taken inside a round, so that a slow moment hits both. Reported are medians over rounds with their robust standard error."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssmlens.results import Value


@dataclass(frozen=True)
class Contender:
    """Something to time. run: one call, whose result is thrown away. own: one of ours."""

    name: str
    run: Callable[[], object]
    own: bool = False


Times = dict[str, list[float]]  # seconds by contender, one a round it took part in


def in_turns(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    budget: float,
    before: Callable[[str], None] = lambda _: None,
) -> Times:
    """Seconds of every contender in each of `rounds` rounds, after one untimed call. One that has used up its `budget` of seconds
    sits out the later rounds (it has been timed at least once). before(name) is called ahead of every run, for a progress bar."""
    times: Times = {c.name: [] for c in contenders}
    for c in contenders:
        before(c.name)
        first = _seconds(c.run)
        if first > budget:  # too slow for a second call: the one it had counts
            times[c.name].append(first)
    for _ in range(rounds):
        for c in contenders:
            if sum(times[c.name]) < budget or not times[c.name]:
                before(c.name)
                times[c.name].append(_seconds(c.run))
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


def ratios(times: Times, of: str, to: str) -> list[float]:
    """Seconds of `of` over seconds of `to`, round by round."""
    return [a / b for a, b in zip(times[of], times[to], strict=False)]


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
