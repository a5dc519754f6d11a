"""Transitions: what a layer's a_t are on real input, how far they move, how long they remember (SPEC §3, the paper's Figure 6).

    range of a state channel on a sequence      max_t a_t - min_t a_t          0: it decays the same whatever it reads
    memory half-life of a state channel         ln 2 / -ln(median_t a_t)       tokens; infinite at a = 1, 0 at a = 0

Of a complex a the modulus is taken. State channels that polarization holds at one or zero are counted, and left out of everything that is
said about learned ones. Nothing larger than one sequence's a of a single layer at `_KEPT` tokens is held in memory: extremes and
histogram are taken chunk by chunk over all tokens, the median over at most that many, evenly spaced.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
BINS = 50
THRESHOLDS = np.linspace(0, 1, 101)
_CHUNK = 64
_KEPT = 1024
_HORIZONS: tuple[tuple[float, str, Literal["line", "fit"]], ...] = (
    (0.5, "median channel", "line"),
    (0.9, "slowest tenth begins", "fit"),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's state channels (flattened to F) on n sequences. low, high, median: of a over the tokens of each sequence.
    histogram: how many (token, learned channel) have a in each of BINS equal bins of [0, 1]. ones, zeros: which are pinned."""

    low: Float[Array, "n F"]
    high: Float[Array, "n F"]
    median: Float[Array, "n F"]
    histogram: Int[Array, "n bins"]
    ones: Bool[Array, " F"]
    zeros: Bool[Array, " F"]

    @property
    def learned(self) -> Bool[Array, " F"]:
        return ~(self.ones | self.zeros)

    @property
    def ranges(self) -> Float[Array, "n learned"]:
        return (self.high - self.low)[:, self.learned]

    @property
    def half_lives(self) -> Float[Array, "n learned"]:
        """Tokens, per sequence and learned state channel."""
        return half_life(self.median[:, self.learned])


def half_life(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """Tokens until a state under a constant transition a has halved: 0 at a = 0, infinite from a = 1 on."""
    a = np.asarray(a, dtype=float)
    inside = np.clip(a, 1e-300, 1 - 1e-16)
    return np.where(a >= 1, math.inf, np.where(a <= 0, 0.0, math.log(2) / -np.log(inside)))


@dataclass(frozen=True, eq=False)
class Transitions:
    name: str
    length: int
    layers: list[Layer] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.layers[0].low)

    def share_below(self, threshold: float, layer: int | None = None) -> Value:
        """Share of learned state channels whose range on a sequence is at most `threshold`, with its standard error over sequences."""
        ranges = self._pooled("ranges", layer)
        return _mean((ranges <= threshold).mean(1), self.n_sequences)

    def half_life_quantile(self, quantile: float, layer: int | None = None) -> Value:
        """A quantile of the memory half-life over learned state channels, tokens."""
        lives = self._pooled("half_lives", layer)
        # "higher" picks an existing value: interpolating with an infinite neighbour would give NaN
        return _mean(np.quantile(lives, quantile, axis=1, method="higher"), self.n_sequences, "tokens")

    def share_remembering(self, tokens: int, layer: int | None = None) -> Value:
        """Share of learned state channels whose half-life is at least that many tokens."""
        return _mean((self._pooled("half_lives", layer) >= tokens).mean(1), self.n_sequences)

    def pinned(self) -> tuple[int, int, int]:
        """How many state channels of the whole model are held at one, at zero, and how many there are."""
        return (
            sum(int(layer.ones.sum()) for layer in self.layers),
            sum(int(layer.zeros.sum()) for layer in self.layers),
            sum(len(layer.ones) for layer in self.layers),
        )

    def _pooled(self, what: str, layer: int | None) -> Float[Array, "n channels"]:
        layers = self.layers if layer is None else [self.layers[layer]]
        pooled = np.concatenate([getattr(one, what) for one in layers], axis=1)
        if not pooled.shape[1]:
            raise UserError(f"{self.name} has no learned state channels left: all are pinned")
        return pooled

    def figures(self) -> list[Figure]:
        return figures([self])

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows


def measure(model: nn.Module | Subject, inputs: Any, *, progress: Progress | None = None) -> Transitions:
    """The transitions of every layer on the sequences of `inputs` (sequences, length).

    Raises UserError for bad tokens and for a model that does not show its coefficients (attention has no transitions)."""
    subject = Subject.of(model)
    if not subject.has_coefficients:
        raise UserError(f"{subject.name} does not show its transitions: only ssmlens' own recurrent models do")
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    found: list[list[Layer]] = [[] for _ in subject.blocks]
    progress.begin(f"{subject.name}: transitions", n * len(found))

    def visit(seen: BlockPass) -> None:
        found[seen.index].append(_layer(seen.mixer.coefficients(seen.x)))
        progress.step()

    for i in range(n):
        subject.walk(tokens[i : i + 1], visit)
    return Transitions(subject.name, length, [_joined(layers) for layers in found])


def _layer(coefficients: Any) -> Layer:
    """Of one sequence."""
    length = coefficients.length
    ones, zeros = (mask.cpu().flatten() for mask in (coefficients.ones, coefficients.zeros))
    learned = ~(ones | zeros)
    stride = max(1, math.ceil(length / _KEPT))
    low = high = None
    kept: list[Tensor] = []
    counts = torch.zeros(BINS)
    for start in range(0, length, _CHUNK):
        a = coefficients.a_at(slice(start, min(start + _CHUNK, length)))[0]
        a = (a.abs() if a.is_complex() else a).flatten(1).float().cpu()
        low = a.amin(0) if low is None else torch.minimum(low, a.amin(0))
        high = a.amax(0) if high is None else torch.maximum(high, a.amax(0))
        counts += torch.histc(a[:, learned], BINS, 0, 1)
        kept.append(a[-start % stride :: stride])
    assert low is not None
    assert high is not None
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise UserError("the model's transitions hold NaN or infinity on these inputs")
    median = torch.cat(kept).median(0).values
    return Layer(
        low.double().numpy()[None], high.double().numpy()[None], median.double().numpy()[None],
        counts.long().numpy()[None], ones.numpy(), zeros.numpy(),
    )  # fmt: skip


def _joined(layers: list[Layer]) -> Layer:
    stacked = {
        name: np.concatenate([getattr(one, name) for one in layers]) for name in ("low", "high", "median", "histogram")
    }
    return Layer(**stacked, ones=layers[0].ones, zeros=layers[0].zeros)


def _mean(x: Float[Array, " n"], n: int, unit: str = "") -> Value:
    finite = bool(np.isfinite(x).all())
    error = float(x.std(ddof=1) / math.sqrt(n)) if n > 1 and finite else None
    return Value(value=float(x.mean()) if finite else math.inf, stderr=error, n=n, unit=unit)


def figures(results: Sequence[Transitions]) -> list[Figure]:
    """The cumulative histogram of ranges (the paper's Figure 6), the histogram of a, and the memory horizon by layer."""
    ranges, histograms, horizons = [], [], []
    for r in results:
        below = [r.share_below(float(t)) for t in THRESHOLDS]
        errors = [v.stderr for v in below if v.stderr is not None]
        ranges.append(
            Series(
                name=r.name,
                x=THRESHOLDS.tolist(),
                y=[v.value for v in below],
                stderr=errors if len(errors) == len(below) else None,
                group=r.name,
            )
        )
        counts = np.sum([layer.histogram.sum(0) for layer in r.layers], axis=0)
        centres = (np.arange(BINS) + 0.5) / BINS
        histograms.append(
            Series(name=r.name, x=centres.tolist(), y=(counts / counts.sum()).tolist(), style="step", group=r.name)
        )
        depth = [float(layer + 1) for layer in range(len(r.layers))]
        for quantile, label, style in _HORIZONS:
            lives = [r.half_life_quantile(quantile, layer) for layer in range(len(r.layers))]
            shown = [(x, v) for x, v in zip(depth, lives, strict=True) if 0 < v.value < math.inf]
            if shown:
                horizons.append(
                    Series(
                        name=f"{r.name}: {label}",
                        x=[x for x, _ in shown],
                        y=[v.value for _, v in shown],
                        style=style,
                        group=r.name,
                    )
                )
    method = _method(results[0])
    made = [
        Figure(
            id="transition-ranges", title="How far transitions move with the input", x_label="threshold on the range max a - min a",
            y_label="share of learned state channels at or below", series=ranges, method=method,
            meaning="Share of learned state channels whose transition moves by no more than the threshold over a sequence. A curve that rises "
            "early: most channels decay at much the same rate whatever they read.",
        ),
        Figure(
            id="transition-values", title="Where transitions lie", x_label="transition a", y_label="share of tokens and learned state channels",
            series=histograms, method=method, meaning="Near one a channel keeps what it holds, near zero it replaces it with the current token.",
        ),
    ]  # fmt: skip
    if horizons:
        made.append(
            Figure(
                id="memory-horizon",
                title="Memory of learned state channels",
                x_label="layer",
                y_label="half-life (tokens)",
                y_scale="log",
                series=horizons,
                method=method,
                meaning="Tokens until what a state channel holds has halved, at its median transition.",
            )
        )
    return made


def table(results: Sequence[Transitions]) -> Table:
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="state channels", meaning="inner channels × state channels of each"),
        Column(name="held at one"), Column(name="held at zero"),
        Column(name="largest a of those at zero", meaning="0 where they are held exactly"),
        Column(name="median a", meaning="over learned state channels, of their median over tokens"),
        Column(name="median range", meaning="max a - min a over the tokens of a sequence"),
        Column(name="range ≤ 0.5", meaning="share of learned state channels"),
        Column(name="half-life, median channel", unit="tokens"), Column(name="half-life, slowest tenth", unit="tokens"),
        Column(name="half-life ≥ length", meaning="share of learned state channels that could remember the whole sequence"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        for i, layer in enumerate(r.layers):
            zero = float(layer.high[:, layer.zeros].max()) if layer.zeros.any() else None
            row: list[Cell] = [r.name, i + 1, len(layer.ones), int(layer.ones.sum()), int(layer.zeros.sum()), zero]
            if layer.learned.any():
                row += [
                    _mean(np.median(layer.median[:, layer.learned], axis=1), r.n_sequences),
                    _mean(np.median(layer.ranges, axis=1), r.n_sequences), r.share_below(0.5, i),
                    r.half_life_quantile(0.5, i), r.half_life_quantile(0.9, i), r.share_remembering(r.length, i),
                ]  # fmt: skip
            rows.append(row + [None] * (len(columns) - len(row)))
    return Table(
        id="transitions", title="Transitions by layer", columns=columns, rows=rows, method=_method(results[0]),
        meaning="What every layer's transitions are on this text, how far they move and how long they remember.",
    )  # fmt: skip


def _method(r: Transitions) -> str:
    return (
        f"a_t of every state channel on {r.n_sequences} sequences of {r.length} tokens, at the scan's own input; extremes over all tokens of "
        "a sequence; half-life at the median over tokens; mean over sequences with its standard error. Pinned channels are left out."
    )
