"""What `diagnose`, `evaluate` and `attack` do alike with --images and --side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlens.errors import UserError

if TYPE_CHECKING:
    from ssmlens.tasks.images import ImageSet


def read_as_trained(source: str, models: list[str], side: int | None = None) -> "ImageSet":
    """The images of `source`, averaged down to side × side, or to what the models were trained on. Raises UserError."""
    from ssmlens.experiments.pixels import shrunk
    from ssmlens.tasks.images import read

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
