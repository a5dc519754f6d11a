"""Images as a classifier takes them: so many, as small as those that it was trained on; and whether they fit it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssmlens.errors import UserError
from ssmlens.tasks.images import ImageSet, Split, balanced_order, read
from ssmlens.tasks.images.base import assembled


def chosen(images: ImageSet, train: int | None = None, test: int | None = None) -> ImageSet:
    """The first so many images in an order that is balanced over classes; None: all, in that order."""
    splits = []
    for split, wanted in ((images.train, train), (images.test, test)):
        first = balanced_order(split.labels)[:wanted]
        splits.append(Split(np.ascontiguousarray(split.pixels[first]), split.labels[first]))
    return assembled(images.name, images.classes, (images.height, images.width, images.channels), *splits)


def shrunk(images: ImageSet, side: int) -> ImageSet:
    """Averaged over squares of pixels, down to side × side. Raises UserError where that does not go up."""
    if images.height == images.width == side:
        return images
    if images.height != images.width or images.height % side:
        raise UserError(
            f"{images.name} has images of {images.height} × {images.width} pixels, which squares do not take to {side} × {side}: "
            f"give images of a multiple of {side}, as CIFAR-10's 32 × 32"
        )
    factor = images.height // side

    def smaller(split: Split) -> Split:
        done = [
            np.rint(part.reshape(len(part), side, factor, side, factor, -1).mean((2, 4))).astype(np.uint8)
            for part in np.array_split(split.pixels, max(1, len(split) // 1000))
        ]
        return Split(np.concatenate(done).reshape(len(split), side * side, -1), split.labels)

    return assembled(
        images.name, images.classes, (side, side, images.channels), smaller(images.train), smaller(images.test)
    )


def read_as_trained(source: str, models: list[str], side: int | None = None) -> ImageSet:
    """The images of `source`, averaged down to side × side, or to what the models were trained on. Raises UserError."""
    smaller = side or _trained_side(models)  # before the images, which may take long
    found = read(source)
    return shrunk(found, smaller) if smaller else found


def _trained_side(models: list[str]) -> int | None:
    """How small the images were that the models were trained on, where that is known. Raises UserError where they disagree."""
    sides = {}
    for path in models:
        file = Path(path) / "data.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{file} is not readable JSON: {e}") from None
        side = data.get("side") if isinstance(data, dict) else None
        sides[path] = side if isinstance(side, int) and side > 0 else None
    if len(set(sides.values())) > 1:
        said = ", ".join(f"{path}: {f'{side} × {side}' if side else 'not said'}" for path, side in sides.items())
        raise UserError(
            f"these models were trained on images of different sizes ({said}): take them apart, or set --side"
        )
    return next(iter(sides.values()), None)


def fits(name: str, model: Any, images: ImageSet) -> None:
    """Raises UserError where the model cannot be attacked on these images."""
    from ssmlens.models import Classifier

    if not isinstance(model, Classifier):
        raise UserError(f"{name} is no classifier of images (`ssmlens needle` and `diagnose` are for language models)")
    a = model.config.architecture
    if a.d_input != images.channels:
        raise UserError(f"{name} reads pixels of {a.d_input} channels, {images.name} has {images.channels}")
    if len(images.classes) > 255:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes; attack keeps its predictions in a byte: at most 255"
        )
    if a.n_classes != len(images.classes):
        raise UserError(f"{name} knows {a.n_classes} classes, {images.name} has {len(images.classes)}")
    tokens = images.length + (a.pooling == "class_token")
    if a.positions is not None and a.positions < tokens:
        raise UserError(
            f"{name} has positions for {a.positions} tokens, images of {images.height} × {images.width} pixels are {tokens}: `ssmlens attack --side` makes them smaller"
        )
