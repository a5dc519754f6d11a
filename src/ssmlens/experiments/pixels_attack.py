"""The record of `ssmlens attack`: trained classifiers of pixel sequences under noise, target and gradient attack, side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ssmlens.experiments import pixels_checks, pixels_gradient, pixels_noise, pixels_target
from ssmlens.experiments.pixels_claims import Sides
from ssmlens.experiments.pixels_gradient import named
from ssmlens.experiments.pixels_measure import Plan, Predictions, measure
from ssmlens.experiments.pixels_runs import Found, Runs
from ssmlens.lens.store import fingerprint
from ssmlens.progress import bars
from ssmlens.results import Figure, Map, Record, Table, provenance
from ssmlens.tasks.images import ImageSet
from ssmlens.tasks.pixels import Region

ALONE = "The models are these and no others: intervals are over images alone."


@dataclass
class Parts:
    """What a page says of attacks on classifiers that read images of one size."""

    verdict: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)


def parts(found: Found, plan: Plan, n: int, classes: Sequence[str]) -> Parts:
    """found: by name. n: pixels of an image."""
    found = {name: replace(runs, plan_seed=plan.seed) for name, runs in found.items()}
    made = Parts()
    if plan.noise:
        regions, sides = sorted(plan.noise), _sides(plan.noise, n)
        made.tables.append(pixels_noise.corruption_table(found, regions, n, beside=False))
        made.maps.append(pixels_noise.corruption_map(found, regions))
        if sides:
            made.tables.append(pixels_noise.asymmetry_table(found, sides, beside=False))
            made.figures.append(pixels_noise.asymmetry_figure(found, sides))
            made.verdict += pixels_noise.sentences(found, sides[(len(sides) - 1) // 2], len(classes))
        else:
            made.verdict += pixels_noise.worst(found, regions)
    if plan.target:
        sides, targets = _sides(plan.target, n), list(plan.classes)
        title = f"target {classes[targets[0]]}" if len(targets) == 1 else f"mean of {len(targets)} targets"
        where = named(plan.target, n)
        made.tables.append(pixels_target.table("target", f"Target attack, {title}", found, where, sides, targets))
        made.figures.append(pixels_target.figure("target", f"Target attack, {title}", found, where, targets))
        if len(targets) > 1 and sides:
            made.maps.append(pixels_target.by_class(found, sides[0], targets, classes))
        for s in sides[:1]:
            made.verdict += pixels_target.sentences(found, s, targets, title, len(classes))
    if plan.gradient:
        sides, where = _sides(plan.gradient, n), named(plan.gradient, n)
        made.tables.append(pixels_gradient.table(found, where, sides[0] if sides else None, plan))
        made.tables.append(pixels_checks.table(found, where, plan, n))
        made.maps.append(pixels_gradient.map_of(found, where, plan))
        for s in sides[:1]:
            made.figures.append(pixels_gradient.figure(found, s, plan))
            made.verdict += pixels_gradient.sentences(found, s, plan, len(classes))
    return made


def identity(models: Mapping[str, Any], images: ImageSet) -> dict[str, Any]:
    """What was attacked, for the record. models: by name."""
    return {
        "images": {"name": images.name, "sha256": images.sha256},
        "models": {name: fingerprint(model) for name, model in models.items()},
    }


def measured(
    models: Mapping[str, Any], images: ImageSet, plan: Plan, where: Path, *, resume: bool, progress: bool, device: str, batch_size: int = 128
) -> Found:  # fmt: skip
    """Of each model, what `pixels_measure.measure` finds. models: Classifiers, by name. where: what is found is kept there, a file for each.

    Raises UserError where another measurement is kept there, or one at all and resume is False."""
    found: dict[str, Runs] = {}
    stores: dict[Path, Predictions] = {}
    with _bar(progress, len(models) * plan.work(len(images.test))) as advance:
        for name, model in models.items():
            own = {
                "images": {"name": images.name, "sha256": images.sha256},
                "model": fingerprint(model),
                "plan": asdict(plan),
            }
            path = where / f"{own['model']}.json"
            if path not in stores:  # one model may be named twice
                stores[path] = Predictions(path, own, resume)
            store = measure(
                model.to(device), images.test.pixels, images.test.labels, plan, stores[path], batch_size=batch_size, advance=advance
            )  # fmt: skip
            found[name] = Runs.of(name, images.test.labels, [store.found], [store.losses])
            model.cpu()
    return found


@contextmanager
def _bar(shown: bool, total: float) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda passes: None
        return
    with bars("{task.percentage:>3.0f}%") as progress:
        task = progress.add_task("attack", total=total)
        yield lambda passes: progress.advance(task, passes)


def record(found: Found, images: ImageSet, plan: Plan, identity: dict[str, Any]) -> Record:
    """found: by name, one model each. images: those that were attacked, as the test split."""
    made = parts(found, plan, images.length, images.classes)
    return Record(
        kind="attack",
        title=f"{', '.join(found)} under attack",
        verdict=made.verdict,
        tables=made.tables,
        figures=made.figures,
        maps=made.maps,
        notes=[f"Images: {attacked(images)}, {len(images.classes)} classes.", ALONE],
        config={**identity, "plan": asdict(plan)},
        seeds=[plan.seed],
        provenance=provenance(),
    )  # fmt: skip


def attacked(images: ImageSet) -> str:
    """In words."""
    return f"{images.name}, {len(images.test):,} test images, {images.height} × {images.width} pixels ({images.length} tokens)"


def _sides(regions: Sequence[Region], length: int) -> list[Sides]:
    """The widths of which there is a leading and a trailing region, from narrow to wide."""
    there = set(regions)
    every = [Sides(w, length) for w in sorted({r.width for r in regions}) if w < length]
    return [s for s in every if {s.leading, s.trailing} <= there]
