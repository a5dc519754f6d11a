"""Figures 2, 8 and 9: at which depth of a text is a needle still found, by Mamba, polarized Mamba and a transformer trained alike.

    recency index = accuracy in the last third of the depths - accuracy in the first third, in points; over several trainings

The paper asks Mamba-Codestral-7B and Mistral-7B for statements; so does the paper scale, and any scale of the models of `--model`. What can be
trained on a laptop knows no statements, so it is asked for the value of a key among noise: the recipes of configs/needle-*.toml, with several
seeds.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError
from ssmlens.experiments import needle
from ssmlens.experiments.base import (
    Claim,
    Item,
    Outcome,
    Request,
    choose,
    claims_config,
    claims_table,
    claims_verdict,
    side,
)
from ssmlens.results import Column, Figure, Map, Panel, Record, Series, Table, Value, provenance
from ssmlens.training import sweep, sweep_provenance
from ssmlens.training.schedulers import Report

DEPTHS = tuple(i / 8 for i in range(9))

MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"mixer": "mamba"},
    "polarized": {"mixer": "mamba", "polarization": {"ones": 1, "zeros": 1}},
    "transformer": {"mixer": "attention", "mixer_config": {"n_heads": 4}, "mlp": "swiglu", "mlp_ratio": 1.33},
}
LOST = 20.0  # % found, where guessing finds 6: below, a model knows nothing of what stands where
LABELS = {"mamba": "Mamba", "polarized": "Mamba, polarized", "transformer": "transformer"}


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


PAPER_MODELS = ("mistralai/Mamba-Codestral-7B-v0.1", "mistralai/Mistral-7B-v0.3")
PAPER_LENGTHS, PAPER_DEPTHS = (1024, 2048, 4096, 8192), tuple(i / 10 for i in range(11))


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


def run(request: Request) -> Record:
    choose("scale", request.scale, (*SCALES, "paper"))
    if request.models or request.scale == "paper":
        if request.variants or request.seeds:
            option = "--variant" if request.variants else "--seeds"
            raise UserError(
                f"{option} is of the models trained here; trained models are asked as they are: leave it away"
            )
        return _asked(request)
    scale = SCALES[request.scale]
    models = request.variants or tuple(MODELS)
    for name in models:
        choose("variant", name, MODELS)
    seeds = list(range(request.seeds or scale.seeds))
    jobs = [
        (f"{m}-seed{s}", {"item": "figure2", "recipe": recipe(scale, m, s), "lengths": scale.measured, "prompts": scale.prompts})
        for s in seeds for m in models
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"figure2, {request.scale}",
    )  # fmt: skip
    found = {m: [results[f"{m}-seed{s}"] for s in seeds] for m in models}
    return record(request.scale, found, seeds, sweep_provenance(request.out, results))


def _asked(request: Request) -> Record:
    """Statements instead of keys, of trained models; a recurrent one comes first, and what it is compared with behind it."""
    import torch

    from ssmlens.experiments.needle_statements import statements
    from ssmlens.models.pretrained import load, tokens

    paths = request.models or PAPER_MODELS
    small = request.scale == "smoke"
    lengths, depths = ((512,), (0.0, 0.5, 1.0)) if small else (PAPER_LENGTHS, PAPER_DEPTHS)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if on == "cuda" else torch.float32
    loaded = {name: load(path).to(on, kind) for name, path in zip(tokens.names(list(paths)), paths, strict=True)}
    for name, model in loaded.items():
        if not getattr(model, "can_generate", bool)():
            raise UserError(f"{name} is a {type(model).__name__}: only a language model can be asked for a needle")
    asked = statements(
        loaded, paths, None, lengths, list(depths), 16, request.resume, request.out, request.progress, on
    )  # fmt: skip
    claims = _claims_of_statements(asked.found) if not small else []
    made = asked.record
    return made.model_copy(
        update={
            "kind": "reproduce", "title": f"Figures 2 and 9: statements in a haystack ({request.scale} scale)",
            "verdict": [*claims_verdict(claims, small), *made.verdict],
            "tables": [*([claims_table(claims)] if claims else []), *made.tables],
            "config": {"item": "figure2", "scale": request.scale, "claims": claims_config(claims), **made.config},
        }
    )  # fmt: skip


def _claims_of_statements(found: list[needle.Needle]) -> list[Claim]:
    """Errors are over kinds of statements; each model is one training."""
    out = []
    for i, n in enumerate(found):
        index = n.recency_index()
        bounds = index.interval()
        first = i == 0
        out.append(Claim(
            item="Figures 2 and 9",
            claim=f"{n.name} finds needles near the end better than near the beginning." if first else f"{n.name} finds them alike at every depth.",
            paper="Mamba-Codestral-7B: yes" if first else "Mistral-7B: at every depth",
            ours=f"recency index {index.value:+.0f} points" + (f" ({bounds[0]:+.0f} to {bounds[1]:+.0f})" if bounds else ""),
            outcome=side(index) if first else _level(bounds),
            why="scored by probability, without a judge; an interval within 10 points of zero counts as alike", value=index.value,
            stderr=index.stderr, n=index.n,
        ))  # fmt: skip
    return out


def _level(bounds: tuple[float, float] | None) -> Outcome:
    if bounds is None:
        return "undecided"
    if bounds[0] >= -10 and bounds[1] <= 10:
        return "agrees"
    return "differs" if bounds[0] > 0 or bounds[1] < 0 else "undecided"


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


# ---- the record ----


def record(
    scale_name: str, found: dict[str, list[dict[str, Any]]], seeds: list[int], made_by: dict[str, Any]
) -> Record:
    scale = SCALES[scale_name]
    smoke = scale_name == "smoke"
    claims = _claims(scale, found)
    commits = sorted({p["commit"] or p["ssmlens"] for p in made_by.values() if p})
    seconds = sum(r["seconds"] for of in found.values() for r in of)
    return Record(
        kind="reproduce",
        title=f"Figures 2 and 9: needles in a haystack, models trained here ({scale_name} scale)",
        verdict=claims_verdict(claims, smoke),
        tables=[*([] if smoke else [claims_table(claims)]), _table(scale, found)],
        figures=[_by_depth(scale, found), _runs(scale, found)],
        maps=[_map(scale, found)],
        notes=[
            f"{len(seeds)} trainings of each model, {seconds / 60:.0f} core-minutes of training"
            + (f", made by {', '.join(commits)}." if commits else "."),
            f"Synthetic needle: one of 16 keys with one of 16 values among 32 kinds of noise, trained on lengths up to {max(scale.trained)}, "
            f"the needle anywhere; guessing finds {100 / 16:.1f} %. The paper hides statements from models of 7 billion weights: the same "
            "question of another kind, so the shape over depth is compared, no height. `ssmlens needle MODEL ...` asks for statements.",
            "The recipes are those of configs/needle-mamba.toml, needle-polarized.toml and needle-transformer.toml (docs/needle.md).",
        ],
        config={"item": "figure2", "scale": scale_name, "sizes": asdict(scale), "claims": claims_config(claims) if not smoke else []},
        seeds=seeds,
        provenance=provenance(),
    )  # fmt: skip


def _third(run: dict[str, Any], last: bool, rows: list[int]) -> float:
    columns = [i for i, d in enumerate(DEPTHS) if (d >= 2 / 3 if last else d <= 1 / 3)]
    return float(sum(run["accuracy"][r][c] for r in rows for c in columns) / (len(rows) * len(columns)))


def _index(run: dict[str, Any], rows: list[int]) -> float:
    return _third(run, True, rows) - _third(run, False, rows)


def _rows(scale: Scale, which: Callable[[int], bool]) -> list[int]:
    return [i for i, n in enumerate(scale.measured) if which(n)]


def _parts(scale: Scale) -> dict[str, list[int]]:
    """The rows of lengths that training has seen, and of longer ones."""
    longest = max(scale.trained)
    return {
        f"up to {longest} tokens": _rows(scale, lambda n: n <= longest),
        f"longer than any in training (up to {max(scale.measured)})": _rows(scale, lambda n: n > longest),
    }


def _claims(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    out = []
    for words, rows in _parts(scale).items():
        indices = {m: [_index(run, rows) for run in runs] for m, runs in found.items()}
        asked: list[tuple[str, str, Value]] = []
        if "mamba" in indices:
            asked.append((
                f"A state space model finds needles near the end better than near the beginning ({words}).",
                "Mamba-Codestral-7B: yes", Value.mean(indices["mamba"], "points"),
            ))  # fmt: skip
        lost: list[float] = []
        finds = [_third(run, last, rows) for run in found.get("transformer", []) for last in (False, True)]
        if {"mamba", "transformer"} <= set(indices) and sum(finds) / len(finds) < LOST:
            lost = finds
        elif {"mamba", "transformer"} <= set(indices):
            pairs = zip(indices["mamba"], indices["transformer"], strict=True)
            asked.append((
                f"It prefers the end more than a transformer does ({words}).", "Mistral-7B finds them at every depth",
                Value.mean([a - b for a, b in pairs], "points"),
            ))  # fmt: skip
        for claim, paper, value in asked:
            bounds = value.interval()
            ours = (
                f"recency index {value.value:+.0f} points"
                if len(asked) and claim == asked[0][0]
                else f"{value.value:+.0f} points more"
            )
            out.append(Claim(
                item="Figures 2 and 9", claim=claim, paper=paper,
                ours=ours + (f" ({bounds[0]:+.0f} to {bounds[1]:+.0f})" if bounds else ""), outcome=side(value),
                why="the shape over depth is compared: the models are small and the needle is synthetic", value=value.value,
                stderr=value.stderr, n=value.n,
            ))  # fmt: skip
        if lost:
            out.append(Claim(
                item="Figures 2 and 9", claim=f"It prefers the end more than a transformer does ({words}).",
                paper="Mistral-7B finds them at every depth", ours=f"the transformer finds {sum(lost) / len(lost):.0f} % at such lengths",
                outcome="not comparable", why="a transformer that is lost at lengths beyond its training prefers nothing",
            ))  # fmt: skip
    return out


def _table(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> Table:
    names = ("model", "lengths", "first third", "last third", "recency index", "index less Mamba's", "parameters")
    units = ("", "", "%", "%", "points", "points", "")
    rows: list[list[Any]] = []
    for words, at in _parts(scale).items():
        for m, runs in found.items():
            index = [_index(run, at) for run in runs]
            base = [_index(run, at) for run in found.get("mamba", [])]
            less = (
                None
                if m == "mamba" or not base
                else Value.mean([a - b for a, b in zip(index, base, strict=True)], "points")
            )
            thirds = [Value.mean([_third(run, last, at) for run in runs], "%") for last in (False, True)]
            rows.append([LABELS[m], words, *thirds, Value.mean(index, "points"), less, runs[0]["parameters"]])
    return Table(
        id="needles", title="Needles found", columns=[Column(name=n, unit=u) for n, u in zip(names, units, strict=True)], rows=rows,
        meaning="A model that remembers equally well everywhere has a recency index of 0; one that forgets has a positive one.",
        method=f"{scale.prompts} prompts for every length and depth, {len(DEPTHS)} depths; ± standard error over trainings; differences seed by seed.",
    )  # fmt: skip


def _by_depth(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> Figure:
    series = []
    x = [100 * d for d in DEPTHS]
    for m, runs in found.items():
        for i, (words, rows) in enumerate(_parts(scale).items()):
            values = [
                Value.mean([sum(run["accuracy"][r][c] for r in rows) / len(rows) for run in runs])
                for c in range(len(DEPTHS))
            ]
            series.append(Series(
                name=f"{LABELS[m]}, {words.partition(' (')[0]}", x=x, y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values],
                style="line" if i else "points", group=LABELS[m],
            ))  # fmt: skip
    series.append(Series(name="guessing", x=[x[0], x[-1]], y=[100 / 16] * 2, style="fit", group="paper"))
    return Figure(
        id="by-depth", title="Needles found, by depth", x_label="depth of the needle (% of the text before it)", y_label="found (%)",
        series=series, meaning="Left: needles at the beginning; right: just before the question. Lines: texts longer than any in training.",
        method="Mean over lengths, bars are standard errors over trainings.",
    )  # fmt: skip


def _runs(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> Figure:
    x = [f"{LABELS[m]}, {words.partition(' (')[0]}" for m in found for words in _parts(scale)]
    most = max(len(runs) for runs in found.values())
    series = [
        Series(name=f"seed {s}", x=x, y=[_index(runs[s], rows) for runs in found.values() for rows in _parts(scale).values()], style="points")
        for s in range(most)
    ]  # fmt: skip
    return Figure(
        id="every-run", title="Every training", x_label="model, lengths", y_label="recency index (points)", x_scale="category", series=series,
        meaning="One point a training: above 0, needles near the end are found better.", method="Last third of the depths minus the first.",
    )  # fmt: skip


def _map(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> Map:
    panels = []
    for m, runs in found.items():
        cells = [
            [Value.mean([run["accuracy"][r][c] for run in runs]) for c in range(len(DEPTHS))]
            for r in range(len(scale.measured))
        ]
        panels.append(Panel(
            name=LABELS[m], group=LABELS[m], values=[[v.value for v in row] for row in cells],
            stderr=[[math.nan if v.stderr is None else v.stderr for v in row] for row in cells],
        ))  # fmt: skip
    return Map(
        id="map", title="Needles found, by length and depth", x_label="depth of the needle (%)", y_label="length (tokens)", unit="found (%)",
        x=[f"{100 * d:.0f}" for d in DEPTHS], y=[str(n) for n in scale.measured], panels=panels, low=0, high=100,
        meaning="One square: one length of text, one depth. The paper's Figures 2 and 9 are drawn like this.",
        method=f"{scale.prompts} prompts a square and training, mean over trainings.",
    )  # fmt: skip


ITEM = Item(
    name="figure2",
    title="needles in a haystack by depth: Mamba, polarized Mamba and a transformer trained alike",
    source="Figures 2, 8 and 9",
    scales=(*SCALES, "paper"),
    variants=tuple(MODELS),
    run=run,
    takes=("model",),
    aliases=("figure8", "figure9"),
)
