"""The selective scan alone, by every contender that is there."""

from typing import Any

from ssmlens.bench import memory, scan
from ssmlens.bench.parts.base import (
    Expectation,
    Found,
    Results,
    method,
    quick_and_slow,
    scaled,
    seconds_of_turns,
    slug,
    together,
)
from ssmlens.bench.scales import Scale
from ssmlens.bench.scan import FLOOR, LOOP, MAMBAPY, OURS, TORCH_EXP, TRANSFORMERS
from ssmlens.bench.timing import Contender, Ratio, Report, beside, contenders, in_turns, ratio
from ssmlens.results import Cell, Column, Table

NOTHING = 1.5  # seconds of a process that measures memory, beyond its calls


def _expected(s: Scale, backward: bool) -> dict[str, float]:
    return {name: scan.expected(name, s.scan, backward) for name in scan.scans()}


def _floors() -> list[str]:
    """Not scans: what a scan can be held against."""
    return [TORCH_EXP, FLOOR] if OURS in scan.scans() else [TORCH_EXP]


def units(s: Scale) -> dict[str, float]:
    forward, both = _expected(s, False), _expected(s, True)
    quick, slow = quick_and_slow(both, s)
    floors = {name: scan.expected(name, s.scan, False) for name in _floors()}
    planned = {
        "forward": seconds_of_turns({**forward, **floors}, s),
        "both": seconds_of_turns({name: both[name] for name in quick}, s),
    }
    if s.apart:
        planned |= {f"memory-{slug(name)}": NOTHING + both[name] for name in quick}
    return planned | {f"both-{slug(name)}": NOTHING + both[name] for name in slow}


def measure(unit: str, s: Scale, report: Report) -> Any:
    names = list(scan.scans())
    own = names[0]
    quick, _ = quick_and_slow(_expected(s, True), s)
    if unit == "forward":
        calls = {n: scan.forward(n, s.scan) for n in names} | {TORCH_EXP: scan.torch_exp(s.scan)}
        if FLOOR in _floors():
            calls[FLOOR] = scan.exponentials(s.scan)
        return {"times": in_turns(contenders(calls), rounds=s.rounds, budget=s.budget, report=report)}
    if unit == "both":
        calls = {n: scan.both(n, s.scan) for n in quick}
        return {"times": in_turns(contenders(calls), rounds=s.rounds, budget=s.budget, report=report)}
    name = next(n for n in names if unit.endswith(f"-{slug(n)}"))
    call = scan.both_warm(name, s.scan)
    if name in quick:
        return {"extra": memory.extra(call)}
    extra: list[int | None] = []
    watched = Contender(name, lambda: extra.append(memory.extra(call)))
    times = beside(Contender(own, scan.both(own, s.scan)), watched, rounds=s.rounds, report=report)
    return {"times": times, "extra": extra[0]}


def found(s: Scale, results: Results) -> Found:
    forward, both = (results.get(unit, {}).get("times", {}) for unit in ("forward", "both"))
    if not forward and not both:
        return Found()
    names = [n for n in scan.PROMISED if n in forward or n in both]
    own = names[0]
    alone = {n: r["times"] for n in names if "times" in (r := results.get(f"both-{slug(n)}", {}))}
    look = together(both, alone)
    per_element = 1e9 / s.scan.elements
    rows: list[list[Cell]] = []
    against: dict[str, Ratio] = {}
    for n in [*names, *(f for f in (FLOOR, TORCH_EXP) if f in forward)]:
        first: list[Cell] = [None, None]
        if n in forward:
            time, by = together(forward, {})(n, own)
            first = [scaled(time, per_element, "ns per element"), by.cell()]
        second: list[Cell] = [None, None]
        if n in both or n in alone:
            time, by = look(n, own)
            against[n] = by
            second = [scaled(time, per_element, "ns per element"), by.cell()]
        extra = next((r["extra"] for k in ("memory", "both") if (r := results.get(f"{k}-{slug(n)}"))), None)
        rows.append([n, *first, *second, None if extra is None else round(extra / 2**20)])
    verdict = [
        f"Forward and backward of the scan: {n} takes {against[n]} as long as {own}."
        for n in (MAMBAPY, LOOP, TRANSFORMERS) if n in against
    ]  # fmt: skip
    expected = []
    if MAMBAPY in against and own == OURS:
        expected.append(
            Expectation("scan, forward + backward, beside mambapy's", "at least 50 times faster", str(against[MAMBAPY]), against[MAMBAPY].value >= 50)
        )  # fmt: skip
    if own in forward and FLOOR in forward:
        floor, exp = ratio(forward, own, FLOOR), ratio(forward, TORCH_EXP, own)
        verdict.append(
            f"The forward scan takes {floor} as long as its exponentials alone; one torch.exp over as many numbers takes {exp} as long as the scan."
        )
        expected += [
            Expectation("scan, forward, beside its exponentials alone", "at most 1.6 times", str(floor), floor.value <= 1.6),
            Expectation("one torch.exp over as many numbers, beside the forward scan", "slower", str(exp), exp.value > 1),
        ]  # fmt: skip
    if own != OURS:
        verdict.append("The C++ kernels are not available here, so these are the times of the pure torch path.")
    return Found([_table(s, own, rows)], [], verdict, [], expected)


def _table(s: Scale, own: str, rows: list[list[Cell]]) -> Table:
    return Table(
        id="scan", title=f"Selective scan, {s.scan} (batch × length × d_inner × d_state)",
        columns=[
            Column(name="contender"),
            Column(name="forward", unit="ns per element"), Column(name="forward, times ours (quartiles)"),
            Column(name="forward + backward", unit="ns per element"), Column(name="forward + backward, times ours (quartiles)"),

            Column(name="extra memory", unit="MiB", meaning="peak of forward + backward beyond the arguments"),
        ],
        rows=rows,
        method=method(s, slow=True) + (" Memory: the operating system's peak in a fresh process." if s.apart else ""),
        meaning=f"One function, h = exp(dt A) h + dt B x, y = C h + D x, by every contender; ours is {own}. The last rows are not scans: as many "
        "exponentials alone, by this kernel's own code on data in cache, and by torch.exp on as many numbers in memory.",
    )  # fmt: skip
