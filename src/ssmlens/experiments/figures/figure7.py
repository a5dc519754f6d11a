"""Figure 7 of the paper: which tokens move the last output, Mamba beside Pythia; and the ratio of their influence at short distances.

both ends      mean log score of the first twentieth of the positions - that of the middle third       above zero: the beginning counts more
recency        share of squared influence in the last tenth of the positions
ratio(d)       score(d) of Mamba / score(d) of Pythia,  d = 1..64;     log ratio = intercept - slope · d"""

import math

import numpy as np

from ssmlens.experiments.base import Claim, Item, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures import figure1
from ssmlens.experiments.figures.models import BESIDE, Model, described
from ssmlens.experiments.figures.runs import Done, Plan, joined, run, said, samples
from ssmlens.experiments.figures.scales import (
    SCALES,
    Scale,
    beside,
    chosen,
    mambas,
    pythias,
    trained,
)
from ssmlens.lens import influence
from ssmlens.lens.comparison import of_means
from ssmlens.lens.influence import Influence
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance

NAME = "Figure 7"
NEAR = 64


def make(request: Request) -> Record:
    scale = chosen(request)
    models = [*mambas(scale, request), *pythias(scale, request), *trained(scale, request), *beside(scale, request, 3)]
    done = run("figure7", request, models, lambda m: plan(scale, m))
    return record(request, done)


def plan(scale: Scale, model: Model) -> Plan:
    """That of Figure 1: the same measurement, looked at by position."""
    return figure1.plan(scale, model)


def record(request: Request, done: Done) -> Record:
    claims = claims_of(done, request.scale == "smoke")
    initial, given = done.names("mamba", "pythia"), done.names("loaded", "trained transformer", "transformer")
    figures = []
    for group, names in (("initial", initial), ("trained", given)):
        made = influence.position_figure([joined(n, done.found[n]) for n in names]) if names else None
        if made:
            title = "Which tokens move the last output, " + ("at initialisation" if group == "initial" else "trained")
            figures.append(made.model_copy(update={"id": f"position-{group}", "title": title}))
    return Record(
        kind="reproduce", title=f"Figure 7: influence by position ({request.scale} scale)", verdict=claims_verdict(claims, request.scale == "smoke"),
        tables=[claims_table(claims), _table(done)], figures=[*figures, _ratio_figure(done)], notes=[described(request.data), *done.notes()],
        provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        config={"item": "figure7", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


# ---- numbers ----


def both_ends(parts: list[Influence]) -> np.ndarray:
    """Per sample: mean log score of the first twentieth of the positions minus that of the middle third."""
    found = []
    for s in samples(parts):
        by_position = np.log(np.maximum(s.score[::-1], 1e-300))
        size = len(by_position)
        found.append(by_position[: max(1, size // 20)].mean() - by_position[size // 3 : 2 * size // 3].mean())
    return np.array(found)


def recency(parts: list[Influence]) -> np.ndarray:
    """Per sample: the share of squared influence in the last tenth."""
    found = []
    for s in samples(parts):
        squares = np.square(s.score)
        found.append(squares[: max(1, len(squares) // 10)].sum() / squares.sum())
    return np.array(found)


def slopes(one: list[Influence], other: list[Influence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pair of samples: by how much the log ratio falls a token over short distances, R² of that line, R² of a power law."""
    found = []
    for a, b in zip(samples(one), samples(other), strict=False):
        y = np.log(np.maximum(a.score, 1e-300) / np.maximum(b.score, 1e-300))[1 : NEAR + 1]
        x = np.arange(1.0, len(y) + 1)
        found.append((-np.polyfit(x, y, 1)[0], _r2(x, y), _r2(np.log(x), y)))
    slope, r2, power = (np.array(column) for column in zip(*found, strict=True))
    return slope, r2, power


def _r2(x: np.ndarray, y: np.ndarray) -> float:
    rest, total = y - np.polyval(np.polyfit(x, y, 1), x), np.square(y - y.mean()).sum()
    return float(1 - np.square(rest).sum() / total) if total > 0 else 1.0


def couples(done: Done) -> list[tuple[str, str, str]]:
    """(Mamba, transformer, when), of the same size."""
    found = [
        (name, f"Pythia-{BESIDE[done.models[name].of]}", "at initialisation")
        for name in done.names("mamba")
        if f"Pythia-{BESIDE[done.models[name].of]}" in done.found
    ]
    others = done.names("trained transformer") + done.names("loaded", recurrent=False)
    return found + [(a, b, "trained") for a, b in zip(done.names("loaded", recurrent=True), others, strict=False)]


# ---- claims, tables, figures ----


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    claims = []

    def claim(part: str, says: str, paper: str, ours: str, value: Value, why: str, above: bool = True) -> None:
        outcome = "not comparable" if smoke else side(value, above)
        claims.append(Claim(f"{NAME}{part}", says, paper, ours, outcome, why, value.value, value.stderr, value.n))

    for one, other, when in couples(done):
        why = (
            "Over initialisations; the paper's models are trained."
            if when != "trained"
            else "Over sequences, of one training each of a small model."
        )
        ends = Value.mean(both_ends(done.found[other]))
        claim(
            "a",
            f"In {other} the beginning of the text moves the last output more than its middle ({when}).",
            "high at both ends, low in the middle",
            f"log influence of the first twentieth minus the middle third: {said(ends)}",
            ends,
            why,
        )
        shares = [recency(done.found[n]) for n in (one, other)]
        gap = of_means(*shares, paired=False)
        claim(
            "a",
            f"{one}'s influence is concentrated in the nearest positions, more than {other}'s ({when}).",
            "concentrated in the nearest positions",
            f"the last tenth holds {100 * shares[0].mean():.1f} % in {one}, {100 * shares[1].mean():.1f} % in {other}; difference {said(gap)}",
            gap,
            why,
        )
        slope, r2, power = slopes(done.found[one], done.found[other])
        falls, more = Value.mean(slope), Value.mean(r2 - power)
        claim(
            "b",
            f"The ratio of influence, {one} over {other}, falls at short distances ({when}).",
            "falls, at all sizes",
            f"by {said(falls, '1/token')} over distances 1 to {NEAR}",
            falls,
            why,
        )
        claim(
            "b",
            f"That ratio, {one} over {other}, follows an exponential ({when}).",
            "fitted by an exponential",
            f"R² {r2.mean():.2f}, of a power law {power.mean():.2f}; difference {said(more)}",
            more,
            f"Against a power law, which is as simple. {why}",
        )
    return claims


def _table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="parameters"), Column(name="length", unit="tokens"), Column(name="beginning against middle", meaning="in logarithms"),
        Column(name="last tenth holds"), Column(name="effective context", unit="tokens"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        whole = joined(name, parts)
        rows.append([
            name, done.results[name]["parameters"], whole.length, Value.mean(both_ends(parts)), Value.mean(recency(parts)), whole.effective_context,
        ])  # fmt: skip
    return Table(
        id="positions", title="Where the influence on the last output lies", columns=columns, rows=rows,
        meaning="± standard error over initialisations; of a trained model over sequences. Beginning against middle: above zero, the first tokens count more than those in the middle.",
        method="Root mean square of ‖∂y_T/∂x_s‖ over sequences and random ±1 probes; y_T: the last hidden state, x_s: the embedding of token s.",
    )  # fmt: skip


def _ratio_figure(done: Done) -> Figure:
    series = []
    for one, other, when in couples(done):
        curves = [
            (a.score[1 : NEAR + 1] / b.score[1 : NEAR + 1]) / (a.score[1] / b.score[1])
            for a, b in zip(samples(done.found[one]), samples(done.found[other]), strict=False)
        ]
        logs = np.log(np.maximum(np.stack(curves), 1e-300))
        values = [Value.mean(column) for column in logs.T]
        x = [float(d) for d in range(1, logs.shape[1] + 1)]
        name = f"{one} / {other}, {when}"
        y = [math.exp(v.value) for v in values]
        series.append(
            Series(
                name=name, x=x, y=y, stderr=[z * (v.stderr or 0.0) for z, v in zip(y, values, strict=True)], group=name
            )
        )
        fitted = np.polyfit(x, [v.value for v in values], 1)
        line = np.exp(np.polyval(fitted, [x[0], x[-1]]))
        series.append(Series(name=f"{name}: exponential", x=[x[0], x[-1]], y=line.tolist(), style="fit", group=name))
    return Figure(
        id="ratio", title="Influence of Mamba over that of a transformer", x_label="distance t - s (tokens)", y_label="ratio, distance 1 = 1", y_scale="log", series=series,
        meaning="A straight line downwards: Mamba forgets exponentially faster over short distances (the paper's Figure 7b). Dashed: the exponential.",
        method="Geometric mean over initialisations, or over sequences of trained models; bars are standard errors; dashed: least squares of the log ratio on distance.",
    )  # fmt: skip


ITEM = Item(
    name="figure7", title="influence by position, and over that of a transformer", source="Figure 7", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"), group="figure1",
)  # fmt: skip
