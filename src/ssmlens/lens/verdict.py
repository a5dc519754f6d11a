"""What a diagnosis found, in sentences: does it forget, how fast, does depth blur, what differs between the models.

A sentence claims a difference only where it is larger than two of its standard errors; otherwise it says that there is none to see.
Models at initialisation are spoken of only in comparison with what training made of them.
"""

import math
from typing import TYPE_CHECKING

from ssmlens.results import Value

if TYPE_CHECKING:
    from ssmlens.lens.context import Context
    from ssmlens.lens.diagnosis import Diagnosis
    from ssmlens.lens.influence import Influence
    from ssmlens.lens.smoothing import Smoothing
    from ssmlens.lens.transitions import Transitions

CURVED = 0.05  # by how much a power law must explain more before the exponential is called wrong
MATTERS = 0.05  # changes of sharpness below a twentieth are not worth a reader's attention, however significant


def verdict(d: "Diagnosis") -> list[str]:
    said: list[str] = []
    if not d.complete:
        said.append(f"Interrupted: this is what was finished; not measured: {', '.join(d.missing)}.")
    said += [forgetting(r) for r in d.influence.values() if r.name not in d.initial_of]
    said += [_longer(d.influence[a], d.influence[b]) for a, b in d.pairs(d.influence)]
    said += [behaviour(r) for r in d.context.values() if r.name not in d.initial_of]
    said += [blurring(r) for r in d.smoothing.values() if r.name not in d.initial_of]
    said += [_blurs_less(d.smoothing[a], d.smoothing[b]) for a, b in d.pairs(d.smoothing)]
    said += [transitions(r) for r in d.transitions.values() if r.name not in d.initial_of]
    return said


def forgetting(r: "Influence") -> str:
    where = "" if r.output == "last hidden state" else " on the logits"
    recent = (
        f"90 % of the squared influence{where} comes from the last {_count(r.effective_context)}, "
        f"{_percent(r.share_within(0.1))} from the last tenth of the {r.squares.shape[1]}-token context"
    )
    fit = r.fit
    if fit is None:
        return f"{r.name} forgets within a few tokens: beyond them its influence is numerical noise. {recent}."
    trace = f"a token in the farther half has on average {_ratio(r.tail)} of the influence of the last but one"
    low, high = fit.half_life_interval
    if fit.low <= 0:
        bound = "" if math.isinf(low) else f" (if it halves at all, then not within {_tokens(low)})"
        return f"{r.name} keeps a trace that does not clearly decay with distance{bound}. {recent}; {trace}."
    interval = f"95 % interval {_number(low)} to {_number(high)}"
    if fit.r2_power <= fit.r2 + CURVED:
        slowly = " slowly" if fit.half_life > r.length else ""
        says = f"{r.name} forgets{slowly}: the influence of a token halves every {_number(fit.half_life)} tokens ({interval})."
    else:
        far = (
            f", over the farther half every {_number(r.far_fit.half_life)}" if r.far_fit and r.far_fit.kappa > 0 else ""
        )
        says = (
            f"{r.name} forgets fast at first, then slowly: on average the influence of a token halves every "
            f"{_number(fit.half_life)} tokens ({interval}){far} (an exponential explains R² {fit.r2:.2f} of the curve, a power law {fit.r2_power:.2f})."
        )
    return f"{says} {recent}; {trace}."


def _longer(a: "Influence", b: "Influence") -> str:
    """b against a."""
    if a.fit is None or b.fit is None:
        return f"{a.name} against {b.name}: no decay could be fitted for both, so their half-lives are not compared."
    difference = a.fit.kappa - b.fit.kappa
    error = math.hypot(a.fit.stderr, b.fit.stderr)
    numbers = f"half-life {_tokens(b.fit.half_life)} against {_tokens(a.fit.half_life)}"
    trace = f"a token in the farther half keeps {_ratio(b.tail)} against {_ratio(a.tail)} of the influence of the last but one"
    if abs(difference) <= 2 * error:
        return f"{b.name} and {a.name} forget at rates that cannot be told apart here ({numbers}; {trace})."
    return f"{b.name} forgets {'more slowly' if difference > 0 else 'faster'} than {a.name}: {numbers}; {trace}."


def behaviour(r: "Context") -> str:
    """At about an eighth of the length: far enough to be worth something, near enough for a model to have lost it."""
    width = int(max(w for w in r.widths if w <= max(r.length // 8, 1)))
    cost = r.cost(width)
    of = f"bits per token (of {r.full_loss().value:.2f})"
    if cost.stderr is None:
        return f"Seeing only the last {width} tokens costs {r.name} {_with_error(cost)} {of}; with one sequence there is no error to that."
    if cost.value > 2 * cost.stderr:
        return f"{r.name} uses distant text: seeing only the last {width} tokens costs it {_with_error(cost)} {of}."
    if cost.value < -2 * cost.stderr:
        return (
            f"Distant text hurts {r.name}: seeing only the last {width} tokens saves it {_with_error(cost, -1)} {of}."
        )
    return f"{r.name} makes no measurable use of text more than {width} tokens back: without it, it loses {_with_error(cost)} {of}."


def blurring(r: "Smoothing") -> str:
    change = r.change_over_depth("block")
    percent = 100 * abs(1 - change.value)
    error = "" if change.stderr is None else f" ± {100 * change.stderr:.1g}"
    sure = change.stderr is None or abs(1 - change.value) > 2 * change.stderr
    first, last = r.relative("block")[0].value, r.relative("block")[-1].value
    numbers = f"relative sharpness {first:.2f} after layer 1, {last:.2f} after layer {r.n_layers}"
    if not sure or percent < 100 * MATTERS:
        says = f"Depth hardly changes how different the tokens of {r.name} are ({numbers})."
    elif change.value < 1:
        says = f"Depth blurs {r.name}: its tokens become {percent:.2g}{error} % more alike ({numbers})."
    else:
        says = f"Depth does not blur {r.name}: its tokens become {percent:.2g}{error} % more different ({numbers})."
    if (counts := r.memories_smoother()) is not None:
        relative = f", relative to their size in {counts[1]}" if counts[0] != counts[1] else ""
        says += f" Memories are smoother than inputs in {counts[0]} of {r.n_layers} layers{relative}."
    return says


def _blurs_less(a: "Smoothing", b: "Smoothing") -> str:
    one, two = a.change_over_depth("block"), b.change_over_depth("block")
    error = math.hypot(one.stderr or 0, two.stderr or 0)
    numbers = f"sharpness after the last layer over that after the first: {two.value:.2f} against {one.value:.2f}"
    if abs(one.value - two.value) <= max(2 * error, MATTERS):
        return f"{b.name} and {a.name} blur alike ({numbers})."
    return f"{b.name} blurs {'less' if two.value > one.value else 'more'} with depth than {a.name} ({numbers})."


def transitions(r: "Transitions") -> str:
    ones, zeros, total = r.pinned()
    if ones + zeros == total:
        return f"All {total} state channels of {r.name} are pinned."
    pinned = (
        f" Of all {total:,} state channels {ones:,} are held at one and {zeros:,} at zero." if ones or zeros else ""
    )
    return (
        f"In {r.name} the transitions of {_percent(r.share_below(0.5))} of the learned state channels move by at most 0.5 over a sequence; the "
        f"median channel halves what it holds within {_number(r.half_life_quantile(0.5).value)} tokens, and {_percent(r.share_remembering(r.length))} "
        f"hold it for the {r.length} tokens of a sequence.{pinned}"
    )


def _number(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _tokens(x: float) -> str:
    return "unlimited" if math.isinf(x) else f"{_number(x)} tokens"


def _count(v: Value) -> str:
    return "token" if v.value == 1 else f"{v.value:.0f} tokens"


def _percent(v: Value) -> str:
    percent = 100 * v.value
    if 0 < percent < 0.1:
        return "under 0.1 %"
    if 99.9 < percent < 100:
        return "over 99.9 %"
    return f"{percent:.{0 if 1 <= percent <= 99 or percent in (0, 100) else 1}f} %"


def _ratio(v: Value) -> str:
    """A share as a reader can picture it: per cent down to a tenth of one, then 1/n."""
    return _percent(v) if v.value >= 1e-3 or v.value <= 0 else f"1/{_number(1 / v.value)}"


def _with_error(v: Value, sign: int = 1) -> str:
    if v.stderr is None or v.stderr <= 0:
        return f"{sign * v.value:.3f}"
    places = max(0, min(6, 1 - math.floor(math.log10(v.stderr))))
    return f"{sign * v.value:.{places}f} ± {v.stderr:.{places}f}"
