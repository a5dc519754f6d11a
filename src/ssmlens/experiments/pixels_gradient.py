"""The gradient attack, which the paper does not try: does the effect of position survive a real adversary? Table, figure, map, sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ssmlens.experiments import pixels_checks
from ssmlens.experiments.pixels_checks import Named
from ssmlens.experiments.pixels_claims import Sides, allowed, corrected, words
from ssmlens.experiments.pixels_measure import Plan
from ssmlens.experiments.pixels_runs import OVER, Found, Runs, comparable, crossed
from ssmlens.results import Column, Figure, Map, Panel, Series, Table, Value
from ssmlens.tasks.pixels import Region


def asymmetry(runs: Runs, s: Sides, epsilon: float, both: bool = False) -> Value:
    """Accuracy under attack on the leading pixels minus that under attack on the trailing ones, in points. both: under the worse, for each
    image, of the gradient attack and the one without gradients."""
    return crossed(100 * (_under(runs, s.leading, epsilon, both) - _under(runs, s.trailing, epsilon, both)), "points")


def table(found: Found, regions: Named, s: Sides | None, plan: Plan) -> Table:
    last = next(reversed(regions))
    columns = [Column(name="model"), Column(name="ε"), Column(name="clean", unit="%")]
    columns += [Column(name=name, unit="%", meaning=str(region)) for region, name in regions.items()]
    if s:
        columns.append(
            Column(
                name="leading minus trailing",
                unit="points",
                meaning="above zero: the attack on trailing pixels is the stronger one",
            )
        )
    columns.append(Column(name=f"random, {regions[last]}", unit="%", meaning="± ε at random instead of the gradient"))
    rows: list[list[Any]] = []
    for runs in found.values():
        clean = crossed(100 * runs.before_gradient(last, plan.middle), "%")
        worse = [(plan.middle, True)] if pixels_checks.searched(runs, plan) else []
        for e, both in (*((e, False) for e in plan.epsilons), *worse):
            rows.append([
                runs.name, f"{over_255(e)}{', or search' * both}", clean, *(crossed(100 * _under(runs, r, e, both), "%") for r in regions),
                *([asymmetry(runs, s, e, both)] if s else []), crossed(100 * runs.gradient(last, e, "signs"), "%"),
            ])  # fmt: skip
    return Table(
        id="gradient-table", title="Accuracy under gradient attack", columns=columns, rows=rows,
        meaning="The attacker knows the model and may change every channel of the region's pixels by at most ε. Not in the paper.",
        method=f"PGD, untargeted, L∞, {plan.steps} steps of {2.5 / plan.steps:.3g} ε from one random start, clamped to [0, 1], the strongest image on the way "
        f"kept; the first {plan.images} test images. Or search: the worse of it and of an attack without gradients for each image, where that one is the stronger in "
        f"some region (see below), on fewer images. {OVER}",
    )  # fmt: skip


def figure(found: Found, s: Sides, plan: Plan) -> Figure:
    series = []
    for runs in found.values():
        values = [asymmetry(runs, s, e) for e in plan.epsilons]
        series.append(Series(
            name=runs.name, x=[255 * e for e in plan.epsilons], y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], group=runs.name,
        ))  # fmt: skip
    return Figure(
        id="gradient", title="Gradient attack: trailing against leading pixels", x_label="ε (of 255)",
        y_label="accuracy, leading minus trailing attacked (points)", x_scale="log", series=series,
        meaning="Above zero: an adversary does more harm in the pixels that are read last. Where ε is so large that both attacks take everything, nothing is "
        "left to tell them apart.",
        method=f"{s.width} of {s.length} pixels, PGD of {plan.steps} steps. {OVER}",
    )  # fmt: skip


def map_of(found: Found, regions: Named, plan: Plan) -> Map:
    panels = []
    for runs in found.values():
        rows = [
            [
                crossed(100 * rights)
                for rights in (runs.before_gradient(r, plan.epsilons[0]), *(runs.gradient(r, e) for e in plan.epsilons))
            ]
            for r in regions
        ]
        values, errors = [[v.value for v in row] for row in rows], [[v.stderr or 0.0 for v in row] for row in rows]
        panels.append(Panel(name=runs.name, group=runs.name, values=values, stderr=errors))
    return Map(
        id="under-gradient", title="Accuracy under gradient attack", x_label="ε", y_label="pixels attacked", unit="accuracy (%)",
        x=["0", *(over_255(e) for e in plan.epsilons)], y=list(regions.values()), panels=panels, low=0.0,
        meaning="Rows alike: it does not matter where the adversary strikes. A row that darkens sooner is where the model is weakest.",
        method=f"PGD of {plan.steps} steps; column 0 is not attacked. {OVER}",
    )  # fmt: skip


def sentences(found: Found, s: Sides, plan: Plan, classes: int) -> list[str]:
    """For each model at the middle ε, corrected for all of them together; nothing of position where the attack fails a check."""
    epsilon, values, out = plan.middle, dict[str, Value](), list[str]()
    for m, runs in found.items():
        if not comparable(runs, classes):
            continue
        failed = pixels_checks.failures(runs, plan.gradient, plan, s.length)
        if failed:
            out.append(f"Where a gradient attack on {runs.name} does more harm is not said: {'; '.join(failed)}.")
        elif _saturated(runs, s, epsilon, both=pixels_checks.searched(runs, plan)):
            out.append(_nothing_left(runs, s, plan))
        else:
            values[m] = asymmetry(runs, s, epsilon, both=pixels_checks.searched(runs, plan))
    may = corrected(values)
    for m, value in values.items():
        runs, both = found[m], pixels_checks.searched(found[m], plan)
        where = "trailing" if value.value > 0 else "leading"
        says = {
            "sure": f"does more harm in the {where} pixels",
            "alone": f"seems to do more harm in the {where} pixels (alone it would count, among {len(values)} models it may be chance)",
            "no": f"does no more harm at one end than at the other that could be told ({allowed(value)})",
        }[may[m]]
        who = (
            "The worse, for each image, of a gradient attack and one without gradients" if both else "A gradient attack"
        )
        out.append(
            f"{who} on {runs.name} {says}: {_left(runs, s, epsilon, both)}; leading minus trailing {words(value)}."
        )
    return out


def _under(runs: Runs, region: Region, epsilon: float, both: bool) -> Float[np.ndarray, "seeds images"]:
    return runs.under_both(region, epsilon) if both else runs.gradient(region, epsilon)


def _saturated(runs: Runs, s: Sides, epsilon: float, both: bool = False) -> bool:
    return all(100 * _under(runs, r, epsilon, both).mean() < pixels_checks.FLOOR for r in (s.leading, s.trailing))


def _left(runs: Runs, s: Sides, epsilon: float, both: bool = False) -> str:
    last, first = (100 * _under(runs, r, epsilon, both).mean() for r in (s.trailing, s.leading))
    return (
        f"accuracy {last:.1f} % with trailing and {first:.1f} % with leading pixels attacked at ε = {over_255(epsilon)}"
    )


def _nothing_left(runs: Runs, s: Sides, plan: Plan) -> str:
    said = (
        f"An attack on {runs.name} takes nearly everything at either end, so nothing is left to tell them apart: "
        f"{_left(runs, s, plan.middle, pixels_checks.searched(runs, plan))}"
    )
    smaller = [e for e in plan.epsilons if e < plan.middle and not _saturated(runs, s, e)]
    if smaller:
        said += f"; at the largest smaller ε where something is, by the gradient alone and unchecked: {_left(runs, s, max(smaller))}, "
        said += f"leading minus trailing {words(asymmetry(runs, s, max(smaller)))}"
    return f"{said}."


def over_255(epsilon: float) -> str:
    return f"{255 * epsilon:.3g}/255"


def named(regions: Sequence[Region], length: int) -> Named:
    """Regions by words where they have some."""
    out: Named = {}
    for r in regions:
        ends = r.start == 0, r.stop == length
        middle = r.start == (length - r.width) // 2
        out[r] = (
            str(r)
            if all(ends)
            else f"leading {r.width}"
            if ends[0]
            else f"trailing {r.width}"
            if ends[1]
            else f"middle {r.width}"
            if middle
            else str(r)
        )
    return out
