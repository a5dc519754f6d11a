"""Time over length: forward + backward of the scan at batch 1, by every contender for which a call is affordable."""

import ctypes
from dataclasses import replace
from typing import Any

from ssmlens.bench import scan
from ssmlens.bench.parts.base import Expectation, Found, Results, method, seconds_of_turns
from ssmlens.bench.scales import Scale
from ssmlens.bench.scan import Shape
from ssmlens.bench.timing import Report, contenders, in_turns, median
from ssmlens.results import Cell, Column, Figure, Series, Table

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's numbers, malloc.h


def _shape(s: Scale, length: int) -> Shape:
    return Shape(1, length, *s.width)


def _calls(s: Scale, length: int) -> dict[str, float]:
    """Seconds that a call of each contender is expected to take; ours always takes part."""
    expected = {n: scan.expected(n, _shape(s, length), True) for n in scan.scans()}
    own = next(iter(expected))
    return {n: seconds for n, seconds in expected.items() if seconds <= s.slow or n == own}


def units(s: Scale) -> dict[str, float]:
    return {str(length): seconds_of_turns(_calls(s, length), _briefly(s)) for length in s.lengths}


def _briefly(s: Scale) -> Scale:
    """Five lengths and a curve over orders of magnitude: less time for each of its points."""
    return replace(s, budget=s.budget / 4)


def measure(unit: str, s: Scale, report: Report) -> Any:
    _keep_memory()
    shape = _shape(s, int(unit))
    calls = {n: scan.both(n, shape) for n in _calls(s, int(unit))}
    return {"times": in_turns(contenders(calls), rounds=s.rounds, budget=_briefly(s).budget, report=report)}


def _keep_memory() -> None:
    """Freed memory stays with this process, where the C library is glibc. It returns blocks above 32 MiB to the system, so that at
    long lengths, and only there, every call would pay for fresh pages: half as much again as the scan itself."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)


def found(s: Scale, results: Results) -> Found:
    points = {int(unit): result["times"] for unit, result in results.items()}
    lengths = sorted(points)
    names = [n for n in scan.PROMISED if any(n in times for times in points.values())]
    if not names:
        return Found()
    at = {n: [(length, median(points[length][n], "s")) for length in lengths if n in points[length]] for n in names}
    series = [
        Series(name=n, x=[float(x) for x, _ in p], y=[v.value for _, v in p], stderr=[v.stderr or 0.0 for _, v in p])
        for n, p in at.items()
    ]
    d_inner, d_state = s.width
    figure = Figure(
        id="length", title=f"Time over length, batch 1, d_inner {d_inner}, d_state {d_state}", x_label="length (tokens)",
        y_label="forward + backward (s)", x_scale="log", y_scale="log", series=series,
        meaning="A line that rises by a factor of ten for every factor of ten in length is linear growth.",
        method=f"{method(_briefly(s))} Freed memory stays with the process.",
    )  # fmt: skip
    rows: list[list[Cell]] = []
    for n in names:
        have = dict(at[n])
        rows.append([n, *(have[x].model_copy(update=_per_token(have[x], x)) if x in have else None for x in lengths)])
    table = Table(
        id="lengths", title="Time of a token, by length",
        columns=[Column(name="contender"), *(Column(name=f"length {x:,}", unit="µs per token") for x in lengths)],
        rows=rows, meaning="Forward + backward over the number of tokens: the same at every length where growth is linear.",
    )  # fmt: skip
    verdict, expected = _growth(names[0], at[names[0]])
    return Found([table], [figure], verdict, _left_out(s, lengths), expected)


def _per_token(v: Any, length: int) -> dict[str, Any]:
    by = 1e6 / length
    return {"value": v.value * by, "stderr": None if v.stderr is None else v.stderr * by, "unit": "µs per token"}


def _growth(own: str, points: list[tuple[int, Any]]) -> tuple[list[str], list[Expectation]]:
    """The longest length against the one before: at short ones what a call costs whatever its length counts too."""
    if len(points) < 2:
        return [], []
    (short, fast), (far, slow) = points[-2], points[-1]
    per_token = slow.value / far / (fast.value / short)
    linear = 0.5 < per_token < 1.5
    said = f"a token costs {per_token:.2f} times as much at length {far:,} as at {short:,}"
    return (
        [f"{own} grows linearly: {said}." if linear else f"{own} does not grow linearly here: {said}."],
        [
            Expectation(
                f"scan, forward + backward, from {short:,} to {far:,} tokens",
                "linear growth",
                f"a token costs {per_token:.2f} times as much",
                linear,
            )
        ],
    )


def _left_out(s: Scale, lengths: list[int]) -> list[str]:
    missing = {n: [x for x in lengths if n not in _calls(s, x)] for n in scan.scans()}
    said = [f"{n} from length {min(xs):,} on" for n, xs in missing.items() if xs]
    if not said:
        return []
    return [
        f"Time over length: left out are {'; '.join(said)}, where one call is expected to take more than {s.slow:g} seconds (a backward "
        "pass through a loop over tokens may take time with the square of the length)."
    ]
