"""Data to train and measure on. A task offers a stream: the batch of any step, so resuming is exact."""

from collections.abc import Mapping
from typing import Any

from ssmlens.errors import UserError, nearest
from ssmlens.targets import IGNORED
from ssmlens.tasks.base import Batch
from ssmlens.tasks.corpus import CorpusConfig, CorpusStream
from ssmlens.tasks.mqar import MqarConfig, MqarStream

__all__ = ["IGNORED", "Batch", "stream_of"]


def stream_of(config: Mapping[str, Any]) -> CorpusStream | MqarStream:
    """The stream of a mapping with `task`, "corpus" or "mqar", and the keys of its config. Raises UserError for other keys."""
    rest = dict(config)
    task = rest.pop("task", None)
    if task == "corpus":
        return CorpusStream(CorpusConfig.of(rest, "data"))
    if task == "mqar":
        return MqarStream(MqarConfig.of(rest, "data"))
    raise UserError(f"data needs task = 'corpus' or 'mqar', not {task!r}{nearest(str(task), ['corpus', 'mqar'])}")
