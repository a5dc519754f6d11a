"""Finding a needle: which statement, how far back in a long text, does a model still answer by (the paper's Figures 2 and 9).

    recency index = accuracy in the last third of the depths - accuracy in the first third

A prompt is answered right where the model holds the answer of the text for more probable than that of the world, or, for the
synthetic task, for the most probable token of all. Beside it: whether the answer it generates is that of the text.

Prompts, not cells, are independent: each is averaged over the cells first. Statements come in kinds ("The capital of ..."), and those of one
kind are alike, so that standard errors are over kinds: with mean m of N statements x_i in G kinds,

    stderr² = G / (G - 1) · Σ_kinds (Σ_i in kind (x_i - m))² / N²          (cluster-robust; Student's t with G - 1 degrees of freedom)

The text before the needle is read once for a length: the states at all depths are kept, and each is the start of its prompts. Long texts
are read in pieces with the state carried on, so time, not memory, bounds the length.

Every cell (model, length, depth) is on disk when it is done; with `resume` it is not measured again.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.experiments.reader import Reader
from ssmlens.results import Value
from ssmlens.tasks.needle import Cell, Grid, NeedleStream

Advance = Callable[[float], None]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Scores:
    """Of one cell, prompt by prompt. right: 0 or 1; generated: 0 or 1; margin: log-probability of the text's answer minus that of
    the world's, in nats. None where there is no such thing (synthetic)."""

    right: list[int]
    generated: list[int] | None = None
    margin: list[float] | None = None


@dataclass(frozen=True)
class Needle:
    """What was found of one model. cells: (length, depth) → Scores; control: length → Scores without any needle. kinds: of every prompt, where
    prompts of one kind are alike; empty where they are not. carries: whether the model went on from its state; else it read the whole text
    again at every step."""

    name: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: dict[tuple[int, float], Scores]
    control: dict[int, Scores] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    carries: bool = True
    parameters: int | None = None

    def accuracy(self, at: Sequence[tuple[int, float]], what: str = "right") -> Value:
        """In %, over prompts (each averaged over the cells `at` first)."""
        columns = [getattr(self.cells[key], what) for key in at]
        return self._mean([100 * sum(row) / len(row) for row in zip(*columns, strict=True)], "%")

    @property
    def complete(self) -> bool:
        return len(self.cells) == len(self.lengths) * len(self.depths)

    def at_depth(self, depth: float, what: str = "right") -> Value:
        return self.accuracy([(length, depth) for length in self.lengths if (length, depth) in self.cells], what)

    def third(self, last: bool, what: str = "right") -> Value:
        return self.accuracy(self._third(last), what)

    def recency_index(self, what: str = "right") -> Value:
        """Accuracy in the last third of the depths minus that in the first, in points, prompt by prompt."""
        parts = [[getattr(self.cells[key], what) for key in self._third(last)] for last in (True, False)]
        late, early = ([sum(row) / len(row) for row in zip(*columns, strict=True)] for columns in parts)
        return self._mean([100 * (a - b) for a, b in zip(late, early, strict=True)], "points")

    def moved(self, depth: float) -> Value:
        """What the needle adds to the log-odds of the text's answer against the world's, in nats: with it minus without it."""
        cells = [(length, self.cells[length, depth]) for length in self.lengths if (length, depth) in self.cells]
        rows = [
            [a - b for a, b in zip(s.margin or [], self.control[length].margin or [], strict=True)]
            for length, s in cells
        ]
        return self._mean([sum(row) / len(row) for row in zip(*rows, strict=True)], "nats")

    def without(self, what: str = "right") -> Value:
        """In %, of the same prompts without any needle, over prompts."""
        columns = [getattr(scores, what) for scores in self.control.values()]
        return self._mean([100 * sum(row) / len(row) for row in zip(*columns, strict=True)], "%")

    def over_control(self) -> Value:
        """Accuracy minus that without a needle, in points, prompt by prompt."""
        columns = [
            [a - b for a, b in zip(s.right, self.control[length].right, strict=True)]
            for (length, _), s in self.cells.items()
        ]
        return self._mean([100 * sum(row) / len(row) for row in zip(*columns, strict=True)], "points")

    def _mean(self, samples: Sequence[float], unit: str) -> Value:
        return clustered(samples, self.kinds, unit)

    def _third(self, last: bool) -> list[tuple[int, float]]:
        inside = [d for d in self.depths if (d >= 2 / 3 if last else d <= 1 / 3)]
        return [(length, d) for length in self.lengths for d in inside if (length, d) in self.cells]


def clustered(samples: Sequence[float], kinds: Sequence[str], unit: str = "") -> Value:
    """The mean with its standard error over kinds, n of them, where there are several; never less than over samples. kinds: of every sample,
    or none at all: all are independent."""
    plain = Value.mean(samples, unit)
    groups = sorted(set(kinds))
    if len(groups) < 2 or plain.stderr is None:
        return plain
    off = [math.fsum(x - plain.value for x, kind in zip(samples, kinds, strict=True) if kind == g) for g in groups]
    n = len(groups)
    stderr = math.sqrt(n / (n - 1) * math.fsum(o * o for o in off)) / len(samples)
    return Value(value=plain.value, stderr=max(stderr, plain.stderr), n=n, unit=unit)


def names(text: str, answer: str) -> int:
    """Where `answer` stands in `text` as a word; -1 where it does not."""
    # the symbol of helium is no pronoun
    low, word = (text, answer) if len(answer) <= 2 else (text.lower(), answer.lower())
    at = low.find(word)
    while at >= 0:
        before, after = low[at - 1 : at], low[at + len(word) : at + len(word) + 1]
        if not before.isalnum() and not after.isalnum():
            return at
        at = low.find(word, at + 1)
    return -1


def measure_statements(
    name: str,
    model: nn.Module,
    grid: Grid,
    decode: Decode,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    batch_size: int = 16,
    store: "Store | None" = None,
    advance: Advance = lambda tokens: None,
) -> Needle:
    """Every fact of the grid at every length and depth. advance: is told the tokens read. Raises UserError for a length beyond the
    positions of the model, or too short for the needles."""
    generated = max(len(a) for pair in grid.answers for a in pair) + 3
    _fits(name, model, max(lengths), generated - 1)
    store = store or Store(None)
    reader, kinds = Reader(model), tuple(fact.kind for fact in grid.facts)
    found = Needle(
        name, tuple(lengths), tuple(depths), {}, kinds=kinds, carries=reader.carries, parameters=_parameters(model)
    )
    with evaluating(model):
        for length in lengths:
            cache, seen = None, 0
            cells = [grid.cell(length, depth) for depth in sorted(depths)]
            for cell in [*cells, grid.cell(length, 0.0, control=True)]:
                key = f"{name}|{length}|{'control' if cell.control else f'{cell.depth:g}'}"
                scores = store.get(key)
                if scores is None:
                    if cell.prefix > seen:
                        _, cache = reader.read(grid.haystack.ids[None, seen : cell.prefix], cache)
                        advance(cell.prefix - seen)
                        seen = cell.prefix
                    scores = _score(
                        reader, grid, cell, cache if cell.prefix else None, decode, generated, batch_size, advance
                    )
                    if not all(math.isfinite(m) for m in scores.margin or []):
                        raise UserError(f"{name} answers with NaN or infinity on texts of {length} tokens")
                    store.put(key, scores)
                if cell.control:
                    found.control[length] = scores
                else:
                    found.cells[length, cell.depth] = scores
    return found


def _fits(name: str, model: nn.Module, length: int, behind: int) -> None:
    """Raises UserError where the model has no positions for a prompt and what it says behind it."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and length + behind > limit:
        raise UserError(
            f"{name} reads at most {limit} tokens; the longest text has {length}, and {behind} more are for the answer: "
            f"give --lengths of at most {limit - behind}"
        )


def work(grid: Grid, lengths: Sequence[int], depths: Sequence[float]) -> int:
    """How many tokens `measure_statements` reads of one model."""
    total = 0
    for length in lengths:
        cells = [grid.cell(length, d) for d in depths]
        total += max(c.prefix for c in cells)
        total += sum(c.rows.numel() for c in [*cells, grid.cell(length, 0.0, control=True)])
    return total


def _score(
    reader: Reader, grid: Grid, cell: Cell, cache: Any, decode: Decode, generated: int, batch_size: int, advance: Advance
) -> Scores:  # fmt: skip
    right: list[int] = []
    spoken: list[int] = []
    margins: list[float] = []
    for start in range(0, len(cell.rows), batch_size):
        rows = cell.rows[start : start + batch_size]
        facts, answers = grid.facts[start : start + batch_size], grid.answers[start : start + batch_size]
        logits, state = reader.read(rows, reader.fork(cache, len(rows)))
        of_text = reader.log_probability(logits, state, [a for a, _ in answers])
        of_world = reader.log_probability(logits, state, [b for _, b in answers])
        for a, b in zip(of_text, of_world, strict=True):
            right.append(int(a > b))
            margins.append(a - b)
        for fact, ids in zip(facts, reader.generate(logits, state, generated), strict=True):
            said = decode(ids)
            here, there = names(said, fact.context), names(said, fact.world)
            spoken.append(int(here >= 0 and (there < 0 or here < there)))
        advance(rows.numel())
    return Scores(right, spoken, margins)


def measure_synthetic(
    name: str,
    model: nn.Module,
    stream: NeedleStream,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    prompts: int = 200,
    batch_size: int = 32,
    store: "Store | None" = None,
    advance: Advance = lambda tokens: None,
) -> Needle:
    """`prompts` prompts a cell: one key and its value in noise, right where the value is the most probable token."""
    _fits(name, model, max(lengths), 0)
    store = store or Store(None)
    reader, found = Reader(model), Needle(name, tuple(lengths), tuple(depths), {}, parameters=_parameters(model))
    with evaluating(model):
        for length in lengths:
            for depth in depths:
                key = f"{name}|{length}|{depth:g}"
                scores = store.get(key)
                if scores is None:
                    batch = stream.test(prompts, length, depth)
                    right: list[int] = []
                    for tokens, targets in zip(
                        batch.tokens.split(batch_size), batch.targets.split(batch_size), strict=True
                    ):
                        logits, _ = reader.read(tokens)
                        right += (logits.argmax(-1).cpu() == targets[:, -1]).int().tolist()
                        advance(tokens.numel())
                    scores = Scores(right)
                    store.put(key, scores)
                found.cells[length, depth] = scores
    return found


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class evaluating:
    """Evaluation mode; afterwards as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training)


class Store:
    """Finished cells in one JSON file, rewritten whole after each. path None: nothing is kept.

    identity: what must be the same on resume. Raises UserError where the file is another measurement's, or holds one and resume is
    False."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        self.path, self.identity = path, dict(identity or {})
        self._cells: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        if not resume:
            raise UserError(f"{path.parent} holds a measurement already: --resume, or another --out")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            there, cells = tree["identity"], tree["cells"]
            self._cells = {key: dict(value) for key, value in cells.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is damaged ({e}): remove it, or choose another --out") from None
        now = json.loads(json.dumps(self.identity))
        changed = [k for k in sorted({*there, *now}) if there.get(k) != now.get(k)]
        if changed:
            raise UserError(
                f"{path.parent} holds another measurement: {', '.join(changed)} differ; choose another --out"
            )

    def get(self, key: str) -> Scores | None:
        found = self._cells.get(key)
        return Scores(**found) if found is not None else None

    def put(self, key: str, scores: Scores) -> None:
        if self.path is None:
            return
        self._cells[key] = {"right": scores.right, "generated": scores.generated, "margin": scores.margin}
        files.write(self.path, json.dumps({"identity": self.identity, "cells": self._cells}) + "\n")
