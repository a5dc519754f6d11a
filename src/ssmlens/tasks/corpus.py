"""Text as bytes: a corpus that every machine has, or the user's own file.

    tokens  T h e _ a s s e       the bytes, 0..255      (batch, length)
    targets  h e _ a s s e r       each one's successor   (batch, length)

`python_reference` is the language reference inside Python's standard library, about 0.45 MB of English.
`CorpusStream` cuts training windows, `windows` spreads held-out ones evenly for a diagnosis.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from pydantic import Field

from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.targets import IGNORED
from ssmlens.tasks.base import Batch, bits, check_step, permutation, words

PYTHON_REFERENCE = "python-reference"
VOCAB_SIZE = 256
_OFFSET, _ORDER = range(2)  # the second number of a seed


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in two parts. sha256: of the training bytes, then the held-out ones; of a file, its own."""

    name: str
    train: UInt8[np.ndarray, " train"]
    heldout: UInt8[np.ndarray, " heldout"]
    sha256: str = field(init=False)
    python: str = field(init=False)  # Python's version, with which the text of its standard library changes

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.train.tobytes() + self.heldout.tobytes()).hexdigest()
        object.__setattr__(self, "sha256", digest)
        object.__setattr__(self, "python", platform.python_version())


# ------------------------------------------------------------------------------------------------------ texts


def python_reference() -> Corpus:
    """The topics of `pydoc_data.topics` in alphabetical order, about a tenth of them held out.

    A topic is held out when sha256 of its name, as a number, is a multiple of ten, so it stays on its side in
    every version of Python. Topics quote each other at length ("sequence-types" stands whole in
    "specialnames"): a training paragraph that a held-out topic has too is left out, or a fifth of the
    held-out text would have been seen in training.
    Raises: UserError when this Python came without the text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python came without pydoc_data.topics: give a text file of your own") from error
    heldout = [name for name in sorted(topics) if _held_out(name)]
    quoted = {_bare(p) for name in heldout for p in _paragraphs(topics[name])}
    train = [
        "\n\n".join(p for p in _paragraphs(topics[name]) if _bare(p) not in quoted)
        for name in sorted(topics)
        if name not in heldout
    ]
    return Corpus(PYTHON_REFERENCE, _as_bytes(train), _as_bytes(topics[name] for name in heldout))


def text_file(path: str | Path, heldout: float = 0.1) -> Corpus:
    """A UTF-8 file, its last part held out.

    heldout: share of the bytes; 1.0 holds out all of it, for a model that was not trained on it.
    Raises: UserError for a file that is missing, unreadable, empty or no text.
    """
    path = Path(path)
    if not 0 < heldout <= 1:
        raise UserError(f"the held-out share of a text lies in (0, 1], not {heldout}")
    if path.exists() and not path.is_file():  # a directory, or a device that never ends
        raise UserError(f"{path} is not a regular file: give a text file")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no text file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise UserError(f"{path} is empty: give a text")
    if b"\0" in content:
        raise UserError(f"{path} is a binary file (it contains zero bytes): give plain text in UTF-8")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): convert it first, e.g. with iconv -t utf-8"
        ) from error
    data = np.frombuffer(content, dtype=np.uint8)
    cut = len(data) - max(1, round(heldout * len(data)))
    return Corpus(path.name, data[:cut], data[cut:])


def read(text: str, heldout: float = 0.1) -> Corpus:
    """The corpus that a config or a command line names: "python-reference", the path of a text file, or several with commas between,
    of each of which the last part is held out."""
    if text == PYTHON_REFERENCE:
        return python_reference()
    parts = [text_file(path, heldout) for path in paths(text)]
    if len(parts) == 1:
        return parts[0]
    train, held = (np.concatenate([getattr(part, side) for part in parts]) for side in ("train", "heldout"))
    return Corpus(" + ".join(part.name for part in parts), train, held)


def paths(text: str) -> list[str]:
    """Of several paths with commas between; a comma that belongs to the name of a file that is there divides nothing."""
    return [text] if Path(text).exists() else [path.strip() for path in text.split(",") if path.strip()] or [text]


def _held_out(topic: str) -> bool:
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 10 == 0


def _paragraphs(text: str) -> list[str]:
    return [p for p in text.split("\n\n") if p.strip()]


def _bare(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _as_bytes(texts: Iterator[str] | list[str]) -> UInt8[np.ndarray, " size"]:
    return np.frombuffer("\n\n".join(t.strip("\n") for t in texts).encode(), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------- windows


def windows(corpus: Corpus, length: int, count: int) -> Batch:
    """Evenly spaced held-out windows that don't overlap: `count`, or as many as the text has room for.

    Returns tokens, targets (windows, length) int64; the last byte of the text has no successor and label -100.
    Raises: UserError when not even one window fits.
    """
    if length < 1 or count < 1:
        raise UserError(f"windows need a length and a count of at least 1, not {length} and {count}")
    size = len(corpus.heldout)
    if size < length:
        whole = "" if len(corpus.train) == 0 else " held-out"
        raise UserError(
            f"the{whole} text of {corpus.name} is {size:,} bytes long, shorter than the length {length:,}: "
            f"give a longer text or a length of at most {size}"
        )
    starts = np.linspace(0, size - length, min(count, size // length)).astype(np.int64)
    return _cut(corpus.heldout, starts, length)


def _cut(text: UInt8[np.ndarray, " size"], starts: Int64[np.ndarray, " batch"], length: int) -> Batch:
    at = starts[:, None] + np.arange(length)
    tokens = text[at].astype(np.int64)
    targets = text[np.minimum(at + 1, len(text) - 1)].astype(np.int64)
    targets[at == len(text) - 1] = IGNORED
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class CorpusConfig(Config):
    """Windows of a text to train on.

    text: "python-reference", a path, or several with commas between; heldout: of each, the share at its end that is not trained on.
    length: tokens a window; validation_windows: held-out ones to validate on, fewer if they would overlap.
    """

    text: str = PYTHON_REFERENCE
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    length: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0)] = 0
    validation_windows: Annotated[int, Field(ge=1)] = 64


class CorpusStream:
    """Batches of a CorpusConfig; `batch(step)` depends on the text, the config and the step alone.

    An epoch cuts the training text into windows side by side, from a random offset below `length`, and shows
    them in random order, each at most once. The last few, less than a batch, are left out; each epoch others.
    Raises: UserError when the text is shorter than a batch of windows, or its held-out part than one.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.corpus = read(config.text, config.heldout)
        size = len(self.corpus.train)
        self._windows = max(0, (size - config.length) // config.length)  # so many fit behind every offset
        if self._windows < config.batch_size:
            needed = (config.batch_size + 1) * config.length
            raise UserError(
                f"{self.corpus.name} has {size:,} bytes to train on; a batch of {config.batch_size} windows "
                f"of {config.length} needs {needed:,}: give more text, a shorter length or a smaller batch"
            )
        windows(self.corpus, config.length, 1)  # fails now rather than after an epoch
        self._order: tuple[int, Int64[np.ndarray, " windows"]] | None = None

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must find again beside the config: the text itself."""
        return {"sha256": self.corpus.sha256}

    @property
    def batches_per_epoch(self) -> int:
        return self._windows // self.config.batch_size

    def batch(self, step: int) -> Batch:
        """The training batch of global step 0, 1, ...: tokens, targets (batch_size, length) int64."""
        check_step(step)
        epoch, index = divmod(step, self.batches_per_epoch)
        starts = self._starts(epoch)[index * self.config.batch_size : (index + 1) * self.config.batch_size]
        return _cut(self.corpus.train, starts, self.config.length)

    def validation(self) -> Iterator[Batch]:
        """The same held-out windows at every call, in batches."""
        config = self.config
        tokens, targets, _ = windows(self.corpus, config.length, config.validation_windows)
        for part in zip(tokens.split(config.batch_size), targets.split(config.batch_size), strict=True):
            yield Batch(*part)

    def _starts(self, epoch: int) -> Int64[np.ndarray, " windows"]:
        """Where the windows of an epoch start, in the order of training; the last epoch asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            seed, length = self.config.seed, self.config.length
            offset = int(words(bits((seed, _OFFSET, epoch)), 1)[0]) % length
            self._order = (epoch, offset + length * permutation(self._windows, (seed, _ORDER, epoch)))
        return self._order[1]
