"""Classifiers that were trained elsewhere, as they are, on the page of `pixels`: the same attacks on the same source of images, made as small as
those that each was trained on.

Attacked on the fewer images the longer they are, so that one of them reads no more tokens than one of the item's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssmlens.experiments import pixels_attack
from ssmlens.experiments.pixels_images import chosen, fits, read_as_trained
from ssmlens.experiments.pixels_measure import Plan
from ssmlens.experiments.pixels_models import Scale, plan
from ssmlens.experiments.pixels_runs import Found
from ssmlens.results import Record
from ssmlens.tasks.images import ImageSet


@dataclass(frozen=True)
class Group:
    """Classifiers, by name, that read images of one size."""

    images: ImageSet
    plan: Plan
    models: dict[str, Any]


def opened(paths: Sequence[str], source: str, scale: Scale) -> list[Group]:
    """Raises UserError where one cannot be loaded or cannot read these images: to be called before hours of training."""
    from ssmlens.models.pretrained import load, tokens

    groups: dict[int, Group] = {}
    for name, path in zip(tokens.names(list(paths)), paths, strict=True):
        model, whole = load(path), read_as_trained(source, [path])
        if whole.length not in groups:
            tests = None if scale.test_images is None else _fewer(scale.test_images, scale, whole)
            images = chosen(whole, len(whole.classes), tests)  # their training images are not asked for
            groups[whole.length] = Group(
                images, replace(plan(scale, images), images=_fewer(scale.attacked, scale, images)), {}
            )
        fits(name, model, groups[whole.length].images)
        groups[whole.length].models[name] = model
    return list(groups.values())


def _fewer(n: int, scale: Scale, images: ImageSet) -> int:
    return max(1, min(n, n * scale.length // images.length))


def measured(group: Group, where: Path, progress: bool) -> Found:
    """What is kept under `where` is not measured again."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pixels_attack.measured(
        group.models, group.images, group.plan, where / str(group.images.length), resume=True, progress=progress, device=device,
    )  # fmt: skip


def beside(record: Record, group: Group, found: Found) -> Record:
    """The record, and what was found of these."""
    n, classes = group.images.length, group.images.classes
    made = pixels_attack.parts(found, group.plan, n, classes)

    def named(part: Any) -> Any:
        return part.model_copy(
            update={"id": f"trained-{n}-{part.id}", "title": f"Trained elsewhere, {n} tokens: {part.title}"}
        )

    kinds = "; ".join(f"{name} ({_kind(model)})" for name, model in group.models.items())
    smoke = record.config["scale"] == "smoke"
    note = (
        f"Trained elsewhere and attacked as they are: {kinds}, on {pixels_attack.attacked(group.images)}, the first {group.plan.images} of them by gradient. "
        f"{pixels_attack.ALONE}"
    )
    return record.model_copy(update={
        "verdict": [*record.verdict, *([] if smoke else made.verdict)],
        "tables": [*record.tables, *map(named, made.tables)],
        "figures": [*record.figures, *map(named, made.figures)],
        "maps": [*record.maps, *map(named, made.maps)],
        "notes": [*record.notes, note],
        "config": {**record.config, "trained": [*record.config.get("trained", []), pixels_attack.identity(group.models, group.images)]},
    })  # fmt: skip


def _kind(model: Any) -> str:
    a = model.config.architecture
    pooling = {"class_token": "class token last", "mean": "mean pooling"}
    return f"{a.mixer}, {pooling.get(a.pooling, a.pooling)}, {sum(p.numel() for p in model.parameters()):,} parameters"
