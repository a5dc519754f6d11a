"""`ssmlens needle MODEL [MODEL ...]`."""

import json as json_
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError

LENGTHS = (512, 1024, 2048)


def run(
    models: list[str], text: Path | None, lengths: str | None, depths: int, prompts: int, batch_size: int, device: str,
    resume: bool, out: Path | None, json: bool,
) -> None:  # fmt: skip
    if not models:
        raise UserError("name at least one model: a directory, a packaged checkpoint or a hub id")
    sizes = _lengths(lengths)

    from ssmlens.cli import devices
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments.needle_statements import statements
    from ssmlens.models.pretrained import load, tokens

    on = devices.chosen(device)
    loaded = {name: load(path).to(on) for name, path in zip(tokens.names(models), models, strict=True)}
    for name, model in loaded.items():
        if not getattr(model, "can_generate", bool)():
            raise UserError(f"{name} is a {type(model).__name__}: only a language model can be asked for a needle")
    recipes = [_recipe(path) for path in models]
    synthetic = [r for r in recipes if r is not None]
    if synthetic and len(synthetic) < len(models):
        raise UserError(
            "some of these models were trained on the synthetic needle and some were not: measure them apart"
        )
    if len({json_.dumps({**r, "seed": 0}, sort_keys=True) for r in synthetic}) > 1:
        raise UserError(
            "these models were trained on different needle tasks (see data.json beside them): measure them apart"
        )
    if synthetic and text is not None:
        raise UserError("these models know only the tokens of the synthetic needle: leave --text out")
    where = directory(out, "needle")
    grid = [i / (depths - 1) for i in range(depths)]
    if synthetic:
        record = _synthetic(loaded, synthetic[0], sizes, grid, prompts, batch_size, resume, where, not json, on)
    else:
        record = statements(
            loaded, models, text, sizes or LENGTHS, grid, batch_size, resume, where, not json, on
        ).record
    finish(record, where, json)


def _lengths(words: str | None) -> tuple[int, ...] | None:
    if words is None:
        return None
    try:
        found = tuple(sorted({int(w) for w in words.split(",")}))
    except ValueError:
        raise UserError(f"--lengths are numbers with commas between them, such as 512,1024, not {words!r}") from None
    if found[0] < 4:
        raise UserError(f"a length of {found[0]} tokens holds no needle")
    return found


def _recipe(path: str) -> dict[str, Any] | None:
    """What the model was trained on, where that is the synthetic needle (`ssmlens train` leaves it beside the weights)."""
    from ssmlens.models.pretrained import packaged

    file = packaged().get(path, Path(path)) / "data.json"
    if not file.is_file():
        return None
    try:
        data = json_.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} is not readable JSON: {e}") from None
    return data if isinstance(data, dict) and data.get("task") == "needle" else None


def _synthetic(
    loaded: dict[str, Any], data: dict[str, Any], lengths: tuple[int, ...] | None, depths: list[float], prompts: int,
    batch_size: int, resume: bool, where: Path, shown: bool, on: str,
) -> Any:  # fmt: skip
    from ssmlens.experiments import needle as n
    from ssmlens.experiments import needle_record
    from ssmlens.experiments.needle_statements import bar
    from ssmlens.lens.store import fingerprint
    from ssmlens.tasks.needle import NeedleConfig, NeedleStream

    config = NeedleConfig.of({k: v for k, v in data.items() if k != "task"}, "data.json")
    stream = NeedleStream(config)
    chosen = lengths or (*sorted(config.lengths), 2 * config.length, 4 * config.length)
    identity = {
        "data": config.model_dump(mode="json"), "lengths": list(chosen), "depths": depths, "prompts": prompts,
        "models": {name: fingerprint(model) for name, model in loaded.items()},
    }  # fmt: skip
    store = n.Store(where / "cells.json", identity, resume)
    with bar(shown, len(loaded) * len(depths) * prompts * sum(chosen)) as advance:
        found = [
            n.measure_synthetic(
                name, model, stream, chosen, depths, prompts=prompts, batch_size=batch_size, store=store, advance=advance
            )
            for name, model in loaded.items()
        ]  # fmt: skip
    beyond = [str(length) for length in chosen if length > config.length]
    notes = [
        f"Synthetic needle: one of {config.keys} keys with one of {config.keys} values among {config.vocab_size - 2 * config.keys} kinds of "
        f"noise; trained on lengths {', '.join(map(str, sorted(config.lengths)))}, the needle anywhere.",
        *([f"Lengths {', '.join(beyond)} are longer than any in training."] if beyond else []),
        "Errors and intervals are over prompts: how another training of the same model would do, they do not say.",
    ]
    return needle_record.record(
        found,
        synthetic=True,
        config=identity,
        seeds=[config.seed],
        notes=notes,
        chance=100 / config.keys,
        device=on,
        trained=config.length,
    )
