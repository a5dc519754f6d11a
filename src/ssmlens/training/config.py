"""What one training run is.

    lr_s = min_lr + (lr - min_lr) (1 + cos(π p_s)) / 2        p_s: share of the run that is over at step s

Steps are optimizer updates. A batch is what the stream returns for one step, over all processes together.
"""

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from ssmlens.configuration import Config
from ssmlens.errors import UserError


class TrainConfig(Config):
    """Everything about a run but the model, the data and where it is written."""

    model_config = ConfigDict(allow_inf_nan=False)

    steps: int = Field(gt=0)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(default=0, ge=0)  # lr rises linearly over these
    schedule: Literal["cosine", "cosine_epoch", "constant"] = "cosine"
    """cosine: lr falls at every step; cosine_epoch: after every epoch of the stream (the paper, SPEC.md §5)."""
    min_lr: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=None, gt=0)  # largest norm of the gradient
    seed: int = 0  # dropout and the like: the caller seeds the model and the stream
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; parameters stay float32
    grad_accumulation: int = Field(default=1, gt=0)  # pieces to cut each batch into
    log_every: int = Field(default=20, gt=0)  # steps per row of the history
    eval_every: int | None = Field(default=None, gt=0)  # None: only at the end
    checkpoint_every: int = Field(default=500, gt=0)
    early_stop: float | None = None  # stop once the accuracy exceeds this
    early_stop_on: Literal["validation", "released"] = "validation"
    """Which one: `accuracy` (validation) or, as the paper's released code does, `test_accuracy` (SPEC.md §4.5)."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        faults = {
            f"min_lr ({self.min_lr:g}) is above lr ({self.lr:g})": self.min_lr > self.lr,
            f"warmup_steps ({self.warmup_steps}) is more than steps ({self.steps})": self.warmup_steps > self.steps,
            f"betas must be in [0, 1), not {self.betas}": not all(0 <= beta < 1 for beta in self.betas),
            "early_stop needs eval_every": self.early_stop is not None and self.eval_every is None,
        }
        if found := [fault for fault, holds in faults.items() if holds]:
            raise UserError(f"TrainConfig: {'; '.join(found)}")
        return self

    @property
    def early_stop_metric(self) -> str:
        """The key that `evaluate` must return for the early stop."""
        return "accuracy" if self.early_stop_on == "validation" else "test_accuracy"

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed: everything that changes the numbers."""
        return self.model_dump(mode="json", exclude={"checkpoint_every"})
