"""Figure 6 of the paper: how far state channels' transitions move over a sequence, as a cumulative histogram.

share(θ) = share of learned state channels with max_t a_t - min_t a_t ≤ θ          the paper: over 60 % at θ = 0.5"""

import math
from typing import Any

import numpy as np

from ssmlens.experiments.base import Claim, Item, Outcome, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures.models import Model, described
from ssmlens.experiments.figures.runs import Done, Plan, run, said
from ssmlens.experiments.figures.scales import SCALES, Scale, chosen, length, mambas, sequences, trained
from ssmlens.lens.transitions import THRESHOLDS
from ssmlens.models.pretrained import packaged
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance

NAME = "Figure 6"
PAPER = 0.6
_HALF = int(np.argmin(np.abs(THRESHOLDS - 0.5)))


def make(request: Request) -> Record:
    scale = chosen(request)
    given = trained(scale, request)
    fresh = [Model("fresh", m.of, s) for m in given for s in range(3) if m.of in packaged()]
    done = run("figure6", request, [*mambas(scale, request), *_recurrent(given), *fresh], lambda m: plan(scale, m))
    return record(request, done)


def _recurrent(given: list[Model]) -> list[Model]:
    """Transformers have no transitions; those of the hub are known by name."""
    return [m for m in given if "pythia" not in m.of.lower()]


def plan(scale: Scale, model: Model) -> Plan:
    return Plan("transitions", length(scale, model), sequences(scale, model))


def record(request: Request, done: Done) -> Record:
    claims = [_claim(name, done, request.scale == "smoke") for name in done.found]
    return Record(
        kind="reproduce", title=f"Figure 6: how far transitions move ({request.scale} scale)", verdict=claims_verdict(claims, request.scale == "smoke"),
        tables=[claims_table(claims), _table(done)], figures=[_figure(done), _layers(done)], notes=[described(request.data), *done.notes()],
        provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        config={"item": "figure6", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


def shares(parts: list[dict[str, Any]], threshold: int) -> Value:
    """Of channels at or below THRESHOLDS[threshold]: over initialisations where there are several, else over the texts of the one model."""
    each = [[row[threshold] for row in part["below"]] for part in parts]
    return Value.mean(np.mean(x) for x in each) if len(each) > 1 else Value.mean(each[0])


def _claim(name: str, done: Done, smoke: bool) -> Claim:
    parts, model = done.found[name], done.models[name]
    share = shares(parts, _HALF)
    outcome: Outcome = "not comparable" if smoke else side(share, of=PAPER)
    when = "" if model.kind == "fresh" else ", trained" if model.trained else ", at initialisation"
    percent = Value(value=100 * share.value, stderr=None if share.stderr is None else 100 * share.stderr, n=share.n)
    return Claim(
        NAME, f"{name}{when}: over 60 % of state channels move by less than 0.5 over a sequence.", "over 60 %", said(percent, "%"), outcome,
        f"{_why(outcome, model.trained)} Over {done.over(name)}.", share.value, share.stderr, share.n,
    )  # fmt: skip


def _why(outcome: Outcome, trained: bool) -> str:
    if outcome == "not comparable":
        return "Nothing can be said of a model this small."
    if trained:
        return "The paper does not say which model or text; pinned state channels are left out."
    return {
        "agrees": "As one would expect at initialisation, where Δ depends little on the token.",
        "differs": "Unexpected at initialisation, where Δ should depend little on the token.",
    }.get(outcome, "At initialisation; the interval holds the paper's 60 %, or there is none.")


def _table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="learned state channels"), Column(name="range ≤ 0.1"), Column(name="range ≤ 0.5"), Column(name="range ≤ 0.9"),
        Column(name="median range"), Column(name="least in a layer, ≤ 0.5"), Column(name="length", unit="tokens"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        by_layer = [x for part in parts for x in part["by_layer"] if x is not None]
        median = (
            Value.mean(np.mean(p["median_range"]) for p in parts)
            if len(parts) > 1
            else Value.mean(parts[0]["median_range"])
        )
        rows.append([
            name, parts[0]["channels"], *(shares(parts, t) for t in (10, _HALF, 90)), median, min(by_layer, default=math.nan), parts[0]["length"],
        ])  # fmt: skip
    return Table(
        id="ranges", title="Ranges of transitions", columns=columns, rows=rows,
        meaning="Share of learned state channels whose transition moves by no more than so much over a sequence. ± standard error over initialisations; of a trained model over its texts.",
        method="a_t at the scan's own input, extremes over all tokens of a sequence but the first.",
    )  # fmt: skip


def _figure(done: Done) -> Figure:
    series = []
    for name, parts in done.found.items():
        values = [shares(parts, t) for t in range(len(THRESHOLDS))]
        series.append(Series(
            name=name, x=THRESHOLDS.tolist(), y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], group=name,
            style="line" if done.models[name].trained else "fit",
        ))  # fmt: skip
    series.append(Series(name="paper: over 60 % below 0.5", x=[0.5], y=[PAPER], style="points", group="paper"))
    return Figure(
        id="ranges", title="How far transitions move over a sequence", x_label="threshold on the range max a - min a", y_label="share of learned state channels at or below",
        series=series, meaning="A curve that rises early: most channels decay at much the same rate whatever they read. Dashed: at initialisation.",
        method="Cumulative histogram over learned state channels of all layers.",
    )  # fmt: skip


def _layers(done: Done) -> Figure:
    series = []
    for name, parts in done.found.items():
        known = [i for i, x in enumerate(parts[0]["by_layer"]) if x is not None]
        values = [Value.mean(part["by_layer"][i] for part in parts) for i in known]
        depth = [i / max(1, len(parts[0]["by_layer"]) - 1) for i in known]
        series.append(Series(
            name=name, x=depth, y=[v.value for v in values], group=name, style="line" if done.models[name].trained else "fit",
            stderr=[v.stderr or 0.0 for v in values] if len(parts) > 1 else None,
        ))  # fmt: skip
    return Figure(
        id="ranges-by-layer", title="The same, layer by layer, at 0.5", x_label="depth (0: first layer, 1: last)", y_label="share of channels that move by at most 0.5",
        series=series, meaning="Where a line dips, channels answer to what they read.", method="Mean over texts; bars: standard errors over initialisations.",
    )  # fmt: skip


ITEM = Item(
    name="figure6", title="how far transitions move over a sequence", source="Figure 6", scales=tuple(SCALES), variants=(), run=make, takes=("data", "model"), group="figure1"
)  # fmt: skip
