"""Figure 4 and Table 4 of the paper: validation loss of Mamba against its number of parameters, one curve a depth, two context lengths.

    against d layers = mean over seeds of (loss of a depth - loss of d layers), the same size, seed and batches

What is trained is in `depth_runs.py`, what is said of it in `depth_claims.py`; here the runs are made, and their results become a record."""

import json
from dataclasses import asdict
from typing import Any

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.experiments.base import Item, Request, choose, claims_config, claims_table, claims_verdict
from ssmlens.experiments.depth_claims import PAIRED, Key, Runs, claims_of, rate_notes, rates, short
from ssmlens.experiments.depth_runs import SCALES, VARIANTS, Scale, known, source, text, work
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance
from ssmlens.training import sweep, sweep_provenance

KEYS = ("variant", "size", "depth", "context", "seed")


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    variants = request.variants or scale.variants
    for variant in variants:
        choose("variant", variant, VARIANTS)
    keys = [
        (part.variant, size, depth, context, seed) for part in scale.parts if part.variant in variants
        for seed in range(request.seeds or part.seeds) for size in part.sizes for depth in part.depths for context in scale.contexts
    ]  # fmt: skip
    if not keys:
        raise UserError(
            f"figure4 has no {', '.join(variants)} models at {request.scale} scale: leave out --variant, or choose another"
        )
    keys.sort(key=lambda key: (key[4], key[1]))  # each once before any twice, the cheap before the dear
    # a text that cannot be read, or is too short, is named before anything runs
    if not (request.out / "runs").exists():
        for context in scale.contexts:
            text(scale, request.data, context, 0, request.out / "packed")
    # a run knows its text by name and contents; where that lies is written beside the runs
    read = known(scale, request.data)
    files.write(source(files.make_directory(request.out), read), json.dumps(request.data) + "\n")
    jobs = [
        (_id(key), {"item": "figure4", "scale": request.scale, "sizes": scale.shared, "text": read, **dict(zip(KEYS, key, strict=True))})
        for key in keys
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"figure4, {request.scale}", keep=True,
    )  # fmt: skip
    made_by = sweep_provenance(request.out, results)
    return record(request.scale, Runs(scale, {key: results[_id(key)] for key in keys}), made_by)


def _id(key: Key) -> str:
    variant, size, depth, context, seed = key
    return f"{variant}-{short(size)}-depth{depth}-context{context}-seed{seed}"


# ---- the record ----


def record(scale_name: str, found: Runs, made_by: dict[str, dict[str, Any] | None]) -> Record:
    scale, smoke = found.scale, scale_name == "smoke"
    claims, two_rates = claims_of(found, smoke), rates(found)
    beside = claims_table(claims)
    beside = beside.model_copy(update={"method": f"{PAIRED} {beside.method} {_equal(found)}"})
    return Record(
        kind="reproduce", title=f"Figure 4: depth against width ({scale_name} scale)", verdict=claims_verdict(claims, smoke),
        tables=[beside, *(_table(v, found) for v in found.variants), *([two_rates] if two_rates else []), _training_table(scale, found)],
        figures=[*(_figure(found, context) for context in scale.contexts), _depth_figure(found)],
        notes=_notes(scale_name, found, made_by), provenance=provenance(), seeds=sorted({key[4] for key in found.results}),
        config={"item": "figure4", "scale": scale_name, "variants": list(found.variants), "sizes": asdict(scale), "text": next(iter(found.results.values()))["text"], "claims": claims_config(claims)},
    )  # fmt: skip


def _equal(found: Runs) -> str:
    """How nearly models of a size are equally large, and in what they are not."""
    parts = []
    variant = found.variants[0]
    for size in found.sizes(variant):
        runs = [
            (d, next(iter(found.of(variant, size, d, found.scale.contexts[0]).values())))
            for g, d in found.cells(variant)
            if g == size
        ]
        (shallow, first), (deep, last) = runs[0], runs[-1]
        counts = [run["parameters"] for _, run in runs]
        outside = [f"{100 * (1 - run['embedding'] / run['parameters']):.0f} %" for run in (first, last)]
        parts.append(
            f"{short(size)}: {min(counts):,} to {max(counts):,} ({100 * (max(counts) / min(counts) - 1):.1f} % more), {deep} layers {100 * (last['parameters'] / first['parameters'] - 1):+.1f} % against {shallow}; "
            f"outside the embedding {outside[0]} of them at {shallow} layers, {outside[1]} at {deep}"
        )  # fmt: skip
    return f"Models of a size have nearly as many parameters. {'. '.join(parts)}."


def _polarized(found: Runs) -> str:
    """What it does to the number of parameters."""
    lost = [
        100 * (a[0]["parameters"] / b[0]["parameters"] - 1)
        for size, d in found.cells("polarized")
        if (a := found.of("polarized", size, d, found.scale.contexts[0])) and (b := found.of("default", size, d, found.scale.contexts[0]))
    ]  # fmt: skip
    change = f" (here {max(lost):+.1f} to {min(lost):+.1f} % of the parameters)" if lost else ""
    return (
        " One state channel at one and one at zero take the place of learned ones (appended, they would add to the deepest models most): N stays 16, "
        f"and two transitions of each inner channel are not learned{change}."
    )


def _table(variant: str, found: Runs) -> Table:
    shallow, contexts = found.scale.compared[0], found.scale.contexts
    columns = [
        Column(name="size"), Column(name="layers"), Column(name="width"), Column(name="parameters"), Column(name="outside the embedding", unit="%"),
        *(Column(name=f"loss, context {c}", unit="nats") for c in contexts),
        *(Column(name=f"against {shallow} layers, {c}", unit="nats") for c in contexts),
        *(Column(name=f"sharpness kept, {c}", meaning="relative sharpness after the last block over that after the first, on held-out text") for c in contexts),
        Column(name="steps"), Column(name="core time of a run", unit="s", meaning="training, mean over seeds and contexts"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for size, depth in found.cells(variant):
        at = [list(found.of(variant, size, depth, c).values()) for c in contexts]
        gaps = [found.gaps(variant, size, depth, shallow, c) if depth != shallow else [] for c in contexts]
        run, seconds = at[0][0], [r["seconds"] for runs in at for r in runs]
        rows.append([
            short(size), depth, run["width"], run["parameters"], round(100 * (1 - run["embedding"] / run["parameters"]), 1),
            *(Value.mean([r["loss"] for r in runs], "nats") for runs in at), *(Value.mean(g, "nats") if g else None for g in gaps),
            *(Value.mean([r["blur"] for r in runs]) for runs in at), run["steps"], round(sum(seconds) / len(seconds), 1),
        ])  # fmt: skip
    return Table(
        id=f"loss-{variant}", title=f"Validation loss, {VARIANTS[variant]}", columns=columns, rows=rows,
        meaning="Mean cross-entropy of a token of held-out text, the same text for both contexts, ± standard error over seeds. Differences are taken seed by seed, of the "
        "seeds that both depths have.",
        method="Widths are chosen so that models of a size have as nearly the same number of parameters as the width's step allows; N = 16, expand 2, "
        "dt_rank = d_model / 16, tied embeddings." + (_polarized(found) if variant == "polarized" else ""),
    )  # fmt: skip


def _training_table(scale: Scale, found: Runs) -> Table:
    rows: list[list[Cell]] = [
        ["paper", "100-250M", 4800, 3e-3, "0.5M", "2.5B"],
        ["paper", "250-400M", 13500, 1.5e-3, "0.5M", "7B"],
        ["paper", "400-550M", 20000, 1.25e-3, "0.5M", "10B"],
    ]
    for tier in scale.tiers:
        sizes = sorted({key[1] for key in found.results if scale.tier(key[1]) is tier})
        if sizes:
            rows.append([
                "here", ", ".join(map(short, sizes)), tier.steps, tier.lr, f"{scale.batch_tokens:,}", f"{tier.steps * scale.batch_tokens:,}",
            ])  # fmt: skip
    names = ("run", "parameters", "steps", "peak learning rate", "batch (tokens)", "tokens")
    return Table(
        id="training", title="How it was trained (Table 4)", columns=[Column(name=n) for n in names], rows=rows,
        meaning="One peak learning rate for all depths of a size, as in the paper: part of what looks like an effect of depth may be one of the learning rate.",
        method="AdamW, β = (0.9, 0.95), gradient clip 1.0, weight decay 0.1 (not on A_log, D, biases, norms), linear warm-up over a tenth of the steps, cosine to 1e-5.",
    )  # fmt: skip


def _figure(found: Runs, context: int) -> Figure:
    """Loss against parameters, one curve a depth (the paper's Figure 4)."""
    series = []
    for variant in (v for v in found.variants if v != "half-rate"):
        for depth in found.scale.depths:
            cells = [[*found.of(variant, size, depth, context).values()] for size in found.sizes(variant)]
            points = [(float(runs[0]["parameters"]), Value.mean([r["loss"] for r in runs])) for runs in cells if runs]
            if points:
                series.append(Series(
                    name=f"{depth} layers" + ("" if variant == "default" else f", {variant}"), x=[x for x, _ in points], y=[v.value for _, v in points],
                    stderr=[v.stderr or 0.0 for _, v in points], style="line" if variant == "default" else "points", group=f"{depth} layers",
                ))  # fmt: skip
    return Figure(
        id=f"loss-context-{context}", title=f"Validation loss by size and depth, context {context}", x_label="parameters", y_label="validation loss (nats/token)",
        x_scale="log", series=series, meaning="Curves that lie on each other: only the number of parameters matters. Curves of deep models above the others: depth hurts.",
        method="Mean over seeds, bars are standard errors; points are polarized models.",
    )  # fmt: skip


def _depth_figure(found: Runs) -> Figure:
    """What depth does at equal size, both contexts in one picture."""
    shallow, variant, series = found.scale.compared[0], found.variants[0], []
    for size in found.sizes(variant):
        depths = [d for g, d in found.cells(variant) if g == size]
        for context in found.scale.contexts:
            gaps = [(str(d), found.gaps(variant, size, d, shallow, context)) for d in depths]
            points = [(name, Value.mean(each)) for name, each in gaps if each]
            series.append(Series(
                name=f"{short(size)}, context {context}", x=[x for x, _ in points], y=[v.value for _, v in points], stderr=[v.stderr or 0.0 for _, v in points],
                style="line" if context == min(found.scale.contexts) else "fit", group=short(size),
            ))  # fmt: skip
    return Figure(
        id="by-depth", title="What depth costs at equal size", x_label="layers", y_label=f"loss minus that at {shallow} layers (nats/token)", x_scale="category", series=series,
        meaning="Below zero: deeper is better than the shallowest. The paper's claim is a valley: down first, then up, later at the longer context (dashed).",
        method="Seed by seed, mean over seeds; bars are standard errors.",
    )  # fmt: skip


def _notes(scale_name: str, found: Runs, made_by: dict[str, dict[str, Any] | None]) -> list[str]:
    runs = list(found.results.values())
    seconds, told = sum(r["seconds"] for r in runs), runs[0]["text"]
    tokens = sorted({r["tokens"] for r in runs})
    notes = [f"{len(runs)} runs, {seconds / 3600:.2f} core-hours of training."]
    by: dict[tuple[str, int, int], list[str]] = {}
    for variant in found.variants:
        for size, depth in found.cells(variant):
            by.setdefault((variant, size, len(found.of(variant, size, depth, found.scale.contexts[0]))), []).append(
                str(depth)
            )
    design = "; ".join(
        f"{v} {short(g)} at {', '.join(depths)} layers, {n} seed{'s' * (n > 1)}" for (v, g, n), depths in by.items()
    )
    notes.append(f"Design, each at both contexts: {design}.")
    notes.append(
        f"Text: {told['name']}, sha256 {told['sha256'][:16]}, one token a {'byte' if told['unit'] == 'bytes' else 'piece of its tokenizer'}. Windows run on from "
        "one document into the next, and the state is not reset there."
        + ("" if told["tokens"] else " What is held out are blocks spread over the first part of the text: they lie inside documents whose rest is trained on.")
    )  # fmt: skip
    if told["tokens"]:
        share = [n / told["tokens"] for n in tokens]
        word = "nothing is read twice" if share[-1] <= 1 else "the text is read again and again"
        notes.append(
            f"{' and '.join(f'{n:,}' for n in tokens)} tokens of training from {told['tokens']:,}: {' and '.join(f'{s:.2g}' for s in share)} passes over the text, {word}. "
            f"The paper trains on 12 to 25 tokens a parameter, these runs on {min(tokens) / max(r['parameters'] for r in runs):.2g} to {max(tokens) / min(r['parameters'] for r in runs):.2g}."
        )  # fmt: skip
    notes += rate_notes(found)
    if scale_name == "laptop":
        notes.append(
            "Small models, a short training: what differs by depth here is in part how fast a shape learns, where the paper's models are nearer the end of learning."
        )
    origin = sorted(
        {f"{p['commit'] or p['ssmlens']}, {p['device']}, {p['threads']} thread(s)" for p in made_by.values() if p}
    )
    return [*notes, *(f"Runs made by {o}." for o in origin)]


ITEM = Item(
    name="figure4", title="depth against width at equal size, two contexts", source="Figure 4, Table 4", scales=tuple(SCALES), variants=tuple(VARIANTS), run=run,
    aliases=("table4",), takes=("data",),
)  # fmt: skip
