"""Training batches of pixel sequences.

    tokens   x_t = pixel / 255 in [0, 1], or (pixel/255 - mean) / std      (batch, height · width, channels) float32
    targets  the class                                                     (batch,) int64

An epoch is a random order of the training images, cut into whole batches; the same for a seed, for ever.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field
from torch import Tensor

from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.tasks.base import Batch, check_step, permutation
from ssmlens.tasks.images.base import ImageSet, Split, balanced_order
from ssmlens.tasks.images.sources import read

# Of the channels of CIFAR-10's training images, in [0, 1]; the deviations that most code uses are means of those of single images.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.243, 0.261)
_ORDER = 0  # the second number of a seed


class ImageConfig(Config):
    """source: what `ssmlens.tasks.images.read` takes. train_images: the first so many in an order that is balanced over classes (the same for every
    seed); None: all. validation_images: so many, balanced and the last in that order, are kept from training and are what
    `validation` gives; 0: it gives the test images. scale: "unit" pixels in [0, 1]; "cifar10" by the mean and deviation above."""

    source: str = "digits"
    batch_size: int = Field(default=64, ge=1)
    train_images: int | None = Field(default=None, ge=1)
    validation_images: int = Field(default=0, ge=0)
    scale: Literal["unit", "cifar10"] = "unit"
    seed: int = 0


class ImageStream:
    """Random access to the batches of an ImageConfig. Raises UserError where there are too few images."""

    def __init__(self, config: ImageConfig, images: ImageSet | None = None) -> None:
        self.config = config
        self.images = images or read(config.source)
        if config.scale == "cifar10" and self.images.channels != len(CIFAR10_MEAN):
            raise UserError(
                f"scale 'cifar10' is for images of 3 channels, {self.images.name} has {self.images.channels}"
            )
        there, wanted = len(self.images.train), config.train_images
        left = there - config.validation_images
        if left < (wanted or config.batch_size):
            raise UserError(
                f"{self.images.name} has {there:,} training images; {config.validation_images:,} for validation and "
                f"{wanted or config.batch_size:,} to train on are more"
            )
        order = balanced_order(self.images.train.labels)
        self._train = np.sort(order[: wanted or left])
        self._validation = np.sort(order[left:])
        if len(self._train) < config.batch_size:
            raise UserError(f"{len(self._train):,} training images are less than a batch of {config.batch_size:,}")
        self._order: tuple[int, Int64[np.ndarray, " images"]] | None = None

    @property
    def n_classes(self) -> int:
        return len(self.images.classes)

    @property
    def d_input(self) -> int:
        return self.images.channels

    @property
    def length(self) -> int:
        return self.images.length

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a resumed run must find again beside the config: the images themselves."""
        return {"sha256": self.images.sha256}

    @property
    def batches_per_epoch(self) -> int:
        return len(self._train) // self.config.batch_size

    def batch(self, step: int) -> Batch:
        """The training batch of global step 0, 1, ..."""
        check_step(step)
        epoch, index = divmod(step, self.batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self._train), (self.config.seed, _ORDER, epoch))
        places = self._order[1][index * self.config.batch_size : (index + 1) * self.config.batch_size]
        return self._made(self.images.train, self._train[places])

    def validation(self) -> Iterator[Batch]:
        """The validation images (of the config), always the same and in the same order; without any, the test images."""
        if not self.config.validation_images:
            yield from self.test()
            return
        yield from self._batches(self.images.train, self._validation)

    def test(self, limit: int | None = None) -> Iterator[Batch]:
        """The test images, or the first `limit` of them in an order that is balanced over classes."""
        order = balanced_order(self.images.test.labels)
        yield from self._batches(self.images.test, np.sort(order[:limit]))

    def _batches(self, split: Split, places: Int64[np.ndarray, " n"]) -> Iterator[Batch]:
        for start in range(0, len(places), self.config.batch_size):
            yield self._made(split, places[start : start + self.config.batch_size])

    def _made(self, split: Split, places: Int64[np.ndarray, " batch"]) -> Batch:
        x = to_unit(split.pixels[places])
        if self.config.scale == "cifar10":
            x = (x - torch.tensor(CIFAR10_MEAN)) / torch.tensor(CIFAR10_STD)
        return Batch(x, torch.from_numpy(split.labels[places]))


def to_unit(pixels: UInt8[np.ndarray, "..."]) -> Float[Tensor, "..."]:
    """Pixels as float32 in [0, 1]."""
    return torch.from_numpy(np.asarray(pixels, np.float32)) / 255
