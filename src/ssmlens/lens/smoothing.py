"""Over-smoothing: how much the tokens of a sequence still differ, at every depth (SPEC §3; the paper's §4, Figure 5).

    E(z) = 1/(T(T-1)) Σ_{t≠s} ‖z_t - z_s‖₂        relative sharpness = E(z) / mean_t ‖z_t‖₂

z is a sequence of T vectors: a layer's input b_t(x_t) and its memory h_t (both over the whole state, flattened), its mixer's output, its block's output.
Identical tokens have E = 0. Independent ones of mean zero have a relative sharpness near √2; a large common offset brings it to 0 however
different the tokens are, which is why both numbers are reported.

Exact up to `exact_up_to` tokens; beyond, all pairs of that many tokens drawn at random without replacement, with the standard error of
that (jackknife over tokens, as pairs that share a token are not independent).

Numerics: ‖a-b‖² = ‖a‖² + ‖b‖² - 2 a·b loses what a and b have in common, so the mean token is subtracted first, and it is done in
float64. An error of ε (‖a‖² + ‖b‖²) in the square is then at most √ε (‖a‖ + ‖b‖) in a distance, and since mean ‖z_t - z̄‖ ≤ E(z) for
centred z, E is right to about 2√ε ≈ 3e-8 of itself, whatever the sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens.layers import choose, large, state_size
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.ops import linear_scan
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
STREAMS = ("b", "h", "mixer", "block")
_MEANING = {"b": "inputs b_t", "h": "memories h_t", "mixer": "mixer output", "block": "block output"}
_BLOCK = 256
_LARGE_LAYERS = 8
_CHUNK = 64  # tokens of a layer's coefficients held at a time


@dataclass(frozen=True)
class Sharpness:
    """One sequence: E, the mean norm, and the standard error of E from drawing tokens (0 where all were used)."""

    mean_distance: float
    mean_norm: float
    sampling_error: float
    tokens: int

    @property
    def relative(self) -> float:
        """E over the mean norm; 0 for a sequence of zeros, whose tokens do not differ."""
        return self.mean_distance / self.mean_norm if self.mean_norm > 0 else 0.0


def sharpness(z: Float[Tensor, "length width"], *, exact_up_to: int = 1024, seed: int = 0) -> Sharpness:
    """E(z) of one sequence of vectors. Raises UserError for fewer than two tokens or NaN."""
    length = z.shape[0]
    if length < 2:
        raise UserError("sharpness compares tokens: it needs at least two")
    rows = _rows(length, exact_up_to, seed)
    return _of_rows(z if rows is None else z[rows], length)


def _rows(length: int, exact_up_to: int, seed: int) -> Tensor | None:
    """The tokens that are compared, in order; None for all."""
    if length <= exact_up_to:
        return None
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(length, exact_up_to, replace=False)))


def _of_rows(z: Float[Tensor, "m width"], length: int) -> Sharpness:
    """All pairs of m of a sequence's `length` tokens."""
    m = z.shape[0]
    if z.is_complex():
        z = torch.view_as_real(z).flatten(1)
    z = (z.cpu() if z.device.type == "mps" else z).double()
    mean_norm = float(z.norm(dim=1).mean())
    if not math.isfinite(mean_norm):
        raise UserError(
            "the model's activations hold NaN or infinity on these inputs: their sharpness cannot be measured"
        )
    z = z - z[:1]  # exactly zero for identical tokens, which subtracting a mean would not be
    z -= z.mean(0)
    squares = z.square().sum(1)
    totals = torch.zeros(m, dtype=torch.float64, device=z.device)  # Σ_s ‖z_t - z_s‖ for each t
    for start in range(0, m, _BLOCK):  # every block of rows against itself and the rows after it
        block = z[start : start + _BLOCK]
        size = len(block)
        distances = (
            (squares[start : start + size, None] + squares[start:] - 2 * (block @ z[start:].T)).clamp_min(0).sqrt()
        )
        distances.fill_diagonal_(0)
        totals[start : start + size] += distances.sum(1)
        totals[start + size :] += distances[:, size:].sum(0)
    total = float(totals.sum())
    mean_distance = total / (m * (m - 1))
    error = 0.0
    if m < length and m > 2:
        without = (total - 2 * totals) / ((m - 1) * (m - 2))
        variance = (m - 1) / m * float((without - without.mean()).square().sum())
        error = math.sqrt(variance * (1 - m / length))
    return Sharpness(mean_distance, mean_norm, error, m)


@dataclass(frozen=True, eq=False)
class Smoothing(Shown):
    """distance[stream][i, l] and norm[stream][i, l]: E and mean norm of sequence i at layer layers[stream][l] (counted from 1); streams
    as in STREAMS, those that the model shows (b and h: only where a layer is recurrent). sampling_error: of E, from drawing tokens."""

    name: str
    length: int
    tokens: int
    distance: dict[str, Float[Array, "n layers"]]
    norm: dict[str, Float[Array, "n layers"]]
    sampling_error: dict[str, Float[Array, "n layers"]] = field(repr=False)
    layers: dict[str, list[int]] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.distance["block"])

    @property
    def n_layers(self) -> int:
        return int(self.distance["block"].shape[1])

    def absolute(self, stream: str) -> list[Value]:
        """E per layer, mean over sequences. The standard error is that of the mean over sequences (which contains the drawing of tokens); for one
        sequence that of the drawing alone, None where nothing was drawn."""
        return self._values(self.distance[stream], self.sampling_error[stream])

    def relative(self, stream: str) -> list[Value]:
        """E over mean norm per layer, mean over sequences."""
        norm = np.where(self.norm[stream] > 0, self.norm[stream], 1.0)
        return self._values(self.relative_by_sequence(stream), self.sampling_error[stream] / norm)

    def relative_by_sequence(self, stream: str) -> Float[Array, "n layers"]:
        return self.distance[stream] / np.where(self.norm[stream] > 0, self.norm[stream], 1.0)

    def _values(self, x: Float[Array, "n layers"], drawing: Float[Array, "n layers"]) -> list[Value]:
        if len(x) > 1:
            return [Value.mean(layer) for layer in x.T]
        return [
            Value(value=float(v), stderr=float(e) if e else None, n=1) for v, e in zip(x[0], drawing[0], strict=True)
        ]

    def change_by_sequence(self) -> Float[Array, " n"]:
        """Relative sharpness of block outputs after the last layer over that after the first, per sequence."""
        x = self.relative_by_sequence("block")
        return np.divide(x[:, -1], x[:, 0], out=np.ones(len(x)), where=x[:, 0] > 0)

    def change_over_depth(self) -> Value:
        """Its mean: below one, depth blurs."""
        return Value.mean(self.change_by_sequence())

    def memories_smoother(self) -> tuple[int, int, int] | None:
        """In how many layers memories h_t are clearly smoother than inputs b_t (the 95 % interval of the difference, paired by sequence, lies
        below zero): by E itself, and relative to the norms; and of how many. None without coefficients, or with one sequence.

        By E it is nearly always so in a trained Mamba (the paper: in all), but h_t carries a factor Δ_t that b_t lacks and is simply
        smaller; the relative count has no such head start."""
        if "b" not in self.distance or self.n_sequences < 2:
            return None

        def count(b: Float[Array, "n layers"], h: Float[Array, "n layers"]) -> int:
            intervals = [Value.mean(layer).interval() for layer in (h - b).T]
            return sum(interval is not None and interval[1] < 0 for interval in intervals)

        return (
            count(self.distance["b"], self.distance["h"]),
            count(self.relative_by_sequence("b"), self.relative_by_sequence("h")),
            len(self.layers["b"]),
        )

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return [table([self])]

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    states: bool | int | None = None,
    exact_up_to: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> Smoothing:
    """Sharpness at every depth of a model, over the sequences of `inputs` (sequences, length).

    states: also b_t and h_t of every recurrent layer (True), of so many of them spread evenly, or of none (False); they are the costly part. None: all,
    in a large model 8, and there no more than √(2³¹ / numbers in a state) tokens are compared.
    Memory: of one sequence, min(length, exact_up_to) states of one layer. Raises UserError for bad tokens, NaN, or a model without blocks."""
    subject = Subject.of(model)
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    recurrent = subject.recurrent if states or states is None else []
    if states is None and large(subject, length):
        states = _LARGE_LAYERS
        exact_up_to = min(exact_up_to, math.isqrt(2**31 // state_size(subject)))
    if recurrent and states is not None and states is not True:
        recurrent = choose(states, recurrent)
    found: dict[str, dict[tuple[int, int], Sharpness]] = {}
    rows = _rows(length, exact_up_to, seed)
    progress.begin(f"{subject.name}: sharpness", n * len(subject.blocks))

    for i in range(n):

        def visit(seen: BlockPass, i: int = i) -> None:
            streams: dict[str, Tensor | None] = {"mixer": seen.y, "block": seen.out}
            if seen.index in recurrent:
                streams["b"], streams["h"] = _states(seen, rows)
            for stream, z in streams.items():
                if z is None:
                    continue
                # of b and h only the chosen tokens were kept
                chosen = z[0] if rows is None or stream in ("b", "h") else z[0][rows.to(z.device)]
                found.setdefault(stream, {})[i, seen.index] = _of_rows(chosen.flatten(1), length)
            progress.step()

        subject.walk(tokens[i : i + 1], visit)

    streams = [stream for stream in STREAMS if stream in found]
    layers = {stream: sorted({layer for _, layer in found[stream]}) for stream in streams}

    def grid(what: str) -> dict[str, Array]:
        return {
            stream: np.array([[getattr(found[stream][i, layer], what) for layer in layers[stream]] for i in range(n)])
            for stream in streams
        }

    return Smoothing(
        name=subject.name, length=length, tokens=length if rows is None else len(rows),
        distance=grid("mean_distance"), norm=grid("mean_norm"), sampling_error=grid("sampling_error"),
        layers={stream: [layer + 1 for layer in layers[stream]] for stream in streams},
    )  # fmt: skip


def _states(seen: BlockPass, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """b_t (Δ_t b_t where a family has no b_t of its own) and h_t of one sequence at the chosen tokens, a chunk of tokens at a time."""
    coefficients = seen.mixer.coefficients(seen.x)
    wanted = torch.arange(coefficients.length) if rows is None else rows
    inputs, memories, h = [], [], None
    for start in range(0, coefficients.length, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, coefficients.length))
        a, u = coefficients.a_at(chunk), coefficients.u_at(chunk)
        b = coefficients.b_at(chunk)
        b = u if b is None else b
        here = wanted[(wanted >= start) & (wanted < chunk.stop)] - start
        states, h = linear_scan(a, u, h0=h, return_final_state=True)
        inputs.append(b[:, here.to(u.device)])
        memories.append(states[:, here.to(u.device)])
    return torch.cat(inputs, 1), torch.cat(memories, 1)


def figures(results: Sequence[Smoothing]) -> list[Figure]:
    """Relative sharpness by depth: of block outputs, of mixer outputs, and of inputs against memories (the paper's Figure 5)."""
    titles = {
        "block": (
            "Does depth blur? Sharpness of block outputs",
            "A line that falls means that tokens become alike with depth: the model blurs.",
        ),
        "mixer": (
            "Sharpness of mixer outputs",
            "What each mixer adds to the residual stream: low means much the same vector for every token.",
        ),
    }
    made = []
    for stream, (title, meaning) in titles.items():
        shown = [r for r in results if stream in r.distance]
        series = [_series(r, stream, r.name) for r in shown]
        if series:
            made.append(_figure(f"sharpness-{stream}", title, series, meaning, results))
    series = [
        _series(r, stream, f"{r.name}: {_MEANING[stream]}", "line" if stream == "b" else "fit")
        for r in results
        if "b" in r.distance
        for stream in ("b", "h")
    ]
    if series:
        meaning = "What each layer writes (inputs b_t) and what it remembers (memories h_t): memories below inputs are a low-pass filter."
        made.append(_figure("sharpness-states", "Inputs and memories of every layer", series, meaning, results))
    return made


def _series(r: Smoothing, stream: str, name: str, style: Any = "line") -> Series:
    values = r.relative(stream)
    errors = [v.stderr for v in values]
    stderr = [float(e) for e in errors if e is not None] if all(e is not None for e in errors) else None
    depth = [float(layer) for layer in r.layers[stream]]
    return Series(name=name, x=depth, y=[v.value for v in values], stderr=stderr, group=r.name, style=style)


def _figure(id: str, title: str, series: list[Series], meaning: str, results: Sequence[Smoothing]) -> Figure:
    return Figure(
        id=id, title=title, x_label="layer", y_label="relative sharpness E(z) / mean ‖z‖", series=series, meaning=meaning, method=_method(results[0])
    )  # fmt: skip


def table(results: Sequence[Smoothing]) -> Table:
    columns = [Column(name="model"), Column(name="layer")]
    for stream in STREAMS:
        columns.append(Column(name=f"E of {_MEANING[stream]}", meaning="mean distance between two tokens"))
        columns.append(
            Column(
                name=f"relative E of {_MEANING[stream]}",
                meaning="the same over the mean norm: about √2 for unrelated tokens",
            )
        )
    rows: list[list[Cell]] = []
    for r in results:
        measured = {
            stream: dict(zip(layers, zip(r.absolute(stream), r.relative(stream), strict=True), strict=True))
            for stream, layers in r.layers.items()
        }
        for layer in r.layers["block"]:
            cells: list[Cell] = []
            for stream in STREAMS:
                cells += measured.get(stream, {}).get(layer, (None, None))
            rows.append([r.name, layer, *cells])
    return Table(
        id="sharpness", title="Sharpness by depth", columns=columns, rows=rows,
        meaning="How far two tokens of a sequence lie apart, on average, in every layer.", method=_method(results[0]),
    )  # fmt: skip


def _method(r: Smoothing) -> str:
    how = "all pairs of tokens" if r.tokens == r.length else f"all pairs of {r.tokens} tokens drawn from each sequence"
    return (
        f"E(z): mean distance between the vectors of two tokens of a sequence, {how}, mean over {r.n_sequences} sequences of "
        f"{r.length} tokens with its standard error; divided by the mean norm where called relative."
    )
