"""How two runs are told apart, before one is continued as the other."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ssmlens.training.config import TrainConfig


def run_identity(
    config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that must be the same for a checkpoint to be this run's; JSON-able.

    Raises ValueError: when the optimizer's groups do not hold exactly the model's trainable parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    wrong = wanted.symmetric_difference(name for group in held for name in group)
    if wrong:
        raise ValueError(f"the optimizer groups must hold just the model's trainable parameters; look at {wrong}")
    groups = [
        {"weight_decay": group["weight_decay"], "parameters": fingerprint({"names": these})[:12]}
        for group, these in zip(optimizer.param_groups, held, strict=True)
    ]
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return {
        **(given or {}),
        "training": config.identity(),
        "parameters": {"count": sum(map(math.prod, shapes.values())), "shapes": fingerprint(shapes)[:12]},
        "optimizer_groups": groups,
    }


def surroundings(world: int, device: torch.device) -> dict[str, Any]:
    """What may change the last bits of a run without being part of its configuration."""
    return {
        "threads": torch.get_num_threads(),
        "processes": world,
        "device": device.type,
        "torch": str(torch.__version__),
    }


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a JSON-able configuration; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two JSON-able configurations differ, each as `training.lr was 0.001, is now 0.002`."""
    before, after = dict(_flat(old)), dict(_flat(new))
    absent = object()
    found = []
    for key in sorted({**before, **after}):
        was, now = before.get(key, absent), after.get(key, absent)
        if was != now:
            said = ["absent" if value is absent else repr(value) for value in (was, now)]
            found.append(f"{key} was {said[0]}, is now {said[1]}")
    return found


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with dotted keys. Tuples compare equal to the lists that JSON makes of them."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(config, list | tuple) and config:
        for index, value in enumerate(config):
            yield from _flat(value, f"{prefix}.{index}")
    else:
        yield prefix, list(config) if isinstance(config, tuple) else config
