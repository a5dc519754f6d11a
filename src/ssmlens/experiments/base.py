"""What the experiments share: the items by name, the scales, and how a result is held against the paper's number.

An experiment is a function from a Request to a Record; its configurations are plain functions too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError, nearest
from ssmlens.results import Record

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


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: below α for all of them together, however many there are."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
