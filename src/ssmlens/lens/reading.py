"""What a classifier reads: how much each input moves its logits (SPEC §2, for a model that answers once and not at every token).

    score(s) = √ mean over sequences of ‖∂logits/∂x_s‖_F²        x_s: what enters the first block in place of input s, before a class token

Exact: one vector-Jacobian product for every logit. Beside it stands an even spread, in which a tenth of the inputs holds a tenth of the squared
influence. A class token, or the last hidden state, can only be read through the recurrence; a mean over hidden states reads every
position at once, and there a decay with distance need not show. The recency index is the last third's share minus the first third's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens import decay
from ssmlens.lens.jacobian import Backward
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import Subject
from ssmlens.results import Cell, Column, Figure, Map, Panel, Series, Table, Value

Array = np.ndarray
SHARES = (0.01, 0.1, 0.5)
MATTERS = 0.05  # a recency index below is not worth a reader's attention, however significant
_BINS = 128
_BATCH = 2**19  # numbers in the embeddings of the sequences that go through together


@dataclass(frozen=True, eq=False)
class Reading(Shown):
    """squares[i, s]: of sequence i, the squared score of input s. outputs: how many numbers the model answers with."""

    name: str
    outputs: int
    seed: int
    squares: Float[Array, "n length"] = field(repr=False)

    @property
    def length(self) -> int:
        return self.squares.shape[1]

    @cached_property
    def score(self) -> Float[Array, " length"]:
        return decay.pooled_curve(self.squares, np.ones_like(self.squares))

    def share(self, first: int, last: int) -> Value:
        """Of the squared influence, that of the inputs first .. last - 1."""

        def of(curve: Float[Array, "... length"]) -> Float[Array, "..."]:
            squares = np.square(curve)
            whole = squares.sum(-1)
            return np.divide(squares[..., first:last].sum(-1), whole, out=np.zeros_like(whole), where=whole > 0)

        return self._value(of)

    def last_share(self, fraction: float) -> Value:
        return self.share(self.length - max(1, round(fraction * self.length)), self.length)

    @cached_property
    def recency_index(self) -> Value:
        third = self.length // 3

        def of(curve: Float[Array, "... length"]) -> Float[Array, "..."]:
            squares = np.square(curve)
            whole = squares.sum(-1)
            more = squares[..., -third:].sum(-1) - squares[..., :third].sum(-1)
            return np.divide(more, whole, out=np.zeros_like(whole), where=whole > 0)

        return self._value(of)

    def _value(self, statistic: Callable[[Array], Array]) -> Value:
        value, error = decay.with_stderr(statistic, self.squares, np.ones_like(self.squares), self.seed)
        return Value(value=value, stderr=error, n=len(self.squares))

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return [table([self])]

    def maps(self) -> list[Map]:
        return maps([self])


def measure(
    model: nn.Module | Subject, inputs: object, *, seed: int = 0, batch_size: int | None = None, progress: Progress | None = None
) -> Reading:  # fmt: skip
    """Of every input of the sequences. Raises UserError for a model that is no classifier, and where it answers with NaN."""
    subject = Subject.of(model)
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = len(tokens), tokens.shape[1] - subject.tail
    with subject.still(), torch.no_grad():
        embedded = subject.embed(tokens[:1])
        outputs = subject.read(subject.run(embedded)).shape[-1]
    backward = Backward(subject, tokens)
    batch = batch_size or max(1, _BATCH // embedded.numel())
    progress.begin(f"{subject.name}: what it reads", n * outputs * backward.depths)
    squares = np.zeros((n, length))
    for start in range(0, n, batch):
        some = tokens[start : start + batch]
        eye = torch.eye(outputs, device=tokens.device)

        def step(done: int, size: int = len(some)) -> None:
            progress.step(done * size)

        for depth, gradients in backward(some, subject.read, [v.expand(len(some), -1) for v in eye], step=step):
            if depth == 1:
                for g in gradients:
                    squares[start : start + batch] += g[:, :length].detach().cpu().double().square().sum(-1).numpy()
    if not np.isfinite(squares).all():
        raise UserError(
            f"{subject.name} answers these inputs with NaN or infinite gradients: what it reads cannot be measured"
        )
    return Reading(subject.name, outputs, seed, squares)


def figures(results: Sequence[Reading]) -> list[Figure]:
    """Score by position, in bins, relative to the root mean square over positions: 1 everywhere is an even spread."""
    series = []
    for r in results:
        if not r.score.any():
            continue
        edges = np.unique(np.linspace(0, r.length, min(_BINS, r.length) + 1).astype(int))

        def binned(curve: Float[Array, "... length"], edges: Array = edges) -> Float[Array, "... bins"]:
            squares = np.square(curve)
            means = np.stack([squares[..., a:b].mean(-1) for a, b in pairwise(edges)], -1)
            return np.sqrt(means / squares.mean(-1, keepdims=True))

        n, errors = len(r.squares), None
        if n > 1:
            weights = decay.resampling_weights(n, r.seed)
            errors = decay.spread(
                binned(decay.resampled_curves(r.squares, np.ones_like(r.squares), weights)), n
            ).tolist()
        x = ((edges[:-1] + edges[1:] - 1) / 2).tolist()
        series.append(Series(name=r.name, x=x, y=binned(r.score).tolist(), stderr=errors, group=r.name))
    if not series:
        return []
    return [
        Figure(
            id="reading", title="Which inputs move the answer", x_label="position s", y_label="influence on the logits (even spread: 1)",
            y_scale="log", series=series, method=_method(results[0]),
            meaning="How strongly the input at each position moves the logits, relative to the mean over all. High at the right end only: the model "
            "answers from what it saw last. Level: position does not matter.",
        )
    ]  # fmt: skip


def table(results: Sequence[Reading]) -> Table:
    columns = [
        Column(name="model"), *(Column(name=f"last {100 * f:g} %", meaning="share of squared influence on the logits in this part of the inputs") for f in SHARES),
        Column(name="first 10 %", meaning="the same of the first tenth"),
        Column(name="recency index", meaning="share of the last third minus that of the first; 0: even, 1: all of it at the end"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [r.name, *(r.last_share(f) for f in SHARES), r.share(0, max(1, round(0.1 * r.length))), r.recency_index]
        for r in results
    ]
    return Table(
        id="reading", title="What the answer depends on", columns=columns, rows=rows, method=_method(results[0]),
        meaning="In an even spread the last 1 % of the inputs hold 1 %, the last 10 % hold 10 %.",
    )  # fmt: skip


def maps(results: Sequence[Reading]) -> list[Map]:
    """Square images as they are seen."""
    side = math.isqrt(results[0].length)
    if side < 4 or any(r.length != side * side for r in results) or not all(r.score.any() for r in results):
        return []
    panels = []
    for r in results:
        relative = (r.score / math.sqrt(np.square(r.score).mean())).reshape(side, side)
        panels.append(Panel(name=r.name, values=relative.tolist(), group=r.name))
    axis = [float(i) for i in range(side)]
    return [
        Map(
            id="reading", title="Which pixels move the answer", x_label="column", y_label="row (the first is read first)", unit="influence on the logits (even spread: 1)",
            x=axis, y=axis, panels=panels, scale="log", method=_method(results[0]), meaning="The same by place in the image, which is read row by row.",
        )
    ]  # fmt: skip


def says(r: Reading) -> str:
    last, index = r.last_share(0.1), r.recency_index
    if not r.score.any():
        return f"{r.name}: no input moves the answer at all."
    numbers = f"the last tenth of the inputs holds {100 * last.value:.0f} % of the squared influence on the logits"
    bounds = index.interval()
    if bounds is None:
        return f"{r.name}: {numbers} (recency index {index.value:+.2f})."
    interval = f"recency index {index.value:+.2f}, 95 % interval {bounds[0]:+.2f} to {bounds[1]:+.2f}"
    if bounds[0] > MATTERS:
        return f"{r.name} answers from late inputs more than from early ones: {numbers} ({interval})."
    if bounds[1] < -MATTERS:
        return f"{r.name} answers from early inputs more than from late ones: {numbers} ({interval})."
    return f"{r.name} answers from early and late inputs alike, as far as can be told: {numbers} ({interval})."


def _method(r: Reading) -> str:
    return (
        f"Root mean square of ‖∂logits/∂x_s‖_F over {len(r.squares)} sequences, x_s: the embedding of input s; exact, one vector-Jacobian product for "
        f"each of {r.outputs} outputs; standard errors by bootstrap over sequences."
    )
