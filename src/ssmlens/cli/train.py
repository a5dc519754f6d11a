"""`ssmlens train CONFIG`: a TOML file with the tables [model], [data] and [training].

seed, weight_decay_groups, threads      above the first table, see RunConfig
[model]      the fields of `ssmlens.models.Architecture`
[data]       task = "corpus" (the other keys: `CorpusConfig`), "mqar" (`MqarConfig`) or "needle" (`NeedleConfig`)
[training]   the fields of `ssmlens.training.TrainConfig`
"""

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ssmlens.configuration import Config
from ssmlens.errors import UserError


class RunConfig(Config):
    """A training file. seed: of the initialisation, and of data and training where they name none of their own.
    weight_decay_groups: see `LanguageModel.parameter_groups`. threads: of PyTorch; None leaves them as they are."""

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
    settings = TrainConfig.of({"seed": config.seed, **config.training}, f"{path}, [training]")
    model_config = LanguageModelConfig(**config.model)
    stream = stream_of({"seed": config.seed, **config.data})
    if stream.vocab_size > model_config.vocab_size:
        raise UserError(
            f"{path}: the data has {stream.vocab_size} different tokens, the model only {model_config.vocab_size}; set model.vocab_size"
        )
    torch.manual_seed(config.seed)
    model = LanguageModel(model_config)
    where = out if out is not None else Path("runs") / path.stem
    result = train(
        model, stream, settings, where, evaluate=lambda m: evaluate(m, stream), resume=resume, title=path.stem,
        optimizer_groups=model.parameter_groups(settings.weight_decay, config.weight_decay_groups),
        identity={"model": model_config.architecture.model_dump(mode="json"), "data": {**config.data, **stream.identity}, "seed": config.seed},
    )  # fmt: skip
    save(model, where / "model", config.data)
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


def save(model: Any, path: Path, data: dict[str, Any]) -> None:
    """save_pretrained, and beside the weights, in data.json, what they were trained on; all of it or nothing."""
    from transformers.utils import logging

    from ssmlens import files

    logging.disable_progress_bar()
    with files.replace_directory(path) as temporary:
        model.save_pretrained(temporary)
        named = {k: Path(v).name if k == "text" else v for k, v in data.items()}  # a path says nothing elsewhere
        files.write(Path(temporary) / "data.json", json.dumps(named, indent=1) + "\n")
