"""Figures and tables of influence: against distance and position, layer by layer, one model over another."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from ssmlens.lens import decay
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

if TYPE_CHECKING:
    from ssmlens.lens.influence import Influence

Array = np.ndarray
SHARES = (0.01, 0.1, 0.5)
NEAR = 64  # distances over which two models are divided, as in the paper's Figure 7(b)


def figures(results: Sequence["Influence"]) -> list[Figure]:
    return [f for f in (figure(results), position_figure(results), layer_figure(results)) if f]


def tables(results: Sequence["Influence"]) -> list[Table]:
    return [t for t in (table(results), layer_table(results)) if t]


def figure(results: Sequence["Influence"]) -> Figure:
    """Score against distance, one line per model with its standard error, and each fitted line (the paper's Figure 1)."""
    series: list[Series] = []
    for r in results:
        keep = _drawn(r.score)
        errors = None if r.stderr is None else r.stderr[keep].tolist()
        series.append(
            Series(
                name=r.name,
                x=r.distances[keep].astype(float).tolist(),
                y=r.score[keep].tolist(),
                stderr=errors,
                group=r.name,
            )
        )
        if r.fit is not None:
            ends = np.array([r.fit.first, r.fit.last], dtype=float)
            label = f"{r.name}: half-life {_tokens(r.fit.half_life)}"
            series.append(Series(name=label, x=ends.tolist(), y=r.fit.line(ends).tolist(), style="fit", group=r.name))
    floor = max(r.floor.value for r in results)
    return Figure(
        id="influence", title="Influence of a token by its distance", x_label="distance t - s (tokens)",
        y_label="influence ‖∂y_t/∂x_s‖", y_scale="log", y_floor=floor or None, series=series,
        meaning="How strongly a token moves the output, by how many tokens ago it was. A straight line downwards is exponential "
        "forgetting; a flat one would be memory. Compare slopes, not heights: heights depend on the scale of the embeddings.",
        method=_method(results[0]),
    )  # fmt: skip


def position_figure(results: Sequence["Influence"]) -> Figure | None:
    """The same by position in the text (the paper's Figure 7a): None unless every target was the last position."""
    if any(r.targets != "the last position" for r in results):
        return None
    series = []
    for r in results:
        keep = _drawn(r.score)[::-1]
        relative = r.score / r.score.max()
        errors = None if r.stderr is None else (r.stderr / r.score.max())[keep].tolist()
        x = (r.length - 1 - r.distances[keep]).astype(float).tolist()
        series.append(Series(name=r.name, x=x, y=relative[keep].tolist(), stderr=errors, group=r.name))
    return Figure(
        id="influence-by-position", title="Which tokens move the last output", x_label="position s (tokens)",
        y_label="influence on the last output, largest = 1", y_scale="log", series=series,
        meaning="Each position's influence on the last output, relative to the largest. High at the right end only: recency. "
        "High at both ends: the pattern known from attention.",
        method=_method(results[0]),
    )  # fmt: skip


def layer_figure(results: Sequence["Influence"]) -> Figure | None:
    """How far back the output depends on what enters every layer; None where no model shows its layers."""
    series: list[Series] = []
    for r in results:
        if r.n_layers < 2:
            continue
        found = [(i, decay.half_life_value(fit)) for i, fit in enumerate(r.layer_fits, 1)]
        lives = [(i, v) for i, v in found if v is not None and 0 < v.value < math.inf]
        lines: tuple[tuple[str, list[tuple[int, Value]], Literal["line", "fit"]], ...] = (
            ("half-life", lives, "line"),
            ("effective context", list(enumerate(r.layer_contexts, 1)), "fit"),
        )
        for what, points, style in lines:
            if points:
                errors = [math.nan if v.stderr is None else v.stderr for _, v in points]
                series.append(
                    Series(
                        name=f"{r.name}: {what}", x=[float(i) for i, _ in points], y=[v.value for _, v in points], group=r.name, style=style,
                        stderr=None if all(map(math.isnan, errors)) else errors,
                    )
                )  # fmt: skip
    if not series:
        return None
    return Figure(
        id="influence-by-layer", title="From every layer to the output: how far back it reaches", x_label="layer whose input is changed", y_label="distance (tokens)",
        y_scale="log", series=series, method=f"{_method(results[0])} A half-life's error is that of its rate to first order.",
        meaning="The output's dependence on what enters each layer: solid, over how many tokens it halves; thin, how many recent tokens hold 90 % of it. The first layer's "
        "input is the embedding. Where the last layers reach back as far as the first, they do the remembering; where only the first do, the model hands "
        "things up early.",
    )  # fmt: skip


def ratio_figure(pairs: Sequence[tuple["Influence", "Influence"]]) -> Figure | None:
    """Score of the second over the first of each pair at short distances, with an exponential fit (the paper's Figure 7b). Each score is
    relative to the root of its own total square, so that the scale of a model's embeddings falls out."""
    series: list[Series] = []
    for a, b in pairs:
        size = min(a.squares.shape[1], b.squares.shape[1], NEAR + 1)
        whole = min(a.squares.shape[1], b.squares.shape[1])

        def logs(
            weights_a: Array,
            weights_b: Array,
            size: int = size,
            whole: int = whole,
            a: "Influence" = a,
            b: "Influence" = b,
        ) -> Array:
            curves = [
                decay.resampled_curves(r.squares, r.counts, w)[:, :whole] for r, w in ((b, weights_b), (a, weights_a))
            ]
            with np.errstate(divide="ignore", invalid="ignore"):
                relative = [np.log(c[:, :size]) - 0.5 * np.log(np.square(c).sum(1, keepdims=True)) for c in curves]
                return relative[0] - relative[1]

        middle = logs(np.ones((1, a.n_sequences)), np.ones((1, b.n_sequences)))[0]
        kept = np.flatnonzero(np.isfinite(middle))
        kept = kept[kept > 0]
        if len(kept) < 3:
            continue
        n, errors = min(a.n_sequences, b.n_sequences), None
        if n >= 2:
            draws = logs(
                decay.resampling_weights(a.n_sequences, a.seed), decay.resampling_weights(b.n_sequences, b.seed)
            )[:, kept]
            spread = decay.spread(np.where(np.isfinite(draws), draws, middle[kept]), n)
            errors = (np.exp(middle[kept]) * spread).tolist()
        name = f"{b.name} / {a.name}"
        series.append(
            Series(
                name=name, x=kept.astype(float).tolist(), y=np.exp(middle[kept]).tolist(), stderr=errors, group=b.name
            )
        )
        slope, top = np.polyfit(kept, middle[kept], 1)
        ends = np.array([kept[0], kept[-1]], dtype=float)
        how = (
            f"falls by {100 * -math.expm1(slope):.2g} % per token"
            if slope < 0
            else f"rises by {100 * math.expm1(slope):.2g} % per token"
        )
        series.append(
            Series(
                name=f"{name}: {how}", x=ends.tolist(), y=np.exp(top + slope * ends).tolist(), style="fit", group=b.name
            )
        )
    if not series:
        return None
    return Figure(
        id="influence-ratio", title="One model's influence over another's, at short distances", x_label="distance t - s (tokens)",
        y_label="ratio of relative influence", y_scale="log", series=series, method=_method(pairs[0][0]) + " Thin line: least squares of the log ratio on distance.",
        meaning="How much more weight the one model gives to recent tokens than the other, each relative to its own total. A line that falls: it favours the nearest tokens more.",
    )  # fmt: skip


def layer_table(results: Sequence["Influence"]) -> Table | None:
    columns = [
        Column(name="model"), Column(name="layer", meaning="whose input is changed; the first layer's is the embedding"),
        Column(name="half-life", unit="tokens", meaning="distance over which the fitted score halves"), Column(name="95 % interval", unit="tokens"),
        Column(name="decay κ̂", unit="1/token"), Column(name="effective context", unit="tokens", meaning="most recent tokens that hold 90 % of the squared influence"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        if r.n_layers < 2:
            continue
        for layer, (fit, context) in enumerate(zip(r.layer_fits, r.layer_contexts, strict=True), 1):
            cells: list[Cell] = [None] * 3
            if fit is not None:
                low, high = fit.half_life_interval
                kappa = Value(value=fit.kappa, stderr=fit.stderr, n=fit.n, unit="1/token")
                cells = [decay.half_life_value(fit), f"{_number(low)} to {_number(high)}", kappa]
            rows.append([r.name, layer, *cells, context])
    if not rows:
        return None
    return Table(
        id="influence-by-layer", title="From every layer to the output", columns=columns, rows=rows, method=_method(results[0]),
        meaning="The influence of what enters each block on the model's output: how far back that output depends on it.",
    )  # fmt: skip


def table(results: Sequence["Influence"]) -> Table:
    columns = [
        Column(name="model"),
        Column(
            name="half-life",
            unit="tokens",
            meaning="distance over which the fitted score halves; infinite: it does not fall",
        ),
        Column(name="95 % interval", unit="tokens"),
        Column(name="decay κ̂", unit="1/token", meaning="slope of log score against distance, sign turned"),
        Column(name="R²", meaning="how much of log score the straight line explains"),
        Column(
            name="R² power law",
            meaning="the same for a power of the distance: clearly larger means no single half-life",
        ),
        Column(
            name="half-life, farther half", unit="tokens", meaning="fitted over the farther half of the distances alone"
        ),
        Column(
            name="effective context",
            unit="tokens",
            meaning="most recent tokens that hold 90 % of the squared influence",
        ),
        *(
            Column(name=f"last {100 * f:g} %", meaning="share of squared influence in this part of the context")
            for f in SHARES
        ),
        Column(name="trace", meaning="score over the farther half of the context relative to that at distance 1"),
        Column(name="noise floor", meaning="scores below are numerical noise"),
    ]
    rows: list[list[Cell]] = []
    for r in results:
        fit: list[Cell] = [None] * 5
        if r.fit is not None:
            low, high = r.fit.half_life_interval
            fit = [
                r.half_life,
                f"{_number(low)} to {_number(high)}",
                r.kappa,
                round(r.fit.r2, 4),
                round(r.fit.r2_power, 4),
            ]
        shares: list[Cell] = [r.share_within(f) for f in SHARES]
        far = decay.half_life_value(r.far_fit)
        rows.append([r.name, *fit, far, r.effective_context, *shares, r.tail, r.floor.value])
    return Table(
        id="influence", title="How fast influence decays", columns=columns, rows=rows,
        meaning="The half-life is the distance over which a token's influence on the output halves.",
        method=_method(results[0]) + (f" Interval: {results[0].fit.how}." if results[0].fit else ""),
    )  # fmt: skip


def _method(r: "Influence") -> str:
    how = (
        "random ±1 probes, unbiased in the square"
        if "probes" in r.method
        else "one vector-Jacobian product per output dimension"
    )
    return (
        f"Root mean square of ‖∂y_t/∂x_s‖_F over {r.n_sequences} sequences of {r.length} tokens; x: input embedding, y: {r.output} at "
        f"{r.targets}; {r.method} ({how}); standard errors by bootstrap over sequences. Line: least squares of log score on "
        f"distance ≥ 1 above the noise floor ({r.floor.how})."
    )


def _drawn(score: Float[Array, " D"]) -> Int[Array, " m"]:
    """Distances that are drawn: zeros have no logarithm, and far ones lie closer than a line is wide."""
    shown = decay.spaced(len(score))
    return shown[score[shown] > 0]


def _number(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}"


def _tokens(x: float) -> str:
    return "infinite" if math.isinf(x) else f"{x:.3g} tokens"
