"""What Figure 2 trains, and what it asks of it: the value of a key among noise, at every length and depth.

    accuracy[i][j]     % found in texts of measured[i] tokens, the needle at depth DEPTHS[j]

The recipes are those of configs/needle-*.toml, with several seeds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmlens.experiments import needle
from ssmlens.training.schedulers import Report

DEPTHS = tuple(i / 8 for i in range(9))

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": "mamba"},
    "polarized": {"mixer": "mamba", "polarization": {"ones": 1, "zeros": 1}},
    "transformer": {"mixer": "attention", "mixer_config": {"n_heads": 4}, "mlp": "swiglu", "mlp_ratio": 1.33},
}


@dataclass(frozen=True)
class Scale:
    """trained, measured: lengths in tokens. steps: of training. prompts: for every length and depth. d_model: of all models."""

    trained: tuple[int, ...]
    measured: tuple[int, ...]
    grow_every: int
    steps: int
    d_model: int
    prompts: int
    seeds: int


SCALES = {
    "smoke": Scale((16, 32), (16, 32, 64), 4, 8, 16, 8, 2),
    "laptop": Scale((16, 32, 64, 128, 256), (64, 256, 1024, 4096), 100, 800, 64, 100, 5),
}


def recipe(scale: Scale, model: str, seed: int) -> dict[str, Any]:
    """The run as `ssmlens train` would be told it: the keys of configs/needle-*.toml."""
    return {
        "seed": seed,
        "model": {"vocab_size": 64, "d_model": scale.d_model, "n_layers": 2, **MODELS[model]},
        "data": {
            "task": "needle", "vocab_size": 64, "keys": 16, "lengths": list(scale.trained), "grow_every": scale.grow_every, "batch_size": 4,
        },
        "training": {
            "steps": scale.steps, "lr": 3e-3, "min_lr": 3e-5, "warmup_steps": min(100, scale.steps // 2), "weight_decay": 0.1, "clip": 1.0,
            "eval_every": 200, "checkpoint_every": 200,
        },
    }  # fmt: skip


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One training, then every length and depth. accuracy: of every cell, in %; rows are lengths, columns depths."""
    import torch

    from ssmlens.models import LanguageModel, LanguageModelConfig
    from ssmlens.tasks.needle import NeedleConfig, NeedleStream
    from ssmlens.training import TrainConfig, train

    told = config["recipe"]
    stream = NeedleStream(
        NeedleConfig.of({**{k: v for k, v in told["data"].items() if k != "task"}, "seed": told["seed"]}, "data")
    )
    settings = TrainConfig(**told["training"], seed=told["seed"])
    torch.manual_seed(told["seed"])
    lm = LanguageModel(LanguageModelConfig(**told["model"]))
    trained = train(
        lm, stream, settings, directory / "training", optimizer_groups=lm.parameter_groups(settings.weight_decay), resume=True,
        progress=lambda share: report(0.7 * share),
    )  # fmt: skip
    lengths, done = tuple(config["lengths"]), 0.0
    total = config["prompts"] * len(DEPTHS) * sum(lengths)

    def advance(tokens: float) -> None:
        nonlocal done
        done += tokens
        report(0.7 + 0.3 * done / total)

    made = needle.measure_synthetic(
        "model", lm, stream, lengths, DEPTHS, prompts=config["prompts"], advance=advance,
        store=needle.Store(directory / "cells.json", {"prompts": config["prompts"]}, resume=True),
    )  # fmt: skip
    return {
        "accuracy": [[made.accuracy([(n, d)]).value for d in DEPTHS] for n in lengths],
        "parameters": made.parameters,
        "seconds": trained.seconds,
        "loss": [[row["step"], row["loss"]] for row in trained.history],
    }
