"""What the parts of the grid's record share: the finished runs, asked for by cell, and what a part makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssmlens.experiments.grid_design import Cell, Part
from ssmlens.experiments.recall import CONFIGURATIONS, Scale, guessing, sized
from ssmlens.experiments.recall_gain import Arm, Gain
from ssmlens.results import Figure, Series, Table, Value


class Found:
    """The results, asked for by cell. A cell of two parts has the seeds of the one that has more."""

    def __init__(self, scale: Scale, grid: Mapping[str, Part], results: Mapping[str, Any]) -> None:
        self.scale, self.results = scale, results
        self.seeds: dict[str, int] = {}
        for part in grid.values():
            for cell in part.cells:
                self.seeds[cell.id] = max(part.seeds, self.seeds.get(cell.id, 0))

    def has(self, cell: Cell) -> bool:
        return cell.id in self.seeds

    def arm(self, cell: Cell) -> Arm:
        names = {seed: f"{cell.id}-seed{seed}" for seed in range(self.seeds[cell.id])}
        runs = {seed: self.results[name] for seed, name in names.items() if name in self.results}
        return Arm(runs, guessing(sized(self.scale, cell.length)))

    def gain(self, polarized: Cell, default: Cell) -> Gain:
        return Gain(self.arm(default), self.arm(polarized))


@dataclass
class Made:
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def label(configuration: str) -> str:
    c = next(c for c in CONFIGURATIONS if c.id == configuration)
    return f"{c.label}, {c.layers} layers"


def drawn(
    name: str, x: Sequence[Any], values: Sequence[Value | None], style: Literal["bar", "line", "points"] = "bar"
) -> Series:
    """As far as there are values."""
    there = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
    return Series(
        name=name, x=[at for at, _ in there], y=[v.value for _, v in there], stderr=[v.stderr or 0.0 for _, v in there], style=style, group=name,
    )  # fmt: skip
