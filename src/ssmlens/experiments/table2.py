"""Tables 2 and 5 of the paper: associative recall by default and polarized Mamba, beside the paper's numbers.

What is trained is in `recall.py`; here the runs are made, and their results become a record."""

from dataclasses import asdict
from typing import Any

from ssmlens.experiments.base import Claim, Item, Request, choose, claims_config, claims_table, holm, side
from ssmlens.experiments.recall import (
    CONFIGURATIONS,
    DT_RANGE,
    PAPER_LENGTH,
    SCALES,
    VARIANTS,
    Configuration,
    Scale,
    data,
    guessing,
    job,
    model,
    training,
    work,
)
from ssmlens.results import Column, Figure, Record, Series, Table, Value, provenance
from ssmlens.tasks import mqar
from ssmlens.training import sweep, sweep_provenance


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    variants = request.variants or scale.variants
    for variant in variants:
        choose("variant", variant, VARIANTS)
    seeds = list(range(request.seeds or scale.seeds))
    jobs = [
        (f"{v}-{c.id}-seed{s}", job(request.scale, VARIANTS[v], c, s))
        for s in seeds for v in variants for c in CONFIGURATIONS
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"table2, {request.scale}",
    )  # fmt: skip
    made_by = sweep_provenance(request.out, results)
    return record(request.scale, variants, seeds, results, made_by)


# ---- the record ----


def record(
    scale_name: str,
    variants: tuple[str, ...],
    seeds: list[int],
    results: dict[str, Any],
    made_by: dict[str, dict[str, Any] | None],
) -> Record:
    """The table beside the paper's, from the results by job id and what made each of them."""
    scale = SCALES[scale_name]

    def found(variant: str, c: Configuration) -> list[dict[str, Any]]:
        return [results[f"{variant}-{c.id}-seed{s}"] for s in seeds]

    tables, figures = [], []
    all_gains: dict[str, dict[str, Value]] = {}
    for variant in variants:
        cells = {c.id: _by_pairs(found(variant, c), scale) for c in CONFIGURATIONS}
        gains = {
            c.id: _gain(found(variant, c), found(variant, _baseline(c))) for c in CONFIGURATIONS if c.ones or c.zeros
        }
        tables.append(_table(variant, scale, cells, gains, found))
        figures += [_seeds_figure(variant, seeds, scale, found), _figure(variant, scale, cells)]
        all_gains[variant] = gains
    verdict = _sentences(all_gains)
    claims = _claims(all_gains) if scale_name != "smoke" else []
    if scale_name == "smoke":
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
    seconds = sum(r["seconds"] for r in results.values())
    return Record(
        kind="reproduce",
        title=f"Table 2: associative recall by polarized Mamba ({scale_name} scale)",
        verdict=verdict,
        tables=[*([claims_table(claims)] if claims else []), *tables, _paper_table()],
        figures=[*figures, _gain_figure(variants, found)],
        notes=[*_notes(scale_name, scale, variants, results, seconds), *_origin(made_by)],
        config={
            "item": "table2",
            "scale": scale_name,
            "variants": list(variants),
            "sizes": asdict(scale),
            "claims": claims_config(claims),
        },
        seeds=seeds,
        provenance=provenance(),
    )


def _baseline(c: Configuration) -> Configuration:
    return next(b for b in CONFIGURATIONS if not b.ones and not b.zeros and b.layers == c.layers)


def _average(run: dict[str, Any]) -> float:
    return 100 * sum(run["accuracy"].values()) / len(run["accuracy"])


def _by_pairs(runs: list[dict[str, Any]], scale: Scale) -> list[Value]:
    return [
        *(Value.mean([100 * r["accuracy"][str(k)] for r in runs], "%") for k in scale.pairs),
        Value.mean([_average(r) for r in runs], "%"),
    ]


def _gain(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> Value:
    """The difference of the averages, seed by seed: the same data stream, so what a seed has in common cancels."""
    return Value.mean([_average(r) - _average(b) for r, b in zip(runs, base, strict=True)], "points")


def _paper_gain(c: Configuration) -> float | None:
    base = _baseline(c).paper
    return None if c.paper is None or base is None else (sum(c.paper) - sum(base)) / 3


def _table(variant: str, scale: Scale, cells: dict[str, list[Value]], gains: dict[str, Value], found: Any) -> Table:
    columns = [
        Column(name="configuration"), Column(name="layers"),
        *(Column(name=f"{k} pairs", unit="%") for k in scale.pairs), Column(name="average", unit="%"),
        Column(name="gain over default", unit="points"),
        Column(name="paper: average", unit="%", meaning="at length 1024 and 64, 128, 256 pairs"),
        Column(name="paper: gain", unit="points"), Column(name="parameters"),
    ]  # fmt: skip
    rows: list[list[Any]] = []
    for c in CONFIGURATIONS:
        paper = None if c.paper is None else round(sum(c.paper) / 3, 2)
        gain = _paper_gain(c) if c.id in gains else None
        rows.append([
            c.label, c.layers, *cells[c.id], gains.get(c.id), paper, None if gain is None else round(gain, 2),
            found(variant, c)[0]["parameters"],
        ])  # fmt: skip
    return Table(
        id=f"accuracy-{variant}",
        title=f"Accuracy, {variant} variant",
        columns=columns,
        rows=rows,
        meaning="Share of queries answered with the right value, ± standard error over seeds. The gain is taken seed by seed.",
        method=_method(scale, variant),
    )


def _method(scale: Scale, variant: str) -> str:
    """Read off the configurations that are run, so that it cannot say anything else."""
    settings_of = VARIANTS[variant]
    task = data(scale, settings_of, 0)
    stream = mqar.MqarStream(task)
    trained = {n: training(scale, settings_of, n, 0, stream.batches_per_epoch) for n in (2, 4)}
    settings = trained[2]
    lm = model(scale, next(c for c in CONFIGURATIONS if c.id == "both-2"), settings_of)
    mixer, pinned = lm.mixer_config, lm.polarization
    start = (
        "Δ's bias zeroed, so that Δ starts at 0.69 and the slowest ordinary channel at 0.5"
        if mixer["initialization"] == "released"
        else f"Δ starts log-uniform in [{mixer['dt_min']:.3g}, {mixer['dt_max']:.3g}]"
    )
    decay = "everything" if settings_of.decay == "released" else "everything but A_log, D, biases and norms"
    examples = (
        "fresh examples" if task.on_the_fly else f"a fixed set of {sum(s.examples for s in task.train):,} examples"
    )
    looked_at = "the test set" if settings_of.test_stop else "validation examples"
    stop = f"; early stop above {settings.early_stop:.0%} of {looked_at}" if settings.early_stop else ""
    return (
        f"{start}; zero channel A = {pinned['zero']}; weight decay {settings.weight_decay:g} on {decay}; data {task.order}. "
        f"Trained on lengths {', '.join(map(str, sorted({s.length for s in task.train})))} ({examples}), measured at {scale.length} on "
        f"{scale.test_examples} examples for each number of pairs; vocabulary {scale.vocab_size}, d_model {scale.d_model}, "
        f"N = {mixer['d_state']} (pinned channels appended), batch {scale.batch_size}, at most {settings.steps} steps of AdamW, peak learning "
        f"rate {' and '.join(f'{each.lr:g} at {layers} layers' for layers, each in trained.items())}, whatever is pinned{stop}."
    )


def _figure(variant: str, scale: Scale, cells: dict[str, list[Value]]) -> Figure:
    series = []
    for c in CONFIGURATIONS:
        values = cells[c.id][:3]
        series.append(Series(
            name=f"{c.label}, {c.layers} layers", x=[str(k) for k in scale.pairs], y=[v.value for v in values],
            stderr=[v.stderr or 0.0 for v in values], style="line" if c.layers == 2 else "points", group=c.label,
        ))  # fmt: skip
    return Figure(
        id=f"by-pairs-{variant}", title=f"Accuracy by number of pairs, {variant}", x_label="key-value pairs to remember",
        y_label="accuracy (%)", x_scale="category", series=series,
        meaning="How much is recalled as more must be remembered; lines are 2 layers, points 4.",
        method="Mean over seeds, bars are standard errors.",
    )  # fmt: skip


def _seeds_figure(variant: str, seeds: list[int], scale: Scale, found: Any) -> Figure:
    """Every run: a mean would hide that some have found the association and some have not."""
    names = [f"{c.label}, {c.layers} layers" for c in CONFIGURATIONS]
    series = [
        Series(name=f"seed {seed}", x=names, y=[_average(found(variant, c)[i]) for c in CONFIGURATIONS], style="points")
        for i, seed in enumerate(seeds)
    ]
    guess = 100 * guessing(scale)
    series.append(
        Series(
            name="guessing among the values in the sequence",
            x=names,
            y=[guess] * len(names),
            style="fit",
            group="paper",
        )
    )
    return Figure(
        id=f"seeds-{variant}", title=f"Every run, {variant}", x_label="configuration", y_label="average accuracy (%)", x_scale="category",
        series=series,
        meaning="One point a run. Runs at the line know which values occur in the sequence, not which belongs to the key.",
        method="Average over the three numbers of pairs.",
    )  # fmt: skip


def _gain_figure(variants: tuple[str, ...], found: Any) -> Figure:
    rows = [c for c in CONFIGURATIONS if c.ones or c.zeros]
    names = {c.id: f"{c.label}, {c.layers} layers" for c in rows}
    series = []
    for variant in variants:
        gains = [_gain(found(variant, c), found(variant, _baseline(c))) for c in rows]
        series.append(Series(name=variant, x=list(names.values()), y=[g.value for g in gains], stderr=[g.stderr or 0.0 for g in gains],
                             style="bar", group=variant))  # fmt: skip
    paper = {names[c.id]: gain for c in rows if (gain := _paper_gain(c)) is not None}
    series.append(
        Series(name="paper (length 1024)", x=list(paper), y=list(paper.values()), style="points", group="paper")
    )
    return Figure(
        id="gain", title="What polarization adds to the average accuracy", x_label="pinned state channels, depth",
        y_label="gain over default (points)", x_scale="category", series=series,
        meaning="Above zero: polarization helps. The paper's gains are at other sizes, so compare signs and order, not heights.",
        method="Difference of the averages over three numbers of pairs, seed by seed; bars are standard errors over seeds.",
    )  # fmt: skip


def _paper_table() -> Table:
    rows: list[list[Any]] = [
        [c.label, c.layers, *(c.paper or (None, None, None)), None if c.paper is None else round(sum(c.paper) / 3, 2)]
        for c in CONFIGURATIONS
    ]
    names = ("64 pairs", "128 pairs", "256 pairs", "average")
    return Table(
        id="paper", title="The paper's numbers (Tables 2 and 5)",
        columns=[Column(name="configuration"), Column(name="layers"), *(Column(name=n, unit="%") for n in names)], rows=rows,
        meaning="One seed, no error bars. The row without numbers is missing in the paper.",
        method="arXiv 2501.00658: length 1024, vocabulary 8192, d_model 128, 64 epochs, batch 128.",
    )  # fmt: skip


def _sentences(gains: dict[str, dict[str, Value]]) -> list[str]:
    """One sentence a configuration and variant. "helps" and "hurts" hold for all of them together (Holm, 5 %)."""
    tests = {f"{v} {c}": p for v, by in gains.items() for c, g in by.items() if (p := g.p_value()) is not None}
    adjusted = holm(tests)
    out = []
    for variant, by in gains.items():
        sure = [c for c in CONFIGURATIONS if adjusted.get(f"{variant} {c.id}", 1.0) < 0.05]
        if sure:
            words = (f"{c.label} at {c.layers} layers {'helps' if by[c.id].value > 0 else 'hurts'}" for c in sure)
            out.append(f"{variant}: {'; '.join(words)}.")
        else:
            out.append(f"{variant}: no gain or loss by polarization can be told from chance with these seeds.")
    for variant, by in gains.items():
        for c in CONFIGURATIONS:
            if c.id not in by:
                continue
            gain, paper = by[c.id], _paper_gain(c)
            bounds = gain.interval()
            beside = "no number in the paper" if paper is None else f"paper, at length 1024: {paper:+.1f}"
            name = {"both": "channels at 1 and 0"}.get(c.label, c.label)
            if bounds is None:
                text = f"{gain.value:+.1f} points from one seed, which says nothing about chance"
            else:
                name_of_test = f"{variant} {c.id}"
                if adjusted[name_of_test] < 0.05:
                    says = "helps" if gain.value > 0 else "hurts"
                elif tests[name_of_test] < 0.05:
                    says = f"alone it would count, among {len(tests)} gains it may be chance"
                else:
                    says = "no difference that these seeds can show"
                text = f"{gain.value:+.1f} points (95 % interval {bounds[0]:+.1f} to {bounds[1]:+.1f}): {says}"
            out.append(f"{variant}, {c.layers} layers, {name}: {text} ({beside}).")
    return out


def _claims(gains: dict[str, dict[str, Value]]) -> list[Claim]:
    """The gains that the paper reports, by sign; one of 0.04 points says nothing that could hold or not."""
    out = []
    for variant, by in gains.items():
        for c in CONFIGURATIONS:
            paper = _paper_gain(c)
            if c.id not in by or paper is None or paper < 1:
                continue
            gain, bounds = by[c.id], by[c.id].interval()
            says = f"{gain.value:+.1f} points" + (
                f" ({bounds[0]:+.1f} to {bounds[1]:+.1f})" if bounds else ", one seed"
            )
            name = {"both": "channels at 1 and 0"}.get(c.label, c.label)
            out.append(Claim(
                item=f"Table 2, {variant}", claim=f"With {c.layers} layers, {name}: recall is better than by default Mamba.",
                paper=f"{paper:+.1f} points", ours=says, outcome=side(gain), value=gain.value, stderr=gain.stderr, n=gain.n,
                why="the signs are compared, as the length and the sizes are others than the paper's",
            ))  # fmt: skip
    return out


def _notes(
    scale_name: str, scale: Scale, variants: tuple[str, ...], results: dict[str, Any], seconds: float
) -> list[str]:
    notes = [
        f"{len(results)} runs, {seconds / 3600:.2f} core-hours of training in all.",
        'The intervals are Student\'s, for each gain alone; "helps" and "hurts" are said only where they hold for all gains of this page '
        "together (Holm's correction, 5 %).",
        "One learning rate for all configurations of a variant and depth. Recall is known to be sensitive to it (arXiv 2508.19029), so a gain may "
        "in part be a better match between configuration and rate.",
    ]
    if scale_name != "paper":
        notes.append(
            f"Length {scale.length} against the paper's {PAPER_LENGTH}: with Mamba's own Δ range the slowest channels' half-life "
            f"(about {0.693 / DT_RANGE[0]:.0f} tokens) is far beyond the sequence here, at paper scale it is not. The rescaled variant "
            "restores that ratio."
        )
    if len(variants) > 1 and scale.lr != scale.released_lr:
        notes.append(
            "The learning rates were chosen with the default model of each variant and depth. Compare configurations within a variant and "
            "depth, not variants with each other."
        )
    unfinished = sum(_average(r) < 130 * guessing(scale) for r in results.values())
    if unfinished:
        notes.append(
            f"{unfinished} of {len(results)} runs end no better than 1.3 times guessing among the values in the sequence: they had not found "
            "the association when the steps were over. Where that is a matter of chance, a mean over few seeds says little."
        )
    if stopped := [name for name, r in results.items() if r["finished"] == "early_stop"]:
        notes.append(f"{len(stopped)} runs ended early, at 99 % of the test set: {', '.join(stopped)}.")
    if "released" in variants:
        notes.append(
            "The released variant looks at the test set to stop, as the released code does; the others never see it."
        )
    return notes


def _origin(made_by: dict[str, dict[str, Any] | None]) -> list[str]:
    """Runs may be older than the record that gathers them, or come from different machines: say which code made them."""
    found = {(p["commit"] or f"version {p['ssmlens']}", p["device"], p["threads"]) for p in made_by.values() if p}
    said = [
        f"{commit} on {device} with {threads} thread{'s' * (threads != 1)}" for commit, device, threads in sorted(found)
    ]
    return [f"Runs made by {'; '.join(said)}."] if said else []


ITEM = Item(
    name="table2",
    title="associative recall (MQAR) by default and polarized Mamba",
    source="Tables 2 and 5",
    scales=tuple(SCALES),
    variants=tuple(VARIANTS),
    run=run,
)
