"""What a training run returns."""

from dataclasses import dataclass, field
from pathlib import Path

from ssmlens.training.history import Row


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. The model itself was trained in place and is in evaluation mode."""

    step: int
    finished: str  # "steps" or "early_stop"
    metrics: dict[str, float]  # of the last evaluation
    history: list[Row] = field(repr=False)  # rows with loss, accuracy, lr, tokens_per_second
    evaluations: list[Row] = field(repr=False)  # rows with evaluation
    seconds: float  # spent in training steps, over all parts of a resumed run
    tokens: int
    checkpoint: Path
    resumed_from: int | None
