"""A check on behaviour: how much worse does the model predict when the distant context is taken away?

    loss(W) = mean over sequences and positions t of  -log₂ p(token_{t+1} | token_{t-W+1} .. token_t)        bits per token

The same next tokens are predicted with the last W tokens only, for W = 1, 2, 4, .., and with everything before them (full). Influence says what the
output *could* depend on; this says what the prediction *gains* from it. Differences to full are paired by position, so their standard
error over sequences is small. All positions lie in the second half of their sequence. A window starts from the empty state, as a text does.

At every position, the loss without the distant context is that of overlapping pieces of the text, each read from the empty state: of every piece but the first the
second half counts, whose tokens see between W/2 and W tokens (W: `distant`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.errors import UserError
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import Subject
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
_TOKENS_AT_ONCE = 8192
_BUDGET = 10**12  # multiplications and additions for all windows, about 10 s on two cores


@dataclass(frozen=True, eq=False)
class Context(Shown):
    """loss[i, j]: sequence i, mean over its positions with only the last widths[j] tokens; full[i]: with all of them.
    by_position[i, t]: the loss at every position of sequence i, from one pass with everything before it; cut[i, t]: with the last `distant` tokens at
    most. Bits per token."""

    name: str
    length: int
    positions: int
    widths: Int[Array, " W"]
    loss: Float[Array, "n W"]
    full: Float[Array, " n"]
    by_position: Float[Array, "n length-1"] = field(repr=False)
    cut: Float[Array, "n length-1"] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(self.full)

    def full_loss(self) -> Value:
        return Value.mean(self.full, "bits/token")

    def at(self, width: int) -> Value:
        return Value.mean(self.loss[:, self._index(width)], "bits/token")

    def cost(self, width: int) -> Value:
        """How many bits per token it costs to see only the last `width` tokens. Paired by position."""
        return Value.mean(self.costs(width), "bits/token")

    def costs(self, width: int) -> Float[Array, " n"]:
        """The same for every sequence."""
        costs: Array = self.loss[:, self._index(width)] - self.full
        return costs

    @property
    def distant(self) -> int:
        """The width beyond which text is called distant, about an eighth of the length: far enough for a model to have lost it."""
        return _distant(self.length)

    def _index(self, width: int) -> int:
        found = np.flatnonzero(self.widths == width)
        if not len(found):
            raise UserError(f"the context was cut to {', '.join(map(str, self.widths))} tokens, not to {width}")
        return int(found[0])

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
    positions: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Context:
    """Loss with and without the distant context on the sequences of `inputs` (sequences, length), at `positions` positions of each (None: 64; in a model
    of many parameters as few as 8, and windows no longer than a quarter of the length).

    Raises UserError for bad tokens, too many positions, or a model without a head."""
    subject = Subject.of(model)
    progress = progress or Silent()
    tokens = subject.tokens(inputs)
    n, length = tokens.shape
    if not subject.has_head:
        raise UserError(f"{subject.name} has no head: it predicts no tokens")
    half = np.arange(length // 2, length - 1)
    widths = 2 ** np.arange(int(math.log2(length // 2)) + 1)
    if positions is None:
        affordable = _BUDGET // (2 * sum(p.numel() for p in subject.model.parameters()) * n * int(widths.sum()) or 1)
        if affordable < 16 and length >= 64:
            widths, affordable = widths[:-1], 2 * affordable
        positions = min(64, max(8, affordable))
    positions = min(positions, len(half))
    if positions < 1:
        raise UserError("at least one position is needed")
    rng = np.random.default_rng(seed)
    at = np.stack([np.sort(rng.choice(half, positions, replace=False)) for _ in range(n)])
    progress.begin(f"{subject.name}: context", n * (3 * length + positions * int(widths.sum())))  # in tokens run
    with subject.still(), torch.no_grad():
        by_position, cut = np.zeros((n, length - 1)), np.zeros((n, length - 1))
        for i in range(n):
            hidden = subject.run(subject.embed(tokens[i : i + 1]))[0, :-1]
            by_position[i] = _bits(subject, hidden, tokens[i, 1:])
            progress.step(length)
            cut[i] = _cut(subject, tokens[i], _distant(length))
            progress.step(2 * length)
        loss = np.zeros((n, len(widths)))
        for j, width in enumerate(widths):
            windows = np.stack([tokens[i, t - width + 1 : t + 1].cpu().numpy() for i in range(n) for t in at[i]])
            wanted = torch.cat([tokens[i, torch.from_numpy(at[i] + 1).to(tokens.device)] for i in range(n)])
            loss[:, j] = (
                _window_loss(subject, torch.from_numpy(windows).to(tokens.device), wanted).reshape(n, -1).mean(1)
            )
            progress.step(n * positions * int(width))
    if not np.isfinite(loss).all():
        raise UserError(f"{subject.name} predicts these inputs with a loss that is NaN or infinite")
    full = np.take_along_axis(by_position, at, axis=1).mean(1)
    return Context(subject.name, length, positions, widths, loss, full, by_position, cut)


def _distant(length: int) -> int:
    return int(2 ** int(math.log2(max(length // 8, 1))))


def _cut(subject: Subject, tokens: Int[Tensor, " length"], width: int) -> Float[Array, " length-1"]:
    """The loss of every next token of one sequence from between width/2 and width tokens, fewer at its beginning. Where width is 1, from one."""
    length, step = len(tokens), max(1, width // 2)
    starts = list(range(0, max(1, length - 1 - width + step), step))
    out = np.full(length - 1, math.nan)  # every place is filled
    for some in torch.tensor(starts).split(max(1, _TOKENS_AT_ONCE // width)):
        at = (some[:, None] + torch.arange(width)).clamp_max(length - 1).to(tokens.device)
        with _chunks(subject.model, width):
            hidden = subject.run(subject.embed(tokens[at]))
        for row, start in enumerate(some.tolist()):
            first = 0 if start == 0 else width - step
            stop = min(width, length - 1 - start)
            where = slice(start + first, start + stop)
            out[where] = _bits(subject, hidden[row, first:stop], tokens[where.start + 1 : where.stop + 1])
    return out


def _window_loss(subject: Subject, windows: Int[Tensor, "m width"], wanted: Int[Tensor, " m"]) -> Float[Array, " m"]:
    parts = []
    with _chunks(subject.model, windows.shape[1]):
        for rows in torch.arange(len(windows)).split(max(1, _TOKENS_AT_ONCE // windows.shape[1])):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            parts.append(_bits(subject, subject.run(subject.embed(windows[part]))[:, -1], wanted[part]))
    return np.concatenate(parts)


@contextmanager
def _chunks(model: nn.Module, width: int) -> Iterator[None]:
    """No chunk longer than `width`, which leaves what is computed as it is: transformers' Mamba-2 layers pad every window to a whole chunk,
    of 256 tokens, with its square in memory."""
    longer = [
        m for m in model.modules() if hasattr(m, "A_log") and isinstance(n := getattr(m, "chunk_size", None), int) and n > width
    ]  # fmt: skip
    sizes = [m.chunk_size for m in longer]
    try:
        for m in longer:
            setattr(m, "chunk_size", width)  # noqa: B010  (no attribute that a type checker knows)
        yield
    finally:
        for m, size in zip(longer, sizes, strict=True):
            setattr(m, "chunk_size", size)  # noqa: B010


def _bits(subject: Subject, hidden: Float[Tensor, "m d_hidden"], wanted: Int[Tensor, " m"]) -> Float[Array, " m"]:
    nats = F.cross_entropy(subject.logits(hidden).float(), wanted, reduction="none")
    bits: Array = nats.double().cpu().numpy() / math.log(2)
    return bits


def figures(results: Sequence[Context]) -> list[Figure]:
    kept, positions = [], []
    for r in results:
        values = [r.at(int(w)) for w in r.widths]
        stderr = [v.stderr for v in values if v.stderr is not None]
        kept.append(
            Series(
                name=r.name,
                x=[float(w) for w in r.widths],
                y=[v.value for v in values],
                stderr=stderr or None,
                group=r.name,
            )
        )
        ends = [float(r.widths[0]), float(r.widths[-1])]
        kept.append(
            Series(name=f"{r.name}: everything", x=ends, y=[r.full_loss().value] * 2, style="fit", group=r.name)
        )
        edges = _bins(r.length - 1)
        centres = [(a + b - 1) / 2 + 1 for a, b in pairwise(edges)]
        lines: tuple[tuple[str, Array, Literal["line", "fit"]], ...] = (
            (r.name, r.by_position, "line"),
            (f"{r.name}: last {r.distant} tokens at most", r.cut, "fit"),
        )
        for name, losses, style in lines:
            binned = [Value.mean(losses[:, a:b].mean(1)) for a, b in pairwise(edges)]
            stderr = [v.stderr for v in binned if v.stderr is not None]
            positions.append(
                Series(
                    name=name, x=centres, y=[v.value for v in binned], stderr=stderr or None, group=r.name, style=style
                )
            )
    return [
        Figure(
            id="loss-by-context", title="What the distant context is worth", x_label="last tokens that the model sees",
            y_label="loss (bits per token)", x_scale="log", series=kept, method=_method(results[0]),
            meaning="Loss at the same positions when all but the last tokens are taken away; thin line: nothing taken away. Where a curve has "
            "reached its thin line, no gain from more distant tokens can be seen.",
        ),
        Figure(
            id="loss-by-position", title="Loss by position, with and without the distant context", x_label="tokens seen so far", y_label="loss (bits per token)", x_scale="log",
            series=positions, method=f"Mean over {results[0].n_sequences} sequences in bins of equal ratio, with its standard error. Thin: {_pieces(results[0])}",
            meaning="A model that uses its context predicts better the more it has seen. Thin: the distant context taken away; where it lies above, the model had used it.",
        ),
    ]  # fmt: skip


def _bins(length: int) -> list[int]:
    """Edges of bins that grow by √2: single positions first, wider later, where one position's loss is mostly noise."""
    return sorted({round(2 ** (k / 2)) - 1 for k in range(int(2 * math.log2(length)) + 1)} | {length})


def table(results: Sequence[Context]) -> Table:
    widths = [int(w) for w in results[0].widths][::2]
    columns = [
        Column(name="model"),
        Column(name="everything", unit="bits/token", meaning="loss with the whole context"),
    ]
    columns += [
        Column(name=f"last {w}", unit="bits/token", meaning=f"what it costs to see only the last {w} tokens")
        for w in widths
    ]
    rows: list[list[Cell]] = [[r.name, r.full_loss(), *(r.cost(w) for w in widths)] for r in results]
    return Table(
        id="context", title="Loss with the whole context, and what cutting it costs", columns=columns, rows=rows, method=_method(results[0]),
        meaning="Extra bits per token when the model sees only the last tokens. 0 within its error: what lies further back is worth no more "
        "than that error.",
    )  # fmt: skip


def _pieces(r: Context) -> str:
    return f"from overlapping pieces of {r.distant} tokens, the second half of each, which sees at least {max(1, r.distant // 2)} tokens."


def _method(r: Context) -> str:
    return (
        f"Loss of the next token at {r.positions} positions in the second half of each of {r.n_sequences} sequences of {r.length} tokens, the "
        "same positions for every context; differences are paired; mean over sequences with its standard error."
    )
