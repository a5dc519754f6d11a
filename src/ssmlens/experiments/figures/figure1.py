"""Figure 1 of the paper: log influence against distance, Mamba of several sizes, at initialisation and trained.

    straightness = R² of a straight line through log score over distance - R² of one over log distance (a power law)

Above zero the decay is exponential, as the paper says, rather than a power of the distance."""

import math

from ssmlens.experiments.base import Claim, Item, Outcome, Request, claims_config, claims_table, claims_verdict, side
from ssmlens.experiments.figures.models import Model, described
from ssmlens.experiments.figures.runs import Done, Plan, fits, joined, run, said, samples
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
from ssmlens.lens import influence
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


def straightness(parts: list[Influence]) -> tuple[Value, Value] | None:
    """R² of the line, and how much that is above a power law's; over initialisations, or over the sequences of one model."""
    found = [f for f in fits(parts) if math.isfinite(f.r2_power)]
    if not found:
        return None
    return Value.mean(f.r2 for f in found), Value.mean(f.r2 - f.r2_power for f in found)


def claims_of(done: Done, smoke: bool) -> list[Claim]:
    claims = []
    for name in done.names("mamba", "loaded", recurrent=True):
        parts, when = done.found[name], "trained" if done.models[name].trained else "at initialisation"
        says = f"{name}, {when}: log influence falls along a straight line over distance."
        straight = straightness(parts)
        if straight is None:
            claims.append(
                Claim(
                    NAME,
                    says,
                    "a straight line downwards",
                    "no decay could be fitted",
                    "undecided",
                    "Too few distances lie above the noise.",
                )
            )
            continue
        r2, more = straight
        kappa = Value.mean(f.kappa for f in fits(parts))
        outcome: Outcome = "not comparable" if smoke else _line(r2, more, kappa)
        far = [s.far_fit.r2 for s in samples(parts) if s.far_fit is not None]
        ours = (
            f"κ = {said(kappa, '1/token')}; the line explains {100 * r2.value:.0f} % of log influence, {100 * more.value:+.0f} points against a power law"
            + (f"; over the farther half alone {100 * sum(far) / len(far):.0f} %" if far else "")
        )
        interval = more.interval()
        why = (
            "Nothing can be said of a model this small."
            if smoke
            else f"It agrees where the line explains at least {STRAIGHT:.0%}, more than a power law, and falls; interval of the difference "
            f"{'not known' if interval is None else f'{interval[0]:+.3f} to {interval[1]:+.3f}'} over {'initialisations' if len(parts) > 1 else 'sequences'}."
        )
        claims.append(
            Claim(NAME, says, "a straight line downwards", ours, outcome, why, more.value, more.stderr, more.n)
        )
    return claims + _initialisation(done, smoke)


def _line(r2: Value, more: Value, kappa: Value) -> Outcome:
    against = (side(more), side(kappa), "agrees" if r2.value >= STRAIGHT else side(r2, of=STRAIGHT))
    if "differs" in against:
        return "differs"
    return "agrees" if set(against) == {"agrees"} else "undecided"


def _initialisation(done: Done, smoke: bool) -> list[Claim]:
    """Does the initialisation make it worse? Of a model that is there both ways."""
    claims = []
    for name in done.names("loaded"):
        before = [n for n in done.names("fresh") if done.models[n].of == done.models[name].of]
        if not before:
            continue
        new, old = (Value.mean(f.kappa for f in fits(done.found[n])) for n in (before[0], name))
        error = None if new.stderr is None or old.stderr is None else math.hypot(new.stderr, old.stderr)
        gap = Value(value=new.value - old.value, stderr=error, n=min(new.n or 1, old.n or 1), unit="1/token")
        claims.append(
            Claim(
                NAME, "The initialisation makes the bias towards recent tokens stronger than training leaves it.", "decay steeper at initialisation",
                f"{name}: κ at initialisation minus trained {said(gap, '1/token')}", "not comparable" if smoke else side(gap),
                "Initialisations against sequences of one training; another training would differ too." if not smoke else "Smoke scale.",
                gap.value, gap.stderr, gap.n,
            )
        )  # fmt: skip
    return claims


def _figure(group: str, shown: list[Influence]) -> Figure:
    made = influence.figure(shown)
    title = "Influence by distance, " + (
        "published sizes at initialisation" if group == "initial" else "trained, and the same at initialisation"
    )
    return made.model_copy(update={"id": f"influence-{group}", "title": title})


def _table(done: Done) -> Table:
    columns = [
        Column(name="model"), Column(name="parameters"), Column(name="length", unit="tokens"), Column(name="initialisations"),
        Column(name="decay κ̂", unit="1/token"), Column(name="half-life", unit="tokens"), Column(name="R², line"), Column(name="R², line minus power law"),
        Column(name="half-life, farther half", unit="tokens"), Column(name="effective context", unit="tokens", meaning="most recent tokens that hold 90 % of the squared influence"),
        Column(name="last tenth", meaning="share of squared influence in the last 10 % of the context"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, parts in done.found.items():
        whole, straight, found = joined(name, parts), straightness(parts), fits(parts)
        kappa = Value.mean((f.kappa for f in found), "1/token") if found else None
        far = whole.far_fit
        rows.append([
            name, done.results[name]["parameters"], whole.length, len(parts) if done.models[name].kind != "loaded" else None, kappa,
            None if kappa is None or kappa.value <= 0 else math.log(2) / kappa.value, *(straight or (None, None)), None if far is None else far.half_life,
            whole.effective_context, whole.share_within(0.1),
        ])  # fmt: skip
    one = next(iter(done.found.values()))[0]
    return Table(
        id="influence", title="How fast influence decays", columns=columns, rows=rows,
        meaning="± standard error over initialisations; of a trained model over sequences. Half-life: of the mean κ̂; infinite where it does not fall.",
        method=f"Root mean square of ‖∂y_T/∂x_s‖ over sequences and random ±1 probes, y_T the last hidden state; line fitted at every distance ≥ 1 above the noise floor ({one.floor.how}).",
    )  # fmt: skip


ITEM = Item(
    name="figure1", title="influence against distance, at initialisation and trained", source="Figure 1", scales=tuple(SCALES), variants=(), run=make,
    takes=("data", "model"),
)  # fmt: skip
