"""Does polarization help a model that is trained already? A worked example, not one of the paper's.

A default Mamba learns real text (the English reference inside Python, or `--data FILE,FILE,...`), then goes on for a while in three ways from the same weights, on
the same batches, for the same number of steps:

    as it is            no polarization, all parameters
    polarized           one state channel at one and one at zero appended (ssmlens.polarize), all parameters
    new rows alone      the same, but only what was appended is trained

Measured of each, and of the model before: loss on held-out text and on the text of training, influence over distance, and what a needle far
back is still worth, in texts of twice the length of training, so that "far" is far.
A seed is one training from scratch with its three continuations; differences are taken seed by seed.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.experiments import needle
from ssmlens.experiments.base import Item, Request, choose, holm
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance
from ssmlens.tasks import corpus
from ssmlens.tasks.corpus import Corpus, CorpusConfig, CorpusStream
from ssmlens.training import TrainConfig, sweep, sweep_provenance, train
from ssmlens.training.schedulers import Report

SOURCE = "text.json"
WAYS = {"before": "before", "plain": "as it is", "polarized": "polarized", "new": "new rows alone"}
# name, unit, meaning
MEASURES = {
    "bits": ("loss", "bits/byte", "on held-out text"),
    "seen": ("loss, text of training", "bits/byte", "on as many windows of the text that it was trained on"),
    "trace": ("trace", "", "influence over the farther half of the distances, relative to that at distance 1"),
    "context": ("effective context", "tokens", "holds 90 % of the squared influence"),
    "needle": ("far needle", "nats", "log-odds added by a statement in the first third of the text"),
}
WORDS = {
    "bits": ("better", "worse"),
    "trace": ("weaker", "stronger"),
    "needle": ("worth less", "worth more"),
}  # less, more


@dataclass(frozen=True)
class Scale:
    """length: tokens of a training window, and of what is measured. steps, more: of the first training, of each continuation."""

    d_model: int
    layers: int
    length: int
    batch_size: int
    steps: int
    more: int
    lr: float
    more_lr: float
    windows: int
    sequences: int
    facts: int
    depths: tuple[float, ...]
    seeds: int


SCALES = {
    "smoke": Scale(8, 1, 512, 2, 3, 2, 4e-3, 1e-3, 2, 2, 4, (0.0, 0.5, 1.0), 2),
    "laptop": Scale(64, 6, 512, 8, 1000, 300, 4e-3, 1e-3, 64, 8, 52, (0.0, 0.25, 0.5, 0.75, 1.0), 3),
}


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    seeds = list(range(request.seeds or scale.seeds))
    source = request.data or corpus.PYTHON_REFERENCE
    text = corpus.read(source)
    # a run knows its text by name and contents; where that lies stands beside the runs and may change
    files.write(files.make_directory(request.out) / SOURCE, json.dumps(source) + "\n")
    known = {"name": text.name, "sha256": text.sha256}
    jobs = [
        (f"seed{s}", {"item": "retrofit", "scale": request.scale, "sizes": asdict(scale), "text": known, "seed": s}) for s in seeds
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"retrofit, {request.scale}", keep=True,
    )  # fmt: skip
    return record(request.scale, seeds, results, sweep_provenance(request.out, results), text)


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One seed: the training, the three continuations, the measurements. Resumes from what is in `directory`."""
    from ssmlens.models import LanguageModel, LanguageModelConfig
    from ssmlens.models.retrofit import polarize, train_only_new

    scale, seed = SCALES[config["scale"]], int(config["seed"])
    total, before = scale.steps + 3 * scale.more, 0
    source = json.loads((directory.parents[1] / SOURCE).read_text(encoding="utf-8"))
    text = corpus.read(source)
    if text.sha256 != config["text"]["sha256"]:
        raise UserError(f"{source} is not the text that this run began with: give that one, or another --out")

    def stream(seed: int) -> CorpusStream:
        return CorpusStream(
            CorpusConfig(
                text=source, length=scale.length, batch_size=scale.batch_size, seed=seed, validation_windows=scale.windows
            )
        )  # fmt: skip

    def trained(
        model: LanguageModel, name: str, steps: int, lr: float, data: CorpusStream, groups: Any = None
    ) -> float:
        nonlocal before
        settings = TrainConfig(
            steps=steps, lr=lr, min_lr=lr / 100, warmup_steps=min(100, steps // 10), weight_decay=0.1, clip=1.0, seed=seed,
            checkpoint_every=250,
        )  # fmt: skip
        result = train(
            model, data, settings, directory / name, resume=True, optimizer_groups=groups or model.parameter_groups(0.1),
            progress=lambda share: report((before + share * steps) / total),
        )  # fmt: skip
        before += steps
        return result.seconds

    torch.manual_seed(seed)
    base = LanguageModel(
        LanguageModelConfig(vocab_size=256, d_model=scale.d_model, n_layers=scale.layers, mixer="mamba")
    )
    seconds = {"before": trained(base, "before", scale.steps, scale.lr, stream(seed))}
    models = {
        "before": base,
        "plain": copy.deepcopy(base),
        "polarized": polarize(base, seed=seed),
        "new": polarize(base, seed=seed),
    }
    for way in ("plain", "polarized", "new"):
        groups = [{"params": train_only_new(models[way]), "weight_decay": 0.0}] if way == "new" else None
        # other batches than those of the first training, the same for all three
        seconds[way] = trained(models[way], way, scale.more, scale.more_lr, stream(seed + 1_000_000), groups)
    return {
        way: {
            "seconds": seconds[way],
            "parameters": sum(p.numel() for p in model.parameters()),
            **measure(model, scale, seed, text),
        }
        for way, model in models.items()
    }


def measure(model: Any, scale: Scale, seed: int, text: Corpus) -> dict[str, Any]:
    """Bits a byte on held-out text and on text of training, the influence curve and its numbers, and what needles are worth by depth."""
    from ssmlens.lens import influence
    from ssmlens.tasks.facts import FACTS
    from ssmlens.tasks.needle import Grid, Haystack

    seen = Corpus(text.name, text.heldout, text.train)  # windows are cut from what is held out
    i = influence.measure(model, corpus.windows(text, scale.length, scale.sequences).tokens, seed=seed)

    def encode(words: str) -> list[int]:
        return list(words.encode())

    def decode(ids: list[int]) -> str:
        return bytes(i % 256 for i in ids).decode(errors="replace")

    length = 2 * scale.length
    hay = Haystack.of(text.name, bytes(text.heldout).decode(errors="replace"), encode, length)
    found = needle.measure_statements(
        "model", model, Grid.of(hay, FACTS[: scale.facts], encode), decode, [length], scale.depths
    )
    return {
        "bits": _bits(model, text, scale), "seen": _bits(model, seen, scale), "curve": [float(v) for v in i.score / i.score[1]], "trace": i.tail.value,
        "context": i.effective_context.value, "needle": [found.moved(d).value for d in scale.depths],
    }  # fmt: skip


def _bytes(text: Corpus) -> str:
    size = f"{len(text.train):,} bytes to train on, {len(text.heldout):,} held out"
    return (
        f"bytes of Python's own reference ({size})"
        if text.name == corpus.PYTHON_REFERENCE
        else f"bytes of {text.name} ({size})"
    )


def _bits(model: Any, text: Any, scale: Scale) -> float:
    """Bits a byte on what the text holds out."""
    losses = []
    with torch.no_grad(), needle.evaluating(model):
        for tokens, targets in zip(
            *(t.split(8) for t in corpus.windows(text, scale.length, scale.windows)[:2]), strict=True
        ):
            losses.append((float(model(tokens, targets=targets).loss), int((targets >= 0).sum())))
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses) / math.log(2)


def record(scale_name: str, seeds: list[int], results: dict[str, Any], made_by: dict[str, Any], text: Corpus) -> Record:
    scale = SCALES[scale_name]
    found = {s: {way: _numbers(results[f"seed{s}"][way], scale) for way in WAYS} for s in seeds}

    def of(way: str, key: str) -> Value:
        return Value.mean([found[s][way][key] for s in seeds], MEASURES[key][1])

    def gain(way: str, key: str, over: str = "plain") -> Value:
        """Against another way (the continuation without polarization), seed by seed."""
        return Value.mean([found[s][way][key] - found[s][over][key] for s in seeds], MEASURES[key][1])

    columns = [Column(name=name, unit=unit, meaning=meaning) for name, unit, meaning in MEASURES.values()]
    rows: list[list[Cell]] = [
        [label, *(of(way, key) for key in MEASURES), results["seed0"][way]["parameters"]] for way, label in WAYS.items()
    ]
    repeated = scale.batch_size * scale.length
    tables = [
        Table(
            id="retrofit", title="A trained Mamba, trained on with and without polarization", rows=rows,
            columns=[Column(name="model"), *columns, Column(name="parameters")],
            meaning="All three continuations begin at the model of the first row and see the same batches. Where the loss on text of training is far "
            "below that on held-out text, a model knows the former by heart, and going on makes the latter worse.",
            method=f"{scale.layers} layers, d_model {scale.d_model}, {_bytes(text)}, length {scale.length}, batch {scale.batch_size}: "
            f"{scale.steps} steps at {scale.lr:g}, then {scale.more} at {scale.more_lr:g}, {repeated:,} bytes a step; {scale.windows} windows for each "
            f"loss; influence by 8 probes on {scale.sequences} of the held-out ones. Mean ± standard error over seeds.",
        ),
        Table(
            id="retrofit-gain", title="Against an equally long training without polarization",
            rows=[[WAYS[way], *(gain(way, key) for key in MEASURES)] for way in ("polarized", "new")],
            columns=[Column(name="model"), *columns], meaning="What polarization changed. Zero: nothing.",
            method="Differences seed by seed, then their mean ± standard error. What the verdict says of losses, traces and needles here holds for all six together "
            "(Holm's correction); every interval, and what is said against before, by itself.",
        ),
        Table(
            id="retrofit-seeds", title="Seed by seed",
            rows=[[label, s, *found[s][way].values()] for way, label in WAYS.items() for s in seeds],
            columns=[Column(name="model"), Column(name="seed"), *columns],
        ),
    ]  # fmt: skip
    distances = list(range(1, scale.length))
    curves = [
        _curve(
            label,
            [float(d) for d in distances],
            [[results[f"seed{s}"][way]["curve"][d] for d in distances] for s in seeds],
        )
        for way, label in WAYS.items()
    ]
    bins = [(round(2 ** (k / 2)), round(2 ** ((k + 1) / 2))) for k in range(int(2 * math.log2(scale.length)))]
    bins = [(a, min(b, scale.length)) for a, b in bins if a < b]
    against = [
        _curve(
            WAYS[way],
            [float(a) for a, _ in bins],
            [
                [
                    sum(results[f"seed{s}"][way]["curve"][a:b]) / sum(results[f"seed{s}"]["plain"]["curve"][a:b])
                    for a, b in bins
                ]
                for s in seeds
            ],
        )
        for way in ("before", "polarized", "new")
    ]
    needles = [
        _curve(label, [100 * d for d in scale.depths], [results[f"seed{s}"][way]["needle"] for s in seeds])
        for way, label in WAYS.items()
    ]
    figures = [
        Figure(
            id="influence", title="Influence over distance", x_label="distance (tokens)", y_label="influence, relative to distance 1",
            x_scale="log", y_scale="log", series=curves, meaning="How much a token still moves the last state, by how far back it lies.",
            method="Mean over seeds of the root mean square score; bands are standard errors over seeds.",
        ),
        Figure(
            id="influence-ratio", title="Influence over distance, against as it is", x_label="distance (tokens)",
            y_label="influence / that without polarization", x_scale="log",
            series=[*against, Series(name="the same", x=[1.0, float(bins[-1][0])], y=[1.0, 1.0], style="fit", group="paper")],
            meaning="Above 1: a token that far back moves the last state more than it does in the model that went on without polarization.",
            method="Sums over bins of distance that grow by √2, their ratio seed by seed, then the mean over seeds; bands are standard errors over seeds.",
        ),
        Figure(
            id="needle", title="What a needle is worth", x_label="depth of the needle (% of the text before it)",
            y_label="log-odds added by the needle (nats)", series=needles,
            meaning="How far a statement in the text moves the odds of its answer. These models are far too small to answer; this is the trace of it.",
            method=f"{scale.facts} counterfactual statements in held-out text of {2 * scale.length} bytes, with the statement minus without it; mean over "
            "seeds, bars are standard errors over seeds.",
        ),
    ]  # fmt: skip
    asked = {(way, key): gain(way, key) for way in ("polarized", "new") for key in WORDS}
    p = {" ".join(each): p for each, v in asked.items() if (p := v.p_value()) is not None}
    chance = {name for name, adjusted in holm(p).items() if adjusted >= 0.05}

    def says(way: str, key: str) -> str:
        return _says(asked[way, key], key, len(asked) if f"{way} {key}" in chance else 1)

    verdict = [
        f"Training on without polarization, against before: {_says(gain('plain', 'bits', 'before'), 'bits')}.",
        *(
            f"{label[0].upper()}{label[1:]}, against an equally long training without polarization: "
            + "; ".join(says(way, key) for key in WORDS)
            + f". Against before: {_says(gain(way, 'bits', 'before'), 'bits')}."
            for way, label in list(WAYS.items())[2:]
        ),
    ]  # fmt: skip
    worth = [bounds for way in WAYS if (bounds := of(way, "needle").interval()) is not None]
    if worth and all(low <= 0 <= high for low, high in worth):
        verdict.append(
            "In none of the four is a far needle worth anything that these seeds can tell from zero; by their intervals it may be worth up to "
            f"{max(high for _, high in worth):.2g} nats, or cost up to {-min(low for low, _ in worth):.2g}."
        )
    if scale_name == "smoke":
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
    seconds = sum(r["seconds"] for by in results.values() for r in by.values())
    origin = sorted(
        {f"{p['commit'] or p['ssmlens']}, {p['device']}, {p['threads']} thread(s)" for p in made_by.values() if p}
    )
    return Record(
        kind="reproduce", title=f"Polarizing a trained Mamba ({scale_name} scale)", verdict=verdict, tables=tables, figures=figures,
        notes=[f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {seconds / 3600:.2f} core-hours of training.", *(f"Runs made by {o}." for o in origin)],
        config={"item": "retrofit", "scale": scale_name, "sizes": asdict(scale), "text": {"name": text.name, "sha256": text.sha256}}, seeds=seeds,
        provenance=provenance(),
    )  # fmt: skip


def _curve(name: str, x: list[float], runs: list[list[float]]) -> Series:
    values = [Value.mean(column) for column in zip(*runs, strict=True)]
    return Series(name=name, x=x, y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], group=name)


def _numbers(run: dict[str, Any], scale: Scale) -> dict[str, float]:
    """Of one model, by the names of MEASURES."""
    far = [value for depth, value in zip(scale.depths, run["needle"], strict=True) if depth <= 1 / 3]
    return {key: run[key] for key in ("bits", "seen", "trace", "context")} | {"needle": sum(far) / len(far)}


def _says(v: Value, key: str, among: int = 1) -> str:
    """among: how many comparisons were made, if with so many it is not beyond chance."""
    name, (less, more) = MEASURES[key][0], WORDS[key]
    told, bounds = f"{name} {v.value:+.2g} {v.unit}".rstrip(), v.interval()
    if bounds is None:
        return f"{told} (one seed)"
    word = less if v.value < 0 else more
    if bounds[0] <= 0 <= bounds[1]:
        word = "no difference that these seeds can show"
    elif among > 1:
        word = f"seems {word} (alone it would count, among {among} comparisons it may be chance)"
    return f"{told}, 95 % interval {bounds[0]:+.2g} to {bounds[1]:+.2g}: {word}"


ITEM = Item(
    name="retrofit", title="a trained Mamba, polarized and trained on", source="not in the paper", scales=tuple(SCALES), variants=(), run=run,
    takes=("data",),
)  # fmt: skip
