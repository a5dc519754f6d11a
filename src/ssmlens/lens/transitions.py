"""Transitions: what a layer's a_t are on real input, how far they move, how long they remember (SPEC §3, the paper's Figure 6).

    range of a state channel on a sequence      max_t a_t - min_t a_t          0: it decays the same whatever it reads
    what it keeps of the first token            Π_{t=2..T} a_t
    its memory half-life                        ln 2 (T-1) / -Σ_{t=2..T} ln a_t         tokens; infinite at a = 1, 0 at a = 0

The half-life is that of the constant transition that would keep as much; one token at a = 0 empties a channel, whatever the others are.
a_1 multiplies h_0 = 0 and is left out of the product. Of a complex a the modulus is taken. State channels that polarization holds at one
or zero are counted, and left out of everything that is said about learned ones. Layers without a diagonal transition (attention) are
left out. Nothing larger than a chunk of one sequence's a of a single layer is held in memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.results import Cell, Column, Figure, Map, Panel, Series, Table, Value

Array = np.ndarray
BINS = 50
THRESHOLDS = np.linspace(0, 1, 101)
_CHUNK = 64
_COUNTED = 2**18  # of a chunk's numbers that go into the histogram
_QUANTILES = 101
_FOREVER = 1e6  # tokens, in pictures
_HORIZONS: tuple[tuple[float, str, Literal["line", "fit"]], ...] = (
    (0.5, "median channel", "line"),
    (0.9, "slowest tenth begins", "fit"),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's state channels (flattened to F) on n sequences. low, high: of a over the tokens of each sequence but the first.
    logsum: Σ ln a over all tokens but the first, `steps` of them: the logarithm of what is left of the first token at the last.
    histogram: how many (token, learned channel) have a in each of BINS equal bins of [0, 1]; in large layers of every so many tokens. ones, zeros: which are pinned."""

    low: Float[Array, "n F"]
    high: Float[Array, "n F"]
    logsum: Float[Array, "n F"]
    steps: int
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
        return half_life(self.logsum[:, self.learned], self.steps)

    @property
    def remembers(self) -> Bool[Array, "n learned"]:
        """Whether at least half of the first token is left at the last."""
        return self.logsum[:, self.learned] >= math.log(0.5)


def half_life(logsum: Float[Array, "..."], steps: int) -> Float[Array, "..."]:
    """Tokens until a state has halved under the mean rate of `steps` transitions whose logarithms sum to `logsum`: 0 where one of them
    is zero (-inf), infinite where nothing is lost."""
    rate = -np.asarray(logsum, dtype=float) / steps
    return np.divide(math.log(2), rate, out=np.full_like(rate, math.inf), where=rate > 0)


@dataclass(frozen=True, eq=False)
class Transitions(Shown):
    """numbers[i]: which layer of the model layers[i] is, counted from 1 (those without a diagonal transition are not among them)."""

    name: str
    length: int
    numbers: list[int]
    layers: list[Layer] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.layers[0].low)

    def share_below(self, threshold: float, layer: int | None = None) -> Value:
        """Share of learned state channels whose range on a sequence is at most `threshold`, with its standard error over sequences."""
        ranges = self._pooled("ranges", layer)
        return Value.mean((ranges <= threshold).mean(1))

    def half_life_quantile(self, quantile: float, layer: int | None = None) -> Value:
        """A quantile of the memory half-life over learned state channels, tokens."""
        lives = self._pooled("half_lives", layer)
        # "higher" picks an existing value: interpolating with an infinite neighbour would give NaN
        found = np.quantile(lives, quantile, axis=1, method="higher")
        if not np.isfinite(found).all():
            return Value(value=math.inf, n=self.n_sequences, unit="tokens")
        return Value.mean(found, "tokens")

    def share_remembering(self, layer: int | None = None) -> Value:
        """Share of learned state channels that at the last token hold at least half of what the first one wrote."""
        return Value.mean(self._pooled("remembers", layer).mean(1))

    def pinned(self) -> tuple[int, int, int]:
        """How many state channels of the whole model are held at one, at zero, and how many there are."""
        return (
            sum(int(layer.ones.sum()) for layer in self.layers),
            sum(int(layer.zeros.sum()) for layer in self.layers),
            sum(len(layer.ones) for layer in self.layers),
        )

    def _pooled(self, what: Literal["ranges", "half_lives", "remembers"], layer: int | None) -> Array:
        """(sequences, learned state channels) of one layer (an index into `layers`) or of all."""
        layers = self.layers if layer is None else [self.layers[layer]]
        pooled = np.concatenate([getattr(one, what) for one in layers], axis=1)
        if not pooled.shape[1]:
            raise UserError(f"{self.name} has no learned state channels left: all are pinned")
        return pooled

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return [table([self])]

    def maps(self) -> list[Map]:
        return maps([self])

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows


def measure(model: nn.Module | Subject, inputs: Any, *, progress: Progress | None = None) -> Transitions:
    """The transitions of every recurrent layer on the sequences of `inputs` (sequences, length).

    Raises UserError for bad tokens and for a model that shows no coefficients (attention has no transitions)."""
    subject = Subject.of(model)
    if not subject.recurrent:
        raise UserError(f"{subject.name} does not show its transitions: only ssmlens' own recurrent models do")
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    found: dict[int, list[Layer]] = {index: [] for index in subject.recurrent}
    progress.begin(f"{subject.name}: transitions", n * len(found))

    def visit(seen: BlockPass) -> None:
        if seen.index in found:
            found[seen.index].append(_layer(seen.mixer.coefficients(seen.x)))
            progress.step()

    for i in range(n):
        subject.walk(tokens[i : i + 1], visit)
    return Transitions(subject.name, length, [i + 1 for i in found], [_joined(layers) for layers in found.values()])


def _layer(coefficients: Any) -> Layer:
    """Of one sequence."""
    length = coefficients.length
    ones, zeros = (mask.cpu().flatten() for mask in (coefficients.ones, coefficients.zeros))
    learned = ~(ones | zeros)
    every = bool(learned.all())
    low = high = logsum = None
    counts = torch.zeros(BINS)
    for start in range(0, length, _CHUNK):
        a = coefficients.a_at(slice(start, min(start + _CHUNK, length)))[0]
        a = (a.abs() if a.is_complex() else a).flatten(1).float().cpu()
        if start == 0 and length > 1:
            a = a[1:]  # a_1 meets only h_0 = 0; some families have it at 0 (Griffin)
        kept = a.log().sum(0, dtype=torch.float64) if length > 1 else torch.zeros(a.shape[1], dtype=torch.float64)
        low = a.amin(0) if low is None else torch.minimum(low, a.amin(0))
        high = a.amax(0) if high is None else torch.maximum(high, a.amax(0))
        logsum = kept if logsum is None else logsum + kept
        some = a[:: max(1, a.numel() // _COUNTED)]
        counts += torch.histc(some if every else some[:, learned], BINS, 0, 1)
    assert low is not None
    assert high is not None
    assert logsum is not None
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise UserError("the model's transitions hold NaN or infinity on these inputs")
    return Layer(
        low.double().numpy()[None], high.double().numpy()[None], logsum.numpy()[None], length - 1,
        counts.long().numpy()[None], ones.numpy(), zeros.numpy(),
    )  # fmt: skip


def _joined(layers: list[Layer]) -> Layer:
    stacked = {
        name: np.concatenate([getattr(one, name) for one in layers]) for name in ("low", "high", "logsum", "histogram")
    }
    return Layer(**stacked, steps=layers[0].steps, ones=layers[0].ones, zeros=layers[0].zeros)


def figures(results: Sequence[Transitions]) -> list[Figure]:
    """The cumulative histogram of ranges (the paper's Figure 6), the histogram of a, and the memory horizon by layer."""
    ranges, histograms, horizons = [], [], []
    results = [r for r in results if any(layer.learned.any() for layer in r.layers)]
    if not results:
        return []
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
        learning = [i for i, layer in enumerate(r.layers) if layer.learned.any()]
        for quantile, label, style in _HORIZONS:
            lives = [(float(r.numbers[i]), r.half_life_quantile(quantile, i)) for i in learning]
            shown = [(x, v) for x, v in lives if 0 < v.value < math.inf]
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
                meaning="Tokens until what a state channel holds has halved, at the mean rate at which it lost the first token of a sequence.",
            )
        )
    return made


def maps(results: Sequence[Transitions]) -> list[Map]:
    """Layer by layer: the histogram of a, the cumulative histogram of ranges, and the half-life of every state channel, from the shortest to the
    longest (quantiles, where there are more of them than columns)."""
    results = [r for r in results if any(layer.learned.any() for layer in r.layers)]
    if not results:
        return []
    depth = max(max(r.numbers) for r in results)
    method = _method(results[0])

    def panels(row: Callable[[Layer], Array], columns: int) -> list[Panel]:
        made = []
        for r in results:
            values = np.full((depth, columns), math.nan)
            for number, layer in zip(r.numbers, r.layers, strict=True):
                if layer.learned.any():
                    values[number - 1] = row(layer)
            shown = [[float(f"{x:.3g}") for x in line] for line in values]
            made.append(Panel(name=r.name, values=shown, group=r.name))
        return made

    quantiles = np.linspace(0, 1, _QUANTILES)
    layers = [float(number) for number in range(1, depth + 1)]
    described: tuple[tuple[str, str, str, str, Any, list[float], Callable[[Layer], Array], str], ...] = (
        (
            "values", "Where transitions lie, layer by layer", "transition a", "share of the layer's tokens and learned state channels", "linear",
            ((np.arange(BINS) + 0.5) / BINS).tolist(), lambda layer: layer.histogram.sum(0) / layer.histogram.sum(),
            "Right: what is held is kept; left: it is replaced by the current token.",
        ),
        (
            "ranges", "How far transitions move, layer by layer", "threshold on the range max a - min a", "share of learned state channels at or below", "linear",
            THRESHOLDS[::4].tolist(), lambda layer: (layer.ranges[..., None] <= THRESHOLDS[::4]).mean((0, 1)),
            "Cumulative histogram of every layer. Bright from the left on: its state channels decay at much the same rate whatever they read.",
        ),
        (
            "horizons", "Memory of every learned state channel, layer by layer", "state channels, from the most forgetful on (%)", "half-life (tokens)", "log",
            (100 * quantiles).tolist(), lambda layer: np.quantile(np.minimum(layer.half_lives, _FOREVER), quantiles, axis=1, method="higher").mean(1),
            f"Every state channel of a layer in the order of its memory. {_FOREVER:g} tokens stands for whatever is longer, and for ever.",
        ),
    )  # fmt: skip
    return [
        Map(
            id=f"transition-{id}-by-layer", title=title, x_label=x_label, y_label="layer", unit=unit, x=x, y=layers,
            panels=panels(row, len(x)), scale=scale, meaning=meaning, method=method,
        )
        for id, title, x_label, unit, scale, x, row, meaning in described
    ]  # fmt: skip


def table(results: Sequence[Transitions]) -> Table:
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="state channels", meaning="inner channels × state channels of each"),
        Column(name="held at one"), Column(name="held at zero"),
        Column(name="largest a of those at zero", meaning="0 where they are held exactly"),
        Column(name="median range", meaning="max a - min a over the tokens of a sequence"),
        Column(name="range ≤ 0.5", meaning="share of learned state channels"),
        Column(name="half-life, median channel", unit="tokens"), Column(name="half-life, slowest tenth", unit="tokens"),
        Column(name="remember the sequence", meaning="share of learned state channels that hold half of the first token at the last"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        for i, layer in enumerate(r.layers):
            zero = float(layer.high[:, layer.zeros].max()) if layer.zeros.any() else None
            row: list[Cell] = [
                r.name,
                r.numbers[i],
                len(layer.ones),
                int(layer.ones.sum()),
                int(layer.zeros.sum()),
                zero,
            ]
            if layer.learned.any():
                row += [
                    Value.mean(np.median(layer.ranges, axis=1)), r.share_below(0.5, i),
                    r.half_life_quantile(0.5, i), r.half_life_quantile(0.9, i), r.share_remembering(i),
                ]  # fmt: skip
            rows.append(row + [None] * (len(columns) - len(row)))
    return Table(
        id="transitions", title="Transitions by layer", columns=columns, rows=rows, method=_method(results[0]),
        meaning="What every layer's transitions are on this text, how far they move and how long they remember.",
    )  # fmt: skip


def _method(r: Transitions) -> str:
    return (
        f"a_t of every state channel on {r.n_sequences} sequences of {r.length} tokens, at the scan's own input; extremes over all tokens of "
        "a sequence but the first, whose transition meets an empty state; half-life ln 2 (T-1) / -Σ ln a_t from what the product of a_t leaves of the first token; mean over sequences with its "
        "standard error. Pinned channels are left out."
    )
