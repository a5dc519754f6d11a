"""The record of the grid: what each factor does to the gain by polarization, and when polarization begins to pay.

gain = accuracy of the polarized model - that of the default one, averaged over the numbers of pairs, in points, seed by seed
"""

from dataclasses import asdict
from typing import Any

from ssmlens.experiments.base import Claim, claims_config, claims_table, holm, side
from ssmlens.experiments.grid_design import FACTORS, Cell, Part, variant
from ssmlens.experiments.recall import CONFIGURATIONS, SCALES, Scale, guessing, half_life, recall_distance, sized
from ssmlens.results import Column, Figure, Record, Series, Table, Value, provenance

Results = dict[str, Any]
PAPER_GAIN = 11.11  # both channels, 2 layers: 83.17 - 72.06 % (Table 2)
PAPER_LENGTHS = 1.5  # half-lives of the slowest channel in the paper's 1024 tokens, as Mamba's authors start it


class _Found:
    """The results, asked for by cell."""

    def __init__(self, results: Results, grid: dict[str, Part]) -> None:
        self.results = results
        self.seeds = {cell.id: part.seeds for part in reversed(grid.values()) for cell in part.cells}

    def runs(self, cell: Cell) -> list[dict[str, Any]]:
        return [self.results[f"{cell.id}-seed{seed}"] for seed in range(self.seeds[cell.id])]

    def scores(self, cell: Cell) -> list[float]:
        return [100 * sum(r["accuracy"].values()) / len(r["accuracy"]) for r in self.runs(cell)]

    def accuracy(self, cell: Cell) -> Value:
        return Value.mean(self.scores(cell), "%")

    def gains(self, cell: Cell, default: Cell) -> list[float]:
        """As far as both have the seed."""
        return [a - b for a, b in zip(self.scores(cell), self.scores(default), strict=False)]

    def bound(self, cell: Cell) -> str:
        """How many runs found the association: better at the end than half way from guessing to one."""
        found = sum(r["found"] is not None for r in self.runs(cell))
        return f"{found} of {len(self.runs(cell))}"


def record(scale_name: str, grid: dict[str, Part], results: Results, made_by: dict[str, Any]) -> Record:
    scale = SCALES[scale_name]
    found = _Found(results, grid)
    claims: list[Claim] = []
    tables, figures, verdict = [], [], []
    for part in (_factors, _half_lives, _lengths, _modes, _rates):
        if (made := part(scale, grid, found)) is not None:
            tables += made.tables
            figures += made.figures
            claims += made.claims
            verdict += made.sentences
    figures.append(_every_run(scale, grid, found))
    if scale_name == "smoke":
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
        claims = []
    seconds = sum(r["seconds"] for r in results.values())
    commits = sorted({p["commit"] or p["ssmlens"] for p in made_by.values() if p})
    return Record(
        kind="reproduce",
        title=f"Table 2 as a grid: where the gain comes from ({scale_name} scale)",
        verdict=verdict,
        tables=[*([claims_table(claims)] if claims else []), *tables],
        figures=figures,
        notes=[
            f"{len(results)} runs, {seconds / 3600:.2f} core-hours of training in all"
            + (f", made by {', '.join(commits)}." if commits else "."),
            "The design is fractional: one factor at a time, from both ends. It does not show how two factors act together elsewhere.",
            "The standard errors are over training seeds, differences are taken seed by seed. Accuracies near guessing and near 100 % in "
            "one cell make Student's intervals rough: the last figure shows every run.",
            "A run that found the association late has a low accuracy, whatever it could hold: both are one number here.",
        ],
        config={"item": "table2-grid", "scale": scale_name, "sizes": asdict(scale), "claims": claims_config(claims)},
        seeds=list(range(max(part.seeds for part in grid.values()))),
        provenance=provenance(),
    )


class _Made:
    def __init__(self) -> None:
        self.tables: list[Table] = []
        self.figures: list[Figure] = []
        self.claims: list[Claim] = []
        self.sentences: list[str] = []


def _interval(value: Value, unit: str = "points") -> str:
    bounds = value.interval()
    return f"{value.value:+.1f} {unit}" + (f" (95 % interval {bounds[0]:+.1f} to {bounds[1]:+.1f})" if bounds else "")


def _label(configuration: str) -> str:
    c = next(c for c in CONFIGURATIONS if c.id == configuration)
    return f"{c.label}, {c.layers} layers"


# ---- one factor at a time ----


def _factors(scale: Scale, grid: dict[str, Part], found: _Found) -> _Made:
    """Rows: the two ends and, from each, one factor exchanged. The change of the gain is the part that the factor explains."""
    made = _Made()
    rows: list[list[Any]] = []
    changes: dict[str, Value] = {}
    bars: dict[str, tuple[list[str], list[Value]]] = {}
    for base, sign, verb in (("corrected", "+", "with"), ("released", "-", "without")):
        plain, both = Cell(base, "default-2"), Cell(base, "both-2")
        at_base = found.gains(both, plain)
        rows.append([base, "", found.accuracy(plain), found.accuracy(both), found.bound(plain), found.bound(both),
                     Value.mean(at_base, "points"), None, None])  # fmt: skip
        bars[base] = ([f"{base} as it is"], [Value.mean(at_base, "points")])
        for factor, words in FACTORS.items():
            name = f"{base}{sign}{factor}"
            default = plain if factor == "zero" else Cell(name, "default-2")
            other = Cell(name, "both-2")
            gains = found.gains(other, default)
            change = Value.mean([a - b for a, b in zip(gains, at_base, strict=False)], "points")
            changes[f"{base}, {verb} {words}"] = change
            part = Value(
                value=100 * change.value / PAPER_GAIN, stderr=None if change.stderr is None else 100 * change.stderr / PAPER_GAIN,
                n=change.n, unit="%",
            )  # fmt: skip
            rows.append([base, f"{verb} {words}", found.accuracy(default), found.accuracy(other), found.bound(default),
                         found.bound(other), Value.mean(gains, "points"), change, part])  # fmt: skip
            bars[base][0].append(f"{verb} {words}")
            bars[base][1].append(Value.mean(gains, "points"))
    names = (
        "base",
        "changed",
        "default",
        "both",
        "found, default",
        "found, both",
        "gain",
        "change of the gain",
        "of the paper's gain",
    )
    units = ("", "", "%", "%", "", "", "points", "points", "%")
    made.tables.append(Table(
        id="factors", title="What polarization adds when one thing is changed",
        columns=[Column(name=n, unit=u) for n, u in zip(names, units, strict=True)], rows=rows,
        meaning=f"The change of the gain is what the factor explains; the paper's gain here is {PAPER_GAIN} points (both channels, 2 layers, "
        "length 1024). Found: runs that learned to bind key and value.",
        method="Accuracy averaged over three numbers of pairs; ± standard error over seeds; gains and their changes seed by seed. A factor "
        "keeps the learning rate of its base.",
    ))  # fmt: skip
    tests = {name: p for name, change in changes.items() if (p := change.p_value()) is not None}
    sure = {name for name, p in holm(tests).items() if p < 0.05}
    for name in changes:
        says = f"{_interval(changes[name])}: " + (
            "this factor changes what polarization adds" if name in sure else "cannot be told from chance"
        )
        made.sentences.append(f"{name}: the gain changes by {says}.")
    lead = f"{len(sure)} of {len(changes)} single factors change the gain by polarization beyond chance (Holm, 5 %)."
    made.sentences.insert(0, lead)
    for base, (x, values) in bars.items():
        made.figures.append(Figure(
            id=f"factors-{base}", title=f"Gain by polarization, from {base}", x_label="what is changed", y_label="gain (points)",
            x_scale="category", series=[_bars("both channels over default", x, values)],
            meaning="Bars that differ from the first: factors on which the gain hangs.", method="2 layers; bars are standard errors over seeds.",
        ))  # fmt: skip
    return made


def _bars(name: str, x: list[Any], values: list[Value], style: Any = "bar") -> Series:
    return Series(
        name=name, x=x, y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], style=style, group=name
    )


# ---- how many half-lives long a sequence is ----


def _half_lives(scale: Scale, grid: dict[str, Part], found: _Found) -> _Made | None:
    if "half-life" not in grid:
        return None
    made = _Made()
    distance = recall_distance(scale)
    names = ["corrected", *dict.fromkeys(cell.variant for cell in grid["half-life"].cells)]
    rows: list[list[Any]] = []
    ratios: list[float] = []
    gains: dict[str, list[Value]] = {"one-2": [], "both-2": []}
    for name in names:
        life = half_life(scale, variant(name))
        default = Cell(name, "default-2")
        ratios.append(distance / life)
        for configuration, values in gains.items():
            values.append(Value.mean(found.gains(Cell(name, configuration), default), "points"))
        rows.append([life, scale.length / life, distance / life, found.accuracy(default), found.bound(default),
                     *(values[-1] for values in gains.values())])  # fmt: skip
    heads = (
        "half-life",
        "length / half-life",
        "recall distance / half-life",
        "default",
        "found, default",
        "gain: one channel at 1",
        "gain: both",
    )
    units = ("tokens", "", "", "%", "", "points", "points")
    made.tables.append(Table(
        id="half-life", title="When polarization begins to pay, with Mamba's own initialisation otherwise",
        columns=[Column(name=n, unit=u) for n, u in zip(heads, units, strict=True)], rows=rows,
        meaning="The half-life is that of the slowest ordinary state channel at its slowest Δ before training. In the paper a sequence is 1.5 "
        "of them long where Δ starts as Mamba's authors start it.",
        method=f"Δ's initial range times 1, 4, 16, 64 (at most 0.8); length {scale.length}, mean distance from value to query "
        f"{distance:.1f} tokens.",
    ))  # fmt: skip
    series = [_bars(_label(c), ratios, values, "line") for c, values in gains.items()]
    made.figures.append(Figure(
        id="half-life", title="Gain against recall distance in half-lives", x_label="mean recall distance / half-life of the slowest channel",
        y_label="gain over default (points)", x_scale="log", series=series,
        meaning="Above zero polarization pays.", method="2 layers; bars are standard errors over seeds.",
    ))  # fmt: skip
    lengths = [scale.length / half_life(scale, variant(name)) for name in names]
    like = min(range(len(names)), key=lambda i: abs(lengths[i] - PAPER_LENGTHS))
    made.claims.append(Claim(
        item="Table 2", claim="With Mamba's own start and a sequence as many half-lives long as the paper's, both channels help at 2 layers.",
        paper=f"+{PAPER_GAIN} points at {PAPER_LENGTHS} half-lives", ours=_interval(gains["both-2"][like]), outcome=side(gains["both-2"][like]),
        why=f"the sign is compared; here {lengths[like]:.2g} half-lives, length {scale.length}", value=gains["both-2"][like].value,
        stderr=gains["both-2"][like].stderr, n=gains["both-2"][like].n,
    ))  # fmt: skip
    for configuration, values in gains.items():
        tests = {str(r): p for r, v in zip(ratios, values, strict=True) if (p := v.p_value()) is not None}
        adjusted = holm(tests)
        pays = [r for r, v in zip(ratios, values, strict=True) if v.value > 0 and adjusted.get(str(r), 1.0) < 0.05]
        what = _label(configuration)
        made.sentences.append(
            f"{what}: begins to pay at a recall distance of {min(pays):.2g} half-lives (of {', '.join(f'{r:.2g}' for r in ratios)})."
            if pays
            else f"{what}: at no recall distance between {ratios[0]:.2g} and {ratios[-1]:.2g} half-lives a gain that chance cannot explain "
            f"({', '.join(f'{v.value:+.1f}' for v in values)} points)."
        )
    return made


# ---- longer, replaced, other rates ----


def _lengths(scale: Scale, grid: dict[str, Part], found: _Found) -> _Made | None:
    if "length" not in grid:
        return None
    made = _Made()
    longer = grid["length"].cells[0].length
    rows: list[list[Any]] = []
    for name in dict.fromkeys(cell.variant for cell in grid["length"].cells):
        for length in (None, longer):
            default, both = Cell(name, "default-2", length), Cell(name, "both-2", length)
            if default.id not in found.seeds:
                continue
            size = sized(scale, length)
            gain = Value.mean(found.gains(both, default), "points")
            rows.append([name, size.length, size.length / half_life(size, variant(name)), found.accuracy(default), found.accuracy(both),
                         found.bound(default), found.bound(both), gain])  # fmt: skip
            if length:
                made.sentences.append(f"{name}, length {length}: both channels add {_interval(gain)}.")
    names = ("variant", "length", "length / half-life", "default", "both", "found, default", "found, both", "gain")
    units = ("", "", "", "%", "%", "", "", "points")
    size = sized(scale, longer)
    made.tables.append(Table(
        id="length", title="Longer sequences", columns=[Column(name=n, unit=u) for n, u in zip(names, units, strict=True)], rows=rows,
        meaning="The longer the sequence, the more must be kept, and the longer.",
        method=f"As many pairs for each length: 1/16, 1/8, 1/4 of it; vocabulary {size.vocab_size} and {size.steps} steps at length {size.length}.",
    ))  # fmt: skip
    return made


def _modes(scale: Scale, grid: dict[str, Part], found: _Found) -> _Made | None:
    if "mode" not in grid:
        return None
    made = _Made()
    rows: list[list[Any]] = []
    for cell in grid["mode"].cells:
        base = cell.variant.partition(",")[0]
        default = Cell(base, "default-2")
        replaced, appended = found.gains(cell, default), found.gains(Cell(base, cell.configuration), default)
        change = Value.mean([a - b for a, b in zip(replaced, appended, strict=False)], "points")
        rows.append(
            [base, _label(cell.configuration), Value.mean(appended, "points"), Value.mean(replaced, "points"), change]
        )
    names = ("variant", "pinned", "gain, appended", "gain, replacing", "difference")
    made.tables.append(Table(
        id="mode", title="Appended or in place of learned state channels",
        columns=[Column(name=n, unit="points" if i > 1 else "") for i, n in enumerate(names)], rows=rows,
        meaning="Appending makes the state a little larger; replacing keeps its size.", method="2 layers, seed by seed.",
    ))  # fmt: skip
    return made


def _rates(scale: Scale, grid: dict[str, Part], found: _Found) -> _Made | None:
    if "rates" not in grid:
        return None
    made = _Made()
    cells = grid["rates"].cells
    rates = sorted({1.0, *(cell.rate for cell in cells)})
    rows: list[list[Any]] = []
    series = []
    for name in dict.fromkeys(cell.variant for cell in cells):
        best = {}
        for configuration in ("default-2", "both-2"):
            values = [found.accuracy(Cell(name, configuration, rate=rate)) for rate in rates]
            best[configuration] = max(values, key=lambda v: v.value)
            rows.append([name, _label(configuration), *values, best[configuration]])
            series.append(_bars(f"{name}, {_label(configuration)}", [f"{r:.2g}" for r in rates], values, "line"))
        gain = best["both-2"].value - best["default-2"].value
        made.sentences.append(
            f"{name}: each at the best of {len(rates)} learning rates, both channels add {gain:+.1f} points."
        )
    made.tables.append(Table(
        id="rates", title="Other learning rates",
        columns=[Column(name="variant"), Column(name="pinned"), *(Column(name=f"rate × {r:.2g}", unit="%") for r in rates),
                 Column(name="best", unit="%")], rows=rows,
        meaning="One learning rate can favour one configuration; at its own best each shows what it can.",
        method="2 layers. The best is chosen on the runs that are shown, so it is a little too good, for all alike.",
    ))  # fmt: skip
    made.figures.append(Figure(
        id="rates", title="Accuracy by learning rate", x_label="learning rate, times the variant's own", y_label="accuracy (%)", x_scale="category",
        series=series, meaning="A gain that holds at one rate only is a matter of tuning.", method="Bars are standard errors over seeds.",
    ))  # fmt: skip
    return made


def _every_run(scale: Scale, grid: dict[str, Part], found: _Found) -> Figure:
    """Every run: a mean would hide that some have found the association and some have not."""
    cells = list(dict.fromkeys(cell for name in ("corners", "factors") for cell in grid[name].cells))
    names = [f"{cell.variant}, {cell.configuration}" for cell in cells]
    most = max(len(found.runs(cell)) for cell in cells)
    series = []
    for seed in range(most):
        there = [(n, found.scores(c)[seed]) for n, c in zip(names, cells, strict=True) if seed < len(found.scores(c))]
        series.append(Series(name=f"seed {seed}", x=[n for n, _ in there], y=[y for _, y in there], style="points"))
    series.append(Series(
        name="guessing among the values in the sequence", x=names, y=[100 * guessing(scale)] * len(names), style="fit", group="paper",
    ))  # fmt: skip
    return Figure(
        id="every-run", title="Every run of the corners and factors", x_label="variant, configuration", y_label="average accuracy (%)",
        x_scale="category", series=series,
        meaning="One point a run. Runs at the line know which values occur in the sequence, not which belongs to the key.",
        method="Average over the three numbers of pairs.",
    )  # fmt: skip
