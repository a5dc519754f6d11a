"""Training: one run (`train`), many runs (`sweep`), and what makes both survive a kill."""

from ssmlens.targets import IGNORED
from ssmlens.training.config import TrainConfig
from ssmlens.training.data import Batch, Stream
from ssmlens.training.loop import train
from ssmlens.training.optimizer import default_groups, learning_rate
from ssmlens.training.result import TrainResult
from ssmlens.training.sweep import Job, SweepError, sweep, sweep_provenance

__all__ = [
    "IGNORED",
    "Batch",
    "Job",
    "Stream",
    "SweepError",
    "TrainConfig",
    "TrainResult",
    "default_groups",
    "learning_rate",
    "sweep",
    "sweep_provenance",
    "train",
]
