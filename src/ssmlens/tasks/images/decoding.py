"""PNG and JPEG files, gathered into splits: bytes in, pixels out.

Every fault is named with the file that has it. Grey images stay grey where all of them are; else all become RGB.
"""

import io
from collections import Counter

import numpy as np
from jaxtyping import UInt8

from ssmlens.errors import UserError
from ssmlens.tasks.images.base import SPLITS, ImageSet, Split, assembled

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST = 1024  # pixels to a side
_BYTES = 1 << 26  # of a file


def decode(content: bytes, where: str) -> UInt8[np.ndarray, "height width channels"]:
    """channels: 1 or 3. Raises UserError, which begins with `where`, for what is truncated, no image, too large or not of 8 bits."""
    from PIL import Image

    if len(content) > _BYTES:
        raise UserError(f"{where}: {len(content):,} bytes are too many for an image of at most {LARGEST} × {LARGEST}")
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        if max(image.size) > LARGEST:
            raise UserError(
                f"{where}: {image.width} × {image.height} pixels; at most {LARGEST} × {LARGEST} can be read"
            )
        if image.mode not in ("1", "L", "P", "RGB"):
            raise UserError(f"{where}: an image of mode {image.mode}; give 8-bit grey or RGB")
        return np.atleast_3d(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
    except UserError:
        raise
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for damaged files
        reason = " ".join(str(e).split())[:120].replace("<_io.BytesIO object at", "<content at") or type(e).__name__
        raise UserError(f"{where}: not a whole PNG or JPEG ({reason.split(' <content')[0]})") from None


class Gathered:
    """Decoded images of both splits, until they are an ImageSet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: dict[tuple[str, str, str], UInt8[np.ndarray, "height width channels"]] = {}

    def add(self, split: str, label: str, file: str, content: bytes) -> None:
        """Raises UserError for an image that cannot be read or was there already."""
        where = f"{self.name}: {split}/{label}/{file}"
        if (split, label, file) in self._found:
            raise UserError(f"{where} is there twice")
        self._found[split, label, file] = decode(content, where)

    def finish(self, classes: tuple[str, ...] | None = None) -> ImageSet:
        """classes: in order of their labels; None for the sorted names. Raises UserError for a split or class without images, and for an image
        that is not of the others' size."""
        counts = Counter(split for split, _, _ in self._found)
        for split in SPLITS:
            if not counts[split]:
                raise UserError(f"{self.name} holds no images {split}/CLASS/NAME.png or .jpg")
        sizes = Counter(pixels.shape[:2] for pixels in self._found.values())
        (height, width), _ = sizes.most_common(1)[0]
        for (split, label, file), pixels in self._found.items():
            if pixels.shape[:2] != (height, width):
                h, w = pixels.shape[:2]
                raise UserError(
                    f"{self.name}: {split}/{label}/{file} has {w} × {h} pixels, the others {width} × {height}"
                )
        classes = classes or tuple(sorted({label for _, label, _ in self._found}))
        channels = max(pixels.shape[2] for pixels in self._found.values())
        made = []
        for split in SPLITS:
            keys = sorted(key for key in self._found if key[0] == split)
            pixels = np.empty((len(keys), height * width, channels), np.uint8)
            for i, key in enumerate(keys):
                pixels[i] = self._found.pop(key).reshape(height * width, -1)  # one grey value becomes three
            made.append(Split(pixels, np.array([classes.index(label) for _, label, _ in keys], np.int64)))
        return assembled(self.name, classes, (height, width, channels), *made)
