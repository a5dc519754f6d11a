"""Figure 5 of the paper: how different a sequence's tokens still are, layer by layer, in Mamba and in a transformer of the same size.

    (a) E(b_t) against E(h_t) of every Mamba layer      (b) E of the mixers' outputs      (c) E of the blocks' outputs
    fall over depth = ln (E at the last layer / E at the first)

E(z) = 1/(T(T-1)) Σ_{t≠s} ‖z_t - z_s‖; relative: E over the mean norm. Whether the paper's is relative it does not say, so the claims are held against both.
Samples are initialisations, each averaged over the texts that it read; of a trained model, which is there once, the texts."""

from collections.abc import Sequence

import numpy as np

from ssmlens.experiments.base import Claim, Item, Outcome, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures.models import Model, described
from ssmlens.experiments.figures.runs import (
    ONE_TRAINING,
    Couple,
    Done,
    Plan,
    by_sample,
    capped,
    every,
    joined_smoothing,
    run,
    said,
)
from ssmlens.experiments.figures.scales import (
    SCALES,
    Scale,
    beside,
    chosen,
    length,
    mambas,
    pythias,
    sequences,
    trained,
)
from ssmlens.lens import smoothing
from ssmlens.lens.comparison import of_means
from ssmlens.lens.smoothing import Smoothing
from ssmlens.results import Cell, Column, Figure, Record, Series, Table, Value, provenance

NAME = "Figure 5"
_PAIRS = 256  # tokens compared: a state has d_inner · N numbers
_STREAMS = {"mixer": "b", "block": "c"}
_WORDS = {"mixer": "mixer outputs", "block": "block outputs"}
_HOW = ("absolute", "relative")
_METHOD = (
    f"E(z): mean distance between the vectors of two tokens of a text, all pairs of at most {_PAIRS} tokens; divided by the mean norm where called "
    "relative. Mean and standard error over initialisations, each averaged over its texts first; of a trained model over texts."
)


def make(request: Request) -> Record:
    scale = chosen(request)
    models = [*mambas(scale, request), *pythias(scale, request), *trained(scale, request), *beside(scale, request, 3)]
    done = run("figure5", request, models, lambda m: plan(scale, m))
    return record(request, done)


def plan(scale: Scale, model: Model) -> Plan:
    return Plan("smoothing", length(scale, model), sequences(scale, model), pairs=_PAIRS)


def record(request: Request, done: Done) -> Record:
    claims = claims_of(done, request.scale == "smoke")
    whole = [joined_smoothing(name, parts) for name, parts in done.found.items()]
    return Record(
        kind="reproduce", title=f"Figure 5: sharpness by depth ({request.scale} scale)", verdict=claims_verdict(claims, request.scale == "smoke"),
        tables=[claims_table(claims), _states_table(done), _depth_table(done), smoothing.table(whole).model_copy(update={"method": _METHOD})],
        figures=[*_states_figures(whole), *(_figure(stream, done, how) for stream in _STREAMS for how in _HOW)],
        notes=[described(request.data), *done.notes()], provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        config={"item": "figure5", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


# ---- claims ----


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    claims = [
        _inputs_sharper(name, done, how, smoke) for name in done.names("mamba", "loaded", recurrent=True) for how in _HOW
    ]  # fmt: skip
    for couple in done.couples():
        claims += [_falls_faster(couple, done, stream, how, smoke) for stream in _STREAMS for how in _HOW]
    return claims


def _inputs_sharper(name: str, done: Done, how: str, smoke: bool) -> Claim:
    """(a): in every layer."""
    gaps = _gaps(done.found[name], how)
    outcome, sharper, smoother = every(gaps)
    words = "" if how == "absolute" else " relative to their norms"
    when = "trained" if done.models[name].trained else "at initialisation"
    why = (
        f"It agrees where b is sharper in every layer, by its own 95 % interval over {gaps[0].n} {done.over(name)}; it differs where h is sharper in any, by "
        "Holm's correction over all layers. "
        + (
            "E of h has a head start: h carries the factor Δ, which b lacks."
            if how == "absolute"
            else "Relative to the norms, so that h has no head start."
        )
    )
    return Claim(
        f"{NAME}a", f"{name}, {when}: inputs b are sharper than memories h{words} in all Mamba blocks.", "in all blocks",
        f"in {sharper} of {len(gaps)} layers clearly sharper, in {smoother} clearly smoother", "not comparable" if smoke else outcome, why,
        sharper / len(gaps), None, len(gaps),
    )  # fmt: skip


def _falls_faster(couple: Couple, done: Done, stream: str, how: str, smoke: bool) -> Claim:
    """(b), (c): it must fall in Mamba at all, and faster than in the transformer."""
    one, other = couple.one, couple.other
    a, b = (_falls(done.found[n], stream, how) for n in (one, other))
    gap, own = of_means(a, b, paired=couple.paired and len(done.found[one]) == 1), Value.mean(a)
    sides = (side(own, above=False), side(gap, above=False))
    outcome: Outcome = "differs" if "differs" in sides else "agrees" if set(sides) == {"agrees"} else "undecided"
    why = (
        f"It agrees where sharpness falls in {one} itself and falls faster than in {other}, both by their 95 % intervals over {done.over_both(couple)}. "
        + (ONE_TRAINING if couple.trained else "The paper does not say whether its models are trained.")
    )
    relative = "" if how == "absolute" else ", relative to the norms,"
    return Claim(
        f"{NAME}{_STREAMS[stream]}", f"Sharpness of {_WORDS[stream]}{relative} falls faster over depth in {one} than in {other}{couple.note}.",
        "falls rapidly in Mamba, slower in the transformer",
        f"ln(last/first) is {said(own)} in {one}, {b.mean():+.2f} in {other}; difference {said(gap)}",
        "not comparable" if smoke else capped(outcome, couple.trained), why, gap.value, gap.stderr, gap.n,
    )  # fmt: skip


def _by_text(part: Smoothing, stream: str, how: str) -> np.ndarray:
    """(texts, layers)"""
    return part.distance[stream] if how == "absolute" else part.relative_by_sequence(stream)


def _mean(parts: Sequence[Smoothing], stream: str, how: str) -> np.ndarray:
    """Layer by layer."""
    mean: np.ndarray = by_sample(parts, lambda p: _by_text(p, stream, how)).mean(0)
    return mean


def _gaps(parts: Sequence[Smoothing], how: str) -> list[Value]:
    """E of inputs minus that of memories, layer by layer."""
    return [Value.mean(x) for x in by_sample(parts, lambda p: _by_text(p, "b", how) - _by_text(p, "h", how)).T]


def _falls(parts: Sequence[Smoothing], stream: str, how: str) -> np.ndarray:
    def fall(p: Smoothing) -> np.ndarray:
        z = np.maximum(_by_text(p, stream, how), 1e-30)
        return np.log(z[:, -1] / z[:, 0])

    return by_sample(parts, fall)


# ---- tables and figures ----


def _states_table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="layers measured"), Column(name="b sharper, by E"), Column(name="b sharper, relative"),
        Column(name="median E(h) / E(b)"), Column(name="the same, relative"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        if "b" not in parts[0].distance:
            continue
        gaps = [_gaps(parts, how) for how in _HOW]
        ratios = [float(np.median(_mean(parts, "h", how) / np.maximum(_mean(parts, "b", how), 1e-30))) for how in _HOW]
        rows.append([name, len(gaps[0]), *(every(g)[1] for g in gaps), *ratios])
    return Table(
        id="states", title="Inputs against memories (Figure 5a)", columns=columns, rows=rows,
        meaning="In how many layers the inputs b are clearly sharper than the memories h: 95 % interval of the difference, layer by layer, above zero.",
        method=_METHOD,
    )  # fmt: skip


def _depth_table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="layers"), Column(name="parameters"),
        *(Column(name=f"{_WORDS[s]}, {h}", meaning="ln of E at the last layer over E at the first") for s in _STREAMS for h in ("E", "relative")),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [name, done.results[name]["layers"], done.results[name]["parameters"],
         *(Value.mean(_falls(parts, s, h)) for s in _STREAMS for h in _HOW)]
        for name, parts in done.found.items()
    ]  # fmt: skip
    return Table(
        id="fall", title="How sharpness changes over depth (Figure 5b, c)", columns=columns, rows=rows,
        meaning="Below zero: tokens become alike with depth. ± standard error over initialisations; of a trained model over texts.",
        method=f"First and last layer, text by text. {_METHOD}",
    )  # fmt: skip


def _states_figures(whole: list[Smoothing]) -> list[Figure]:
    """(a), relative to the norms: of E itself one picture would not hold all models."""
    return [f.model_copy(update={"method": _METHOD}) for f in smoothing.figures(whole) if f.id == "sharpness-states"]


def _figure(stream: str, done: Done, how: str) -> Figure:
    """By share of the depth, so that models of different depth can be compared; E itself over that of the first layer."""

    def curve(p: Smoothing) -> np.ndarray:
        z = _by_text(p, stream, how)
        return z / np.maximum(z[:, :1], 1e-30) if how == "absolute" else z

    series = []
    for name, parts in done.found.items():
        if stream not in parts[0].distance:
            continue
        values = [Value.mean(layer) for layer in by_sample(parts, curve).T]
        depth = [(layer - 1) / max(1, parts[0].n_layers - 1) for layer in parts[0].layers[stream]]
        stderr = [v.stderr or 0.0 for v in values]
        series.append(Series(name=name, x=depth, y=[v.value for v in values], stderr=stderr, group=name))
    label = "E(z), first layer = 1" if how == "absolute" else "E(z) / mean ‖z‖"
    return Figure(
        id=f"{stream}-{how}", title=f"Sharpness of {_WORDS[stream]} over depth" + ("" if how == "absolute" else ", relative"), x_label="depth (0: first layer, 1: last)",
        y_label=label, y_scale="log" if how == "absolute" else "linear", series=series,
        meaning="A line that falls: tokens become alike with depth.", method=_METHOD,
    )  # fmt: skip


ITEM = Item(
    name="figure5", title="sharpness of inputs, memories, mixers and blocks by depth", source="Figure 5", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"), group="figure1",
)  # fmt: skip
