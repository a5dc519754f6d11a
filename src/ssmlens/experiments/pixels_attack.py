"""The record of `ssmlens attack`: trained classifiers of pixel sequences under noise, target and gradient attack, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ssmlens.experiments import pixels_checks, pixels_gradient, pixels_noise, pixels_target
from ssmlens.experiments.pixels_claims import Sides
from ssmlens.experiments.pixels_gradient import named
from ssmlens.experiments.pixels_measure import Plan
from ssmlens.experiments.pixels_runs import Found
from ssmlens.results import Figure, Map, Record, Table, provenance
from ssmlens.tasks.images import ImageSet
from ssmlens.tasks.pixels import Region


def record(found: Found, images: ImageSet, plan: Plan, identity: dict[str, Any]) -> Record:
    """found: by name, one model each. images: those that were attacked, as the test split."""
    n, classes = images.length, images.classes
    found = {name: replace(runs, plan_seed=plan.seed) for name, runs in found.items()}
    tables: list[Table] = []
    figures: list[Figure] = []
    maps: list[Map] = []
    verdict: list[str] = []
    if plan.noise:
        regions, sides = sorted(plan.noise), _sides(plan.noise, n)
        tables.append(pixels_noise.corruption_table(found, regions, n, beside=False))
        maps.append(pixels_noise.corruption_map(found, regions))
        if sides:
            tables.append(pixels_noise.asymmetry_table(found, sides, beside=False))
            figures.append(pixels_noise.asymmetry_figure(found, sides))
            verdict += pixels_noise.sentences(found, sides[(len(sides) - 1) // 2], len(classes))
        else:
            verdict += pixels_noise.worst(found, regions)
    if plan.target:
        sides, targets = _sides(plan.target, n), list(plan.classes)
        title = f"target {classes[targets[0]]}" if len(targets) == 1 else f"mean of {len(targets)} targets"
        where = named(plan.target, n)
        tables.append(pixels_target.table("target", f"Target attack, {title}", found, where, sides, targets))
        figures.append(pixels_target.figure("target", f"Target attack, {title}", found, where, targets))
        if len(targets) > 1 and sides:
            maps.append(pixels_target.by_class(found, sides[0], targets, classes))
        for s in sides[:1]:
            verdict += pixels_target.sentences(found, s, targets, title, len(classes))
    if plan.gradient:
        sides, where = _sides(plan.gradient, n), named(plan.gradient, n)
        tables.append(pixels_gradient.table(found, where, sides[0] if sides else None, plan))
        tables.append(pixels_checks.table(found, where, plan, n))
        maps.append(pixels_gradient.map_of(found, where, plan))
        for s in sides[:1]:
            figures.append(pixels_gradient.figure(found, s, plan))
            verdict += pixels_gradient.sentences(found, s, plan, len(classes))
    return Record(
        kind="attack",
        title=f"{', '.join(found)} under attack",
        verdict=verdict,
        tables=tables,
        figures=figures,
        maps=maps,
        notes=[
            f"Images: {images.name}, {len(images.test):,} test images, {images.height} × {images.width} pixels ({n} tokens), {len(classes)} classes.",
            "The models are these and no others: intervals are over images alone.",
        ],
        config={**identity, "plan": asdict(plan)},
        seeds=[plan.seed],
        provenance=provenance(),
    )  # fmt: skip


def _sides(regions: Sequence[Region], length: int) -> list[Sides]:
    """The widths of which there is a leading and a trailing region, from narrow to wide."""
    there = set(regions)
    every = [Sides(w, length) for w in sorted({r.width for r in regions}) if w < length]
    return [s for s in every if {s.leading, s.trailing} <= there]
