"""What a diagnosis found, in sentences: does it forget, how fast, does depth blur, what differs between the models.

A sentence claims a difference only where Student's t 95 % interval over sequences excludes "no difference" (`ssmlens.lens.comparison`);
otherwise it says that there is none to see, or that it cannot be told. One sequence has no such interval, and nothing is claimed from it.
Models at initialisation are spoken of only in comparison with what training made of them.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmlens.lens import comparison, decay
from ssmlens.lens.comparison import sign
from ssmlens.results import Value

if TYPE_CHECKING:
    from ssmlens.lens.bounds import Bounds
    from ssmlens.lens.context import Context
    from ssmlens.lens.diagnosis import Diagnosis
    from ssmlens.lens.filters import Filters
    from ssmlens.lens.influence import Influence
    from ssmlens.lens.smoothing import Smoothing
    from ssmlens.lens.transitions import Transitions

CURVED = 0.05  # by how much a power law must explain more before the exponential is called wrong
MATTERS = 0.05  # changes of sharpness below a twentieth are not worth a reader's attention, however significant
NOTHING = 0.02  # bits per token: who certainly gains less from distant text than this does not use it


def verdict(d: "Diagnosis", says: Mapping[str, Callable[[Any], str | None]]) -> list[str]:
    """says: what each measure says of one model, in order."""
    said: list[str] = []
    if not d.complete:
        said.append(f"Interrupted: this is what was finished; not measured: {', '.join(d.missing)}.")
    if any(len(tokens) == 1 for tokens in d.inputs.values()):
        said.append("One sequence says nothing about chance: what follows holds for that sequence alone.")
    said += _changed_by_polarization(d)
    said += [_longer(d.influence[a], d.influence[b], d.paired(a, b)) for a, b in d.pairs(d.influence)]
    for name, sentence_of in says.items():
        spoken = [sentence_of(r) for r in getattr(d, name).values() if r.name not in d.untrained]
        said += [sentence for sentence in spoken if sentence]
        if name == "smoothing":
            said += [_blurs_less(d.smoothing[a], d.smoothing[b], d.paired(a, b)) for a, b in d.pairs(d.smoothing)]
    return said + _would_be_polarized(d)


def _pinned(d: "Diagnosis") -> dict[str, Any]:
    """The polarization of each model that is not at initialisation, None where there is none."""
    trained = [s for s in d.subjects if s.name not in d.untrained]
    return {s.name: getattr(getattr(s.model, "config", None), "polarization", None) for s in trained}


def _changed_by_polarization(d: "Diagnosis") -> list[str]:
    """Of every polarized model beside its plain twin."""
    pinned = _pinned(d)
    trained = [s for s in d.subjects if s.name in pinned]
    return [
        _changed(d, plain.name, other.name)
        for plain in trained
        for other in trained
        if pinned[other.name]
        and not pinned[plain.name]
        and _same_but_for_polarization(plain.model, other.model)
        and len(d.inputs[plain.name]) > 1
    ]


def _would_be_polarized(d: "Diagnosis") -> list[str]:
    """Where there is no polarized model: what it would mean for those that could be."""
    pinned = _pinned(d)
    if any(pinned.values()):
        return []
    trained = [s for s in d.subjects if s.name in pinned]
    able = [
        s.name
        for s in trained
        if hasattr(getattr(s.model, "config", None), "architecture")
        and any(getattr(s.mixers[i], "polarizable", False) for i in s.recurrent)
    ]
    if not able:
        return []
    return [
        f"{_and(able)} {'has' if len(able) == 1 else 'have'} no state channel held at one or zero. Polarized (`ssmlens polarize`), every layer would have one that "
        "forgets nothing, so that Theorem 3.1 would no longer force it to forget, and one that sees the current token alone; what that is worth, "
        "training it further has to show."
    ]


def _same_but_for_polarization(a: Any, b: Any) -> bool:
    one, two = (getattr(m.config, "architecture", None) for m in (a, b))
    if one is None or two is None:
        return False
    return bool(one.model_copy(update={"polarization": None}) == two.model_copy(update={"polarization": None}))


def _changed(d: "Diagnosis", plain: str, polarized: str) -> str:
    paired = d.paired(plain, polarized)
    found: list[str] = []
    if {plain, polarized} <= set(d.influence):
        a, b = d.influence[plain].fit, d.influence[polarized].fit
        slower = sign(decay.difference(a, b, paired=paired)) if a and b else None
        found.append(
            {1: "it forgets more slowly", -1: "it forgets faster"}.get(
                slower or 0, "no difference in forgetting can be told"
            )
        )
    if {plain, polarized} <= set(d.smoothing):
        by = comparison.of_means(
            d.smoothing[polarized].change_by_sequence(), d.smoothing[plain].change_by_sequence(), paired=paired
        )
        less = sign(by) if abs(by.value) >= MATTERS else 0
        found.append(
            {1: "it blurs less with depth", -1: "it blurs more with depth"}.get(
                less or 0, "no difference in blurring can be told"
            )
        )
    if not found:
        return f"{plain} and {polarized} differ in polarization alone."
    return f"What polarization changed, {polarized} against {plain} (one training of each): {', '.join(found)}."


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def forgetting(r: "Influence") -> str:
    where = "" if r.output == "last hidden state" else " on the logits"
    recent = f"90 % of the squared influence{where} comes from the last {_count(r.effective_context)} of {r.squares.shape[1]}"
    fit = r.fit
    if fit is None:
        alone = (
            ""
            if (r.score[1:] > r.floor.value).any()
            else " No token but the last moves it: what mixes tokens does nothing."
        )
        return f"{r.name} forgets within a few tokens: beyond them its influence is numerical noise. {recent}.{alone}"
    low, high = fit.half_life_interval
    if fit.low <= 0:
        bound = "" if math.isinf(low) else f" (if it halves at all, then not within {_tokens(low)})"
        return f"{r.name} keeps a trace that does not clearly decay with distance{bound}. {recent}."
    interval = f"95 % interval {_number(low)} to {_number(high)}"
    if fit.r2_power <= fit.r2 + CURVED:
        slowly = " slowly" if fit.half_life > r.length else ""
        says = f"{r.name} forgets{slowly}: the influence of a token halves every {_number(fit.half_life)} tokens ({interval})."
    else:
        says = (
            f"{r.name} forgets fast at first, then slowly: on average the influence of a token halves every "
            f"{_number(fit.half_life)} tokens ({interval})."
        )
    return f"{says} {recent}."


def _longer(a: "Influence", b: "Influence", paired: bool) -> str:
    """b against a."""
    if a.fit is None or b.fit is None:
        return f"{a.name} against {b.name}: no decay could be fitted for both, so their half-lives are not compared."
    numbers = f"a token's influence {_halves(b.fit)}, in {a.name} it {_halves(a.fit)}"
    slower = sign(decay.difference(a.fit, b.fit, paired=paired))
    if slower is None:
        return f"{b.name} on this one sequence: {numbers}."
    if slower == 0:
        return f"Which of {b.name} and {a.name} forgets more slowly cannot be told: in {b.name} {numbers}."
    return f"{b.name} forgets {'more slowly' if slower > 0 else 'faster'} than {a.name}: {numbers}."


def behaviour(r: "Context") -> str:
    width = r.distant
    cost = r.cost(width)
    interval = cost.interval()
    if interval is None:
        change = _signed(cost.value)
        return f"Seeing only the last {width} tokens changes the loss of {r.name} by {change} bits per token on this one sequence."
    low, high = interval
    if low > 0:
        return (
            f"{r.name} uses text more than {width} tokens back: without it, it loses {cost.value:.3f} bits per token "
            f"(95 % interval {low:.3f} to {high:.3f})."
        )
    if high < 0:
        return (
            f"Text more than {width} tokens back hurts {r.name}: without it, it gains {-cost.value:.3f} bits per token."
        )
    if high < NOTHING:
        return f"{r.name} does not use text more than {width} tokens back: without it, it loses at most {high:.3f} bits per token."
    return (
        f"Whether {r.name} uses text more than {width} tokens back cannot be told: without it, its loss changes by "
        f"{_signed(low)} to {_signed(high)} bits per token (95 % interval)."
    )


def blurring(r: "Smoothing") -> str:
    change = r.change_over_depth()
    interval, differs = change.interval(), sign(change, 1.0)
    first, last = r.relative("block")[0].value, r.relative("block")[-1].value
    numbers = f"relative sharpness {first:.2f} after layer 1, {last:.2f} after layer {r.n_layers}"
    if interval is None:
        return f"{r.name} on this one sequence: {numbers}."
    if differs and abs(1 - change.value) >= MATTERS:
        percent = f"{100 * abs(1 - change.value):.2g} %"
        says = (
            f"Depth blurs {r.name}: its tokens become {percent} more alike ({numbers})."
            if differs < 0
            else f"Depth does not blur {r.name}: its tokens become {percent} more different ({numbers})."
        )
    elif max(1 - interval[0], interval[1] - 1) < 2 * MATTERS:
        says = f"Depth hardly changes how different the tokens of {r.name} are ({numbers})."
    else:
        says = f"Whether depth blurs {r.name} cannot be told ({numbers})."
    if (counts := r.memories_smoother()) is not None:
        relative = f", relative to their size in {counts[1]}" if counts[0] != counts[1] else ""
        says += f" Memories are smoother than inputs in {counts[0]} of {counts[2]} layers{relative}."
    return says


def _blurs_less(a: "Smoothing", b: "Smoothing", paired: bool) -> str:
    difference = comparison.of_means(b.change_by_sequence(), a.change_by_sequence(), paired=paired)
    interval, less = difference.interval(), sign(difference)
    one, two = a.change_over_depth().value, b.change_over_depth().value
    numbers = f"sharpness after the last layer over that after the first: {two:.2f} against {one:.2f}"
    if interval is None:
        return f"{b.name} against {a.name} on this one sequence: {numbers}."
    if less and abs(difference.value) >= MATTERS:
        return f"{b.name} blurs {'less' if less > 0 else 'more'} with depth than {a.name} ({numbers})."
    if max(-interval[0], interval[1]) < 2 * MATTERS:
        return f"{b.name} and {a.name} blur alike ({numbers})."
    return f"Which of {b.name} and {a.name} blurs less cannot be told ({numbers})."


def transitions(r: "Transitions") -> str:
    ones, zeros, total = r.pinned()
    if ones + zeros == total:
        return f"All {total:,} state channels of {r.name} are pinned."
    pinned = f" Of all {total:,}, {ones:,} are held at one and {zeros:,} at zero." if ones or zeros else ""
    median = r.half_life_quantile(0.5).value
    loses = "loses nothing" if math.isinf(median) else f"halves what it holds every {_number(median)} tokens"
    none = "" if ones else " None is held at one: each that polarization holds there would lose nothing."
    return (
        f"In {r.name} the median learned state channel {loses}; "
        f"{_percent(r.share_remembering())} of them still hold half of the first token at the end of {r.length} tokens.{pinned}{none}"
    )


def bounded(r: "Bounds") -> str:
    """Theorem 3.1, then Theorem 4.2."""
    return f"{_recency(r)} {_alike(r)}"


def _recency(r: "Bounds") -> str:
    total, said = len(r.layers), []
    inside = [layer for layer in r.layers if layer.applies]
    if not inside:
        return f"Theorem 3.1 does not speak of {r.name}: its transitions depend on earlier tokens too."
    vacuous = [layer for layer in inside if layer.vacuous]
    if vacuous:
        pinned = all(layer.bound_learned is not None and layer.bound_learned.value > 0 for layer in vacuous)
        where = ", at pinned state channels only" if pinned else ""
        said.append(
            f"Theorem 3.1 guarantees no forgetting in {len(vacuous)} of {total} layers of {r.name}, where a transition is one{where}"
        )
    bound = [layer for layer in inside if not layer.vacuous]
    if bound:
        least = min(layer.bound.value for layer in bound)
        one = not vacuous and len(bound) == total
        where = (
            "the others"
            if vacuous
            else f"each of {total} layers of {r.name}"
            if one
            else f"{len(bound)} of {total} layers of {r.name}"
        )
        halves = "halves what it holds" if one else "halve what they hold"
        said.append(
            f"Theorem 3.1 guarantees that {where} {halves} every {_number(decay.half_life(least))} tokens or faster"
        )
        measured = [
            layer.measured.value / layer.bound.value
            for layer in bound
            if layer.measured and 0 < layer.bound.value < math.inf
        ]
        if measured:
            said[-1] += (
                f" (measured, they forget {_number(min(measured))} to {_number(max(measured))} times as fast as they must)"
            )
    return "; ".join([said[0], *(s.replace("Theorem 3.1", "it", 1) for s in said[1:])]) + "."


def _alike(r: "Bounds") -> str:
    real = [layer.original for layer in r.layers if layer.original is not None]
    if not real:
        return "Theorem 4.2 has no version for its complex transitions."
    held, violated = sum(form.assumed for form in real), sum(form.assumed and not form.holds for form in real)
    says = f"The assumption of Theorem 4.2 (a + Δ ≤ 1) holds in {held} of {len(real)} layers looked at"
    rescaled = [layer.rescaled for layer in r.layers if layer.rescaled is not None and layer.rescaled.assumed]
    if rescaled and held < len(real):
        says += f"; rescaled, in {len(rescaled)}"
    ratios = [form.ratio.value for form in (rescaled or [form for form in real if form.assumed])]
    if ratios and math.isfinite(max(ratios)):
        says += f", where memories differ by {_percent(Value(value=min(ratios)))} to {_percent(Value(value=max(ratios)))} of what it allows"
    return says + (f"; the inequality was violated in {violated}, which is a bug" if violated else "") + "."


def filtering(r: "Filters") -> str:
    from ssmlens.lens.filters import EPSILONS
    from ssmlens.lens.filters import verdict as is_

    kinds = [is_(one) for one in r.responses.values()]
    low, high = kinds.count("low-pass"), kinds.count("high-pass")
    says = f"Of {len(kinds)} layers of {r.name} looked at, "
    if low + high:
        says += f"{low or 'none'} let slow changes through more than fast ones (low-pass), {high or 'none'} the other way round."
    else:
        says += "none treats slow and fast changes of its input clearly differently."
    if r.invariant:
        measured, _, tight = (
            float(np.median(np.concatenate([one.cut_offs[EPSILONS[0]][i] for one in r.invariant.values()])))
            for i in range(3)
        )
        says += (
            f" Its learned filters pass less than {100 * EPSILONS[0]:.0f} % beyond {_number(measured)} radians per token in the median "
            f"(Proposition D.4: {_number(tight)}; tokens show none beyond 3.14)."
        )
    return says


def _signed(x: float) -> str:
    return f"{x:+.2f}".replace("-", "−")


def _number(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _tokens(x: float) -> str:
    return "unlimited" if math.isinf(x) else f"{_number(x)} tokens"


def _halves(fit: decay.Fit) -> str:
    return "does not halve" if math.isinf(fit.half_life) else f"halves every {_tokens(fit.half_life)}"


def _count(v: Value) -> str:
    return "token" if v.value == 1 else f"{v.value:.0f} tokens"


def _percent(v: Value) -> str:
    percent = 100 * v.value
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.{0 if 1 <= percent <= 99 or percent in (0, 100) else 1}f} %"
