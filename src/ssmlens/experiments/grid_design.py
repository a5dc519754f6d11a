"""Table 2 as a grid: which part of the gain by polarization is due to what, and at which half-life it begins to pay.

    gain(variant) = accuracy of a polarized model - accuracy of the default one, seed by seed, in points

Parts, each a list of cells (variant, configuration, length, learning rate) with its number of seeds:

    corners    released and corrected, all eight configurations: the cells of `reproduce table2`, whose runs it shares
    factors    one factor at a time: from corrected towards released and from released towards corrected, default and both, 2 layers
    mode       "replace" in place of "append", 2 layers
    rates      a third of the learning rate and three times it, default and both, 2 layers
    half-life  corrected, with Δ's initial range scaled up, so that a sequence is more half-lives long: default, one, both, 2 layers
    length     a longer sequence: released, corrected and rescaled, default and both, 2 layers
    more seeds default and both at every half-life again: five seeds leave gains of ten points undecided there

The design is fractional: factors are changed one at a time, from both ends, so it shows what each adds to the gain where the others are as
in the corrected or as in the released variant, not how two of them act together elsewhere.
"""

from dataclasses import dataclass, replace
from typing import Any

from ssmlens.experiments.recall import CONFIGURATIONS, SCALES, VARIANTS, Scale, Variant, job

FACTORS = {
    "dt": "Δ's bias zeroed",
    "weights": "small first weights",
    "decay": "weight decay on A_log, D and biases too",
    "zero": "zero channel at -100",
    "order": "data in order",
    "mix": "the released training mix",
}
"""What the released code does otherwise, by the name that it has in a cell."""

FIRST = ("default-2", "both-2", "default-4", "both-4")  # what is trained before the other configurations, seed by seed

_HALVES = {"dt": "released_dt", "weights": "released_weights"}


@dataclass(frozen=True)
class Cell:
    """What is trained with several seeds. `id` begins the names of its runs' directories."""

    variant: str
    configuration: str
    length: int | None = None
    rate: float = 1.0

    @property
    def id(self) -> str:
        parts = [self.variant, self.configuration]
        parts += [f"length{self.length}"] if self.length else []
        parts += [f"rate{self.rate:.3g}"] if self.rate != 1 else []
        return "-".join(parts)

    def job(self, scale: str, seed: int) -> tuple[str, dict[str, Any]]:
        configuration = next(c for c in CONFIGURATIONS if c.id == self.configuration)
        return f"{self.id}-seed{seed}", job(
            scale, variant(self.variant), configuration, seed, length=self.length, rate=self.rate
        )


def variant(name: str) -> Variant:
    """By name: one of VARIANTS, "corrected+FACTOR" (like the released code in this alone), "released-FACTOR" (like corrected in this
    alone), with ",replace" for the other mode, with ",dt4" for Δ's initial range times 4."""
    name, *changes = name.split(",")
    for sign, other in (("+", "released"), ("-", "corrected")):
        base, found, factor = name.partition(sign)
        if found:
            made = _exchanged(VARIANTS[base], factor, VARIANTS[other])
            break
    else:
        made = VARIANTS[name]
    for change in changes:
        made = replace(made, mode="replace") if change == "replace" else replace(made, dt_scale=float(change[2:]))
    return made


def _exchanged(base: Variant, factor: str, other: Variant) -> Variant:
    if factor in _HALVES:
        halves = set(_HALVES) if base.initialization == "released" else set()
        now = halves ^ {factor}
        name = {0: "authors", 1: _HALVES[min(now)] if now else "", 2: "released"}[len(now)]
        return replace(base, initialization=name)  # type: ignore[arg-type]
    return replace(base, **{factor: getattr(other, factor)})


def factors(scale: Scale) -> dict[str, str]:
    """Those of FACTORS in which the two ends differ at this scale: the mix at the paper's alone."""
    return {factor: words for factor, words in FACTORS.items() if factor != "mix" or scale.steps is None}


@dataclass(frozen=True)
class Part:
    seeds: int
    cells: tuple[Cell, ...]


def in_order(grid: dict[str, Part]) -> list[tuple[Cell, int]]:
    """The runs, each once: corners and factors first, of those seed by seed the configurations of FIRST, then the rest."""
    runs = dict.fromkeys(
        (name, cell, seed) for name, part in grid.items() for seed in range(part.seeds) for cell in part.cells
    )
    ordered = sorted(runs, key=lambda run: (run[0] not in ("corners", "factors"), run[2], place(run[1].configuration)))
    return list(dict.fromkeys((cell, seed) for _, cell, seed in ordered))


def place(configuration: str) -> int:
    return FIRST.index(configuration) if configuration in FIRST else len(FIRST)


def parts(scale_name: str) -> dict[str, Part]:
    """The grid of a scale. At paper scale only the corners and the factors: the rest are hundreds of GPU-hours."""
    scale = SCALES[scale_name]
    seeds = scale.seeds
    few = min(seeds, 3)

    def cells(variants: list[str], configurations: list[str], **options: Any) -> tuple[Cell, ...]:
        return tuple(Cell(v, c, **options) for v in variants for c in configurations)

    pair, halved = ["default-2", "both-2"], [f"corrected,dt{f}" for f in (4, 16, 64)]
    steps = [
        f"{base}{sign}{short}" for base, sign in (("corrected", "+"), ("released", "-")) for short in factors(scale)
    ]
    found = {
        "corners": Part(seeds, cells(["corrected", "released"], [c.id for c in CONFIGURATIONS])),
        # without a channel at zero its value is nothing that could differ
        "factors": Part(seeds, tuple(c for c in cells(steps, pair) if not (c.variant.endswith("zero") and c.configuration == "default-2"))),
    }  # fmt: skip
    if scale_name == "paper":
        return found
    return found | {
        "mode": Part(few, cells(["corrected,replace", "released,replace"], ["one-2", "zero-2", "both-2"])),
        "rates": Part(few, tuple(c for rate in (1 / 3, 3.0) for c in cells(["corrected", "released"], pair, rate=rate))),
        "half-life": Part(seeds, cells(halved, ["default-2", "one-2", "both-2"])),
        "length": Part(few, cells(["corrected", "released", "rescaled"], pair, length=4 * scale.length)),
        "more seeds": Part(3 * seeds if scale_name == "laptop" else seeds, cells(["corrected", *halved, "corrected+dt"], pair)),
    }  # fmt: skip
