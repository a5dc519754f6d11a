"""Tables 2 and 5 of the paper: associative recall by default and polarized Mamba, beside the paper's numbers.

What is trained is in `recall.py`; here the runs are made, and their results become a record."""

from dataclasses import asdict
from typing import Any

from ssmlens.experiments.base import Claim, Item, Request, Stopped, choose, claims_config, claims_table
from ssmlens.experiments.grid_design import place
from ssmlens.experiments.recall import (
    CONFIGURATIONS,
    DT_RANGE,
    FOUND,
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
)
from ssmlens.experiments.recall_gain import (
    COUNTED,
    HOW_FOUND,
    MARGIN,
    RULES,
    Arm,
    Gain,
    Judged,
    interval,
    judged,
    mean,
    ruled,
    trained,
    unfinished,
)
from ssmlens.results import Column, Figure, Record, Series, Table, Value, provenance
from ssmlens.tasks import mqar
from ssmlens.training import sweep_provenance


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    variants = request.variants or scale.variants
    for variant in variants:
        choose("variant", variant, VARIANTS)
    seeds = list(range(request.seeds or scale.seeds))
    jobs = [
        (f"{v}-{c.id}-seed{s}", job(request.scale, VARIANTS[v], c, s))
        for s in seeds for c in sorted(CONFIGURATIONS, key=lambda c: place(c.id)) for v in variants
    ]  # fmt: skip
    results = trained(jobs, request, f"table2, {request.scale}")
    made = record(request.scale, variants, seeds, results, sweep_provenance(request.out, results))
    if not made.complete:
        raise Stopped(made)
    return made


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
    smoke = scale_name == "smoke"
    arms = {
        (v, c.id): Arm({s: results[name] for s in seeds if (name := f"{v}-{c.id}-seed{s}") in results}, guessing(scale))
        for v in variants for c in CONFIGURATIONS
    }  # fmt: skip
    gains = {
        v: {c.id: Gain(arms[v, _baseline(c).id], arms[v, c.id]) for c in CONFIGURATIONS if c.ones or c.zeros}
        for v in variants
    }
    tables, figures = [], []
    for variant in variants:
        own = {c.id: arms[variant, c.id] for c in CONFIGURATIONS}
        tables += [_table(variant, scale, own, gains[variant]), _found_table(variant, gains[variant])]
        figures += [_seeds_figure(variant, seeds, scale, own), _figure(variant, scale, own)]
    says = _judge(gains)
    claims = [] if smoke else _claims(scale_name, gains, says)
    verdict = _sentences(gains, says)
    if smoke:
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
    seconds = sum(r["seconds"] for r in results.values())
    missing = unfinished((f"{v}-{c.id}-seed{s}" for v in variants for c in CONFIGURATIONS for s in seeds), results)
    return Record(
        kind="reproduce",
        title=f"Table 2: associative recall by polarized Mamba ({scale_name} scale)",
        verdict=verdict,
        tables=[*([ruled(claims_table(claims))] if claims else []), *tables, _paper_table()],
        figures=[*figures, _gain_figure(scale_name, gains)],
        notes=[*missing, *_notes(scale_name, scale, variants, results, arms, seconds), *_origin(made_by)],
        complete=not missing,
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


def _by_pairs(arm: Arm, scale: Scale) -> list[Value | None]:
    return [mean((100 * run["accuracy"][str(k)] for run in arm.runs.values()), "%") for k in scale.pairs]


def _paper_gain(c: Configuration) -> float | None:
    base = _baseline(c).paper
    return None if c.paper is None or base is None else (sum(c.paper) - sum(base)) / 3


def _table(variant: str, scale: Scale, arms: dict[str, Arm], gains: dict[str, Gain]) -> Table:
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
        own = gains[c.id].value if c.id in gains else None
        rows.append([
            c.label, c.layers, *_by_pairs(arms[c.id], scale), arms[c.id].accuracy, own, paper, None if gain is None else round(gain, 2),
            next((run["parameters"] for run in arms[c.id].runs.values()), None),
        ])  # fmt: skip
    return Table(
        id=f"accuracy-{variant}",
        title=f"Accuracy, {variant} variant",
        columns=columns,
        rows=rows,
        meaning="Share of queries answered with the right value, ± standard error over seeds. The gain is taken seed by seed.",
        method=_method(scale, variant),
    )


def _found_table(variant: str, gains: dict[str, Gain]) -> Table:
    """Apart from how much is held: how often it was learned to hold anything."""
    rows: list[list[Any]] = [[c.label, c.layers, *gains[c.id].cells()] for c in CONFIGURATIONS if c.id in gains]
    return Table(
        id=f"found-{variant}", title=f"Runs that found the association, {variant} variant",
        columns=[Column(name="configuration"), Column(name="layers"), *COUNTED], rows=rows,
        meaning="A mean over runs mixes two things: how many learned to bind key and value, and how much those hold.",
        method=HOW_FOUND,
    )  # fmt: skip


def _method(scale: Scale, variant: str) -> str:
    """Read off the configurations that are run, so that it cannot say anything else."""
    settings_of = VARIANTS[variant]
    task = data(scale, settings_of, 0)
    stream = mqar.MqarStream(task)
    settings_by = {n: training(scale, settings_of, n, 0, stream.batches_per_epoch) for n in (2, 4)}
    settings = settings_by[2]
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
    precision = (
        "; matrix products in bfloat16 while training, parameters, Δ and the recurrence in float32, measured in float32"
        if settings.precision == "bf16"
        else ""
    )
    before = (
        f"; before, at most {scale.finding} steps at a constant rate on lengths {' and '.join(map(str, scale.lengths[:2]))} alone, until {FOUND:.0%} "
        "are right"
        if scale.finding
        else ""
    )
    return (
        f"{start}; zero channel A = {pinned['zero']}; weight decay {settings.weight_decay:g} on {decay}; data {task.order}. "
        f"Trained on lengths {', '.join(map(str, sorted({s.length for s in task.train})))} ({examples}), measured at {scale.length} on "
        f"{scale.test_examples} examples for each number of pairs; vocabulary {scale.vocab_size}, d_model {scale.d_model}, "
        f"N = {mixer['d_state']} (pinned channels appended), batch {scale.batch_size}, at most {settings.steps} steps of AdamW{before}, peak learning "
        f"rate {' and '.join(f'{each.lr:g} at {layers} layers' for layers, each in settings_by.items())}, whatever is pinned{stop}{precision}."
    )


def _figure(variant: str, scale: Scale, arms: dict[str, Arm]) -> Figure:
    series = []
    for c in CONFIGURATIONS:
        values = [v for v in _by_pairs(arms[c.id], scale) if v]
        if not values:
            continue
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


def _seeds_figure(variant: str, seeds: list[int], scale: Scale, arms: dict[str, Arm]) -> Figure:
    """Every run: a mean would hide that some have found the association and some have not."""
    names = {c.id: f"{c.label}, {c.layers} layers" for c in CONFIGURATIONS if arms[c.id].runs}
    series = []
    for seed in seeds:
        there = {name: arms[c].scores[seed] for c, name in names.items() if seed in arms[c].runs}
        series.append(Series(name=f"seed {seed}", x=list(there), y=list(there.values()), style="points"))
    guess = 100 * guessing(scale)
    series.append(
        Series(
            name="guessing among the values in the sequence",
            x=list(names.values()),
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


def _gain_figure(scale_name: str, gains: dict[str, dict[str, Gain]]) -> Figure:
    rows = [c for c in CONFIGURATIONS if c.ones or c.zeros]
    names = {c.id: f"{c.label}, {c.layers} layers" for c in rows}
    series = []
    for variant, by in gains.items():
        there = {names[c.id]: value for c in rows if (value := by[c.id].value)}
        series.append(Series(name=variant, x=list(there), y=[g.value for g in there.values()], stderr=[g.stderr or 0.0 for g in there.values()],
                             style="bar", group=variant))  # fmt: skip
    sizes = (
        "The paper's gains are of one seed." if scale_name == "paper" else
        "The paper's gains are at other sizes, so compare signs and order, not heights."
    )  # fmt: skip
    paper = {names[c.id]: gain for c in rows if (gain := _paper_gain(c)) is not None}
    series.append(
        Series(name="paper (length 1024)", x=list(paper), y=list(paper.values()), style="points", group="paper")
    )
    return Figure(
        id="gain", title="What polarization adds to the average accuracy", x_label="pinned state channels, depth",
        y_label="gain over default (points)", x_scale="category", series=series,
        meaning=f"Above zero: polarization helps. {sizes}",
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


def _judge(gains: dict[str, dict[str, Gain]]) -> dict[tuple[str, str], Judged]:
    """All gains of the page together, so that a claim and a sentence cannot say two things."""
    values = {f"{v} {c}": value for v, by in gains.items() for c, gain in by.items() if (value := gain.value)}
    found = judged(values, {f"{v} {c}": gain.blocked for v, by in gains.items() for c, gain in by.items()})
    return {(v, c): found[f"{v} {c}"] for v, by in gains.items() for c in by if f"{v} {c}" in found}


def _name(c: Configuration) -> str:
    return {"both": "channels at 1 and 0"}.get(c.label, c.label)


def _sentences(gains: dict[str, dict[str, Gain]], says: dict[tuple[str, str], Judged]) -> list[str]:
    """What holds, then one sentence a variant and configuration."""
    out = []
    for variant in gains:
        sure = [
            c for c in CONFIGURATIONS if (variant, c.id) in says and says[variant, c.id].words in ("helps", "hurts")
        ]
        words = "; ".join(f"{_name(c)} at {c.layers} layers {says[variant, c.id].words}" for c in sure)
        out.append(f"{variant}: {words or 'no gain or loss by polarization can be told from chance with these seeds'}.")
    for variant, by in gains.items():
        for c in CONFIGURATIONS:
            if (variant, c.id) not in says:
                continue
            gain, paper = by[c.id], _paper_gain(c)
            assert gain.value is not None
            beside = "no number in the paper" if paper is None else f"paper, at length {PAPER_LENGTH}: {paper:+.1f}"
            counts = "" if gain.floor else f"found by {gain.default.count} runs without, {gain.polarized.count} with; "
            out.append(
                f"{variant}, {c.layers} layers, {_name(c)}: {interval(gain.value)}: {says[variant, c.id].words} ({counts}{beside})."
            )
    return out


def _claims(scale_name: str, gains: dict[str, dict[str, Gain]], says: dict[tuple[str, str], Judged]) -> list[Claim]:
    """The gains that the paper reports, by sign; one of 0.04 points says nothing that could hold or not."""
    out = []
    for variant, by in gains.items():
        for c in CONFIGURATIONS:
            paper = _paper_gain(c)
            if (variant, c.id) not in says or paper is None or paper < 1:
                continue
            gain, said = by[c.id].value, says[variant, c.id]
            assert gain is not None
            why = f"decided among all gains of its page (Holm, 5 %), with a margin of {MARGIN:g} point; the signs are compared"
            if scale_name != "paper":
                why += ", as the length and the sizes are others than the paper's"
            elif bounds := gain.interval():
                inside = bounds[0] <= paper <= bounds[1]
                why += f"; the paper's number lies {'in' if inside else 'outside'} our 95 % interval"
            out.append(Claim(
                item=f"Table 2, {variant}", claim=f"With {c.layers} layers, {_name(c)}: recall is better than by default Mamba.",
                paper=f"{paper:+.1f} points", ours=f"{interval(gain)}: {said.words}", outcome=said.outcome, value=gain.value,
                stderr=gain.stderr, n=gain.n, why=why,
            ))  # fmt: skip
    return out


def _notes(
    scale_name: str, scale: Scale, variants: tuple[str, ...], results: dict[str, Any], arms: dict[tuple[str, str], Arm],
    seconds: float,
) -> list[str]:  # fmt: skip
    notes = [
        f"{len(results)} runs, {seconds / 3600:.2f} core-hours of training in all.",
        f"The intervals are Student's, for each gain alone. {RULES}",
        "One learning rate for all configurations of a variant and depth. Recall is known to be sensitive to it (arXiv 2508.19029), so a gain may "
        "in part be a better match between configuration and rate.",
    ]
    if scale_name != "paper":
        notes.append(
            f"Length {scale.length} against the paper's {PAPER_LENGTH}: with Mamba's own Δ range the slowest channels' half-life "
            f"(about {0.693 / DT_RANGE[0]:.0f} tokens) is far beyond the sequence here, at paper scale it is not. The rescaled variant "
            "restores that ratio."
        )
    if scale_name == "laptop":
        notes.append(
            "The learning rates were chosen with default models of one seed, by how soon they find the association."
        )
    found, runs = sum(len(arm.found) for arm in arms.values()), sum(len(arm.runs) for arm in arms.values())
    if found < runs:
        notes.append(
            f"{runs - found} of {runs} runs had not found the association when the steps were over. Where that is a matter of chance, a mean "
            "over few seeds says little."
        )
    for variant in variants:
        stopped = [n for n, r in results.items() if n.startswith(f"{variant}-") and r.get("finished") == "early_stop"]
        if stopped:
            looked_at = "the test set" if VARIANTS[variant].test_stop else "validation examples"
            names = ", ".join(name.removeprefix(f"{variant}-") for name in stopped)
            notes.append(f"{variant}: {len(stopped)} runs ended early, above 99 % of {looked_at}: {names}.")
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
