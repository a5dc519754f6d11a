"""Figure 7 of the paper: which tokens move the last output, Mamba beside Pythia; and the ratio of their influence at short distances.

both ends      mean log score of the first (last) twentieth of the positions - that of the middle third       above zero: that end counts more
recency        share of squared influence in the last tenth of the positions
ratio(d)       score(d) of Mamba / score(d) of Pythia,  d = 1..64;     log ratio = intercept - slope · d

All are of the score pooled over the texts; errors are over initialisations, of trained models by the jackknife over the texts (of both at once)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ssmlens.experiments.base import (
    Claim,
    Item,
    Outcome,
    Request,
    claims_config,
    claims_table,
    claims_verdict,
    side,
)
from ssmlens.experiments.figures import figure1
from ssmlens.experiments.figures.models import Model, described
from ssmlens.experiments.figures.runs import (
    ONE_TRAINING,
    Couple,
    Done,
    Plan,
    capped,
    estimates,
    every,
    joined,
    run,
    said,
)
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
            how = figure1.method(done.found[names[0]][0])
            figures.append(made.model_copy(update={"id": f"position-{group}", "title": title, "method": how}))
    return Record(
        kind="reproduce", title=f"Figure 7: influence by position ({request.scale} scale)", verdict=claims_verdict(claims, request.scale == "smoke"),
        tables=[claims_table(claims), _table(done)], figures=[*figures, *([_ratio_figure(done)] if done.couples() else [])], notes=[described(request.data), *done.notes()],
        provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        config={"item": "figure7", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


# ---- numbers ----


def ends(p: Influence) -> tuple[float, float]:
    """Mean log score of the first twentieth of the positions, and of the last, minus that of the middle third."""
    by_position = np.log(np.maximum(p.score[::-1], 1e-300))
    size = len(by_position)
    edge, middle = max(1, size // 20), by_position[size // 3 : 2 * size // 3].mean()
    return float(by_position[:edge].mean() - middle), float(by_position[-edge:].mean() - middle)


def last_tenth(p: Influence) -> float:
    """Its share of the squared influence."""
    squares = np.square(p.score)
    return float(squares[: max(1, len(squares) // 10)].sum() / squares.sum())


def log_ratio(a: Influence, b: Influence) -> np.ndarray:
    """ln of a's score over b's at distances 1 .. NEAR."""
    near: list[np.ndarray] = [np.log(np.maximum(p.score[1 : NEAR + 1], 1e-300)) for p in (a, b)]
    return near[0] - near[1]


def fall(a: Influence, b: Influence) -> tuple[float, float, float, float]:
    """By how much the log ratio falls a token, R² of that line, R² of a power law, and the former minus the latter."""
    y = log_ratio(a, b)
    x = np.arange(1.0, len(y) + 1)
    line, power = _r2(x, y), _r2(np.log(x), y)
    return -float(np.polyfit(x, y, 1)[0]), line, power, line - power


def _r2(x: np.ndarray, y: np.ndarray) -> float:
    rest, total = y - np.polyval(np.polyfit(x, y, 1), x), np.square(y - y.mean()).sum()
    return float(1 - np.square(rest).sum() / total) if total > 0 else 1.0


def numbers(done: Done, couple: Couple, statistic: Callable[..., Sequence[float]]) -> list[Value]:
    """Of both models of a couple at once."""
    return estimates(statistic, done.found[couple.one], done.found[couple.other], paired=couple.paired)


# ---- claims, tables, figures ----


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    return [claim for couple in done.couples() for claim in _claims(done, couple, smoke)]


def _claims(done: Done, couple: Couple, smoke: bool) -> list[Claim]:
    one, other, when = couple.one, couple.other, couple.note
    known = ONE_TRAINING if couple.trained else "The models of the paper are trained."
    both = f"Over {done.over_both(couple)}. {known}"

    def claim(part: str, says: str, paper: str, ours: str, value: Value, outcome: Outcome, why: str) -> Claim:
        found: Outcome = "not comparable" if smoke else outcome
        return Claim(f"{NAME}{part}", says, paper, ours, found, why, value.value, value.stderr, value.n)

    first, last = estimates(ends, done.found[other])
    shares = [last_tenth_of(done.found[n]).value for n in (one, other)]
    (gap,) = numbers(done, couple, lambda a, b: (last_tenth(a) - last_tenth(b),))
    falls, r2, power, more = numbers(done, couple, fall)
    exponential: Outcome = (
        side(more) if side(falls) == "agrees" else "differs" if side(falls) == "differs" else "undecided"
    )
    return [
        claim(
            "a", f"In {other} the beginning and the end of the text move the last output more than its middle{when}.", "high at both ends, low in the middle",
            f"log influence minus that of the middle third: first twentieth {said(first)}, last {said(last)}", min(first, last, key=lambda v: v.value),
            every((first, last))[0], "It agrees where both intervals lie above zero, and differs where one lies below (Holm over the two). Over "
            f"{done.over(other)}." + ("" if couple.trained else " The models of the paper are trained."),
        ),
        claim(
            "a", f"{one}'s influence is concentrated in the nearest positions, more than {other}'s{when}.", "concentrated in the nearest positions",
            f"the last tenth holds {100 * shares[0]:.1f} % in {one}, {100 * shares[1]:.1f} % in {other}; difference {said(gap)}",
            gap, capped(side(gap), couple.trained), both,
        ),
        claim(
            "b", f"The ratio of influence, {one} over {other}, falls at short distances{when}.", "falls, at all sizes",
            f"by {said(falls, '1/token')} over distances 1 to {NEAR}", falls, capped(side(falls), couple.trained), both,
        ),
        claim(
            "b", f"That ratio, {one} over {other}, falls as an exponential{when}.", "fitted by an exponential",
            f"R² {r2.value:.2f}, of a power law {power.value:.2f}; difference {said(more)}", more, capped(exponential, couple.trained),
            f"Against a power law, which is as simple, and only where the ratio falls. {both}",
        ),
    ]  # fmt: skip


def last_tenth_of(parts: Sequence[Influence]) -> Value:
    (found,) = estimates(lambda p: (last_tenth(p),), parts)
    return found


def _table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="parameters"), Column(name="length", unit="tokens"), Column(name="beginning against middle", meaning="in logarithms"),
        Column(name="end against middle", meaning="in logarithms"), Column(name="last tenth holds"), Column(name="effective context", unit="tokens"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        whole = joined(name, parts)
        rows.append([
            name, done.results[name]["parameters"], whole.length, *estimates(ends, parts), last_tenth_of(parts), whole.effective_context,
        ])  # fmt: skip
    return Table(
        id="positions", title="Where the influence on the last output lies", columns=columns, rows=rows,
        meaning="± standard error over initialisations; of a trained model over its texts. Beginning (end) against middle: above zero, the first (last) tokens count more than those in the middle.",
        method=figure1.method(next(iter(done.found.values()))[0]),
    )  # fmt: skip


def _ratio_figure(done: Done) -> Figure:
    series = []
    for couple in done.couples():
        # the first distance is what the others are relative to, so that the scale of the embeddings falls out
        logs = numbers(done, couple, lambda a, b: (log_ratio(a, b) - log_ratio(a, b)[0]).tolist())
        x = [float(d) for d in range(1, len(logs) + 1)]
        name = f"{couple.one} / {couple.other}{couple.note}"
        y = [math.exp(v.value) for v in logs]
        low, high = ([math.exp(v.value + sign * (v.stderr or 0.0)) for v in logs] for sign in (-1, 1))
        series.append(Series(name=name, x=x, y=y, low=low, high=high, group=name))
        fitted = np.polyfit(x, [v.value for v in logs], 1)
        line = np.exp(np.polyval(fitted, [x[0], x[-1]]))
        series.append(Series(name=f"{name}: exponential", x=[x[0], x[-1]], y=line.tolist(), style="fit", group=name))
    return Figure(
        id="ratio", title="Influence of Mamba over that of a transformer", x_label="distance t - s (tokens)", y_label="ratio, distance 1 = 1", y_scale="log", series=series,
        meaning="A straight line downwards: Mamba forgets exponentially faster over short distances (the paper's Figure 7b). Dashed: the exponential.",
        method="Ratio of the scores pooled over texts, geometric mean over initialisations; bands: ± one standard error of its logarithm, over initialisations, or over "
        "the texts of trained models; "
        "dashed: least squares of the log ratio on distance.",
    )  # fmt: skip


ITEM = Item(
    name="figure7", title="influence by position, and over that of a transformer", source="Figure 7", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"), group="figure1",
)  # fmt: skip
