"""The parts of the grid's record beside the factors: half-lives, lengths, appending or replacing, learning rates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssmlens.experiments.grid_design import Cell, Part, variant
from ssmlens.experiments.grid_found import Found, Made, drawn, label
from ssmlens.experiments.recall import (
    DT_RANGE,
    PAPER_LENGTH,
    Scale,
    dt_range,
    half_life,
    recall_distance,
    sized,
)
from ssmlens.experiments.recall_gain import COUNTED, MARGIN, Arm, Change, Gain, interval, judged, mean
from ssmlens.results import Column, Figure, Table, Value

Grid = dict[str, Part]
RESAMPLES = 2000
SURE = 0.025  # two configurations are asked where they begin to pay: 5 % for both together


# ---- how many half-lives long a sequence is ----


def half_lives(scale: Scale, grid: Grid, found: Found) -> Made:
    made = Made()
    distance = recall_distance(scale)
    names = ["corrected", *dict.fromkeys(cell.variant for cell in grid["half-life"].cells), "corrected+dt"]
    lives = {name: half_life(scale, variant(name)) for name in names}
    cells = {(name, c): Cell(name, c) for c in ("one-2", "both-2") for name in names}
    gains = {key: found.gain(cell, Cell(key[0], "default-2")) for key, cell in cells.items() if found.has(cell)}
    rows: list[list[Any]] = []
    for name in names:
        both = gains[name, "both-2"]
        one = gains[name, "one-2"].value if (name, "one-2") in gains else None
        rows.append([name, lives[name], scale.length / lives[name], distance / lives[name], both.default.accuracy, both.default.count,
                     one, both.value])  # fmt: skip
    heads = (
        "variant", "half-life", "length / half-life", "recall distance / half-life", "default", "found, default", "gain: one channel at 1", "gain: both",
    )  # fmt: skip
    units = ("", "tokens", "", "", "%", "", "points", "points")
    capped = [name for name in names if dt_range(scale, variant(name))[1] < DT_RANGE[1] * (variant(name).dt_scale or 1)]
    made.tables.append(Table(
        id="half-life", title="When polarization begins to pay, with Mamba's own initialisation otherwise",
        columns=[Column(name=n, unit=u) for n, u in zip(heads, units, strict=True)], rows=rows,
        meaning="The half-life is that of the slowest ordinary state channel at its slowest Δ before training. The paper's code starts Δ at 0.69, "
        "so that its 1,024 tokens are about 1,000 of them, as in corrected+dt here; it has no number for other starts.",
        method=f"Length {scale.length}, mean distance from value to query {distance:.1f} tokens. Δ's initial range is scaled, by no more than "
        f"makes its upper end 0.8, so it is narrower than Mamba's in {', '.join(capped) or 'none'}. In corrected+dt Δ starts at 0.69 "
        "everywhere, without a spread.",
    ))  # fmt: skip
    series = []
    for c in ("one-2", "both-2"):
        there = [name for name in names if (name, c) in gains]
        series.append(drawn(label(c), [distance / lives[n] for n in there], [gains[n, c].value for n in there], "line"))
        made.sentences.append(_begins(label(c), [distance / lives[n] for n in there], [gains[n, c] for n in there]))
    made.figures.append(Figure(
        id="half-life", title="Gain against recall distance in half-lives", x_label="mean recall distance / half-life of the slowest channel",
        y_label="gain over default (points)", x_scale="log", series=series,
        meaning="Above zero polarization pays.", method="2 layers; bars are standard errors over seeds. In the last point Δ has no spread.",
    ))  # fmt: skip
    if (by_distance := _by_distance(found, lives)) is not None:
        made.figures.append(by_distance)
    like = min(
        names, key=lambda name: abs(scale.length / lives[name] - PAPER_LENGTH / half_life(scale, variant("corrected")))
    )
    gain = gains[like, "both-2"]
    if gain.value:
        said = judged({like: gain.value}, {like: gain.blocked})[like]
        made.sentences.append(
            f"With Mamba's own start, scaled so that a sequence is {scale.length / lives[like]:.2g} half-lives long (1,024 tokens would be 1.5), both "
            f"channels add {interval(gain.value)}: {said.words}."
        )  # fmt: skip
    return made


def crossing(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, at: float) -> float:
    """Where the rising (isotonic) fit of y over x reaches `at`; -inf: at the first x already; inf: nowhere."""
    from scipy.optimize import isotonic_regression

    fit = isotonic_regression(y).x
    if fit[0] >= at:
        return -np.inf
    above = int(np.searchsorted(fit, at))
    return float(np.interp(at, fit[above - 1 : above + 1], x[above - 1 : above + 1])) if above < len(fit) else np.inf


def _by_distance(found: Found, lives: dict[str, float]) -> Figure | None:
    """What both channels add to what is asked for near and far, as far as the runs have counted it."""
    series = []
    for name, life in lives.items():
        arms = [found.arm(Cell(name, c)) for c in ("default-2", "both-2")]
        gain = Gain(*arms)
        if gain.floor or not gain.by_seed:
            continue
        default, both = ([_shares(arm.runs[s]) for s in gain.by_seed] for arm in arms)
        distances = sorted(set.intersection(*(set(shares) for shares in (*default, *both))))
        values = [mean(100 * (b[d] - a[d]) for a, b in zip(default, both, strict=True)) for d in distances]
        series += [drawn(name, [d / life for d in distances], values, "line")] if distances else []
    if not series:
        return None
    return Figure(
        id="by-distance", title="Gain by recall distance within a sequence", x_label="recall distance / half-life of the slowest channel",
        y_label="gain by both channels (points)", x_scale="log", series=series,
        meaning="What is asked for long after it was said is what a state that decays has lost. Where the half-life decides, the lines are one.",
        method="All numbers of pairs together; distances are the lower edges of half octaves of tokens, those with at least 50 queries in every run. "
        "Bars are standard errors over seeds.",
    )  # fmt: skip


def _shares(run: Mapping[str, Any]) -> dict[int, float]:
    """By distance in tokens, the share of right answers."""
    counts: dict[int, list[int]] = {}
    for of in run.get("by_distance", {}).values():
        for distance, (right, asked) in of.items():
            here = counts.setdefault(int(distance), [0, 0])
            here[0], here[1] = here[0] + right, here[1] + asked
    return {d: right / asked for d, (right, asked) in counts.items() if asked >= 50}


def _begins(what: str, ratios: Sequence[float], gains: Sequence[Gain]) -> str:
    """Where the gain, fitted over log2(ratio), reaches MARGIN. Seeds are resampled together: they share their default runs."""
    there = [(r, g) for r, g in zip(ratios, gains, strict=True) if g.by_seed]
    points = sorted(((r, g.by_seed) for r, g in there if not g.floor), key=lambda p: p[0])
    seeds = [s for s in points[0][1] if all(s in by for _, by in points)] if points else []
    left_out = len(there) - len(points)
    without = (
        f" ({left_out} of {len(there)} half-lives left out: neither arm found the association in half of its runs)"
        if left_out
        else ""
    )
    if len(points) < 2 or len(seeds) < 2:
        return f"{what}: too few runs{without or ' of a seed'} to say from which recall distance on it pays."
    x = np.log2([r for r, _ in points])
    y = np.array([[by[s] for s in seeds] for _, by in points])
    means = y.mean(1)
    low, high = (f"{points[i][0]:.2g}" for i in (0, -1))
    each = [f"{v.value:+.1f} ± {v.stderr:.1f}" for v in (Value.mean(row) for row in y)]
    shown = f"{', '.join(each)} points at {', '.join(f'{r:.2g}' for r, _ in points)}"
    falls = max(float(means[i] - means[j]) for j in range(len(means)) for i in range(j + 1))
    rough = " The gains do not rise all the way, so the fit is rough." if falls > MARGIN else ""
    at = crossing(x, means, MARGIN)
    if at == np.inf:
        return f"{what}: the fitted gain reaches {MARGIN:g} point nowhere between {low} and {high} half-lives of recall distance ({shown}){without}."
    numbers = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    resampled = sorted(crossing(x, y[:, n].mean(1), MARGIN) for n in numbers)
    ends = resampled[int(0.025 * RESAMPLES)], resampled[int(0.975 * RESAMPLES)]
    after = Value.mean(y[x >= at].mean(0), "points")
    said = [
        low + " or fewer" if e == -np.inf else f"nowhere up to {high}" if e == np.inf else f"{2**e:.2g}"
        for e in (at, *ends)
    ]
    p = after.p_value()
    if p is None or p >= SURE or ends[1] == np.inf:
        return (
            f"{what}: no recall distance between {low} and {high} half-lives from which on these seeds show a gain: the fit reaches {MARGIN:g} point at "
            f"{said[0]} (95 % of resampled seeds: {said[1]} to {said[2]}), from there on {interval(after)} ({shown}){without}.{rough}"
        )  # fmt: skip
    return (
        f"{what}: begins to pay ({MARGIN:+g} point) at a recall distance of {said[0]} half-lives (95 % of resampled seeds: {said[1]} to {said[2]}); "
        f"from there on {interval(after)} ({shown}){without}.{rough}"
    )


# ---- longer, replaced, other rates ----


def lengths(scale: Scale, grid: Grid, found: Found) -> Made:
    made = Made()
    longer = grid["length"].cells[0].length
    gains: dict[tuple[str, int], Gain] = {}
    for name in dict.fromkeys(cell.variant for cell in grid["length"].cells):
        same = (
            f"corrected,dt{PAPER_LENGTH / scale.length:g}" if name == "rescaled" else name
        )  # the same runs, elsewhere
        short, long = (
            (Cell(same, "both-2"), Cell(same, "default-2")),
            (Cell(name, "both-2", longer), Cell(name, "default-2", longer)),
        )
        gains |= {
            (name, sized(scale, cells[0].length).length): found.gain(*cells)
            for cells in (short, long)
            if all(map(found.has, cells))
        }
    rows: list[list[Any]] = [
        [name, length, length / half_life(sized(scale, length), variant(name)), g.default.accuracy, g.polarized.accuracy, *g.cells(), g.value]
        for (name, length), g in gains.items()
    ]  # fmt: skip
    names = ("variant", "length", "length / half-life", "default", "both")
    units = ("", "", "", "%", "%")
    size = sized(scale, longer)
    made.tables.append(Table(
        id="length", title="Longer sequences",
        columns=[*(Column(name=n, unit=u) for n, u in zip(names, units, strict=True)), *COUNTED, Column(name="gain", unit="points")], rows=rows,
        meaning="The longer the sequence, the longer pairs must be kept.",
        method="; ".join(
            f"length {s.length}: {', '.join(map(str, s.pairs))} pairs, vocabulary {s.vocab_size}, {s.steps} steps" for s in (scale, size)
        ) + ".",
    ))  # fmt: skip
    values = {f"{name} {length}": v for (name, length), g in gains.items() if length == longer and (v := g.value)}
    says = judged(values, {f"{name} {length}": g.blocked for (name, length), g in gains.items()})
    for key, value in values.items():
        name = key.partition(" ")[0]
        made.sentences.append(f"{name}, length {longer}: both channels add {interval(value)}: {says[key].words}.")
    return made


def modes(scale: Scale, grid: Grid, found: Found) -> Made:
    made = Made()
    changes: dict[tuple[str, str], Change] = {}
    for cell in grid["mode"].cells:
        base = cell.variant.partition(",")[0]
        default = Cell(base, "default-2")
        appended = found.gain(Cell(base, cell.configuration), default)
        changes[base, label(cell.configuration)] = Change(appended, found.gain(cell, default))
    values = {", ".join(key): value for key, change in changes.items() if (value := change.value)}
    says = judged(
        values,
        {", ".join(key): change.blocked for key, change in changes.items()},
        "replacing adds more",
        "appending adds more",
    )
    rows: list[list[Any]] = [
        [*key, *(mean(g.by_seed[s] for s in c.by_seed) for g in (c.without, c.having)), c.value, says[", ".join(key)].words if c.value else None]
        for key, c in changes.items()
    ]  # fmt: skip
    names = ("variant", "pinned", "gain, appended", "gain, replacing", "difference", "says")
    made.tables.append(Table(
        id="mode", title="Appended or in place of learned state channels",
        columns=[Column(name=n, unit="points" if 1 < i < 5 else "") for i, n in enumerate(names)], rows=rows,
        meaning="Appending makes the state a little larger; replacing keeps its size.",
        method="2 layers, seed by seed; what is said holds for all differences together (Holm, 5 %).",
    ))  # fmt: skip
    sure = [
        f"{name}: {s.words} ({interval(values[name])})" for name, s in says.items() if s.words.endswith("adds more")
    ]
    compared = sum(s.outcome != "not comparable" for s in says.values())
    made.sentences.append(
        f"Replaced in place of appended: {'; '.join(sure) or 'no difference that these seeds can show'} ({compared} of {len(changes)} comparable)."
    )
    return made


def rates(scale: Scale, grid: Grid, found: Found) -> Made:
    made = Made()
    cells = grid["rates"].cells
    factors = sorted({1.0, *(cell.rate for cell in cells)})
    rows: list[list[Any]] = []
    series = []
    for name in dict.fromkeys(cell.variant for cell in cells):
        best: list[dict[int, float]] = []
        for configuration in ("default-2", "both-2"):
            arms = shared([found.arm(Cell(name, configuration, rate=rate)) for rate in factors])
            best.append(chosen(arms))
            rows.append([name, label(configuration), *(arm.accuracy for arm in arms), mean(best[-1].values(), "%")])
            series.append(
                drawn(
                    f"{name}, {label(configuration)}", [f"{r:.2g}" for r in factors], [a.accuracy for a in arms], "line"
                )
            )
        gain = mean(best[1][seed] - best[0][seed] for seed in best[0] if seed in best[1])
        made.sentences.append(
            f"{name}: each at the best of {len(factors)} learning rates, both channels add {interval(gain)}, of {gain.n} seeds."
            if gain
            else f"{name}: too few seeds have runs at all learning rates to choose one for each."
        )
    made.tables.append(Table(
        id="rates", title="Other learning rates",
        columns=[Column(name="variant"), Column(name="pinned"), *(Column(name=f"rate × {r:.2g}", unit="%") for r in factors),
                 Column(name="at the chosen one", unit="%")], rows=rows,
        meaning="One learning rate can favour one configuration; at its own best each shows what it can.",
        method="2 layers. The rate of a seed is the one that is best on average over the other seeds, so none is chosen by the run that is counted. "
        "Seeds that not all rates have are left out. The intervals take the seeds for independent, though they choose for each other.",
    ))  # fmt: skip
    made.figures.append(Figure(
        id="rates", title="Accuracy by learning rate", x_label="learning rate, times the variant's own", y_label="accuracy (%)", x_scale="category",
        series=series, meaning="A gain that holds at one rate only is a matter of tuning.", method="Bars are standard errors over seeds.",
    ))  # fmt: skip
    return made


def shared(arms: Sequence[Arm]) -> list[Arm]:
    """The runs of the seeds that all arms have."""
    seeds = [s for s in arms[0].runs if all(s in arm.runs for arm in arms)]
    return [Arm({s: arm.runs[s] for s in seeds}, arm.guess) for arm in arms]


def chosen(arms: Sequence[Arm]) -> dict[int, float]:
    """By seed, the score at the rate that is best over the other seeds; none of a single seed. arms: one for each rate, of the same seeds."""
    scores = [arm.scores for arm in arms]
    seeds = list(scores[0])
    if len(seeds) < 2:
        return {}
    return {s: max(scores, key=lambda of: sum(of[o] for o in seeds if o != s))[s] for s in seeds}
