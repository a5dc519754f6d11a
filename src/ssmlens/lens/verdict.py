"""What a diagnosis found, in sentences: does it forget, how fast, does depth blur, what differs between the models.

A sentence claims a difference only where Student's t 95 % interval over sequences excludes "no difference" (`ssmlens.lens.comparison`);
otherwise it says that there is none to see, or that it cannot be told. One sequence has no such interval, and nothing is claimed from it.
Models at initialisation are spoken of only in comparison with what training made of them.
"""

import math
from typing import TYPE_CHECKING

from ssmlens.lens import comparison, decay
from ssmlens.lens.comparison import sign
from ssmlens.results import Value

if TYPE_CHECKING:
    from ssmlens.lens.context import Context
    from ssmlens.lens.diagnosis import Diagnosis
    from ssmlens.lens.influence import Influence
    from ssmlens.lens.smoothing import Smoothing
    from ssmlens.lens.transitions import Transitions

CURVED = 0.05  # by how much a power law must explain more before the exponential is called wrong
MATTERS = 0.05  # changes of sharpness below a twentieth are not worth a reader's attention, however significant
NOTHING = 0.02  # bits per token: who certainly gains less from distant text than this does not use it


def verdict(d: "Diagnosis") -> list[str]:
    said: list[str] = []
    if not d.complete:
        said.append(f"Interrupted: this is what was finished; not measured: {', '.join(d.missing)}.")
    if any(len(tokens) == 1 for tokens in d.inputs.values()):
        said.append("One sequence says nothing about chance: what follows holds for that sequence alone.")
    said += [_longer(d.influence[a], d.influence[b], d.paired(a, b)) for a, b in d.pairs(d.influence)]
    said += [forgetting(r) for r in d.influence.values() if r.name not in d.initial_of]
    said += [behaviour(r) for r in d.context.values() if r.name not in d.initial_of]
    said += [blurring(r) for r in d.smoothing.values() if r.name not in d.initial_of]
    said += [_blurs_less(d.smoothing[a], d.smoothing[b], d.paired(a, b)) for a, b in d.pairs(d.smoothing)]
    said += [transitions(r) for r in d.transitions.values() if r.name not in d.initial_of]
    return said


def forgetting(r: "Influence") -> str:
    where = "" if r.output == "last hidden state" else " on the logits"
    recent = f"90 % of the squared influence{where} comes from the last {_count(r.effective_context)} of {r.squares.shape[1]}"
    fit = r.fit
    if fit is None:
        return f"{r.name} forgets within a few tokens: beyond them its influence is numerical noise. {recent}."
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
    return (
        f"In {r.name} the median learned state channel {loses}; "
        f"{_percent(r.share_remembering())} of them still hold half of the first token at the end of {r.length} tokens.{pinned}"
    )


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
