"""A training step of the polarized Mamba, beside transformers' Mamba of the same size, and where our time goes."""

from typing import Any

from ssmlens.bench import layer, profiling
from ssmlens.bench.layer import POLARIZED, THEIRS, Size
from ssmlens.bench.parts.base import (
    Expectation,
    Found,
    Results,
    loading,
    method,
    scaled,
    seconds_of_turns,
    together,
)
from ssmlens.bench.scales import Scale
from ssmlens.bench.timing import Contender, Report, beside, contenders, in_turns
from ssmlens.results import Cell, Column, Table, Value

WARM = Size(1, 8, 32)  # what is loaded once is loaded by a step of this size
OWN = 1.2e-5  # seconds of our step a token and layer
PROFILED = 5  # steps


def _slow(s: Scale) -> bool:
    return layer.expected(s.step, True) > s.slow


def units(s: Scale) -> dict[str, float]:
    theirs = layer.expected(s.step, True)
    ours = OWN * s.step.batch * s.step.length * s.step.layers
    planned = {"ours": loading(s, 4) + seconds_of_turns({POLARIZED: ours} | ({} if _slow(s) else {THEIRS: theirs}), s)}
    planned["shares"] = loading(s, 4) + 2 * PROFILED * ours
    return planned | ({THEIRS: loading(s, 4) + theirs + s.rounds * ours} if _slow(s) else {})


def measure(unit: str, s: Scale, report: Report) -> Any:
    calls = layer.steps(s.step)
    if unit == "shares":
        return {"profile": profiling.measure(calls[POLARIZED], PROFILED, report)}
    if unit == THEIRS:
        layer.steps(WARM)[THEIRS]()
        return {"times": beside(Contender(POLARIZED, calls[POLARIZED]), Contender(THEIRS, calls[THEIRS]), rounds=s.rounds, report=report)}  # fmt: skip
    if _slow(s):
        del calls[THEIRS]
    return {"times": in_turns(contenders(calls), rounds=s.rounds, budget=s.budget, report=report)}


def found(s: Scale, results: Results) -> Found:
    turns = results.get("ours", {}).get("times", {})
    alone = {THEIRS: results[THEIRS]["times"]} if THEIRS in results else {}
    tokens = s.step.batch * s.step.length
    look = together(turns, alone)
    rows: list[list[Cell]] = []
    verdict, expected = [], []
    for name in (n for n in (POLARIZED, THEIRS) if n in turns or n in alone):
        time, by = look(name, POLARIZED)
        rows.append([name, scaled(time, 1e3, "ms"), round(tokens / time.value), by.cell()])  # fmt: skip
        if name == THEIRS:
            verdict.append(f"A training step of the polarized Mamba: transformers' Mamba of the same size takes {by} as long.")  # fmt: skip
            expected.append(
                Expectation("training step, beside transformers' Mamba", "at least 10 times faster", str(by), by.value >= 10)
            )  # fmt: skip
    tables = []
    if rows:
        tables.append(Table(
            id="step", title=f"A training step, {s.step}",
            columns=[Column(name="model"), Column(name="time", unit="ms"), Column(name="tokens per second"),
                     Column(name="times ours (quartiles)")],
            rows=rows, method=method(s, slow=True), meaning="Forward, backward and AdamW on next-token prediction.",
        ))  # fmt: skip
    if "shares" in results:
        table, outside = _shares(results["shares"]["profile"])
        tables.append(table)
        part = f"{100 * outside.value:.1f} ± {100 * (outside.stderr or 0):.1f} %"
        verdict.append(f"{part} of our training step is neither matrix products nor the scan.")
        expected.append(
            Expectation("training step, outside matrix products and scan", "at most half", part, outside.value <= 0.5)
        )  # fmt: skip
    return Found(tables, [], verdict, [], expected)


def _shares(measured: dict[str, list[list[float]]]) -> tuple[Table, Value]:
    """The table, and the share (0 to 1) of what is neither products nor scan."""
    shares = profiling.shares(measured)
    rows: list[list[Cell]] = [
        [name, Value.mean([100 * x for x in each], "%"), profiling.largest(measured, name)] for name, each in shares.items()
    ]  # fmt: skip
    inside = [sum(each) for each in zip(*(shares[n] for n in (profiling.PRODUCTS, profiling.SCAN) if n in shares), strict=True)]  # fmt: skip
    outside = Value.mean([1 - x for x in inside])
    rows.append(["together outside matrix products and scan", Value.mean([100 * (1 - x) for x in inside], "%"), ""])
    steps = len(inside)
    return Table(
        id="shares", title="Where our training step spends its time",
        columns=[Column(name="group"), Column(name="share of the step", unit="%"), Column(name="its largest operators (calls a step)")],
        rows=rows, meaning="Shares add up to the step; the last row adds up all but two of them.",
        method=f"torch.profiler over {steps} steps, each by itself; self time of every operator, and of what lies between operators. What "
        "the profiler itself costs counts as outside.",
    ), outside  # fmt: skip
