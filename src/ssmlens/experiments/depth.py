"""Figure 4 and Table 4 of the paper: validation loss of Mamba against its number of parameters, one curve a depth, two context lengths.

    difference of two depths = mean over sizes and seeds of (loss of the one - loss of the other), the same size, seed and batches

What is trained is in `depth_runs.py`; here the runs are made, and their results become a record."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ssmlens import files
from ssmlens.experiments.base import Claim, Item, Request, choose, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.depth_runs import SCALES, VARIANTS, Part, Scale, known, source, text, work
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance
from ssmlens.training import sweep, sweep_provenance

ITEM_NAME = "Figure 4"


@dataclass(frozen=True)
class Runs:
    """The results of all runs, by what was run."""

    scale: Scale
    parts: tuple[Part, ...]
    seeds: int | None
    results: dict[str, Any]

    def found(self, variant: str, size: int, depth: int, context: int) -> list[dict[str, Any]]:
        """The runs of one cell, seed by seed; none where the design has none."""
        ids = [_id(variant, size, depth, context, s) for p in self.parts for s in _seeds(p, self.seeds)
               if p.variant == variant and size in p.sizes and depth in p.depths]  # fmt: skip
        return [self.results[i] for i in ids]

    def cells(self, variant: str) -> list[tuple[int, int]]:
        """(size, depth) of a variant."""
        return sorted({(size, d) for p in self.parts if p.variant == variant for size in p.sizes for d in p.depths})

    def sizes(self, variant: str) -> list[int]:
        return sorted({size for size, _ in self.cells(variant)})

    def losses(self, variant: str, size: int, depth: int, context: int) -> list[float]:
        return [run["loss"] for run in self.found(variant, size, depth, context)]

    def mean_over(self, of_run: Callable[[int, int], float | None], variant: str) -> Value | None:
        """Mean of a number made for every size and seed number, where it can be made."""
        found = []
        for size in self.sizes(variant):
            for seed in range(max(len(_seeds(p, self.seeds)) for p in self.parts)):
                number = of_run(size, seed)
                if number is not None:
                    found.append(number)
        return Value.mean(found, "nats") if found else None

    def one(self, variant: str, size: int, depth: int, context: int, seed: int) -> float | None:
        losses = self.losses(variant, size, depth, context)
        return losses[seed] if seed < len(losses) else None

    def difference(self, deep: int, shallow: int, context: int, variant: str = "default") -> Value | None:
        """Loss at depth `deep` minus that at `shallow`: above zero, deeper is worse."""
        return self.mean_over(
            lambda size, seed: _minus(self.one(variant, size, deep, context, seed), self.one(variant, size, shallow, context, seed)), variant
        )  # fmt: skip


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    variants = request.variants or scale.variants
    for variant in variants:
        choose("variant", variant, VARIANTS)
    if not (
        request.out / "runs"
    ).exists():  # a text that cannot be read, or is too short, is named before anything runs
        for context in scale.contexts:
            text(scale, request.data, context, 0, request.out / "packed")
    read = known(scale, request.data)
    files.write(source(files.make_directory(request.out), read), json.dumps(request.data) + "\n")
    parts = tuple(part for part in scale.parts if part.variant in variants)
    jobs = [
        (_id(part.variant, size, depth, context, seed),
         {"item": "figure4", "scale": request.scale, "sizes": scale.shared, "text": read, "variant": part.variant, "size": size, "depth": depth,
          "context": context, "seed": seed})
        for part in parts for seed in _seeds(part, request.seeds) for size in part.sizes for depth in part.depths for context in scale.contexts
    ]  # fmt: skip
    jobs.sort(key=lambda job: (job[1]["seed"], job[1]["size"]))  # each once before any twice, the cheap before the dear
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"figure4, {request.scale}",
    )  # fmt: skip
    made_by = sweep_provenance(request.out, results)
    return record(request.scale, Runs(scale, parts, request.seeds, results), variants, made_by)


def _seeds(part: Part, asked: int | None) -> range:
    return range(asked or part.seeds)


def _id(variant: str, size: int, depth: int, context: int, seed: int) -> str:
    return f"{variant}-{_short(size)}-depth{depth}-context{context}-seed{seed}"


def _short(size: int) -> str:
    """A number of parameters as it is said: 200k, 2M, 140M."""
    return f"{size / 1e6:g}M" if size >= 1_000_000 else f"{size / 1e3:g}k"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


# ---- the record ----


def record(
    scale_name: str, found: Runs, variants: tuple[str, ...], made_by: dict[str, dict[str, Any] | None]
) -> Record:
    scale, smoke = found.scale, scale_name == "smoke"
    claims = claims_of(found, smoke)
    return Record(
        kind="reproduce", title=f"Figure 4: depth against width ({scale_name} scale)", verdict=claims_verdict(claims, smoke),
        tables=[claims_table(claims), *(_table(v, found) for v in variants), _training_table(scale, found)],
        figures=[*(_figure(found, context) for context in scale.contexts), _depth_figure(found)],
        notes=_notes(scale_name, found, made_by), provenance=provenance(), seeds=list(range(max(len(_seeds(p, found.seeds)) for p in found.parts))),
        config={"item": "figure4", "scale": scale_name, "variants": list(variants), "sizes": asdict(scale), "text": next(iter(found.results.values()))["text"], "claims": claims_config(claims)},
    )  # fmt: skip


def claims_of(found: Runs, smoke: bool = False) -> list[Claim]:
    """What the paper says of depth (§4.1, and of polarization in its abstract), and what the runs say."""
    scale = found.scale
    shallow, middle, deep = scale.compared
    short, long = scale.contexts
    what = f"{_short(min(found.sizes(found.parts[0].variant)))} to {_short(max(max(p.sizes) for p in found.parts))} parameters"

    def claim(
        item: str, says: str, paper: str, value: Value | None, above: bool, measured: str, why: str = ""
    ) -> Claim:
        if value is None:
            return Claim(
                item,
                says,
                paper,
                "not run",
                "not comparable",
                "No two runs of this design can be held against each other.",
            )
        interval = value.interval()
        between = (
            "one pair of runs, no interval"
            if interval is None
            else f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}"
        )
        outcome = "not comparable" if smoke else side(value, above)
        reason = (
            "nothing is learned at smoke scale"
            if smoke
            else f"{value.n} pairs of runs (sizes and seeds) of {what}{why}"
        )
        return Claim(
            item, says, paper, f"{measured}: {value.value:+.4f} nats ({between})", outcome, reason, value.value, value.stderr, value.n
        )  # fmt: skip

    main = "default"

    def tolerance(size: int, seed: int) -> float | None:
        """How much worse `deep` is than `middle` at the longer context, minus the same at the shorter."""
        at = [
            _minus(found.one(main, size, deep, c, seed), found.one(main, size, middle, c, seed)) for c in (long, short)
        ]
        return _minus(*at)

    def spread(size: int, seed: int) -> float | None:
        """Largest minus smallest loss over all depths but the deepest, at the longer context minus at the shorter."""
        ranges: list[float | None] = []
        for context in (long, short):
            each = [found.one(main, size, d, context, seed) for d in scale.depths if d < deep]
            known = [x for x in each if x is not None]
            ranges.append(max(known) - min(known) if len(known) > 1 else None)
        return _minus(*ranges)

    def unlocked(context: int) -> Callable[[int, int], float | None]:
        """What polarization adds to the loss of the deep model, minus what it adds to that of the shallow one."""

        def of(size: int, seed: int) -> float | None:
            added = [
                _minus(found.one("polarized", size, d, context, seed), found.one(main, size, d, context, seed)) for d in (deep, shallow)
            ]  # fmt: skip
            return _minus(*added)

        return of

    claims = [
        claim(ITEM_NAME, "At the shorter context, the deepest models end up worse than the shallowest.", "context 2048: more than 48 layers worse than 16",
              found.difference(deep, shallow, short), True, f"loss at {deep} minus {shallow} layers, context {short}"),
        claim(ITEM_NAME, "At the longer context, deeper models beat shallower ones of the same size.", "context 8192: deeper better, up to 32 to 48 layers",
              found.difference(middle, shallow, long), False, f"loss at {middle} minus {shallow} layers, context {long}"),
        claim(ITEM_NAME, "Past some depth, deeper gets worse again.", "64 and 72 layers worse than 32 and 48",
              found.difference(deep, middle, long), True, f"loss at {deep} minus {middle} layers, context {long}"),
        claim(ITEM_NAME, "A longer context tolerates more depth.", "degradation sets in later at 8192 than at 2048",
              found.mean_over(tolerance, main), False, f"what {deep} layers lose to {middle}, at context {long} minus at {short}"),
        claim(ITEM_NAME, "At the shorter context the shape matters less than at the longer.", "curves together at 2048, apart at 8192",
              found.mean_over(spread, main), True, f"spread over depths below {deep}, at context {long} minus at {short}"),
    ]  # fmt: skip
    if any(p.variant == "polarized" for p in found.parts):
        claims += [
            claim("Section 6", "Polarization lets deeper models gain.", "shown on recall, with 2 and 4 layers", found.mean_over(unlocked(c), main),
                  False, f"what polarization adds to the loss at {deep} layers minus at {shallow}, context {c}", "; the paper shows it on recall, not on text")
            for c in scale.contexts
        ]  # fmt: skip
    return claims


def _table(variant: str, found: Runs) -> Table:
    short, long = found.scale.contexts
    columns = [
        Column(name="size"), Column(name="layers"), Column(name="width"), Column(name="parameters"),
        *(Column(name=f"loss, context {c}", unit="nats") for c in (short, long)),
        *(Column(name=f"against {found.scale.compared[0]} layers, {c}", unit="nats") for c in (short, long)),
        *(Column(name=f"sharpness kept, {c}", meaning="relative sharpness after the last block over that after the first, on held-out text") for c in (short, long)),
        Column(name="steps"), Column(name="core time of a run", unit="s", meaning="training, mean over seeds and contexts"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for size, depth in found.cells(variant):
        at = {c: found.found(variant, size, depth, c) for c in (short, long)}
        base = {c: found.found(variant, size, found.scale.compared[0], c) for c in (short, long)}
        run = at[short][0]
        gaps: list[Cell] = [
            Value.mean([a["loss"] - b["loss"] for a, b in zip(at[c], base[c], strict=True)], "nats") if base[c] and base[c] is not at[c] else None
            for c in (short, long)
        ]  # fmt: skip
        if depth == found.scale.compared[0]:
            gaps = [None, None]
        rows.append([
            _short(size), depth, run["width"], run["parameters"], *(Value.mean([r["loss"] for r in at[c]], "nats") for c in (short, long)), *gaps,
            *(Value.mean([r["blur"] for r in at[c]]) for c in (short, long)), run["steps"],
            round(sum(r["seconds"] for c in at for r in at[c]) / sum(len(at[c]) for c in at), 1),
        ])  # fmt: skip
    return Table(
        id=f"loss-{variant}", title=f"Validation loss, {VARIANTS[variant]}", columns=columns, rows=rows,
        meaning="Mean cross-entropy of a token of held-out text, the same text for both contexts, ± standard error over seeds. Differences are taken seed by seed.",
        method="Widths are chosen so that models of a size have as nearly the same number of parameters as the width's step allows; N = 16, expand 2, dt_rank = d_model / 16, tied embeddings.",
    )  # fmt: skip


def _training_table(scale: Scale, found: Runs) -> Table:
    rows: list[list[Cell]] = [
        ["paper", "100-250M", 4800, 3e-3, "0.5M", "2.5B"],
        ["paper", "250-400M", 13500, 1.5e-3, "0.5M", "7B"],
        ["paper", "400-550M", 20000, 1.25e-3, "0.5M", "10B"],
    ]
    for tier in scale.tiers:
        sizes = sorted({s for p in found.parts for s in p.sizes if scale.tier(s) is tier})
        if sizes:
            rows.append([
                "here", ", ".join(map(_short, sizes)), tier.steps, tier.lr, f"{scale.batch_tokens:,}", f"{tier.steps * scale.batch_tokens:,}",
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
    for variant in dict.fromkeys(p.variant for p in found.parts if p.variant != "half-rate"):
        for depth in found.scale.depths:
            cells = [(size, found.found(variant, size, depth, context)) for size in found.sizes(variant)]
            points = [
                (float(runs[0]["parameters"]), Value.mean([r["loss"] for r in runs])) for _, runs in cells if runs
            ]
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
    shallow, series = found.scale.compared[0], []
    for size in found.sizes(found.parts[0].variant):
        for context in found.scale.contexts:
            points: list[tuple[str, Value]] = []
            for depth in found.scale.depths:
                gap = [
                    _minus(found.one(found.parts[0].variant, size, depth, context, s), found.one(found.parts[0].variant, size, shallow, context, s))
                    for s in range(len(found.losses(found.parts[0].variant, size, shallow, context)))
                ]  # fmt: skip
                known = [g for g in gap if g is not None]
                if known:
                    points.append((str(depth), Value.mean(known)))
            series.append(Series(
                name=f"{_short(size)}, context {context}", x=[x for x, _ in points], y=[v.value for _, v in points], stderr=[v.stderr or 0.0 for _, v in points],
                style="line" if context == min(found.scale.contexts) else "fit", group=_short(size),
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
    design = "; ".join(
        f"{p.variant} of {', '.join(map(_short, p.sizes))} at {', '.join(map(str, p.depths))} layers, {len(_seeds(p, found.seeds))} seed(s)"
        for p in found.parts
    )
    notes.append(f"Design, each at both contexts: {design}.")
    notes.append(
        f"Text: {told['name']}, sha256 {told['sha256'][:16]}, one token a {'byte' if told['unit'] == 'bytes' else 'piece of its tokenizer'}."
    )
    if told["tokens"]:
        share = [n / told["tokens"] for n in tokens]
        word = "nothing is read twice" if share[-1] <= 1 else "the text is read again and again"
        notes.append(
            f"{' and '.join(f'{n:,}' for n in tokens)} tokens of training from {told['tokens']:,}: {' and '.join(f'{s:.2g}' for s in share)} passes over the text, {word}. "
            f"The paper trains on 12 to 25 tokens a parameter, these runs on {min(tokens) / max(r['parameters'] for r in runs):.2g} to {max(tokens) / min(r['parameters'] for r in runs):.2g}."
        )  # fmt: skip
    notes += _rate_notes(found)
    if scale_name == "laptop":
        notes.append(
            "Small models, a short training: what differs by depth here is in part how fast a shape learns, where the paper's models are nearer the end of learning."
        )
    origin = sorted(
        {f"{p['commit'] or p['ssmlens']}, {p['device']}, {p['threads']} thread(s)" for p in made_by.values() if p}
    )
    return [*notes, *(f"Runs made by {o}." for o in origin)]


def _rate_notes(found: Runs) -> list[str]:
    """How much of what depth does goes away at half the learning rate: the same sizes and seeds."""
    shallow, _, deep = found.scale.compared
    notes = []
    for context in found.scale.contexts:

        def change(size: int, seed: int, context: int = context) -> float | None:
            gaps = [
                _minus(*(found.one(v, size, d, context, seed) for d in (deep, shallow)))
                for v in ("half-rate", "default")
            ]
            return _minus(*gaps)

        half, moved = found.difference(deep, shallow, context, "half-rate"), found.mean_over(change, "half-rate")
        if half is not None and moved is not None:
            notes.append(
                f"Control: at half the learning rate, {deep} minus {shallow} layers at context {context} is {half.value:+.4f} nats, {moved.value:+.4f} from what the same "
                f"runs show at the full rate (n = {moved.n}): that part belongs to the learning rate, not to depth."
            )
    return notes


ITEM = Item(
    name="figure4", title="depth against width at equal size, two contexts", source="Figure 4, Table 4", scales=tuple(SCALES), variants=tuple(VARIANTS), run=run,
    aliases=("table4",), takes=("data",),
)  # fmt: skip
