"""Figures 2, 8 and 9: at which depth of a text is a needle still found, by Mamba, polarized Mamba and a transformer trained alike.

    recency index = accuracy in the last third of the depths - accuracy in the first third, in points; over several trainings

The paper asks Mamba-Codestral-7B and Mistral-7B for statements; so does the paper scale, and any scale of the models of `--model`. What can be
trained on a laptop knows no statements, so it is asked for the value of a key among noise: the recipes of configs/needle-*.toml, with several
seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

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
from ssmlens.experiments.figure2_runs import DEPTHS, MODELS, SCALES, Scale, recipe, work
from ssmlens.experiments.needle_statements import Memory
from ssmlens.results import Column, Figure, Map, Panel, Record, Series, Table, Value, provenance
from ssmlens.training import sweep, sweep_provenance

LOST = 20.0  # % found, where guessing finds 6: what finds less at either end knows nothing of what stands where
ALIKE = 10.0  # points: an interval within as many of zero shows that both ends are alike
LABELS = {"mamba": "Mamba", "polarized": "Mamba, polarized", "transformer": "transformer"}
PAPER_MODELS = ("mistralai/Mamba-Codestral-7B-v0.1", "mistralai/Mistral-7B-v0.3")
PAPER_LENGTHS, PAPER_DEPTHS = (1024, 2048, 4096, 8192), tuple(i / 10 for i in range(11))


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
        progress=request.progress, title=f"figure2, {request.scale}", keep=True,
    )  # fmt: skip
    found = {m: [results[f"{m}-seed{s}"] for s in seeds] for m in models}
    return record(request.scale, found, seeds, sweep_provenance(request.out, results))


def _asked(request: Request) -> Record:
    """Statements instead of keys, of trained models: one that is recurrent is held against the paper's Mamba, one of attention against its transformer."""
    import torch

    from ssmlens.experiments.needle_statements import memory, statements
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
    kinds = {name: memory(model) for name, model in loaded.items()}
    asked = statements(
        loaded, paths, None, lengths, list(depths), 16, request.resume, request.out, request.progress, on
    )  # fmt: skip
    claims = _claims_of_statements(asked.found, kinds) if not small else []
    made = asked.record
    return made.model_copy(
        update={
            "kind": "reproduce", "title": f"Figures 2 and 9: statements in a haystack ({request.scale} scale)",
            "verdict": [*claims_verdict(claims, small), *made.verdict],
            "tables": [*([claims_table(claims)] if claims else []), *made.tables],
            "config": {"item": "figure2", "scale": request.scale, "claims": claims_config(claims), **made.config},
        }
    )  # fmt: skip


def _claims_of_statements(found: list[needle.Needle], kinds: Mapping[str, Memory]) -> list[Claim]:
    """Errors are over kinds of statements; each model is one training."""
    return [_claim_of_statements(n, kinds[n.name]) for n in found]


def _claim_of_statements(n: needle.Needle, kind: Memory) -> Claim:
    index, over = n.recency_index(), n.over_control()
    says = f"{n.name} finds needles near the end better than near the beginning."
    paper, outcome = "Mamba-Codestral-7B: yes", _prefers_end(index)
    why = f"Scored by probability, without a judge; an interval within {ALIKE:.0f} points of zero counts as alike."
    if kind == "attention":
        says, paper = f"{n.name} finds them alike at every depth.", "Mistral-7B: at every depth"
        leans = _leans(index)
        outcome = "undecided" if leans is None else "agrees" if leans == "alike" else "differs"
    elif kind != "recurrent":
        paper, outcome = "a state space model and a transformer", "not comparable"
        why = "The paper asks a state space model and a transformer; this is neither, or both at once."
    if outcome != "not comparable" and side(over) != "agrees":
        outcome = "not comparable"
        why = f"It does not answer by the text clearly more often than without any needle ({over.value:+.1f} points): what finds none prefers none."
    return Claim(
        "Figures 2 and 9", says, paper, f"recency index {_points(index)}", outcome, why, index.value, index.stderr, index.n
    )  # fmt: skip


def _leans(index: Value) -> Literal["end", "beginning", "alike"] | None:
    """To which end of the text the whole 95 % interval leans; "alike": to neither by more than ALIKE points; None: it cannot be told."""
    bounds = index.interval()
    if bounds is None:
        return None
    if bounds[0] >= -ALIKE and bounds[1] <= ALIKE:
        return "alike"
    return "end" if bounds[0] > 0 else "beginning" if bounds[1] < 0 else None


def _prefers_end(index: Value) -> Outcome:
    leans = _leans(index)
    return "undecided" if leans is None else "agrees" if leans == "end" else "differs"


def _points(index: Value) -> str:
    bounds = index.interval()
    return f"{index.value:+.0f} points" + (f" ({bounds[0]:+.0f} to {bounds[1]:+.0f})" if bounds else "")


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
        verdict=[*claims_verdict(claims, smoke), *([] if smoke else _polarized(scale, found))],
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


def _polarized(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the paper does not ask: whether polarization takes the preference away, and at what price."""
    if not {"mamba", "polarized"} <= set(found):
        return []
    out = []
    for words, rows in _parts(scale).items():
        pairs = list(zip(found["polarized"], found["mamba"], strict=True))
        index = Value.mean([_index(p, rows) for p, _ in pairs], "points")
        less = Value.mean([_index(p, rows) - _index(m, rows) for p, m in pairs], "points")
        finds = Value.mean([_everywhere(p, rows) - _everywhere(m, rows) for p, m in pairs], "points")
        out.append(
            f"Polarized Mamba ({words}): recency index {_points(index)}, {_points(less)} from Mamba's; over all depths it finds "
            f"{fmean(_everywhere(p, rows) for p, _ in pairs):.0f} % where Mamba finds {fmean(_everywhere(m, rows) for _, m in pairs):.0f} % "
            f"(difference {_points(finds)})."
        )
    return out


def _everywhere(run: dict[str, Any], rows: list[int]) -> float:
    return fmean(x for r in rows for x in run["accuracy"][r])


def _claims(scale: Scale, found: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    out = []
    for words, rows in _parts(scale).items():
        if "mamba" not in found:
            continue
        indices = {m: [_index(run, rows) for run in runs] for m, runs in found.items()}
        own = Value.mean(indices["mamba"], "points")
        out.append(_claim(
            f"A state space model finds needles near the end better than near the beginning ({words}).", "Mamba-Codestral-7B: yes",
            f"recency index {_points(own)}", own, _lost(found, ["mamba"], rows),
        ))  # fmt: skip
        if "transformer" in found:
            pairs = zip(indices["mamba"], indices["transformer"], strict=True)
            more = Value.mean([a - b for a, b in pairs], "points")
            out.append(_claim(
                f"It prefers the end more than a transformer does ({words}).", "Mistral-7B finds them at every depth", f"{_points(more)} more",
                more, _lost(found, ["mamba", "transformer"], rows),
            ))  # fmt: skip
    return out


def _claim(says: str, paper: str, ours: str, value: Value, lost: str) -> Claim:
    why = f"The shape over depth is compared: the models are small and the needle is synthetic. An interval within {ALIKE:.0f} points of zero counts as alike."
    outcome = _prefers_end(value)
    if lost:
        ours, outcome = lost, "not comparable"
        why = f"What is lost at such lengths (finds less than {LOST:.0f} % at either end) prefers nothing."
    return Claim("Figures 2 and 9", says, paper, ours, outcome, why, value.value, value.stderr, value.n)


def _lost(found: dict[str, list[dict[str, Any]]], models: Sequence[str], rows: list[int]) -> str:
    """In words, the models that find nothing at either end; "" where there are none."""
    words = []
    for m in models:
        first, last = (sum(_third(run, end, rows) for run in found[m]) / len(found[m]) for end in (False, True))
        if max(first, last) < LOST:
            words.append(f"{LABELS[m]} finds {first:.0f} % near the beginning and {last:.0f} % near the end")
    return ", ".join(words)


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
