"""One Mamba layer: ours and transformers' on the same weights, and its matrix products alone."""

from typing import Any

from ssmlens.bench import layer
from ssmlens.bench.layer import OURS, PRODUCTS, THEIRS, Size
from ssmlens.bench.parts.base import Found, Results, loading, method, scaled, seconds_of_turns, together
from ssmlens.bench.scales import Scale
from ssmlens.bench.timing import Contender, Report, beside, contenders, in_turns
from ssmlens.results import Cell, Column, Table

PASSES = {"forward": ("forward", False), "both": ("forward + backward", True)}
OWN = 1e-5  # seconds a token
WARM = Size(1, 8, 32)  # what is loaded once is loaded by a layer of this size


def _slow(s: Scale, backward: bool) -> bool:
    return layer.expected(s.layer, backward) > s.slow


def units(s: Scale) -> dict[str, float]:
    planned = {}
    for unit, (_, backward) in PASSES.items():
        theirs = layer.expected(s.layer, backward)
        quick = dict.fromkeys((OURS, PRODUCTS), OWN * s.layer.batch * s.layer.length) | (
            {} if _slow(s, backward) else {THEIRS: theirs}
        )
        planned[unit] = loading(s, 3) + seconds_of_turns(quick, s)
        if _slow(s, backward):
            planned[f"{unit}-{THEIRS}"] = loading(s, 3) + theirs
    return planned


def measure(unit: str, s: Scale, report: Report) -> Any:
    name, _, theirs = unit.partition("-")
    backward = PASSES[name][1]
    calls = layer.layer_calls(s.layer, backward)
    if theirs:
        layer.layer_calls(WARM, backward)[THEIRS]()
        return {"times": beside(Contender(OURS, calls[OURS]), Contender(THEIRS, calls[THEIRS]), rounds=s.rounds, report=report)}  # fmt: skip
    if _slow(s, backward):
        del calls[THEIRS]
    return {"times": in_turns(contenders(calls), rounds=s.rounds, budget=s.budget, report=report)}


def found(s: Scale, results: Results) -> Found:
    rows: list[list[Cell]] = []
    verdict = []
    for unit, (what, _) in PASSES.items():
        turns = results.get(unit, {}).get("times", {})
        alone = {THEIRS: results[f"{unit}-{THEIRS}"]["times"]} if f"{unit}-{THEIRS}" in results else {}
        look = together(turns, alone)
        for name in (OURS, THEIRS, PRODUCTS):
            if name not in turns and name not in alone:
                continue
            time, by = look(name, OURS)
            rows.append([what, name, scaled(time, 1e3, "ms"), by.cell()])
            if name == THEIRS:
                verdict.append(f"A Mamba layer, {what}: transformers takes {by} as long, on the same weights.")
    if not rows:
        return Found()
    table = Table(
        id="layer", title=f"A Mamba layer, {s.layer}",
        columns=[Column(name="pass"), Column(name="contender"), Column(name="time", unit="ms"),
                 Column(name="times ours (quartiles)")],
        rows=rows, method=method(s, slow=True),
        meaning="The same random weights in transformers' layer (its CPU path, pure torch) and in ours; the layer's four matrix products alone.",
    )  # fmt: skip
    return Found([table], [], verdict)
