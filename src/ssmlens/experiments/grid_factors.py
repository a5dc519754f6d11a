"""What each difference between the corrected and the released code does to the gain by polarization.

effect_s(f, corrected) = gain_s(corrected+f) - gain_s(corrected)         above zero: having f as the released code has it
effect_s(f, released)  = gain_s(released) - gain_s(released-f)           adds to the gain
effect_s(f)            = (effect_s(f, corrected) + effect_s(f, released)) / 2
rest_s                 = gain_s(released) - gain_s(corrected) - Σ_f effect_s(f)
"""

from collections.abc import Callable
from typing import Any

from ssmlens.experiments.grid_design import Cell, factors
from ssmlens.experiments.grid_found import Found, Made, drawn
from ssmlens.experiments.recall import Scale
from ssmlens.experiments.recall_gain import COUNTED, HOW_FOUND, Change, Gain, Judged, interval, judged, less, mean
from ssmlens.results import Column, Figure, Table, Value

MORE, LESS = "adds to the gain", "takes from the gain"
ENDS = {"corrected": ("+", "with"), "released": ("-", "without")}


def factors_part(scale: Scale, found: Found) -> Made:
    made = Made()
    words = factors(scale)
    ends = {base: found.gain(Cell(base, "both-2"), Cell(base, "default-2")) for base in ENDS}
    changed = {(base, factor): _changed(found, base, factor) for base in ENDS for factor in words}
    effects = {
        (base, f): Change(ends[base], gain) if base == "corrected" else Change(gain, ends[base])
        for (base, f), gain in changed.items()
    }
    pooled = {f: _pooled(effects["corrected", f], effects["released", f]) for f in words}
    single, both = _judge(effects, pooled)
    share = _shares(ends["released"])
    made.tables = [
        _pooled_table(words, effects, pooled, both, share), _ends_table(words, ends, changed, effects, single, share),
        _runs_table(words, ends, changed),
    ]  # fmt: skip
    made.figures = [_figure(words, effects, pooled)]
    made.sentences = _sentences(words, ends, effects, single, pooled, both)
    return made


def _changed(found: Found, base: str, factor: str) -> Gain:
    name = f"{base}{ENDS[base][0]}{factor}"
    # without a channel at zero its value is nothing that could differ
    default = Cell(base if factor == "zero" else name, "default-2")
    return found.gain(Cell(name, "both-2"), default)


def _pooled(a: Change, b: Change) -> dict[int, float]:
    one, other = a.by_seed, b.by_seed
    return {seed: (one[seed] + other[seed]) / 2 for seed in one if seed in other}


def _rest(ends: dict[str, Gain], effects: list[dict[int, float]]) -> Value | None:
    """Above zero: the released gain is larger than the corrected one and all single effects together."""
    rest = less(ends["released"].by_seed, ends["corrected"].by_seed)
    for effect in effects:
        rest = less(rest, effect)
    return mean(rest.values())


def _reproduced(gain: Gain) -> bool:
    bounds = gain.value.interval() if gain.value and not gain.blocked else None
    return bounds is not None and bounds[0] > 0


def _shares(released: Gain) -> Callable[[dict[int, float]], Value | str | None]:
    """Of our released gain: the ratio of the means, its error by the delta method, seed by seed."""

    def share(effect: dict[int, float]) -> Value | str | None:
        if not _reproduced(released):
            return "not reproduced here"
        pairs = [(effect[seed], gain) for seed, gain in released.by_seed.items() if seed in effect]
        if not pairs:
            return None
        whole = sum(gain for _, gain in pairs) / len(pairs)
        ratio = sum(e for e, _ in pairs) / len(pairs) / whole
        return Value.mean([100 * (ratio + (e - ratio * gain) / whole) for e, gain in pairs], "%")

    return share


def _judge(
    effects: dict[tuple[str, str], Change], pooled: dict[str, dict[int, float]]
) -> tuple[dict[str, Judged], dict[str, Judged]]:
    """The single effects (by "base factor") and the pooled ones: two families."""
    single = {" ".join(key): value for key, e in effects.items() if (value := e.value)}
    blocked = {" ".join(key): e.blocked for key, e in effects.items()}
    means = {f: value for f, by_seed in pooled.items() if (value := mean(by_seed.values()))}
    either = {f: next((f"from {b}, {r}" for b in ENDS if (r := blocked[f"{b} {f}"])), None) for f in means}
    return judged(single, blocked, MORE, LESS), judged(means, either, MORE, LESS)


def _pooled_table(
    words: dict[str, str], effects: dict[tuple[str, str], Change], pooled: dict[str, dict[int, float]], says: dict[str, Judged], share: Any
) -> Table:  # fmt: skip
    rows: list[list[Any]] = [
        [words[f], effects["corrected", f].value, effects["released", f].value, mean(pooled[f].values()), said.p, share(pooled[f]), said.words]
        for f, said in says.items()
    ]  # fmt: skip
    columns = [
        Column(name="factor"), Column(name="effect from corrected", unit="points"), Column(name="effect from released", unit="points"),
        Column(name="mean of both", unit="points"), Column(name="p, Holm over the factors"), Column(name="of our released gain", unit="%"), Column(name="says"),
    ]  # fmt: skip
    return Table(
        id="factors", title="What each factor adds to the gain by polarization", columns=columns, rows=rows,
        meaning="Above zero: having the factor as in the released code adds to the gain.",
        method="2 layers, both channels, seed by seed. The mean of both ends is a main effect only if factors do not act together: away from "
        "the two ends it is aliased with their interactions. One difference is no factor: the released variant looks at the test set to stop, "
        "which changes when a run ends, at 99 %.",
    )  # fmt: skip


def _ends_table(
    words: dict[str, str], ends: dict[str, Gain], changed: dict[tuple[str, str], Gain], effects: dict[tuple[str, str], Change],
    says: dict[str, Judged], share: Any,
) -> Table:  # fmt: skip
    rows: list[list[Any]] = []
    for base, (_, verb) in ENDS.items():
        rows.append([base, "as it is", ends[base].value, None, None, ends[base].blocked])
        for f, name in words.items():
            effect, said = effects[base, f], says.get(f"{base} {f}")
            rows.append(
                [
                    base,
                    f"{verb} {name}",
                    changed[base, f].value,
                    effect.value,
                    share(effect.by_seed),
                    said and said.words,
                ]
            )
        rest = _rest(ends, [effects[base, f].by_seed for f in words])
        rows.append([base, "unexplained rest", None, rest, None, None])
    names = ("base", "changed", "gain", "effect", "of our released gain", "says")
    units = ("", "", "points", "points", "%", "")
    return Table(
        id="factors-ends", title="One factor at a time, from either end",
        columns=[Column(name=n, unit=u) for n, u in zip(names, units, strict=True)], rows=rows,
        meaning="Effect: what having the factor as in the released code adds to the gain, the others as in the base. The rest is what the single "
        "effects of a base leave of released minus corrected: factors that act together, the stop on the test set, and chance.",
        method="Seed by seed; what is said holds for all single effects together (Holm, 5 %).",
    )  # fmt: skip


def _runs_table(words: dict[str, str], ends: dict[str, Gain], changed: dict[tuple[str, str], Gain]) -> Table:
    rows: list[list[Any]] = []
    for base, (_, verb) in ENDS.items():
        named = {"as it is": ends[base]} | {f"{verb} {name}": changed[base, f] for f, name in words.items()}
        rows += [[base, n, g.default.accuracy, g.polarized.accuracy, *g.cells()] for n, g in named.items()]
    names = (Column(name="default", unit="%"), Column(name="both", unit="%"))
    return Table(
        id="factors-runs", title="The runs behind them", columns=[Column(name="base"), Column(name="changed"), *names, *COUNTED], rows=rows,
        meaning="A mean over runs mixes two things: how many learned to bind key and value, and how much those hold.",
        method=f"Accuracy averaged over three numbers of pairs. {HOW_FOUND}",
    )  # fmt: skip


def _figure(
    words: dict[str, str], effects: dict[tuple[str, str], Change], pooled: dict[str, dict[int, float]]
) -> Figure:
    names = list(words.values())
    series = [drawn("mean of both ends", names, [mean(pooled[f].values()) for f in words])]
    series += [drawn(f"from {base}", names, [effects[base, f].value for f in words], "points") for base in ENDS]
    return Figure(
        id="factors", title="What each factor adds to the gain by polarization", x_label="factor, as in the released code", y_label="effect (points)",
        x_scale="category", series=series, meaning="Above zero: having it adds to the gain. Points far from their bar: it depends on the others.",
        method="2 layers, both channels; bars are standard errors over seeds.",
    )  # fmt: skip


def _counts(change: Value) -> bool:
    bounds = change.interval()
    return bounds is not None and not bounds[0] <= 0 <= bounds[1]


def _arms(change: Change) -> str:
    """What having it does to either arm: a gain that comes of a default that falls is another than one of a polarized that rises."""
    a, b = change.without, change.having
    values = [arm.accuracy for arm in (a.default, b.default, a.polarized, b.polarized)]
    if any(v is None for v in values):
        return ""
    before, after, *both = [f"{v.value:.1f}" for v in values if v]
    return f" (default {before} % without it and {after} % with it, both channels {both[0]} % and {both[1]} %)"


def _sentences(
    words: dict[str, str], ends: dict[str, Gain], effects: dict[tuple[str, str], Change], single: dict[str, Judged],
    pooled: dict[str, dict[int, float]], says: dict[str, Judged],
) -> list[str]:  # fmt: skip
    sure = [words[f] for f, said in says.items() if said.words in (MORE, LESS)]
    comparable = sum(said.outcome != "not comparable" for said in says.values())
    out = [
        f"{len(sure)} of {comparable} comparable factors change what polarization adds, averaged over both ends (Holm, 5 %)"
        f"{': ' + ', '.join(sure) if sure else ''}."
    ]
    if comparable < len(words):
        out[0] += f" {len(words) - comparable} of {len(words)} factors cannot be compared so."
    for base, gain in ends.items():
        if gain.value is None:
            continue
        reason = f": not comparable: {gain.blocked}" if gain.blocked else ""
        lacking = (
            "" if base == "corrected" or gain.blocked or _reproduced(gain) else ": the gain is not reproduced here"
        )
        out.append(f"{base}, both channels at 2 layers: {interval(gain.value)}{reason}{lacking}.")
    for f, said in says.items():
        value = Value.mean(pooled[f].values(), "points")
        text = f"{words[f]}: as in the released code it changes the gain by {interval(value)}: {said.words}"
        for base in () if said.words in (MORE, LESS) else ENDS:
            alone, change = single[f"{base} {f}"], effects[base, f].value
            if alone.outcome != "not comparable" and change and (said.outcome == "not comparable" or _counts(change)):
                text += f"; from {base} alone by {interval(change)}: {alone.words}{_arms(effects[base, f])}"
        out.append(f"{text}.")
    if rest := _rest(ends, list(pooled.values())):
        out.append(f"The mean effects leave {interval(rest)} of released minus corrected unexplained.")
    return out
