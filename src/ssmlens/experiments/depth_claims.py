"""What the runs of Figure 4 say of depth, and how surely.

    x_{g,s}      a difference of losses: size g, seed s, the same batches        (G sizes, n_g seeds of each)
    effect     = 1/G Σ_g x̄_g                                                   every size weighs the same
    variance   = s² / G² · Σ_g 1/n_g,    s² = Σ_{g,s} (x_{g,s} - x̄_g)² / Σ_g (n_g - 1)

The sizes are these and no others: the interval is over seeds, whose spread is taken to be the same at every size. The n of a value is its degrees
of freedom, Σ_g (n_g - 1), plus one. Where a size by its own interval (with the same s²) lies on the other side of zero, a claim is undecided.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssmlens.experiments.base import Claim, Outcome, side
from ssmlens.experiments.depth_runs import SCALES, VARIANTS, Scale
from ssmlens.results import Cell, Column, Table, Value

PAIRED = (
    "The mean over seeds of every size, then over sizes, each weighing the same; the error is that of seeds alone, pooled over sizes (n: its degrees of "
    "freedom plus one), so what is said is said of these sizes. Where one of them lies surely on the other side of zero, the statement is undecided."
)
Key = tuple[str, int, int, int, int]  # variant, size, depth, context, seed


@dataclass(frozen=True)
class Effect:
    """by_size: a number for every seed of a size, which are independent of each other."""

    by_size: Mapping[int, list[float]]
    unit: str = "nats"

    def mean(self, *sizes: int) -> Value:
        """Over these sizes, or all."""
        means = {size: math.fsum(x) / len(x) for size, x in self.by_size.items()}
        freedom = sum(len(x) - 1 for x in self.by_size.values())
        chosen = sizes or tuple(self.by_size)
        stderr = None
        if freedom:
            pooled = math.fsum((x - means[size]) ** 2 for size, each in self.by_size.items() for x in each) / freedom
            stderr = math.sqrt(pooled * sum(1 / len(self.by_size[size]) for size in chosen)) / len(chosen)
        value = math.fsum(means[size] for size in chosen) / len(chosen)
        return Value(value=value, stderr=stderr, n=freedom + 1, unit=self.unit)

    def against(self) -> list[int]:
        """The sizes that lie surely on the other side of zero."""
        above = self.mean().value > 0
        return [size for size in self.by_size if side(self.mean(size), above) == "differs"]

    def outcome(self, above: bool) -> Outcome:
        """Of a claim that it is above (below) zero."""
        return "undecided" if self.against() else side(self.mean(), above)


@dataclass(frozen=True)
class Runs:
    """The results of all runs, by what was run."""

    scale: Scale
    results: Mapping[Key, dict[str, Any]]
    variants: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        there = {key[0] for key in self.results}
        object.__setattr__(self, "variants", tuple(v for v in VARIANTS if v in there))

    def cells(self, variant: str) -> list[tuple[int, int]]:
        """(size, depth) of a variant."""
        return sorted({key[1:3] for key in self.results if key[0] == variant})

    def sizes(self, variant: str) -> list[int]:
        return sorted({size for size, _ in self.cells(variant)})

    def of(self, variant: str, size: int, depth: int, context: int) -> dict[int, dict[str, Any]]:
        """The results of a cell by seed; none where the design has none."""
        cell = (variant, size, depth, context)
        return {key[4]: result for key, result in sorted(self.results.items()) if key[:4] == cell}

    def number(self, variant: str, size: int, depth: int, context: int, seed: int, of: str = "loss") -> float | None:
        """What `of` names in a run's result; None where there is no such run."""
        result = self.results.get((variant, size, depth, context, seed))
        return None if result is None else float(result[of])

    def gap(
        self, variant: str, size: int, deep: int, shallow: int, context: int, seed: int, of: str = "loss"
    ) -> float | None:
        """Loss (or what else `of` names) at depth `deep` minus that at `shallow`: above zero, deeper is worse."""
        return minus(*(self.number(variant, size, depth, context, seed, of) for depth in (deep, shallow)))

    def gaps(self, variant: str, size: int, deep: int, shallow: int, context: int) -> list[float]:
        """Of every seed that has both."""
        found = (self.gap(variant, size, deep, shallow, context, s) for s in self.of(variant, size, deep, context))
        return [x for x in found if x is not None]

    def effect(
        self, of: Callable[[int, int], float | None], variant: str = "default", unit: str = "nats"
    ) -> Effect | None:
        """A number of every size and seed, where it can be made."""
        seeds = sorted({key[4] for key in self.results})
        found = {size: [x for s in seeds if (x := of(size, s)) is not None] for size in self.sizes(variant)}
        found = {size: numbers for size, numbers in found.items() if numbers}
        return Effect(found, unit) if found else None

    def difference(self, deep: int, shallow: int, context: int) -> Effect | None:
        return self.effect(lambda size, seed: self.gap("default", size, deep, shallow, context, seed))


def short(size: int) -> str:
    """A number of parameters as it is said: 200k, 2M, 140M."""
    return f"{size / 1e6:g}M" if size >= 1_000_000 else f"{size / 1e3:g}k"


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def said(v: Value) -> str:
    bounds = v.interval()
    within = f"95 % interval {bounds[0]:+.4f} to {bounds[1]:+.4f}" if bounds else "one run of each, no interval"
    return f"{f'{v.value:+.4f} {v.unit}'.strip()} ({within})"


def claims_of(found: Runs, smoke: bool = False) -> list[Claim]:
    """What the paper says of depth (§4.1, and of polarization in its abstract), and what the runs say."""
    scale, paper = found.scale, SCALES["paper"]
    shallow, middle, deep = scale.compared
    near, far = scale.contexts
    stand_in = ""
    if scale.compared != paper.compared:
        stand_in = (
            f" {shallow}, {middle} and {deep} layers stand in for the paper's {', '.join(map(str, paper.compared))}, "
            f"contexts {near} and {far} for {' and '.join(map(str, paper.contexts))}."
        )

    def claim(
        says: str, papers: str, effect: Effect | None, above: bool, measured: str, item: str = "Figure 4", why: str = ""
    ) -> Claim:
        if effect is None:
            none = "No two runs of this design can be held against each other."
            return Claim(item, says, papers, "not run", "not comparable", none)
        value, by_size = effect.mean(), effect.by_size
        against = effect.against()
        beyond = f" (surely {'below' if value.value > 0 else 'above'} zero)"
        each = ", ".join(f"{short(g)} {effect.mean(g).value:+.4f}{beyond if g in against else ''}" for g in by_size)
        counts = ", ".join(f"{short(g)}: {len(x)}" for g, x in by_size.items())
        reason = f"Differences within size and seed; seeds of {counts}; {value.n and value.n - 1} degrees of freedom.{why}{stand_in}"
        if against:
            reason = f"On the other side of zero, surely: {', '.join(map(short, against))}. {reason}"
        return Claim(
            item, says, papers, f"{measured}: {said(value)}; by size {each}", "not comparable" if smoke else effect.outcome(above),
            "nothing is learned at smoke scale" if smoke else reason, value.value, value.stderr, value.n,
        )  # fmt: skip

    def tolerance(size: int, seed: int) -> float | None:
        """How much worse `deep` is than `middle` at the longer context, minus the same at the shorter."""
        return minus(*(found.gap("default", size, deep, middle, c, seed) for c in (far, near)))

    def spread(size: int, seed: int) -> float | None:
        """Largest minus smallest loss over the depths below the deepest that all seeds of the size have, at the longer context minus at the shorter."""
        counts = {
            d: len(found.of("default", size, d, near)) for g, d in found.cells("default") if g == size and d < deep
        }
        depths = [d for d, n in counts.items() if n == max(counts.values())]
        ranges: list[float | None] = []
        for context in (far, near):
            known = [x for d in depths if (x := found.number("default", size, d, context, seed)) is not None]
            ranges.append(max(known) - min(known) if len(known) > 1 else None)
        return minus(*ranges)

    def kept(context: int) -> Callable[[int, int], float | None]:
        """How much more of its sharpness the deep model keeps from its first block to its last than the shallow one."""
        return lambda size, seed: found.gap("default", size, deep, shallow, context, seed, "blur")

    def unlocked(context: int) -> Callable[[int, int], float | None]:
        """What polarization adds to the loss of the deep model, minus what it adds to that of the shallow one."""
        return lambda size, seed: minus(
            *(found.gap(v, size, deep, shallow, context, seed) for v in ("polarized", "default"))
        )

    claims = [
        claim("At the shorter context, the deepest models end up worse than the shallowest.", "context 2048: more than 48 layers worse than 16",
              found.difference(deep, shallow, near), True, f"loss at {deep} minus {shallow} layers, context {near}"),
        claim("At the longer context, deeper models beat shallower ones of the same size.", "context 8192: deeper better, up to 32 to 48 layers",
              found.difference(middle, shallow, far), False, f"loss at {middle} minus {shallow} layers, context {far}"),
        claim("Past some depth, deeper gets worse again.", "64 and 72 layers worse than 32 and 48",
              found.difference(deep, middle, far), True, f"loss at {deep} minus {middle} layers, context {far}"),
        claim("A longer context tolerates more depth.", "degradation sets in later at 8192 than at 2048",
              found.effect(tolerance), False, f"what {deep} layers lose to {middle}, at context {far} minus at {near}"),
        claim("At the shorter context the shape matters less than at the longer.", "curves together at 2048, apart at 8192",
              found.effect(spread), True, f"spread over depths below {deep}, at context {far} minus at {near}",
              why=" The depths are those of which a size has all its seeds."),
        *(
            claim("The deeper a model, the more alike its tokens become.", "over-smoothing explains what depth costs", found.effect(kept(c), unit=""), False,
                  f"sharpness kept at {deep} layers minus at {shallow}, context {c}", "Section 4",
                  " Relative sharpness after the last block over that after the first, on held-out text.")
            for c in scale.contexts
        ),
    ]  # fmt: skip
    if "polarized" in found.variants:
        claims += [
            claim("Polarization lets deeper models gain.", "shown on recall, with 2 and 4 layers", found.effect(unlocked(c), "polarized"), False,
                  f"what polarization adds to the loss at {deep} layers minus at {shallow}, context {c}", "Section 6", " The paper shows it on recall, not on text.")
            for c in scale.contexts
        ]  # fmt: skip
    return claims


# ---- two learning rates ----


def rates(found: Runs) -> Table | None:
    """Depth at two learning rates, where both were run."""
    shallow, rows = found.scale.compared[0], []
    for size, depth in found.cells("half-rate") if "default" in found.variants else ():
        for context in found.scale.contexts if depth != shallow else ():
            rows.append(_rates(found, size, depth, context))
    names = ("size", "layers", "context", "peak rate", "half", "half - peak", "better of both", "better rate")
    units = ("", "", "", *["nats"] * 4, "")
    return Table(
        id="rates", title=f"Against {shallow} layers, at two learning rates", columns=[Column(name=n, unit=u) for n, u in zip(names, units, strict=True)],
        rows=rows, meaning="What changes from the one rate to the other depends on the rate; what stays at both need not: neither has to be the best for a depth.",
        method=f"Loss minus that at {shallow} layers, seed by seed, of the seeds that both rates have. Better of both: each depth at the rate with the lower mean loss (the last column: of "
        f"this depth, of {shallow} layers). It is chosen by the losses that are compared, so all look better than they are, and only roughly alike.",
    ) if rows else None  # fmt: skip


def _rates(found: Runs, size: int, depth: int, context: int) -> list[Cell]:
    shallow = found.scale.compared[0]
    both = ("default", "half-rate")
    seeds = sorted(
        set.intersection(*({*found.of(v, size, d, context)} for v in both for d in (depth, shallow)))
    )  # of every run that is compared

    def losses(variant: str, d: int) -> list[float]:
        return [found.results[variant, size, d, context, s]["loss"] for s in seeds]

    def against(deep: str, base: str) -> list[float]:
        return [a - b for a, b in zip(losses(deep, depth), losses(base, shallow), strict=True)]

    at = {v: against(v, v) for v in both}
    moved = [b - a for a, b in zip(*at.values(), strict=True)]
    better = [min(both, key=lambda v: sum(losses(v, d))) for d in (depth, shallow)]
    names = ["half" if v == "half-rate" else "peak" for v in better]
    values = [Value.mean(x, "nats") for x in (*at.values(), moved, against(better[0], better[1]))]
    return [short(size), depth, context, *values, f"{names[0]}, {names[1]}"]


def rate_notes(found: Runs) -> list[str]:
    """The table of `rates` in words, for the deepest models."""
    table, (shallow, _, deep) = rates(found), found.scale.compared
    notes = []
    for size, depth, context, *values, _ in table.rows if table else ():
        if depth == deep:
            full, half, moved, best = (said(v) for v in values if isinstance(v, Value))
            notes.append(
                f"Learning rate, {size}, context {context}: {deep} minus {shallow} layers is {full} at the peak rate of the size, {half} at half of it, "
                f"{moved} from the one to the other; with the better of both for each depth {best}."
            )
    return notes
