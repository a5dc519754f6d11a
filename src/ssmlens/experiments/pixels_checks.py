"""Is the gradient attack what it claims? Gradients can be masked, and fade along a sequence: then it looks weak and says nothing of robustness.

Marks of it, in each region at the ε in the middle of the plan: no stronger than random signs; far from finished; a gradient of exact zeros,
whose sign moves nothing; an attack without gradients that is the stronger one. And over all regions: a model that survives ε = 1 everywhere.
"""

from collections.abc import Sequence
from typing import Any

from ssmlens.experiments.pixels_measure import HARDER, Plan
from ssmlens.experiments.pixels_runs import Found, Runs, crossed
from ssmlens.results import Column, Table, Value
from ssmlens.tasks.pixels import Region

Named = dict[Region, str]
FLOOR = 5.0  # % right: so little is left that attacks cannot be told apart
_FINISHED, _SURVIVORS, _ZEROS = 5.0, 10.0, 10.0  # points that more steps may gain, % right at ε = 1, % of exact zeros


def over_random(runs: Runs, region: Region, epsilon: float) -> Value:
    """Right under random signs minus right under PGD."""
    return crossed(100 * (runs.gradient(region, epsilon, "signs") - runs.gradient(region, epsilon)), "points")


def gained(runs: Runs, region: Region, epsilon: float) -> float:
    """Points that more steps take beyond those that PGD takes."""
    more = runs.gradient(region, epsilon, more=True)
    return 100 * float((runs.gradient(region, epsilon)[:, : more.shape[1]] - more).mean())


def search_over(runs: Runs, region: Region, epsilon: float) -> Value:
    """Right under PGD minus right under the attack without gradients: above zero, that one is the stronger."""
    right = runs.gradient(region, epsilon, "search")
    return crossed(100 * (runs.gradient(region, epsilon)[:, : right.shape[1]] - right), "points")


def searched(runs: Runs, plan: Plan) -> bool:
    """Whether the attack without gradients is the stronger one in some region: then both count, the worse for each image."""
    return any(search_over(runs, r, plan.middle).value > 0 for r in plan.gradient)


def failures(runs: Runs, regions: Sequence[Region], plan: Plan, length: int) -> list[str]:
    """What of the gradient attack is not as it should be, one clause each, for the first such region."""
    e, out = plan.middle, []

    def first(says: str, *failing: Region) -> None:
        if failing:
            out.append(f"{says} (pixels {failing[0]})")

    first("it is not shown to beat random signs", *(r for r in regions if not _beats_random(runs, r, e)))
    first(f"{HARDER} times the steps find much more", *(r for r in regions if gained(runs, r, e) > _FINISHED))
    first("much of the gradient is exactly zero", *(r for r in regions if 100 * runs.slope(r)[0] > _ZEROS))
    if 100 * runs.gradient(Region(0, length), 1.0).mean() > _SURVIVORS:
        out.append("the model survives when everything is allowed")
    return out


def _beats_random(runs: Runs, region: Region, epsilon: float) -> bool:
    bounds = over_random(runs, region, epsilon).interval()
    floor = all(100 * runs.gradient(region, epsilon, kind).mean() < FLOOR for kind in ("pgd", "signs"))
    return floor or (bounds is not None and bounds[0] > 0)


def table(found: Found, regions: Named, plan: Plan, length: int) -> Table:
    e, rows, few, half = plan.middle, list[list[Any]](), 0, 0
    for runs in found.values():
        unbounded = crossed(100 * runs.gradient(Region(0, length), 1.0), "%")
        rose = [100 * one[2] for name, seeds in runs.losses.items() if name.startswith("pgd") for one in seeds]
        for r, name in regions.items():
            few, half = (x.shape[1] for x in (runs.gradient(r, e, more=True), runs.gradient(r, e, "search")))
            failed = failures(runs, [r], plan, length)
            rows.append([
                runs.name, name, over_random(runs, r, e), gained(runs, r, e), crossed(100 * runs.gradient(r, e, "search"), "%"), search_over(runs, r, e),
                crossed(100 * runs.under_both(r, e), "%"), 100 * runs.slope(r)[0], runs.slope(r)[1], crossed(100 * runs.gradient(r, 1.0), "%"), unbounded,
                sum(rose) / len(rose), "no: " + "; ".join(failed) if failed else "yes",
            ])  # fmt: skip
    columns = [
        Column(name="model"), Column(name="pixels attacked"),
        Column(name="stronger than random by", unit="points", meaning="than ± ε at random in the same pixels"),
        Column(name=f"gained by {HARDER} times the steps", unit="points", meaning="how far from finished the attack is"),
        Column(name="accuracy, search", unit="%", meaning="under an attack of the same ε that asks for no gradient"),
        Column(name="search stronger by", unit="points", meaning="than the gradient attack, on the same images"),
        Column(name="accuracy, worse of both", unit="%", meaning="right under the gradient attack and under search"),
        Column(name="zeros", unit="%", meaning="of the gradient to these pixels, before the attack: exactly zero"),
        Column(name="gradient", meaning="mean size of an entry, in nats for a change of 1"),
        Column(name="accuracy, ε = 1", unit="%", meaning="these pixels may become anything"),
        Column(name="accuracy, ε = 1 everywhere", unit="%", meaning="no classifier should survive it"),
        Column(name="loss rose", unit="% of images", meaning="mean over all gradient attacks on the model"),
        Column(name="as it should be"),
    ]  # fmt: skip
    return Table(
        id="checks", title="Is the gradient attack what it claims?", columns=columns, rows=rows,
        meaning="Where gradients are masked, or fade to nothing along the sequence, an attack by gradients looks weak and says nothing of robustness. Of a "
        "model with a \"no\" in some region nothing is said about position.",
        method=f"At ε = {255 * e:.3g}/255 but where ε = 1. As it should be: the interval of what is gained over random signs lies above zero (or both leave less than "
        f"{FLOOR:g} %), at most {_FINISHED:g} points gained by more steps, at most {_ZEROS:g} % zeros, at most {_SURVIVORS:g} % right at ε = 1 everywhere. Search: signs "
        f"of random blocks, {plan.queries} queries, kept where the margin grows, on the first {half} images. More steps and ε = 1: on the first {few} images, so that a "
        "gain of some points is a few images.",
    )  # fmt: skip
