"""Labelled images of one size, as sequences of pixels.

pixels: (n, height · width, channels) uint8, row by row      labels: (n,) int64, the place of a class in `classes`
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

from ssmlens.errors import UserError

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Split:
    pixels: UInt8[np.ndarray, "n length channels"]
    labels: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """sha256: of the size, the classes, and all pixels and labels, so it is the same however the images are packed."""

    name: str
    sha256: str
    classes: tuple[str, ...]
    height: int
    width: int
    channels: int
    train: Split
    test: Split

    @property
    def length(self) -> int:
        """Pixels of an image."""
        return self.height * self.width


def digest(classes: Iterable[str], size: tuple[int, int, int], splits: Iterable[Split]) -> str:
    """What `ImageSet.sha256` says."""
    found = hashlib.sha256(repr((tuple(classes), size)).encode())
    for split in splits:
        found.update(split.pixels.tobytes())
        found.update(split.labels.astype("<i8").tobytes())
    return found.hexdigest()


def assembled(
    name: str, classes: tuple[str, ...], size: tuple[int, int, int], train: Split, test: Split
) -> ImageSet:  # fmt: skip
    """Checked and with its digest. Raises UserError, naming them, for classes that a split lacks."""
    for which, split in zip(SPLITS, (train, test), strict=True):
        absent = sorted(set(range(len(classes))) - set(np.unique(split.labels).tolist()))
        if absent:
            raise UserError(f"{name}: {which} has no image of the class {', '.join(classes[i] for i in absent)}")
    return ImageSet(name, digest(classes, size, (train, test)), classes, *size, train, test)


def balanced_order(labels: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """The images ordered so that any first so many have the same number of every class (as far as it goes): first the first image of
    every class, then the second of every class, ..."""
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], np.unique(labels))
    rank = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    return by_class[np.lexsort((labels[by_class], rank))]
