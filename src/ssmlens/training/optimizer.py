"""AdamW, its parameter groups, and the learning rate as a pure function of the step.

A pure function has no state to save: a resumed run cannot be one step off.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ssmlens.training.config import TrainConfig

Groups = Sequence[dict[str, Any]]


def default_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups for a plain module: matrices decay, vectors and scalars (biases, norms) do not.

    Models that know better (A_log, D) bring their own `parameter_groups`.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the groups. Groups without parameters are left out; a group without weight_decay gets the
    config's.

    The fused update is one kernel for all tensors: for a model of 22 small tensors on one CPU core 0.17 ms
    against 0.67 ms for PyTorch's default. It knows no complex parameters.
    """
    kept = [{**group, "params": list(group["params"])} for group in groups]
    kept = [group for group in kept if group["params"]]
    fused = all(p.is_floating_point() for group in kept for p in group["params"])
    return torch.optim.AdamW(
        kept, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused or None
    )


def learning_rate(config: TrainConfig, step: int, batches_per_epoch: int | None = None) -> float:
    """The lr of update `step` (from 0): linear warm-up, then the schedule. `cosine_epoch` needs batches_per_epoch."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        over = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    else:
        if not batches_per_epoch:
            raise ValueError("schedule cosine_epoch needs a stream that says its batches_per_epoch")
        over = (step // batches_per_epoch) / math.ceil(config.steps / batches_per_epoch)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * over)) / 2
