"""The gradient attack, which the paper does not try: does the effect of position survive a real adversary? Tables, a map, sentences."""

from collections.abc import Sequence
from typing import Any

from ssmlens.experiments.base import holm
from ssmlens.experiments.pixels_claims import Sides, judged, words
from ssmlens.experiments.pixels_measure import HARDER, Plan
from ssmlens.experiments.pixels_runs import OVER, Found, Runs, comparable, crossed
from ssmlens.results import Column, Figure, Map, Panel, Series, Table, Value
from ssmlens.tasks.pixels import Region

Named = dict[Region, str]
_FINISHED, _SURVIVORS = 5.0, 10.0  # points that more steps may gain, % that may survive when everything is allowed


def asymmetry(runs: Runs, s: Sides, epsilon: float) -> Value:
    """Accuracy under attack on the leading pixels minus that under attack on the trailing ones, in points."""
    return crossed(100 * (runs.gradient(s.leading, epsilon) - runs.gradient(s.trailing, epsilon)), "points")


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
    rows: list[list[Any]] = [
        [
            runs.name, over_255(e), crossed(100 * runs.before_gradient(last, e), "%"), *(crossed(100 * runs.gradient(r, e), "%") for r in regions),
            *([asymmetry(runs, s, e)] if s else []), crossed(100 * runs.gradient(last, e, "signs"), "%"),
        ]
        for runs in found.values() for e in plan.epsilons
    ]  # fmt: skip
    return Table(
        id="gradient-table", title="Accuracy under gradient attack", columns=columns, rows=rows,
        meaning="The attacker knows the model and may change every channel of the region's pixels by at most ε. Not in the paper.",
        method=f"PGD, untargeted, L∞, {plan.steps} steps of {2.5 / plan.steps:.3g} ε from a random start, clamped to [0, 1], the strongest image on the way "
        f"kept; the first {plan.images} test images. {OVER}",
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


def checks(found: Found, regions: Named, plan: Plan, length: int) -> Table:
    """Whether the gradient attack is as strong as it claims: gradients can be masked, and then it says nothing."""
    middle, last = plan.epsilons[len(plan.epsilons) // 2], next(reversed(regions))
    rows: list[list[Any]] = []
    for runs in found.values():
        few = runs.gradient(last, middle, more=True).shape[1]
        gain = max(
            100 * float((runs.gradient(r, middle)[:, :few] - runs.gradient(r, middle, more=True)).mean())
            for r in regions
        )
        over_random = crossed(100 * (runs.gradient(last, middle, "signs") - runs.gradient(last, middle)), "points")
        unbounded = crossed(100 * runs.gradient(Region(0, length), 1.0), "%")
        rose = [one[2] for name, seeds in runs.losses.items() if name.startswith("pgd") for one in seeds]
        fine = gain <= _FINISHED and over_random.value >= 0 and unbounded.value <= _SURVIVORS
        rows.append([runs.name, 100 * sum(rose) / len(rose), gain, over_random, unbounded, "yes" if fine else "no"])
    columns = [
        Column(name="model"), Column(name="images whose loss rose", unit="%"),
        Column(name=f"gained by {HARDER} times the steps", unit="points", meaning="the most over the regions: how far from finished the attack is"),
        Column(name="stronger than random by", unit="points", meaning=f"{regions[last]}, same ε"),
        Column(name="accuracy, unbounded", unit="%", meaning="ε = 1 on the whole image: no classifier should survive it"),
        Column(name="as it should be"),
    ]  # fmt: skip
    return Table(
        id="checks", title="Is the gradient attack what it claims?", columns=columns, rows=rows,
        meaning="Where gradients are masked, an attack by gradients looks weak and says nothing of robustness. Its marks: no stronger than random signs, far "
        "from finished, or a model that survives when everything is allowed.",
        method=f"At ε = {over_255(middle)} but for the last; as it should be: at most {_FINISHED:g} points gained by more steps, not weaker than random, at most "
        f"{_SURVIVORS:g} % unbounded. More steps and the unbounded attack: on the first {few} images.",
    )  # fmt: skip


def sentences(found: Found, s: Sides, plan: Plan, classes: int) -> list[str]:
    """For each model at the middle ε, corrected for all of them together."""
    epsilon = plan.epsilons[len(plan.epsilons) // 2]
    values = {m: asymmetry(runs, s, epsilon) for m, runs in found.items() if comparable(runs, classes)}
    adjusted = holm({m: p for m, v in values.items() if (p := v.p_value()) is not None})
    out = []
    for m, value in values.items():
        where = "trailing" if value.value > 0 else "leading"
        says = {
            "sure": f"does more harm in the {where} pixels",
            "alone": f"seems to do more harm in the {where} pixels (alone it would count, among {len(values)} models it may be chance)",
            "no": "does no more harm at one end than at the other, as far as can be told",
        }[judged(value, adjusted.get(m))]
        out.append(
            f"A gradient attack on {found[m].name} {says}: accuracy, leading minus trailing attacked, {words(value)} at ε = {over_255(epsilon)}."
        )
    return out


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
