"""Figure 1 of the paper: log influence against distance, Mamba of several sizes, at initialisation and trained.

    straightness = R² of a straight line through log score over distance - R² of one over log distance (a power law)

Above zero the decay is exponential, as the paper says, rather than a power of the distance. Both lines go through the score pooled over the
texts; errors are over initialisations, of a trained model by the jackknife over its texts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ssmlens.experiments.base import Claim, Item, Outcome, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures.models import Model, described
from ssmlens.experiments.figures.runs import Done, Plan, capped, estimates, joined, run, said
from ssmlens.experiments.figures.scales import (
    SCALES,
    Scale,
    chosen,
    length,
    mambas,
    pythias,
    sequences,
    trained,
)
from ssmlens.lens import decay, influence
from ssmlens.lens.influence import Influence
from ssmlens.models.pretrained import packaged
from ssmlens.results import Cell, Column, Figure, Record, Table, Value, provenance

NAME = "Figure 1"
STRAIGHT = 0.9  # of the variance of log score that a line must explain to be called one
_PROBES = 4


def make(request: Request) -> Record:
    scale = chosen(request)
    given = trained(scale, request)
    fresh = [Model("fresh", m.of, s) for m in given[:1] for s in range(3) if m.of in packaged()]
    models = [*mambas(scale, request), *pythias(scale, request), *given, *fresh]
    done = run("figure1", request, models, lambda m: plan(scale, m))
    return record(request, scale, done)


def plan(scale: Scale, model: Model) -> Plan:
    return Plan(
        "influence",
        length(scale, model),
        sequences(scale, model),
        probes=_PROBES if model.kind in ("mamba", "pythia") else 8,
    )


def record(request: Request, scale: Scale, done: Done) -> Record:
    claims = claims_of(done, request.scale == "smoke")
    groups = {"initial": done.names("mamba", "pythia"), "trained": done.names("loaded", "fresh")}
    figures = [
        _figure(id, [joined(n, done.found[n]) for n in names]) for id, names in groups.items() if names
    ]  # fmt: skip
    return Record(
        kind="reproduce", title=f"Figure 1: influence against distance ({request.scale} scale)", verdict=claims_verdict(claims, request.scale == "smoke"),
        tables=[claims_table(claims), _table(done)], figures=figures, provenance=provenance(), seeds=list(range(max(len(p) for p in done.found.values()))),
        notes=[described(request.data), *done.notes()],
        config={"item": "figure1", "scale": request.scale, "models": list(done.models), "claims": claims_config(claims)},
    )  # fmt: skip


class Line(NamedTuple):
    """kappa: 1/token. r2: share of the variance of log score that the line explains. more: the same beyond a power law's."""

    kappa: Value
    r2: Value
    more: Value


def line(parts: Sequence[Influence]) -> Line | None:
    """None where no decay could be fitted."""

    def numbers(p: Influence) -> tuple[float, float, float] | None:
        return None if p.fit is None else (p.fit.kappa, p.fit.r2, p.fit.r2 - p.fit.r2_power)

    found = estimates(numbers, parts)
    return Line(found[0].model_copy(update={"unit": "1/token"}), *found[1:]) if found else None


def farther(parts: Sequence[Influence]) -> tuple[Value, Value] | None:
    """κ and R² of the line through the farther half of the distances alone."""

    def numbers(p: Influence) -> tuple[float, float] | None:
        return None if p.far_fit is None else (p.far_fit.kappa, p.far_fit.r2)

    found = estimates(numbers, parts)
    return (found[0], found[1]) if found else None


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    claims = []
    paper = "a straight line downwards"
    for name in done.names("mamba", "loaded", recurrent=True):
        parts, when = done.found[name], "trained" if done.models[name].trained else "at initialisation"
        says = f"{name}, {when}: log influence falls along a straight line over distance."
        found = line(parts)
        if found is None:
            why = "Too few distances lie above the noise."
            claims.append(
                Claim(NAME, says, paper, "no decay could be fitted", "not comparable" if smoke else "undecided", why)
            )
            continue
        far, more = farther(parts), found.more
        ours = (
            f"κ = {said(found.kappa, '1/token')}; the line explains {100 * found.r2.value:.0f} % of log influence, "
            f"{100 * more.value:+.0f} points against a power law"
            + ("" if far is None else f"; over the farther half alone {100 * far[1].value:.0f} %")
        )
        interval = more.interval()
        why = (
            "Nothing can be said of a model this small."
            if smoke
            else f"It agrees where the line explains at least {STRAIGHT:.0%} (as measured, whatever its interval), more than a power law, and falls; "
            f"interval of the difference {'not known' if interval is None else f'{interval[0]:+.3f} to {interval[1]:+.3f}'} over {done.over(name)}."
        )
        outcome: Outcome = "not comparable" if smoke else _outcome(found)
        claims.append(Claim(NAME, says, paper, ours, outcome, why, more.value, more.stderr, more.n))
    return claims + _initialisation(done, smoke)


def _outcome(found: Line) -> Outcome:
    straight: Outcome = "agrees" if found.r2.value >= STRAIGHT else side(found.r2, of=STRAIGHT)
    against = (side(found.more), side(found.kappa), straight)
    if "differs" in against:
        return "differs"
    return "agrees" if set(against) == {"agrees"} else "undecided"


def _initialisation(done: Done, smoke: bool) -> list[Claim]:
    """Does the initialisation make it worse? Of a model that is there both ways."""
    claims = []
    for name in done.names("loaded"):
        before = [n for n in done.names("fresh") if done.models[n].of == done.models[name].of]
        new, old = (line(done.found[n]) if n else None for n in (before[0] if before else None, name))
        if new is None or old is None:
            continue
        errors = (new.kappa.stderr, old.kappa.stderr)
        error = None if None in errors else math.hypot(*(e for e in errors if e is not None))
        gap = Value(
            value=new.kappa.value - old.kappa.value, stderr=error, n=min(new.kappa.n or 1, old.kappa.n or 1), unit="1/token"
        )  # fmt: skip
        claims.append(
            Claim(
                NAME, "The initialisation makes the bias towards recent tokens stronger than training leaves it.", "decay steeper at initialisation",
                f"{name}: κ at initialisation minus trained {said(gap, '1/token')}", "not comparable" if smoke else capped(side(gap), True),
                "Smoke scale." if smoke else "Initialisations against one training: another training might come out the other way, so no more than undecided is said.",
                gap.value, gap.stderr, gap.n,
            )
        )  # fmt: skip
    return claims


def method(one: Influence) -> str:
    return (
        "Root mean square of ‖∂y_T/∂x_s‖ over texts and random ±1 probes, y_T the last hidden state, x_s the embedding of token s; errors over "
        f"initialisations, of a trained model over its texts. Noise floor: {one.floor.how}."
    )


def _figure(group: str, shown: list[Influence]) -> Figure:
    made = influence.figure(shown)
    title = "Influence by distance, " + (
        "published sizes at initialisation" if group == "initial" else "trained, and the same at initialisation"
    )
    lines = " Line: least squares of log score on distance ≥ 1, above the noise floor."
    return made.model_copy(
        update={"id": f"influence-{group}", "title": title, "method": method(shown[0]) + lines}
    )  # fmt: skip


def _table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="parameters"), Column(name="length", unit="tokens"), Column(name="initialisations"),
        Column(name="decay κ̂", unit="1/token"), Column(name="half-life", unit="tokens"), Column(name="R², line"), Column(name="R², line minus power law"),
        Column(name="half-life, farther half", unit="tokens"), Column(name="effective context", unit="tokens", meaning="most recent tokens that hold 90 % of the squared influence"),
        Column(name="last tenth", meaning="share of squared influence in the last 10 % of the context"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        whole, near, far = joined(name, parts), line(parts), farther(parts)
        kappa, r2, more = near or (None, None, None)
        rows.append([
            name, done.results[name]["parameters"], whole.length, len(parts) if done.models[name].kind != "loaded" else None,
            kappa, _life(kappa), r2, more, _life(far[0] if far else None), whole.effective_context, whole.share_within(0.1),
        ])  # fmt: skip
    one = next(iter(done.found.values()))[0]
    return Table(
        id="influence", title="How fast influence decays", columns=columns, rows=rows,
        meaning="± standard error over initialisations; of a trained model over its texts. Half-life: of κ̂; infinite where it does not fall.",
        method=f"{method(one)} Lines fitted to the pooled score at every distance ≥ 1 above the floor; a trained model's errors by the jackknife.",
    )  # fmt: skip


def _life(kappa: Value | None) -> float | None:
    return None if kappa is None else decay.half_life(kappa.value)


ITEM = Item(
    name="figure1", title="influence against distance, at initialisation and trained", source="Figure 1", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"),
)  # fmt: skip
