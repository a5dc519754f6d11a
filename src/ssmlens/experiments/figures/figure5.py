"""Figure 5 of the paper: how different a sequence's tokens still are, layer by layer, in Mamba and in a transformer of the same size.

    (a) E(b_t) against E(h_t) of every Mamba layer      (b) E of the mixers' outputs      (c) E of the blocks' outputs
    fall over depth = ln (E at the last layer / E at the first)

E(z) = 1/(T(T-1)) Σ_{t≠s} ‖z_t - z_s‖; relative: E over the mean norm. Whether the paper's is relative it does not say, so the claims are held against both."""

from collections.abc import Sequence

import numpy as np

from ssmlens.experiments.base import Claim, Item, Outcome, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures.models import BESIDE, Model, described
from ssmlens.experiments.figures.runs import Done, Plan, joined_smoothing, run, said
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
        tables=[claims_table(claims), _states_table(done), _depth_table(done), smoothing.table(whole)],
        figures=[*_states_figures(whole), *(_figure(stream, whole, how) for stream in _STREAMS for how in ("absolute", "relative"))],
        notes=[described(request.data), *done.notes()], provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        config={"item": "figure5", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


# ---- claims ----


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    claims = []
    for name in done.names("mamba", "loaded", recurrent=True):
        claims += [_inputs_sharper(name, done, how, smoke) for how in ("absolute", "relative")]
    for one, other, when in _couples(done):
        claims += [
            _falls_faster(one, other, when, done, stream, how, smoke)
            for stream in _STREAMS
            for how in ("absolute", "relative")
        ]
    return claims


def _inputs_sharper(name: str, done: Done, how: str, smoke: bool) -> Claim:
    """(a): in every layer."""
    gaps = [Value.mean(x) for x in (_of("b", how, done.found[name]) - _of("h", how, done.found[name])).T]
    sides: list[Outcome] = [side(g) for g in gaps]
    sharper, smoother = sides.count("agrees"), sides.count("differs")
    outcome: Outcome = "differs" if smoother else "agrees" if sharper == len(gaps) else "undecided"
    words = "" if how == "absolute" else " relative to their norms"
    when = "trained" if done.models[name].trained else "at initialisation"
    share = sharper / len(gaps)
    why = (
        f"A layer counts where the 95 % interval over {gaps[0].n} sequences lies on one side."
        if how == "absolute"
        else "E of h has a head start: h carries the factor Δ, which b lacks; relative to the norms it has none."
    )
    return Claim(
        f"{NAME}a", f"{name}, {when}: inputs b are sharper than memories h{words} in all Mamba blocks.", "in all blocks",
        f"in {sharper} of {len(gaps)} layers clearly sharper, in {smoother} clearly smoother", "not comparable" if smoke else outcome, why, share, None, len(gaps)
    )  # fmt: skip


def _falls_faster(one: str, other: str, when: str, done: Done, stream: str, how: str, smoke: bool) -> Claim:
    a, b = (_falls(done.found[n], stream, how) for n in (one, other))
    gap = of_means(a, b, paired=False)
    relative = "" if how == "absolute" else ", relative to the norms"
    initial = when == "at initialisation"
    why = (
        "The paper does not say whether its models are trained; over initialisations"
        if initial
        else "Small models trained on a few megabytes of text; over sequences, of one training each"
    )
    return Claim(
        f"{NAME}{_STREAMS[stream]}", f"Sharpness of {_WORDS[stream]}{relative} falls faster over depth in {one} than in {other} ({when}).",
        "falls rapidly in Mamba, slower in the transformer",
        f"ln(last/first) is {a.mean():+.2f} in {one}, {b.mean():+.2f} in {other}; difference {said(gap)}", "not comparable" if smoke else side(gap, above=False),
        f"{why}.", gap.value, gap.stderr, gap.n,
    )  # fmt: skip


def _couples(done: Done) -> list[tuple[str, str, str]]:
    """(Mamba, transformer, when), of the same size."""
    couples = []
    for name in done.names("mamba"):
        like = f"Pythia-{BESIDE[done.models[name].of]}"
        if like in done.found:
            couples.append((name, like, "at initialisation"))
    recurrent = done.names("loaded", recurrent=True)
    others = done.names("trained transformer") + done.names("loaded", recurrent=False)
    return couples + [(a, b, "trained") for a, b in zip(recurrent[: len(others)], others, strict=False)]


def _of(stream: str, how: str, parts: Sequence[Smoothing]) -> np.ndarray:
    """(samples, layers): initialisations where there are several, each the mean of its sequences, else sequences."""
    each = [p.distance[stream] if how == "absolute" else p.relative_by_sequence(stream) for p in parts]
    if stream in ("b", "h"):
        return np.concatenate(each)
    return np.stack([e.mean(0) for e in each]) if len(parts) > 1 else each[0]


def _falls(parts: Sequence[Smoothing], stream: str, how: str) -> np.ndarray:
    z = _of(stream, how, parts)
    return np.log(np.maximum(z[:, -1], 1e-30) / np.maximum(z[:, 0], 1e-30))


# ---- tables and figures ----


def _states_table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="layers measured"), Column(name="b sharper, by E"), Column(name="b sharper, relative"),
        Column(name="median E(h) / E(b)"), Column(name="the same, relative"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        whole = joined_smoothing(name, parts)
        count = whole.memories_smoother()
        if count is None:
            continue
        ratios = [
            float(np.median(_of("h", how, parts).mean(0) / np.maximum(_of("b", how, parts).mean(0), 1e-30)))
            for how in ("absolute", "relative")
        ]
        rows.append([name, count[2], count[0], count[1], *ratios])
    return Table(
        id="states", title="Inputs against memories (Figure 5a)", columns=columns, rows=rows,
        meaning="In how many layers the memories h are clearly smoother than the inputs b: 95 % interval of the difference over sequences below zero.",
        method=f"E over all pairs of at most {_PAIRS} tokens of a sequence.",
    )  # fmt: skip


def _depth_table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="layers"), Column(name="parameters"),
        *(Column(name=f"{_WORDS[s]}, {h}", meaning="ln of E at the last layer over E at the first") for s in _STREAMS for h in ("E", "relative")),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [name, done.results[name]["layers"], done.results[name]["parameters"],
         *(Value.mean(_falls(parts, s, h)) for s in _STREAMS for h in ("absolute", "relative"))]
        for name, parts in done.found.items()
    ]  # fmt: skip
    return Table(
        id="fall", title="How sharpness changes over depth (Figure 5b, c)", columns=columns, rows=rows,
        meaning="Below zero: tokens become alike with depth. ± standard error over initialisations; of a trained model over sequences.",
        method="E(z) of mixer and block outputs, first and last layer.",
    )  # fmt: skip


def _states_figures(whole: list[Smoothing]) -> list[Figure]:
    """(a) one picture a model would be many: relative for all, and E itself of the first."""
    return [f for f in smoothing.figures(whole) if f.id == "sharpness-states"]


def _figure(stream: str, whole: list[Smoothing], how: str) -> Figure:
    """By share of the depth, so that models of different depth can be compared; E itself over that of the first layer."""
    series = []
    for r in whole:
        if stream not in r.distance:
            continue
        z = r.distance[stream] if how == "absolute" else r.relative_by_sequence(stream)
        values = [Value.mean(layer) for layer in (z / z[:, :1] if how == "absolute" else z).T]
        depth = [(layer - 1) / max(1, r.n_layers - 1) for layer in r.layers[stream]]
        series.append(
            Series(
                name=r.name,
                x=depth,
                y=[v.value for v in values],
                stderr=[v.stderr or 0.0 for v in values],
                group=r.name,
            )
        )
    label = "E(z), first layer = 1" if how == "absolute" else "E(z) / mean ‖z‖"
    return Figure(
        id=f"{stream}-{how}", title=f"Sharpness of {_WORDS[stream]} over depth" + ("" if how == "absolute" else ", relative"), x_label="depth (0: first layer, 1: last)",
        y_label=label, y_scale="log" if how == "absolute" else "linear", series=series,
        meaning="A line that falls: tokens become alike with depth.", method="Mean over sequences (and initialisations); bars are standard errors.",
    )  # fmt: skip


ITEM = Item(
    name="figure5", title="sharpness of inputs, memories, mixers and blocks by depth", source="Figure 5", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"), group="figure1",
)  # fmt: skip
