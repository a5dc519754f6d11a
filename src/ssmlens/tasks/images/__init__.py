"""Images as sequences of pixels: `read` a source, `ImageStream` to train on, `digits` for a first try (docs/images.md)."""

from ssmlens.tasks.images.base import ImageSet, Split, balanced_order
from ssmlens.tasks.images.sources import DIGITS, digits, read
from ssmlens.tasks.images.stream import CIFAR10_MEAN, CIFAR10_STD, ImageConfig, ImageStream, to_unit

__all__ = [
    "CIFAR10_MEAN", "CIFAR10_STD", "DIGITS", "ImageConfig", "ImageSet", "ImageStream", "Split", "balanced_order", "digits", "read", "to_unit",
]  # fmt: skip
