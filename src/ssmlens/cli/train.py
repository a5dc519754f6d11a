"""`ssmlens train CONFIG`: a TOML file with the tables [model], [data] and [training].

[model]      the fields of `ssmlens.models.Architecture`; seed is that of the initialisation, weight_decay_groups "corrected"
[data]       task = "corpus" (the other keys: `CorpusConfig`) or task = "mqar" (`MqarConfig`)
[training]   the fields of `ssmlens.training.TrainConfig`
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ssmlens.configuration import Config
from ssmlens.errors import UserError


class RunConfig(Config):
    """A training file. `seed` initialises the model; data and training have seeds of their own."""

    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    seed: int = 0
    weight_decay_groups: Literal["corrected", "released"] = "corrected"
    threads: int | None = Field(default=None, ge=1)


def read(path: Path) -> RunConfig:
    """Raises UserError for a file that is missing, not TOML, or has unknown keys."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{path} is not TOML: {e}") from None
    return RunConfig.of(tree, str(path))


def run(path: Path, out: Path | None, resume: bool) -> None:
    config = read(path)
    import torch

    from ssmlens.models import LanguageModel, LanguageModelConfig
    from ssmlens.tasks import stream_of
    from ssmlens.training import TrainConfig, train

    if config.threads:
        torch.set_num_threads(config.threads)
    settings = TrainConfig(**config.training)
    model_config = LanguageModelConfig(**config.model)
    stream = stream_of(config.data)
    torch.manual_seed(config.seed)
    model = LanguageModel(model_config)
    where = out if out is not None else Path("runs") / path.stem
    result = train(
        model, stream, settings, where, evaluate=lambda m: evaluate(m, stream), resume=resume, title=path.stem,
        optimizer_groups=model.parameter_groups(settings.weight_decay, config.weight_decay_groups),
        identity={"model": model_config.architecture.model_dump(mode="json"), "data": config.data, "seed": config.seed},
    )  # fmt: skip
    save(model, where / "model")
    measured = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
    print(f"{result.step} steps in {result.seconds:.0f} s; {measured}; model in {where / 'model'}")


def evaluate(model: Any, stream: Any) -> dict[str, float]:
    """Validation loss in nats a target, bits a target, and accuracy."""
    import math

    import torch

    loss = correct = count = 0.0
    device = next(model.parameters()).device
    for batch in stream.validation():
        out = model(torch.as_tensor(batch.tokens).to(device), targets=torch.as_tensor(batch.targets).to(device))
        n = float(out.n_targets)
        loss, correct, count = loss + float(out.loss) * n, correct + float(out.n_correct), count + n
    return {"loss": loss / count, "bits": loss / count / math.log(2), "accuracy": correct / count}


def save(model: Any, path: Path) -> None:
    """save_pretrained, atomically: into a directory beside it, then renamed."""
    import os
    import shutil
    import tempfile

    from transformers.utils import logging

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        logging.disable_progress_bar()
        model.save_pretrained(temporary)
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.")) / "model"
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old.parent)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
