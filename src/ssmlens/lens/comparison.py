"""What differs between two models, and whether it could be chance.

    difference = what `model` has minus what `against` has,   with Student's t interval over sequences

Models that read the same sequences are compared sequence by sequence: how easy a text is then falls out. Others are compared by
their means, whose errors add; the degrees of freedom are those of the smaller sample (fewer than Welch's, so the interval is wider).
A single sequence has no interval, and says nothing about chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ssmlens.lens import decay, influence
from ssmlens.results import Cell, Column, Figure, Table, Value

if TYPE_CHECKING:
    from ssmlens.lens.diagnosis import Diagnosis


@dataclass(frozen=True)
class Comparison:
    what: str
    model: str
    against: str
    difference: Value
    paired: bool


def sign(difference: Value, nothing: float = 0.0) -> int | None:
    """1 or -1 where the whole 95 % interval lies above or below `nothing`, 0 where it does not; None without an interval."""
    interval = difference.interval()
    if interval is None:
        return None
    return int(interval[0] > nothing) - int(interval[1] < nothing)


def of_means(
    model: Float[np.ndarray, " n"], against: Float[np.ndarray, " m"], *, paired: bool, unit: str = ""
) -> Value:
    """Mean of `model` minus mean of `against`, one number per sequence each."""
    if paired:
        return Value.mean(model - against, unit)
    one, other = Value.mean(model), Value.mean(against)
    error = None if one.stderr is None or other.stderr is None else math.hypot(one.stderr, other.stderr)
    return Value(value=one.value - other.value, stderr=error, n=min(len(model), len(against)), unit=unit)


def comparisons(d: "Diagnosis") -> list[Comparison]:
    """Everything that is compared, for every pair of `Diagnosis.pairs`."""
    found = []
    for a, b in d.pairs(d.influence):
        one, other = d.influence[b].fit, d.influence[a].fit
        if one is not None and other is not None:
            value = decay.difference(one, other, paired=d.paired(a, b))
            found.append(Comparison("decay of influence κ̂", b, a, value, d.paired(a, b)))
    for a, b in d.pairs(d.context):
        width = min(d.context[a].distant, d.context[b].distant)
        value = of_means(d.context[b].costs(width), d.context[a].costs(width), paired=d.paired(a, b), unit="bits/token")
        found.append(Comparison(f"cost of seeing the last {width} tokens only", b, a, value, d.paired(a, b)))
    for a, b in d.pairs(d.smoothing):
        value = of_means(
            d.smoothing[b].change_by_sequence(), d.smoothing[a].change_by_sequence(), paired=d.paired(a, b)
        )
        found.append(Comparison("relative sharpness, last layer over first", b, a, value, d.paired(a, b)))
    return found


def figures(d: "Diagnosis") -> list[Figure]:
    """What is a picture of two models at once: influence of one over that of the other."""
    made = influence.ratio_figure([(d.influence[a], d.influence[b]) for a, b in d.pairs(d.influence)])
    return [made] if made else []


def table(found: Sequence[Comparison]) -> Table:
    columns = [
        Column(name="compared"), Column(name="model"), Column(name="against"), Column(name="difference", meaning="of the model minus the other"),
        Column(name="95 % interval"), Column(name="p", meaning="of “no difference”; not corrected for the number of comparisons"),
        Column(name="read"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for c in found:
        interval = c.difference.interval()
        between = None if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
        p = c.difference.p_value()
        rounded = None if p is None else float(f"{p:.2g}")
        read = "the same sequences" if c.paired else "different sequences"
        rows.append([c.what, c.model, c.against, c.difference, between, rounded, read])
    return Table(
        id="comparisons", title="What differs between the models", columns=columns, rows=rows,
        meaning="A difference whose interval holds 0 could be chance.",
        method="Student's t over sequences, paired where the models read the same ones; κ̂ by bootstrap over sequences, the same resamples for both.",
    )  # fmt: skip
