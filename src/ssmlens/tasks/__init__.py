"""Data to train and measure on. A task offers a stream: the batch of any step, so resuming is exact."""

from collections.abc import Mapping
from typing import Any

from ssmlens.errors import UserError, nearest
from ssmlens.targets import IGNORED
from ssmlens.tasks.base import Batch
from ssmlens.tasks.corpus import CorpusConfig, CorpusStream
from ssmlens.tasks.images import ImageConfig, ImageStream
from ssmlens.tasks.mqar import MqarConfig, MqarStream
from ssmlens.tasks.needle import NeedleConfig, NeedleStream

__all__ = ["IGNORED", "Batch", "stream_of"]


Stream = CorpusStream | ImageStream | MqarStream | NeedleStream


def stream_of(config: Mapping[str, Any]) -> Stream:
    """The stream of a mapping with `task`, "corpus", "images", "mqar" or "needle", and the keys of its config. Raises UserError
    for other keys."""
    rest = dict(config)
    task = rest.pop("task", None)
    if task == "corpus":
        return CorpusStream(CorpusConfig.of(rest, "data"))
    if task == "images":
        return ImageStream(ImageConfig.of(rest, "data"))
    if task == "mqar":
        return MqarStream(MqarConfig.of(rest, "data"))
    if task == "needle":
        return NeedleStream(NeedleConfig.of(rest, "data"))
    known = ["corpus", "images", "mqar", "needle"]
    raise UserError(
        f"data needs task = 'corpus', 'images', 'mqar' or 'needle', not {task!r}{nearest(str(task), known)}"
    )
