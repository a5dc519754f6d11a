"""`ssmlens train CONFIG`: a TOML file with the tables [model], [data] and [training].

seed, weight_decay_groups, threads      above the first table, see RunConfig
[model]      the fields of `ssmlens.models.Architecture`; with task = "images" those of `ClassifierArchitecture`
[data]       task = "corpus" (the other keys: `CorpusConfig`), "images" (`ImageConfig`), "mqar" (`MqarConfig`) or "needle" (`NeedleConfig`)
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
    """A training file. model: None where `--from` names one. seed: of the initialisation, and of data and training where they name none of their own.
    weight_decay_groups: see `LanguageModel.parameter_groups`. threads: of PyTorch; None leaves them as they are."""

    model: dict[str, Any] | None = None
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


def run(
    path: Path, out: Path | None, resume: bool, start: str | None = None, only_polarized: bool = False, seed: int | None = None
) -> None:  # fmt: skip
    config = read(path)
    if (config.model is None) == (start is None):
        raise UserError(
            f"{path}: give a [model] to train from nothing, or --from MODEL, not " + ("both" if start else "neither")
        )
    if only_polarized and start is None:
        raise UserError("--only-polarized needs --from MODEL: in a fresh model everything is to be trained")
    if seed is not None:
        config = config.model_copy(update={"seed": seed})
    import torch
    from accelerate import PartialState

    from ssmlens.training import TrainConfig, train

    if config.threads:
        torch.set_num_threads(config.threads)
    settings = TrainConfig.of({"seed": config.seed, **config.training}, f"{path}, [training]")
    given = {"seed": config.seed, **config.data}
    if start is None:
        stream = _stream(given, None, None)
        torch.manual_seed(config.seed)
        model = _fresh(config.model or {}, stream)
    else:
        model = _loaded(start)
        _same_kind(path, model, config.data)
        stream = _stream(given, model, start)
    _fits(path, model, stream)
    identity: dict[str, Any] = {
        "model": model.config.architecture.model_dump(mode="json"), "data": {**config.data, **stream.identity}, "seed": config.seed,
    }  # fmt: skip
    if start is not None:
        from ssmlens.lens.store import fingerprint

        identity |= {"start": fingerprint(model), "only_polarized": only_polarized}
    groups = model.parameter_groups(settings.weight_decay, config.weight_decay_groups)
    if only_polarized:
        from ssmlens.models.retrofit import train_only_new

        groups = [{"params": train_only_new(model), "weight_decay": 0.0}]
    where = out if out is not None else Path("runs") / path.stem
    result = train(
        model, stream, settings, where, evaluate=lambda m: evaluate(m, stream), resume=resume, title=path.stem,
        optimizer_groups=groups, identity=identity,
    )  # fmt: skip
    if not PartialState().is_main_process:
        return  # of several processes one writes: the last would replace the directory by one without weights
    save(model, where / "model", config.data, start)
    measured = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items())
    print(f"{result.step} steps in {result.seconds:.0f} s; {measured}; model in {where / 'model'}")


def _fresh(fields: dict[str, Any], stream: Any) -> Any:
    """A classifier where the data are images (inputs and classes are as many as theirs), else a language model."""
    from ssmlens.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig
    from ssmlens.tasks.images import ImageStream

    if isinstance(stream, ImageStream):
        return Classifier(ClassifierConfig(**{"d_input": stream.d_input, "n_classes": stream.n_classes, **fields}))
    return LanguageModel(LanguageModelConfig(**fields))


def _loaded(start: str) -> Any:
    from ssmlens.models import Classifier, LanguageModel
    from ssmlens.models.pretrained import load

    model = load(start)
    if not isinstance(model, LanguageModel | Classifier):
        raise UserError(
            f"{start} is a {type(model).__name__}, which is not trained here; only ssmlens models and converted families can be trained"
        )
    return model.train()


def _same_kind(path: Path, model: Any, data: dict[str, Any]) -> None:
    """Raises UserError for a classifier with other data than images, and for another model with them."""
    from ssmlens.models import Classifier

    if isinstance(model, Classifier) != (data.get("task") == "images"):
        raise UserError(f'{path}: a classifier learns from task = "images", and nothing else does')


def _fits(path: Path, model: Any, stream: Any) -> None:
    """Raises UserError where model and data do not belong together."""
    from ssmlens.tasks.images import ImageStream

    if isinstance(stream, ImageStream):
        there = (stream.d_input, stream.n_classes)
        if there != (model.config.d_input, model.config.n_classes):
            raise UserError(
                f"{path}: the images have {there[0]} channels and {there[1]} classes, the model {model.config.d_input} and {model.config.n_classes}"
            )
        if stream.config.scale != "unit":  # whoever reads the model gives it pixels in [0, 1]
            raise UserError(
                f"{path}: scale = {stream.config.scale!r} would be lost with the data: give the model mean and std in [model] instead"
            )
        return
    if stream.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: the data has {stream.vocab_size} different tokens, the model only {model.config.vocab_size}; set model.vocab_size"
        )


def _stream(data: dict[str, Any], model: Any, start: str | None) -> Any:
    """The data of the file; text as the tokens of the model's own tokenizer, where it is one that has one. Raises UserError for
    text and a model whose tokens are neither bytes nor a tokenizer's."""
    from ssmlens.tasks import stream_of

    if start is None or data.get("task") != "corpus":
        return stream_of(data)
    from ssmlens.models.pretrained import tokens

    found = tokens.tokenizer(start, model, start)
    if found is None:
        return stream_of(data)
    from ssmlens.tasks.corpus import CorpusConfig
    from ssmlens.tasks.tokens import TokenStream

    config = CorpusConfig.of({k: v for k, v in data.items() if k != "task"}, "data")
    return TokenStream(config, tokens.coder(found).encode, model.config.vocab_size)


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


def save(model: Any, path: Path, data: dict[str, Any], start: str | None = None) -> None:
    """save_pretrained, and beside the weights, in data.json, what they were trained on, and the tokenizer of the model that they were
    before; all of it or nothing."""
    from transformers.utils import logging

    from ssmlens import files

    logging.disable_progress_bar()
    with files.replace_directory(path) as temporary:
        model.save_pretrained(temporary)
        if start is not None:
            from ssmlens.models.pretrained import tokens

            tokens.keep(start, model, start, Path(temporary))
        named = {
            k: Path(v).name if k in ("text", "source") else v for k, v in data.items()
        }  # a path says nothing elsewhere
        files.write(Path(temporary) / "data.json", json.dumps(named, indent=1) + "\n")
