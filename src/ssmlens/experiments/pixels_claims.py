"""What the paper says of pixel sequences, and whether it holds here: its Tables 1 and 3, and the shape of its Figures 3 and 10."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ssmlens.experiments.base import Claim, Outcome, holm, side
from ssmlens.experiments.pixels_models import PAPER_WIDTHS, TARGET_WIDTHS, Model
from ssmlens.experiments.pixels_runs import Runs, between, comparable, crossed
from ssmlens.experiments.recall import PAPER_LENGTH
from ssmlens.results import Value
from ssmlens.tasks.pixels import Region, positions

PAPER = {
    "h3": {"clean": 0.654, "992:1024": 0.569, "0:32": 0.654, "928:1024": 0.477, "0:96": 0.650, "1014:1024": 0.629, "0:10": 0.654,
           "768:1024": 0.394, "0:256": 0.639, "512:544": 0.603, "480:576": 0.543},
    "attention": {"clean": 0.580, "992:1024": 0.535, "0:32": 0.447, "928:1024": 0.431, "0:96": 0.370, "1014:1024": 0.571, "0:10": 0.500,
                  "768:1024": 0.249, "0:256": 0.263, "512:544": 0.498, "480:576": 0.347},
    "rwkv4": {"clean": 0.474, "992:1024": 0.150, "0:32": 0.466, "928:1024": 0.138, "0:96": 0.460, "1014:1024": 0.194, "0:10": 0.470,
              "768:1024": 0.107, "0:256": 0.448, "512:544": 0.405, "480:576": 0.392},
    "mamba": {"clean": 0.674, "992:1024": 0.126, "0:32": 0.658, "928:1024": 0.098, "0:96": 0.647, "1014:1024": 0.348, "0:10": 0.664,
              "768:1024": 0.099, "0:256": 0.597, "512:544": 0.515, "480:576": 0.446},
}  # fmt: skip
TABLE = {10: "Table 3", 32: "Table 1", 96: "Table 1", 256: "Table 3"}
_SMALL = 2.0  # points: a difference of one run of the paper's that may well be chance
_FAR = 5  # times as much: what "far more" is taken to be at least
_RECURRENT = ("mamba", "h3", "rwkv4")


@dataclass(frozen=True)
class Sides:
    """Leading, middle and trailing regions of one width in a sequence of `length`; paper: the width in its 1,024 that this stands for."""

    width: int
    length: int
    paper: int | None = None

    @classmethod
    def of_paper(cls, width: int, length: int) -> "Sides":
        return cls(Region(0, width).scaled(length, PAPER_LENGTH).width, length, width)

    @property
    def regions(self) -> dict[str, Region]:
        return positions(self.width, self.length)

    @property
    def leading(self) -> Region:
        return self.regions["leading"]

    @property
    def trailing(self) -> Region:
        return self.regions["trailing"]

    def share(self) -> str:
        """In words, for a width of the paper's."""
        assert self.paper is not None
        return f"{100 * self.paper / PAPER_LENGTH:.2g} % of the pixels ({self.paper} of {PAPER_LENGTH:,} in the paper, {self.width} of {self.length} here)"

    def named(self) -> dict[Region, str]:
        return {region: where for where, region in self.regions.items()}

    def asymmetry_in_paper(self, name: str) -> float | None:
        """Points lost to the trailing region beyond those lost to the leading one; None for a model or width that the paper has not."""
        row = PAPER.get(paper_model(name) or "")
        if row is None or self.paper not in PAPER_WIDTHS:
            return None
        return 100 * (row[f"0:{self.paper}"] - row[f"{PAPER_LENGTH - self.paper}:{PAPER_LENGTH}"])


def paper_model(name: str) -> str | None:
    """The row of the paper's tables that a model of ours repeats; None for those that it does not have."""
    model = Model.of(name)
    return model.mixer if model.mixer in PAPER and not model.polarized and not model.mean else None


def noise_claims(found: Mapping[str, Runs], length: int, classes: int, learned: bool) -> list[Claim]:
    """One for each row and width of Tables 1 and 3, and the order of the models. learned: False where training was for show."""
    out = []
    for name, runs in found.items():
        if name not in PAPER:
            continue
        for width in (32, 96, 10, 256):
            s = Sides.of_paper(width, length)
            there, ours = s.asymmetry_in_paper(name), runs.asymmetry(s.trailing, s.leading)
            assert there is not None
            more = there > 0
            why = f"Noise in {s.trailing} against noise in {s.leading} of {length} pixels, image by image."
            outcome = side(ours, above=more)
            if abs(there) < _SMALL:
                outcome, why = (
                    "not comparable",
                    "The paper's difference, of one run, may be chance: there is no sign to hold ours against.",
                )
            out.append(_claim(
                TABLE[width], f"{runs.name} loses {'more' if more else 'less'} to noise in the last {s.share()} than in as many of the first.",
                f"{there:+.1f} points", words(ours), *_judged(outcome, why, [runs], classes, learned), ours,
            ))  # fmt: skip
        s, central = Sides.of_paper(96, length), Region(480, 576).scaled(length, PAPER_LENGTH)
        there = 100 * (PAPER[name]["480:576"] - PAPER[name]["928:1024"])
        ours = crossed(100 * (runs.noise(central) - runs.noise(s.trailing)), "points")
        out.append(_claim(
            "Table 3", f"{runs.name} loses {'more' if there > 0 else 'less'} to noise in the last {s.share()} than in as many of the middle.",
            f"{there:+.1f} points", words(ours),
            *_judged(side(ours, above=there > 0), f"Noise in {s.trailing} against noise in {central} of {length} pixels.", [runs], classes, learned), ours,
        ))  # fmt: skip
    s = Sides.of_paper(32, length)
    for name in ("mamba", "rwkv4"):
        if name in found:
            row, runs = PAPER[name], found[name]
            last, first_ = (100 * (row["clean"] - row[region]) for region in ("992:1024", "0:32"))
            beyond = crossed(
                100 * (runs.clean() - runs.noise(s.trailing) - _FAR * (runs.clean() - runs.noise(s.leading))), "points"
            )
            out.append(_claim(
                "Table 1", f"{runs.name} loses far more, at least {_FAR} times as much, to noise in the last {s.share()} than in as many of the first.",
                f"{last:.1f} against {first_:.1f} points", f"{words(beyond)} beyond {_FAR} times",
                *_judged(side(beyond), f"Lost to the last minus {_FAR} times what is lost to the first, image by image.", [runs], classes, learned), beyond,
            ))  # fmt: skip
    for first, second in (("mamba", "h3"), ("rwkv4", "h3"), ("mamba", "attention")):
        if first in found and second in found:
            a, b = found[first], found[second]
            there = (s.asymmetry_in_paper(first) or 0) - (s.asymmetry_in_paper(second) or 0)
            ours = between(_asymmetry(a, s), _asymmetry(b, s))
            out.append(_claim(
                "Table 1", f"The last {s.share()} matter more, against the first, in {a.name} than in {b.name}.", f"{there:+.1f} points", words(ours),
                *_judged(side(ours), "Difference of the two models' differences.", [a, b], classes, learned), ours,
            ))  # fmt: skip
    return out


def target_claims(
    found: Mapping[str, Runs], length: int, targets: Sequence[int], title: str, figure: str, classes: int, learned: bool
) -> list[Claim]:
    """The shape of a figure whose numbers the paper does not print. targets: one class, or all of them; title: in words."""
    out = []
    for width in TARGET_WIDTHS:
        s = Sides.of_paper(width, length)
        pairs = next(iter(found.values())).pairs(targets)
        for name in _RECURRENT:
            if name in found:
                runs = found[name]
                ours = advantage(runs, s, targets)
                out.append(_claim(
                    figure, f"{runs.name}, {s.share()} replaced, {title}: trailing pixels succeed more often than leading ones.", "higher (no number)",
                    words(ours), *_judged(side(ours), "Success on the same images, with pixels of the same donors.", [runs], classes, learned), ours,
                ))  # fmt: skip
        if "mamba" in found and "attention" in found:
            mamba, transformer = _success(found["mamba"], s, targets), _success(found["attention"], s, targets)
            ours = between(mamba, transformer * (1 if transformer.mean() >= 0 else -1), clusters=pairs)
            out.append(_claim(
                figure, f"{s.share()} replaced, {title}: leading and trailing pixels differ less in the transformer than in Mamba.", "less (no number)",
                words(ours), *_judged(side(ours), "Mamba's difference minus the size of the transformer's.",
                                        [found["mamba"], found["attention"]], classes, learned), ours,
            ))  # fmt: skip
    return out


def advantage(runs: Runs, s: Sides, targets: Sequence[int]) -> Value:
    """Success rate of trailing pixels minus that of leading ones, in points."""
    return crossed(_success(runs, s, targets), "points", runs.pairs(targets))


def _success(runs: Runs, s: Sides, targets: Sequence[int]) -> np.ndarray:
    return 100 * (runs.success(s.trailing, targets) - runs.success(s.leading, targets))


def _asymmetry(runs: Runs, s: Sides) -> np.ndarray:
    return 100 * (runs.noise(s.leading) - runs.noise(s.trailing))


def _judged(outcome: Outcome, why: str, runs: Sequence[Runs], classes: int, learned: bool) -> tuple[Outcome, str]:
    if not learned:
        return "not comparable", "Smoke scale: nothing is learned in so few steps."
    for r in runs:
        if not comparable(r, classes):
            return "not comparable", f"{r.name} is not shown to beat chance on clean images here."
    return outcome, why


def _claim(item: str, claim: str, paper: str, ours: str, outcome: Outcome, why: str, value: Value) -> Claim:
    return Claim(item, claim, paper, ours, outcome, why, value.value, value.stderr, value.n)


def judged(value: Value, p: float | None) -> Literal["sure", "alone", "no"]:
    """What may be said of a difference: p is that corrected for all that are said together."""
    bounds = value.interval()
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return "no"
    return "sure" if p is not None and p < 0.05 else "alone"


def corrected(values: Mapping[str, Value]) -> dict[str, Literal["sure", "alone", "no"]]:
    """What may be said of differences that are said together (Holm's correction)."""
    adjusted = holm({name: p for name, v in values.items() if (p := v.p_value()) is not None})
    return {name: judged(v, adjusted.get(name)) for name, v in values.items()}


def allowed(value: Value) -> str:
    """How large an effect is not ruled out where none was found: that none was found is no evidence of none."""
    bounds = value.interval()
    return (
        f"up to {max(map(abs, bounds)):.1f} points either way are not ruled out" if bounds else "nothing is ruled out"
    )


def words(value: Value) -> str:
    """With its 95 % interval."""
    bounds = value.interval()
    return f"{value.value:+.1f} points" + (f" ({bounds[0]:+.1f} to {bounds[1]:+.1f})" if bounds else "")
