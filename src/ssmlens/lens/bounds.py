"""The two theorems against measurement: how fast a layer must forget, and how alike its memories must become (SPEC §2 and §3).

    recency        Theorem 3.1   a token's influence falls at least like exp(-κ d),   κ = log(1/A_max)
    smoothing      Theorem 4.2   memories differ by at most (1 - A_min^{T-1}) times what the inputs b_t differ by

Both sides come from `ssmlens.lens.theorems`, at the scan's own input (after a short convolution or a token shift), on real text.

Recency. A layer with |a| = 1 somewhere has κ = 0: the bound says nothing (vacuous). Where a_t depends on earlier tokens too (RWKV-4, whose
Coefficients carry a `decay`) the theorem does not apply. Beside the bound: the exact products of |a| towards the last token, and the measured
decay of the layer alone, the Jacobian of its mixer's last output with respect to the mixer's input, by ±1 probes on a float64 copy.

Smoothing. In the form of the paper with its initial condition corrected, and rescaled (Δ' = 1 - a, b' = Δ b/(1 - a)) to where the assumption holds.
Real transitions only.

Legend: n sequences, D distances = length in tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens import decay
from ssmlens.lens.layers import choose, in_double
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.lens.theorems import Inequality, Products, inequalities, products, stacked
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
FLOOR = 1e-12  # of the largest score: what an FFT in float64 can still tell from zero
_NEAREST = 4  # distances that a short convolution makes special are not fitted


@dataclass(frozen=True, eq=False)
class Layer:
    """applies: whether Theorem 3.1 does (a_t depends on the current token alone). squares (n, D): mean over probes of the squared Jacobian of the
    mixer's last output with respect to its input, by distance; fit: the line through it. original, rescaled: Theorem 4.2; None where a is complex."""

    products: Products
    applies: bool
    squares: Float[Array, "n D"]
    fit: decay.Fit | None
    original: Inequality | None
    rescaled: Inequality | None

    @property
    def vacuous(self) -> bool:
        """Whether some state channel keeps everything (a = 1) on some sequence: the bound is then a constant."""
        return bool((self.products.a_max >= 1).any())

    @property
    def bound(self) -> Value:
        """κ = log(1/A_max) over all state channels, 1/token: 0 where vacuous, infinite where every a is 0."""
        return _rate(-_log(self.products.a_max))

    @property
    def bound_learned(self) -> Value | None:
        """The same over the state channels that are not pinned; None where all are."""
        learned = self.products.a_max_learned
        return None if np.isnan(learned).any() else _rate(-_log(learned))

    @property
    def exact(self) -> Value:
        """The mean rate of the slowest state channel's product over the whole sequence, 1/token: at least κ."""
        log = self.products.slowest
        return _rate(-log[:, -1] / (log.shape[1] - 1))

    @property
    def measured(self) -> Value | None:
        """κ̂ of the layer alone, 1/token; None where nothing could be fitted."""
        return None if self.fit is None else Value(value=self.fit.kappa, stderr=self.fit.stderr, n=len(self.squares), unit="1/token")  # fmt: skip

    @property
    def score(self) -> Float[Array, " D"]:
        """Root mean square over sequences and probes of ‖vᵀ ∂y_T/∂x_{T-d}‖, by distance d."""
        return np.sqrt(self.squares.mean(0))


@dataclass(frozen=True, eq=False)
class Bounds(Shown):
    """numbers[i]: which layer of the model layers[i] is, counted from 1 (those without a diagonal transition are not among them)."""

    name: str
    length: int
    probes: int
    numbers: list[int]
    layers: list[Layer] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.layers[0].squares)

    @property
    def longest(self) -> int:
        """The layer (an index into `layers`) whose measured decay is slowest; the first where none could be fitted."""
        rates = [math.inf if layer.fit is None else layer.fit.kappa for layer in self.layers]
        return int(np.argmin(rates))

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return tables([self])

    def table_rows(self) -> list[list[Cell]]:
        """Those of `table`: recency, and both forms of the smoothing inequality, layer by layer."""
        return table([self]).rows


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    layers: int | Sequence[int] | None = None,
    probes: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bounds:
    """Both theorems in the recurrent layers on the sequences of `inputs` (sequences, length); probes: of the layer's own Jacobian.

    layers: None for all, or how many, spread evenly over the depth, or their numbers, counted from 1.

    Memory: _CHUNK tokens of one layer's state in float64, and one layer's graph; linear in length. Raises UserError for bad tokens, NaN, and a
    model that shows no coefficients (attention has no transitions)."""
    subject = Subject.of(model)
    if not subject.recurrent:
        raise UserError(f"{subject.name} has no diagonal transition to bound: only ssmlens' own recurrent models do")
    if probes < 1:
        raise UserError(f"at least one probe is needed, not {probes}")
    progress = progress or Silent()
    chosen = choose(layers, subject.recurrent)
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    found: dict[int, list[tuple[Products, Array, Inequality | None, Inequality | None, bool]]] = {}
    progress.begin(f"{subject.name}: bounds", n * len(chosen))

    for i in range(n):

        def visit(seen: BlockPass, i: int = i) -> None:
            if seen.index in chosen and seen.x is not None:
                c = seen.mixer.coefficients(seen.x)
                forms = (None, None) if c.a_at(slice(0, 1)).is_complex() else inequalities(c)
                squares = jacobian_squares(seen.mixer, seen.x, probes, [seed, i, seen.index])
                found.setdefault(seen.index, []).append((products(c), squares, *forms, c.decay is None))
                progress.step()

        subject.walk(tokens[i : i + 1], visit)
    made_layers = []
    for parts in found.values():
        made, squares, original, rescaled, applies = zip(*parts, strict=True)
        squares = np.stack(squares)
        forms = [None if form[0] is None else stacked(form) for form in (original, rescaled)]
        made_layers.append(Layer(stacked(made), applies[0], squares, _fit(squares, seed), *forms))
    return Bounds(subject.name, length, probes, [index + 1 for index in found], made_layers)


def jacobian_squares(mixer: nn.Module, x: Float[Tensor, "1 length d_model"], probes: int, seed: Sequence[int]) -> Float[Array, " D"]:  # fmt: skip
    """Mean over ±1 probes v of ‖vᵀ ∂y_T/∂x_{T-d}‖² of one mixer, by distance d, in float64. Memory linear in length."""
    twin = in_double(mixer)
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    x = x.detach().to(device, torch.float64).requires_grad_()
    with torch.enable_grad():
        y = twin(x)
        y = (y if isinstance(y, Tensor) else y[0])[:, -1]
    rng = np.random.default_rng(list(seed))
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=device)
    for _ in range(probes):
        v = torch.from_numpy(rng.integers(0, 2, y.shape) * 2.0 - 1.0).to(y)
        (gradient,) = torch.autograd.grad(y, x, grad_outputs=v, retain_graph=True)
        total += gradient[0].square().sum(-1)
    squares: Array = (total / probes).flip(0).numpy(force=True)
    if not np.isfinite(squares).all():
        raise UserError("a mixer answers these inputs with NaN or infinite gradients")
    return squares


def _fit(squares: Float[Array, "n D"], seed: int) -> decay.Fit | None:
    counts = np.ones_like(squares)
    curve = decay.pooled_curve(squares, counts)
    floor = FLOOR * float(curve.max())
    return decay.fit_decay(squares, counts, floor=floor, seed=seed, first=_nearest(len(curve)))


def _nearest(distances: int) -> int:
    return min(_NEAREST, distances // 2)


def _log(x: Array) -> Array:
    return np.log(x, out=np.full_like(x, -math.inf), where=x > 0)


def _rate(rates: Array) -> Value:
    if not np.isfinite(rates).all():
        return Value(value=math.inf, n=len(rates), unit="1/token")
    return Value.mean(np.maximum(rates, 0.0), "1/token")


def figures(results: Sequence[Bounds], layer: int | None = None) -> list[Figure]:
    """Decay rates by layer, measured and guaranteed; the decay of one layer (an index into `layers`; by default each model's `longest`) with its
    bound and exact products; and left / right of Theorem 4.2 by layer."""
    rates: list[Series] = []
    curves: list[Series] = []
    ratios: list[Series] = []
    for r in results:
        rates += _rates(r)
        curves += _curves(r, r.longest if layer is None else layer)
        forms: tuple[tuple[Literal["original", "rescaled"], Literal["line", "fit"]], ...] = (("rescaled", "line"), ("original", "fit"))  # fmt: skip
        for form, style in forms:
            made = [(number, getattr(one, form)) for number, one in zip(r.numbers, r.layers, strict=True)]
            shown = [(number, found.ratio) for number, found in made if found is not None and found.assumed]
            if shown:
                ratios.append(_series(f"{r.name}: {form}", shown, r.name, style))
    described = {
        "decay": (
            "One layer: measured influence under its bounds", "distance t - s (tokens)", "influence ‖∂y_T/∂x_{T-d}‖ of the layer alone", curves,
            "The layer that remembers longest in each model. Solid: how strongly a token moves the layer's output, by distance. Thin: what Theorem 3.1 "
            "guarantees (a straight line; flat where a transition is one, which guarantees nothing) and the product of the slowest state channel's "
            "transitions, which is exact. The theorem leaves a constant open: each thin line is as low as it can be without crossing the measured one "
            f"from distance {_NEAREST} on (nearer, a short convolution adds to it).",
        ),
        "rates": (
            "How fast every layer forgets: measured, and the least that is guaranteed", "layer", "decay rate κ (1/token)", rates,
            "Points: the measured rate at which a token's influence on a layer's output falls. Thin line: κ = log(1/A_max), below which it cannot be in "
            "the long run. Layers with a transition at one have no bound and no point on the thin line.",
        ),
        "smoothing": (
            "How much of what it may differ a layer's memory does differ", "layer", "left side / right side of Theorem 4.2", ratios,
            "One: memories are as different as their inputs allow. Near zero: the layer averages its inputs far more than the theorem says it must. "
            "Thin: the inequality in its original form (where its assumption holds); solid: rescaled, where it always holds.",
        ),
    }  # fmt: skip
    return [
        Figure(
            id=f"bounds-{id}", title=title, x_label=x, y_label=y, y_scale="linear" if id == "smoothing" else "log",
            series=series, meaning=meaning, method=_method(results[0]),
        )
        for id, (title, x, y, series, meaning) in described.items()
        if series
    ]  # fmt: skip


def _rates(r: Bounds) -> list[Series]:
    numbered = list(zip(r.numbers, r.layers, strict=True))
    measured = [(n, v) for n, one in numbered if (v := one.measured) is not None and v.value > 0]
    bound = [(n, one.bound) for n, one in numbered if one.applies and 0 < one.bound.value < math.inf]
    made = [_series(f"{r.name}: measured", measured, r.name, "points")] if measured else []
    return made + ([_series(f"{r.name}: guaranteed", bound, r.name, "fit")] if bound else [])


def _series(
    name: str, shown: Sequence[tuple[int, Value]], group: str, style: Literal["line", "points", "fit"]
) -> Series:
    errors = [v.stderr for _, v in shown if v.stderr is not None]
    return Series(
        name=name, x=[float(n) for n, _ in shown], y=[v.value for _, v in shown],
        stderr=errors if len(errors) == len(shown) else None, group=group, style=style,
    )  # fmt: skip


def _curves(r: Bounds, index: int) -> list[Series]:
    """Measured score, bound and slowest product of one layer; the latter two raised to touch the first."""
    layer, number = r.layers[index], r.numbers[index]
    score = layer.score
    seen = decay.spaced(len(score))
    seen = seen[(score[seen] > FLOOR * score.max()) & (seen > 0)]
    far = seen[seen >= _nearest(len(score))]  # where the recurrence alone is at work
    if len(far) < 2:
        return []
    name = f"{r.name}, layer {number}"
    made = [Series(name=f"{name}: measured", x=seen.astype(float).tolist(), y=score[seen].tolist(), group=r.name)]
    lines = {"slowest state channel": _log_rms(layer.products.slowest)}
    if layer.applies:
        lines["Theorem 3.1" + (" (vacuous)" if layer.vacuous else "")] = -layer.bound.value * np.arange(len(score))
    for what, log in lines.items():
        kept = far[np.isfinite(log[far])]
        if len(kept):
            top = float((np.log(score[kept]) - log[kept]).max())
            made.append(Series(name=f"{name}: {what}", x=kept.astype(float).tolist(), y=np.exp(log[kept] + top).tolist(), style="fit", group=r.name))  # fmt: skip
    return made


def _log_rms(log: Float[Array, "n D"]) -> Float[Array, " D"]:
    """Logarithm of the root mean square over sequences of products given by their logarithms."""
    return 0.5 * (np.logaddexp.reduce(2 * log, axis=0) - math.log(len(log)))


def tables(results: Sequence[Bounds]) -> list[Table]:
    return [table(results), smoothing_table(results)]


def table(results: Sequence[Bounds]) -> Table:
    """Theorem 3.1, layer by layer."""
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="A_max", meaning="largest |a| over tokens and state channels"),
        Column(name="guaranteed κ", unit="1/token", meaning="log(1/A_max)"),
        Column(name="guaranteed κ, learned state channels", unit="1/token", meaning="without the pinned ones"),
        Column(name="slowest product", unit="1/token", meaning="mean rate at which the slowest state channel lost the first token"),
        Column(name="measured κ̂", unit="1/token", meaning="of the layer's own Jacobian"), Column(name="remark"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        for number, layer in zip(r.numbers, r.layers, strict=True):
            applies = layer.applies
            guaranteed = (layer.bound, layer.bound_learned) if applies else (None, None)
            largest = Value.mean(layer.products.a_max)
            rows.append([r.name, number, largest, *guaranteed, layer.exact, layer.measured, recency_remark(layer)])
    return Table(
        id="bounds-recency", title="Recency: guaranteed and measured", columns=columns, rows=rows, method=_method(results[0]),
        meaning="Theorem 3.1 says that a layer forgets at least at the guaranteed rate. The true rate is usually far above it, "
        "since one slow state channel on one token sets the bound.",
    )  # fmt: skip


def recency_remark(layer: Layer) -> str:
    if not layer.applies:
        return "outside the theorem: a_t depends on earlier tokens"
    if not layer.vacuous:
        return "bounded"
    learned = layer.bound_learned
    pinned = learned is not None and learned.value > 0
    return "vacuous: A_max = 1" + (", at pinned state channels only" if pinned else "")


def smoothing_table(results: Sequence[Bounds]) -> Table:
    """Both forms of Theorem 4.2, layer by layer."""
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="form"),
        Column(name="covered", meaning="share of state channels spoken of: in the rescaled form those with a < 1 throughout"),
        Column(name="a + Δ = 1", meaning="share of tokens and state channels"), Column(name="a + Δ < 1", meaning="share of tokens and state channels"),
        Column(name="a + Δ > 1", meaning="share of tokens and state channels: the assumption fails"),
        Column(name="case i", meaning="share of state channels with a + Δ = 1 throughout"),
        Column(name="case ii", meaning="share with a + Δ ≤ 1 throughout and inputs of both signs"),
        Column(name="neither", meaning="share of state channels"),
        Column(name="left", meaning="largest range of a memory"), Column(name="right", meaning="the corrected bound"),
        Column(name="slack", meaning="right - left"), Column(name="left / right"),
        Column(name="typical state channel", meaning="median over state channels of left / right of each by itself"), Column(name="remark"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        for number, layer in zip(r.numbers, r.layers, strict=True):
            if layer.original is None or layer.rescaled is None:
                rows.append(
                    [r.name, number, None, *[None] * 12, "complex transition: the theorem has no complex version"]
                )
                continue
            for name, form in (("original", layer.original), ("rescaled", layer.rescaled)):
                rows.append([r.name, number, name, *_form_cells(form), smoothing_remark(form)])
    return Table(
        id="bounds-smoothing", title="Over-smoothing: both sides of Theorem 4.2", columns=columns, rows=rows, method=_method(results[0]),
        meaning="Memories may differ by no more than the right side, wherever a + Δ ≤ 1. Rescaled, the inputs are b' = Δ b / (1 - a).",
    )  # fmt: skip


def _form_cells(form: Inequality) -> list[Cell]:
    if not form.covered.any():
        return [Value.mean(form.covered), *[None] * 11]
    shares = [form.covered, form.conserving, form.contracting, form.expanding, form.case_i, form.case_ii, 1 - form.case_i - form.case_ii]  # fmt: skip
    numbers = [*(Value.mean(x) for x in (*shares, form.left, form.right)), form.slack, form.ratio]
    return [*numbers, None if np.isnan(form.typical).any() else Value.mean(form.typical)]


def smoothing_remark(form: Inequality) -> str:
    if not form.covered.any():
        return "every state channel has a = 1 somewhere"
    if form.assumed:
        return "assumption held" if form.holds else "assumption held, inequality violated"
    return "assumption failed" + (", inequality holds all the same" if form.holds else ", inequality fails")


def _method(r: Bounds) -> str:
    return (
        f"a_t, Δ_t, b_t of every layer on {r.n_sequences} sequences of {r.length} tokens, at the scan's own input; extremes over all tokens "
        f"but the first, whose transition meets an empty state; measured rate: line through the log of the layer's own Jacobian ({r.probes} probes, "
        f"float64, last position) from distance {_NEAREST} on; means over sequences with their standard errors. Δ = 1 where a family has none of its own. In the range of inputs 0 is counted, "
        "as memories begin there (not where h_1 = b_1 and a + Δ = 1)."
    )
