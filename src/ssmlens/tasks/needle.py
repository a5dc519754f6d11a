"""A needle in a haystack: what a model still knows of a statement, by where it stood in a long text (the paper's Figures 2 and 9).

    prompt = haystack[:p]  needle  haystack[p:]  question and cue        length tokens in all, the needle at depth p / room

Two kinds. `Grid` puts counterfactual statements (`facts`) into any text, for models that know language. `NeedleStream` is the
synthetic kind, for small models trained here: one key and its value among random tokens, and at the end the key again:

    n n n K V n n n n n K → V            n: noise, one of vocab_size - 2 · keys tokens; K, V: one of `keys` each

Legend: room = length minus needle and question: what is left for the haystack; depth 0 is the beginning, 1 right before the question.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.targets import IGNORED
from ssmlens.tasks.base import Batch, bits, check_step, words
from ssmlens.tasks.facts import Fact

Encode = Callable[[str], list[int]]
ASK = "\n\nUsing only the text above, even where it is wrong: {question}\nAnswer: {cue}"
SLACK = 0.05  # of the room: how far before its depth a needle may stand, to come after a sentence
_WORDS = re.compile(r"\s*(?:\S+\s+){0,3}\S+")
_TRAIN, _VALIDATION, _TEST = range(3)  # the second number of a seed


# ---------------------------------------------------------------------------------------------------- statements


@dataclass(frozen=True, eq=False)
class Haystack:
    """A text as tokens; ends: where its sentences end, in tokens; cuts: these, and after every few words of a sentence. repeated: how often
    it stands there to be long enough. start: how many special tokens come first, before which nothing may stand."""

    name: str
    ids: Int[Tensor, " size"]
    ends: Int[Tensor, " sentences"]
    cuts: Int[Tensor, " places"]
    repeated: int = 1
    start: int = 0

    @classmethod
    def of(cls, name: str, text: str, encode: Encode, shortest: int, start: Sequence[int] = ()) -> "Haystack":
        """At least `shortest` tokens, the text again and again if need be. start: special tokens that every text begins with.
        Raises UserError for a text without a sentence."""
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
        ids: list[int] = []
        ends: list[int] = []
        cuts: list[int] = []
        for i, sentence in enumerate(sentences):
            for part in _WORDS.findall(f" {sentence}" if i else sentence):
                ids += after(".", part, encode) if ids else encode(part)
                cuts.append(len(ids))
            ends.append(len(ids))
            if len(ids) >= shortest:
                break
        if not ids:
            raise UserError(f"{name} holds no sentence to hide a needle in: give a text")
        times = -(-shortest // len(ids))
        all_ids = torch.cat([torch.tensor(start, dtype=torch.long), torch.tensor(ids).repeat(times)])
        all_ends, all_cuts = (
            len(start) + (torch.arange(times)[:, None] * len(ids) + torch.tensor(places)).flatten()
            for places in (ends, cuts)
        )
        return cls(name, all_ids, all_ends, all_cuts, times, len(start))

    def before(self, target: int, slack: float) -> int:
        """The last end of a sentence at or before `target`; where that is more than `slack` tokens before it, the last place between words."""
        found = [int(torch.searchsorted(places, target, right=True)) for places in (self.ends, self.cuts)]
        end, cut = (
            int(places[n - 1]) if n else self.start for places, n in zip((self.ends, self.cuts), found, strict=True)
        )
        return end if target - end <= slack else cut


def after(before: str, text: str, encode: Encode) -> list[int]:
    """The tokens of `text` where it goes on from `before`: alone, some tokenizers would put a space of their own before it."""
    head, whole = encode(before), encode(before + text)
    return whole[len(head) :] if whole[: len(head)] == head else encode(text)


def asked(prompt: str, answers: tuple[str, str], encode: Encode) -> tuple[list[int], tuple[list[int], list[int]]]:
    """A question and its two answers as tokens, cut where question and answer come apart: a tokenizer may join letters across
    the seam, and then the cut is before them. Raises UserError where the tokenizer does not tell the answers apart."""
    alone = after(".", prompt, encode)
    a, b = (after(".", f"{prompt} {answer}", encode) for answer in answers)
    cut = next((i for i, same in enumerate(zip(alone, a, b, strict=False)) if len(set(same)) > 1), len(alone))
    cut = min(cut, len(a) - 1, len(b) - 1)
    one, other = a[cut:], b[cut:]
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        raise UserError(
            f"this tokenizer writes {answers[0]!r} and {answers[1]!r} with the same tokens: it has no needle to ask for"
        )
    return alone[:cut], (one, other)


@dataclass(frozen=True, eq=False)
class Cell:
    """The prompts of one length and depth: they share haystack[:prefix]. rows[i] is the rest of the prompt with fact i.
    control: the same without a needle."""

    length: int
    depth: float
    prefix: int
    rows: Int[Tensor, "facts rest"]
    control: bool = False


@dataclass(frozen=True, eq=False)
class Grid:
    """Facts in a haystack. needles, questions, answers (context's, world's): token lists by fact."""

    haystack: Haystack
    facts: tuple[Fact, ...]
    needles: list[list[int]]
    questions: list[list[int]]
    answers: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, haystack: Haystack, facts: Sequence[Fact], encode: Encode) -> "Grid":
        """Raises UserError for a tokenizer that writes two answers with the same tokens."""
        both = [
            asked(ASK.format(question=fact.question, cue=fact.cue), (fact.context, fact.world), encode)
            for fact in facts
        ]
        needles = [after(".", f" {fact.needle}", encode) for fact in facts]
        return cls(haystack, tuple(facts), needles, [q for q, _ in both], [a for _, a in both])

    @property
    def shortest(self) -> int:
        """The least length: needle, question, and as much haystack again."""
        return self.haystack.start + 2 * self._around

    @property
    def _around(self) -> int:
        return max(len(n) for n in self.needles) + max(len(q) for q in self.questions)

    def cell(self, length: int, depth: float, control: bool = False) -> Cell:
        """Raises UserError for a length that leaves the haystack less room than needle and question have."""
        if length < self.shortest:
            raise UserError(f"a length of {length} tokens is too short for these needles: at least {self.shortest}")
        if len(self.haystack.ids) < length:
            raise ValueError("the haystack is shorter than the length")
        room = length - self._around
        prefix = self.haystack.before(round(depth * room), SLACK * room)
        rows = []
        for needle, question in zip(self.needles, self.questions, strict=True):
            inside = [] if control else needle
            rest = length - prefix - len(inside) - len(question)
            rows.append([*inside, *self.haystack.ids[prefix : prefix + rest].tolist(), *question])
        return Cell(length, depth, prefix, torch.tensor(rows), control)


# ----------------------------------------------------------------------------------------------------- synthetic


class NeedleConfig(Config):
    """One pair among noise. length: of the prompt, the last key included; lengths: train on these, the longest is `length`.
    keys: of which a sequence holds one, with one of as many values. grow_every: the shortest length comes first, the next longer one
    joins after so many steps, and so on; 0: all from the first step. What is found in short prompts spreads to longer ones; from a mixture
    small models learn nothing for thousands of steps."""

    vocab_size: Annotated[int, Field(ge=8)] = 64
    keys: Annotated[int, Field(ge=2)] = 16
    lengths: Annotated[tuple[int, ...], Field(min_length=1)] = (32, 64, 128, 256)
    batch_size: Annotated[int, Field(ge=1)] = 64
    grow_every: Annotated[int, Field(ge=0)] = 0
    validation_examples: Annotated[int, Field(ge=1)] = 256
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> "NeedleConfig":
        if self.vocab_size < 2 * self.keys + 2:
            raise ValueError(
                f"vocab_size {self.vocab_size} has no room for {self.keys} keys, as many values and two tokens of noise"
            )
        if min(self.lengths) < 4:
            raise ValueError("a prompt of key, value, noise and key has at least 4 tokens")
        return self

    @property
    def length(self) -> int:
        return max(self.lengths)


class NeedleStream:
    """Batches of a NeedleConfig; `batch(step)` depends on the config and the step alone. The needle stands anywhere, uniformly.
    The lengths take turns, the shorter in larger batches, so that every batch has about as many tokens."""

    def __init__(self, config: NeedleConfig) -> None:
        self.config = config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def identity(self) -> dict[str, str]:
        return {}

    @property
    def batches_per_epoch(self) -> None:
        return None

    def batch(self, step: int) -> Batch:
        check_step(step)
        lengths = sorted(self.config.lengths)
        if self.config.grow_every:
            lengths = lengths[: 1 + step // self.config.grow_every]
        length = lengths[step % len(lengths)]
        rows = self.config.batch_size * max(1, self.config.length // length)
        return self.draw(rows, length, None, (self.config.seed, _TRAIN, step))

    def validation(self) -> Iterator[Batch]:
        """The longest prompts, needles anywhere; the same at every call."""
        left, index = self.config.validation_examples, 0
        while left > 0:
            rows = min(left, self.config.batch_size)
            yield self.draw(rows, self.config.length, None, (self.config.seed, _VALIDATION, index))
            left, index = left - rows, index + 1

    def test(self, count: int, length: int, depth: float) -> Batch:
        """`count` prompts of any length with the needle at one depth in [0, 1]; never trained on."""
        return self.draw(count, length, depth, (self.config.seed, _TEST, length, round(1e6 * depth)))

    def draw(self, rows: int, length: int, depth: float | None, seed: tuple[int, ...]) -> Batch:
        """tokens, targets (rows, length): the one target is the value, at the last position. depth None: anywhere."""
        c = self.config
        raw = words(bits(seed), rows * (length + 3)).reshape(rows, length + 3)
        noise = c.vocab_size - 2 * c.keys
        tokens = (2 * c.keys + raw[:, :length] % np.uint64(noise)).astype(np.int64)
        key, value = ((raw[:, length + i] % np.uint64(c.keys)).astype(np.int64) for i in range(2))
        room = length - 3  # the pair may begin at 0..room; the last token is the key again
        if depth is None:
            at = (raw[:, length + 2] % np.uint64(room + 1)).astype(np.int64)
        else:
            at = np.full(rows, round(depth * room))
        row = np.arange(rows)
        tokens[row, at], tokens[row, at + 1], tokens[:, -1] = key, c.keys + value, key
        targets = np.full((rows, length), IGNORED, dtype=np.int64)
        targets[:, -1] = c.keys + value
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
