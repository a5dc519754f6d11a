"""What the experiments share: the items by name, the scales, and how a result is held against the paper's number.

An experiment is a function of (scale, variant, seeds) that returns a Record; its configurations are plain functions too."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError, nearest
from ssmlens.results import Record, Value

SCALES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Request:
    """How an item is to be run. variants, seeds: None for the scale's own. processes: runs at a time."""

    scale: str
    out: Path
    variants: tuple[str, ...] | None = None
    seeds: int | None = None
    resume: bool = False
    processes: int = 1
    progress: bool = True


@dataclass(frozen=True)
class Item:
    name: str
    title: str
    source: str
    scales: tuple[str, ...]
    variants: tuple[str, ...]
    run: Callable[[Request], Record]


def choose(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raises UserError, with the nearest name, where `name` is not known."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, list(known))} (known: {', '.join(known)})")


def mean(values: Sequence[float], unit: str = "") -> Value:
    """The mean over independent runs with its standard error (None for a single one: nothing is known of the spread)."""
    n = len(values)
    centre = math.fsum(values) / n
    if n < 2:
        return Value(value=centre, stderr=None, n=n, unit=unit)
    spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
    return Value(value=centre, stderr=spread / math.sqrt(n), n=n, unit=unit)


def interval(value: Value, level: float = 0.95) -> tuple[float, float] | None:
    """Student's t confidence interval of a mean; None where there is no standard error."""
    if value.stderr is None or value.n is None or value.n < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, value.n - 1)) * value.stderr
    return value.value - half, value.value + half
