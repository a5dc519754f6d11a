"""Influence: how much token s moves output t, as a function of how far back it lies (SPEC §2; the paper's influential score, §3.1).

    score(d) = √ mean over sequences, targets t and probes v of ‖vᵀ ∂y_t/∂x_{t-d}‖²  =  root mean square of ‖∂y_t/∂x_{t-d}‖_F

x_s is the input embedding of token s (d_model), y_t the last hidden state before the head (or the logits on request). Two methods for
the same number: `exact`, one vector-Jacobian product per output dimension, and `probes`, k random ±1 vectors v, for which
E‖vᵀJ‖² = ‖J‖_F² (the mean of *squares* is unbiased, the mean of norms is not). Either is one forward pass and many backward passes
through its graph, so memory is linear in the length.

Only what lies above the noise floor is fitted (`ssmlens.lens.floor`, which measures it).

The score's size depends on the scale of the embeddings; its slope, its shares and its half-life do not, so those are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens import decay
from ssmlens.lens.floor import Floor, noise_floor
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import Subject
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
SHARES = (0.01, 0.1, 0.5)


@dataclass(frozen=True, eq=False)
class Influence:
    """squares[i, d]: for sequence i, the sum over its targets of the (mean over probes of the) squared score at distance d;
    counts[i, d]: of how many targets. Everything else follows from these."""

    name: str
    method: str
    output: str
    length: int
    targets: str
    seed: int
    squares: Float[Array, "n D"]
    counts: Float[Array, "n D"]
    floor: Floor
    fit: decay.Fit | None = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.squares)

    @property
    def distances(self) -> Int[Array, " D"]:
        """t - s in tokens: 0 is the token at the target itself."""
        return np.arange(self.squares.shape[1])

    @cached_property
    def score(self) -> Float[Array, " D"]:
        return decay.pooled_curve(self.squares, self.counts)

    @cached_property
    def stderr(self) -> Float[Array, " D"] | None:
        """By bootstrap over sequences; None for one sequence."""
        n = self.n_sequences
        if n < 2:
            return None
        weights = decay.resampling_weights(n, self.seed)
        return decay.spread(decay.resampled_curves(self.squares, self.counts, weights), n)

    def share_within(self, fraction: float) -> Value:
        """Share of the squared influence that the last `fraction` of the context holds (the token at the target included)."""
        tokens = max(1, math.ceil(fraction * self.squares.shape[1]))
        return self._value(lambda curve: decay.share_within(curve, tokens))

    @cached_property
    def effective_context(self) -> Value:
        """How many of the most recent tokens hold 90 % of the squared influence."""
        return self._value(decay.effective_context, "tokens")

    @cached_property
    def far_fit(self) -> decay.Fit | None:
        """The line through the farther half of the distances alone: where a short convolution or the residual path make the nearest tokens
        special, this is what the recurrence itself does."""
        far = self.squares.shape[1] // 2
        return decay.fit_decay(self.squares, self.counts, floor=self.floor.value, seed=self.seed, first=far)

    @cached_property
    def tail(self) -> Value:
        """Root mean square score over the farther half of the distances, relative to the score at distance 1: how strong a trace is left."""
        half = self.squares.shape[1] // 2

        def trace(curve: Float[Array, "... D"]) -> Float[Array, "..."]:
            far, near = np.sqrt(np.square(curve[..., half:]).mean(-1)), curve[..., 1]
            return np.divide(far, near, out=np.zeros_like(far), where=near > 0)

        return self._value(trace)

    @property
    def kappa(self) -> Value | None:
        if self.fit is None:
            return None
        return Value(value=self.fit.kappa, stderr=self.fit.stderr, n=self.n_sequences, unit="1/token")

    @property
    def half_life(self) -> Value | None:
        return _half_life(self.fit, self.n_sequences)

    def _value(self, statistic: Any, unit: str = "") -> Value:
        value, error = decay.with_stderr(statistic, self.squares, self.counts, self.seed)
        return Value(value=value, stderr=error, n=self.n_sequences, unit=unit)

    def figure(self) -> Figure:
        return figure([self])

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows

    def __str__(self) -> str:
        fit = self.fit
        decay_words = (
            "no decay could be fitted" if fit is None else f"half-life {fit.half_life:.3g} tokens (R² {fit.r2:.2f})"
        )
        return f"{self.name}: {decay_words}; 90 % of the squared influence in the last {self.effective_context.value:.0f} tokens"


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    method: Literal["probes", "exact"] = "probes",
    probes: int = 8,
    targets: Literal["last"] | int | Sequence[int] = "last",
    output: Literal["hidden", "logits"] = "hidden",
    floor: Literal["measured", "eps"] | float = "measured",
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Influence:
    """Influence of every token of `inputs` (sequences, length) on the outputs at the targets.

    targets: "last"; a number k (k positions of each sequence's second half, drawn at random); or the positions themselves.
    batch_size: sequences run together; it changes memory and speed, not what is measured (probes are drawn per sequence).
    Raises UserError for bad tokens, targets or options, and where the model answers with NaN."""
    subject = Subject.of(model)
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    if method not in ("probes", "exact") or output not in ("hidden", "logits"):
        raise UserError(
            f"method is 'probes' or 'exact' and output is 'hidden' or 'logits', not {method!r} and {output!r}"
        )
    if probes < 1:
        raise UserError(f"at least one probe is needed, not {probes}")
    rng = np.random.default_rng(seed)
    positions, described = _targets(targets, n, length, rng)
    width = _output_width(subject, tokens, output)
    reach = int(positions.max(1).min()) + 1  # distances that every sequence has
    squares, counts = np.zeros((n, reach)), np.zeros((n, reach))
    vectors = _Vectors(method, probes, n, positions.shape[1], width, seed)
    if batch_size is None:
        batch_size = max(1, 2**19 // (length * width))
    progress.begin(f"{subject.name}: influence", n * positions.shape[1] * vectors.per_target)
    for start in range(0, n, batch_size):
        rows = range(start, min(start + batch_size, n))
        with subject.still():
            embeddings, hidden = _forward(subject, tokens[start : rows.stop])
            for k in range(positions.shape[1]):
                at = torch.as_tensor(positions[start : rows.stop, k], device=hidden.device)
                y = hidden[torch.arange(len(rows), device=hidden.device), at]
                y = subject.logits(y) if output == "logits" else y
                for p in range(vectors.per_target):
                    v = vectors(rows, k, p).to(y)
                    (gradient,) = torch.autograd.grad(y, embeddings, grad_outputs=v, retain_graph=True)
                    norms = _squared_norms(gradient) / vectors.mean_over
                    for row, i in enumerate(rows):
                        d = min(int(positions[i, k]) + 1, reach)
                        squares[i, :d] += norms[row, int(positions[i, k]) - np.arange(d)]
                        counts[i, :d] += p == 0
                    progress.step(len(rows))
            del embeddings, hidden, y, gradient
    if not np.isfinite(squares).all():
        raise UserError(
            f"{subject.name} answers these inputs with NaN or infinite gradients: its influence cannot be measured"
        )
    largest = float(decay.pooled_curve(squares, counts).max())
    found = noise_floor(subject, tokens[:1], int(positions[0, 0]), largest, output=output, floor=floor, seed=seed)
    return Influence(
        name=subject.name, method=f"{probes} probes" if method == "probes" else "exact",
        output="last hidden state" if output == "hidden" else "logits", length=length, targets=described, seed=seed,
        squares=squares, counts=counts, floor=found, fit=decay.fit_decay(squares, counts, floor=found.value, seed=seed),
    )  # fmt: skip


def _half_life(fit: decay.Fit | None, n: int) -> Value | None:
    if fit is None:
        return None
    error = fit.half_life_stderr
    return Value(value=fit.half_life, stderr=error if math.isfinite(error) else None, n=n, unit="tokens")


class _Vectors:
    """The vectors that multiply the Jacobian from the left: ±1 ones, or one after the other of the standard basis."""

    def __init__(self, method: str, probes: int, n: int, k: int, width: int, seed: int) -> None:
        self.exact, self.width = method == "exact", width
        self.per_target = width if self.exact else probes
        self.mean_over = 1 if self.exact else probes
        if not self.exact:
            # one stream per sequence, so that neither the batch size nor further sequences change a sequence's probes
            self.signs = np.stack(
                [np.random.default_rng([seed, i]).integers(0, 2, (k, probes, width), np.int8) for i in range(n)]
            )

    def __call__(self, rows: range, k: int, p: int) -> Float[Tensor, "batch width"]:
        if self.exact:
            return torch.eye(self.width)[p].expand(len(rows), -1)
        return torch.from_numpy(self.signs[rows.start : rows.stop, k, p] * 2.0 - 1.0)


def _forward(subject: Subject, tokens: Tensor) -> tuple[Tensor, Tensor]:
    embeddings = subject.embed(tokens).detach().requires_grad_()
    with torch.enable_grad():
        return embeddings, subject.run(embeddings)


def _squared_norms(gradient: Float[Tensor, "batch length d_model"]) -> Float[Array, "batch length"]:
    """In float64: the square of anything below 1e-19 would underflow in float32."""
    squared: Array = gradient.detach().cpu().double().square().sum(-1).numpy()
    return squared


def _output_width(subject: Subject, tokens: Tensor, output: str) -> int:
    with subject.still(), torch.no_grad():
        y = subject.run(subject.embed(tokens[:1, :2]))
        return int((subject.logits(y) if output == "logits" else y).shape[-1])


def _targets(targets: Any, n: int, length: int, rng: np.random.Generator) -> tuple[Int[Array, "n k"], str]:
    if isinstance(targets, str):
        if targets != "last":
            raise UserError(f"targets is 'last', a number of positions or the positions themselves, not {targets!r}")
        return np.full((n, 1), length - 1), "the last position"
    if isinstance(targets, int):
        half = np.arange(length // 2, length)
        if not 1 <= targets <= len(half):
            raise UserError(f"{targets} targets cannot be drawn from the {len(half)} positions of the second half")
        drawn = np.stack([rng.choice(half, targets, replace=False) for _ in range(n)])
        return drawn, f"{targets} positions of each sequence's second half"
    positions = np.unique(np.asarray(list(targets), dtype=int))
    if not len(positions) or positions[0] < 0 or positions[-1] >= length or positions[-1] < 3:
        raise UserError(f"targets must lie in 0..{length - 1} and reach beyond 3, not {list(targets)}")
    return np.tile(positions, (n, 1)), f"positions {', '.join(map(str, positions))}"


def figure(results: Sequence[Influence]) -> Figure:
    """Score against distance, one line per model with its standard error, and each fitted line (the paper's Figure 1)."""
    series: list[Series] = []
    for r in results:
        keep = _drawn(r.score)
        errors = None if r.stderr is None else r.stderr[keep].tolist()
        series.append(
            Series(
                name=r.name,
                x=r.distances[keep].astype(float).tolist(),
                y=r.score[keep].tolist(),
                stderr=errors,
                group=r.name,
            )
        )
        if r.fit is not None:
            ends = np.array([r.fit.first, r.fit.last], dtype=float)
            label = f"{r.name}: half-life {_tokens(r.fit.half_life)}"
            series.append(Series(name=label, x=ends.tolist(), y=r.fit.line(ends).tolist(), style="fit", group=r.name))
    floor = max(r.floor.value for r in results)
    return Figure(
        id="influence", title="Influence of a token by its distance", x_label="distance t - s (tokens)",
        y_label="influence ‖∂y_t/∂x_s‖", y_scale="log", y_floor=floor or None, series=series,
        meaning="How strongly a token moves the output, by how many tokens ago it was. A straight line downwards is exponential "
        "forgetting; a flat one would be memory. Compare slopes, not heights: heights depend on the scale of the embeddings.",
        method=_method(results[0]),
    )  # fmt: skip


def position_figure(results: Sequence[Influence]) -> Figure | None:
    """The same by position in the text (the paper's Figure 7a): None unless every target was the last position."""
    if any(r.targets != "the last position" for r in results):
        return None
    series = []
    for r in results:
        keep = _drawn(r.score)[::-1]
        relative = r.score / r.score.max()
        errors = None if r.stderr is None else (r.stderr / r.score.max())[keep].tolist()
        x = (r.length - 1 - r.distances[keep]).astype(float).tolist()
        series.append(Series(name=r.name, x=x, y=relative[keep].tolist(), stderr=errors, group=r.name))
    return Figure(
        id="influence-by-position", title="Which tokens move the last output", x_label="position s (tokens)",
        y_label="influence on the last output, largest = 1", y_scale="log", series=series,
        meaning="Each position's influence on the last output, relative to the largest. High at the right end only: recency. "
        "High at both ends: the pattern known from attention.",
        method=_method(results[0]),
    )  # fmt: skip


def table(results: Sequence[Influence]) -> Table:
    columns = [
        Column(name="model"),
        Column(
            name="half-life",
            unit="tokens",
            meaning="distance over which the fitted score halves; infinite: it does not fall",
        ),
        Column(name="95 % interval", unit="tokens"),
        Column(name="decay κ̂", unit="1/token", meaning="slope of log score against distance, sign turned"),
        Column(name="R²", meaning="how much of log score the straight line explains"),
        Column(
            name="R² power law",
            meaning="the same for a power of the distance: clearly larger means no single half-life",
        ),
        Column(
            name="half-life, farther half", unit="tokens", meaning="fitted over the farther half of the distances alone"
        ),
        Column(
            name="effective context",
            unit="tokens",
            meaning="most recent tokens that hold 90 % of the squared influence",
        ),
        *(
            Column(name=f"last {100 * f:g} %", meaning="share of squared influence in this part of the context")
            for f in SHARES
        ),
        Column(name="trace", meaning="score over the farther half of the context relative to that at distance 1"),
        Column(name="noise floor", meaning="scores below are numerical noise"),
    ]
    rows: list[list[Cell]] = []
    for r in results:
        fit: list[Cell] = [None] * 5
        if r.fit is not None:
            low, high = r.fit.half_life_interval
            fit = [
                r.half_life,
                f"{_number(low)} to {_number(high)}",
                r.kappa,
                round(r.fit.r2, 4),
                round(r.fit.r2_power, 4),
            ]
        shares: list[Cell] = [r.share_within(f) for f in SHARES]
        far = _half_life(r.far_fit, r.n_sequences)
        rows.append([r.name, *fit, far, r.effective_context, *shares, r.tail, r.floor.value])
    return Table(
        id="influence", title="How fast influence decays", columns=columns, rows=rows,
        meaning="The half-life is the distance over which a token's influence on the output halves.",
        method=_method(results[0]) + (f" Interval: {results[0].fit.how}." if results[0].fit else ""),
    )  # fmt: skip


def _method(r: Influence) -> str:
    how = (
        "random ±1 probes, unbiased in the square"
        if "probes" in r.method
        else "one vector-Jacobian product per output dimension"
    )
    return (
        f"Root mean square of ‖∂y_t/∂x_s‖_F over {r.n_sequences} sequences of {r.length} tokens; x: input embedding, y: {r.output} at "
        f"{r.targets}; {r.method} ({how}); standard errors by bootstrap over sequences. Line: least squares of log score on "
        f"distance ≥ 1 above the noise floor ({r.floor.how})."
    )


def _drawn(score: Float[Array, " D"]) -> Int[Array, " m"]:
    """Distances that can be drawn: zeros have no logarithm."""
    return np.flatnonzero(score > 0)


def _number(x: float) -> str:
    return "∞" if math.isinf(x) else f"{x:.3g}"


def _tokens(x: float) -> str:
    return "infinite" if math.isinf(x) else f"{x:.3g} tokens"
