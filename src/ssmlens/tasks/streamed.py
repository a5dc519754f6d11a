"""Text too long to hold: read once, packed into tokens, and kept on disk chunk by chunk.

    documents → tokens, a separator after each → chunks of `chunk` tokens → windows of `length`, shuffled within their chunk

    DIR/heldout.npy     evenly spaced blocks of the first chunk, not trained on
    DIR/00000.npy       a chunk's tokens, written last: what is there is whole
    DIR/00000.json      where the source stood behind it     DIR/00000.rest.npy   tokens read already that belong to the next chunk
    DIR/end.json        how many chunks there are, once the source has ended; then it is gone through again

Held-out blocks lie inside documents whose rest is trained on, and a window runs on over the end of a document: the separator is all that tells, no
state is reset.

What a chunk holds depends on the source alone, so a run that was killed finds, or makes again, the same batches; two processes that make the
same chunk write the same bytes. Sources: text files (.txt; .jsonl with a field "text") and data sets of the hub, streamed.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.tasks.base import Batch, check_step, permutation

CHUNK = 1 << 24
BLOCK = 1 << 13  # tokens of a held-out block
_DOCUMENTS = 256  # read between two looks at where the source stands
_PIECE = 1 << 20  # characters of a text file that are one document

Encode = Callable[[list[str]], list[list[int]]]


class Source(Protocol):
    """Documents in an order that never changes. state: JSON-able; where `documents` stands, to begin there again."""

    name: str

    def documents(self, state: Any = None) -> Iterator[str]: ...
    def state(self) -> Any: ...


class Files:
    """Text files, one after the other; a .jsonl file has a document a line, any other one piece of about a million characters after the other."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            if not path.is_file():
                raise UserError(f"there is no text file {path}")
        self.name = " + ".join(path.name for path in self.paths)
        self._state = [0, 0]

    def documents(self, state: Any = None) -> Iterator[str]:
        first, offset = state or [0, 0]
        for i in range(first, len(self.paths)):
            path = self.paths[i]
            with path.open("rb") as file:
                file.seek(offset)
                while raw := file.readline() if path.suffix == ".jsonl" else b"".join(file.readlines(_PIECE)):
                    self._state = [i, file.tell()]
                    yield self._text(path, raw)
            self._state, offset = [i + 1, 0], 0

    def state(self) -> Any:
        return list(self._state)

    def _text(self, path: Path, raw: bytes) -> str:
        try:
            text = raw.decode()
            return str(json.loads(text)["text"]) if path.suffix == ".jsonl" else text
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not UTF-8: convert it first, e.g. with iconv -t utf-8") from e
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path} has a line that is no JSON object with a field "text"') from e


class Hub:
    """A data set of the hub, or a directory of one, streamed: NAME, or NAME:CONFIGURATION; its split "train", its column "text"."""

    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError as e:
            raise UserError(f"datasets:{name} needs the package datasets: pip install 'ssmlens[data]'") from e
        path = name.split(":")
        self.name = Path(name).name if Path(name).is_dir() else name
        try:
            self._set: Any = datasets.load_dataset(*path, split="train", streaming=True)
            first: dict[str, Any] = next(iter(self._set), {})
        except Exception as e:  # the hub, the network and the builders raise dozens of kinds
            raise UserError(f"cannot stream datasets:{name}: {' '.join(str(e).split())[:300]}") from e
        if not isinstance(first.get("text"), str):
            raise UserError(
                f'datasets:{name} has no text column "text" (it has {", ".join(map(str, first)) or "nothing"})'
            )

    def documents(self, state: Any = None) -> Iterator[str]:
        if state is not None:
            self._set.load_state_dict(state)
        for row in self._set:
            yield row["text"]

    def state(self) -> Any:
        return self._set.state_dict()


def source_of(text: str) -> Source:
    """`datasets:NAME`, or paths with commas between. Raises UserError."""
    from ssmlens.tasks.corpus import paths

    return Hub(text.removeprefix("datasets:")) if text.startswith("datasets:") else Files(paths(text))


class PackedStream:
    """Batches of a source's tokens; `batch(step)` depends on the source and the arguments alone.

    encode: texts → tokens below vocab_size; separator: the token after each document, None for none.
    heldout: tokens that are not trained on, at most a tenth of the first chunk.
    Raises UserError where the source has less than a batch of windows, or as its texts are read."""

    batches_per_epoch = None  # not known before the source has ended

    def __init__(
        self, source: Source, encode: Encode, vocab_size: int, directory: Path, *, length: int, batch_size: int, heldout: int,
        separator: int | None = None, seed: int = 0, chunk: int = CHUNK,
    ) -> None:  # fmt: skip
        self.source, self.encode, self.vocab_size, self.separator = source, encode, vocab_size, separator
        self.directory = files.make_directory(directory)
        self.length, self.batch_size, self.heldout, self.seed, self.chunk = length, batch_size, heldout, seed, chunk
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._order: tuple[tuple[int, int], Any] | None = None
        if not self._file(0).exists():
            self._make(0)
        if self._batches(0) < 1:
            raise UserError(
                f"{source.name} has {len(self._tokens(0)):,} tokens to train on; a batch of {batch_size} windows of {length} needs "
                f"{batch_size * length + 1:,}: give more text, a shorter length or a smaller batch"
            )

    @property
    def identity(self) -> dict[str, str]:
        return {"first_chunk": hashlib.sha256(self._tokens(0).tobytes()).hexdigest()}

    def batch(self, step: int) -> Batch:
        """The training batch of global step 0, 1, ...: tokens, targets (batch_size, length) int64."""
        check_step(step)
        epoch, index, chunk = 0, step, 0
        while index >= (n := self._batches(chunk)):
            index, chunk = index - n, chunk + 1
            if not self._file(chunk).exists():
                ended = self._ended()
                if ended is None:
                    self._make(chunk)
                    ended = self._ended()
                if ended is not None and chunk >= ended:
                    total = sum(self._batches(i) for i in range(ended))
                    epoch, index, chunk = step // total, step % total, 0
        tokens = self._tokens(chunk)
        starts = self._starts(epoch, chunk, len(tokens))[index * self.batch_size : (index + 1) * self.batch_size]
        return _cut(tokens, starts, self.length)

    def validation(self, count: int, length: int | None = None) -> Batch:
        """Up to `count` windows of the held-out tokens, evenly spaced. Raises UserError where there is not one."""
        tokens, length = np.load(self.directory / "heldout.npy"), length or self.length
        most = (len(tokens) - 1) // length
        if most < 1:
            raise UserError(
                f"{self.source.name}: the {len(tokens):,} tokens that are held out hold no window of {length:,}: give more text"
            )
        return _cut(tokens, np.linspace(0, most - 1, min(count, most)).astype(np.int64) * length, length)

    # ---- chunks ----

    def _file(self, chunk: int) -> Path:
        return self.directory / f"{chunk:05d}.npy"

    def _tokens(self, chunk: int) -> Any:
        return np.load(self._file(chunk), mmap_mode="r")

    def _batches(self, chunk: int) -> int:
        return (len(self._tokens(chunk)) - 1) // self.length // self.batch_size

    def _ended(self) -> int | None:
        place = self.directory / "end.json"
        return int(json.loads(place.read_text())["chunks"]) if place.exists() else None

    def _starts(self, epoch: int, chunk: int, size: int) -> Any:
        if self._order is None or self._order[0] != (epoch, chunk):
            order = self.length * permutation((size - 1) // self.length, (self.seed, epoch, chunk))
            self._order = (epoch, chunk), order
        return self._order[1]

    def _make(self, chunk: int) -> None:
        """Chunk number `chunk`, the one before it being there; at the source's end a shorter one, or none."""
        rest, behind = np.zeros(0, self.dtype), {"state": None, "ended": False}
        if chunk:
            before = self._file(chunk - 1)
            rest, behind = np.load(before.with_suffix(".rest.npy")), json.loads(before.with_suffix(".json").read_text())
        parts, size, ended = [rest], len(rest), bool(behind["ended"])
        wanted = self.chunk + (self.heldout if chunk == 0 else 0)
        documents = self.source.documents(behind["state"])
        while size < wanted and not ended:
            texts = list(islice(documents, _DOCUMENTS))
            ended = len(texts) < _DOCUMENTS
            for ids in self.encode(texts) if texts else ():
                both = [*ids, self.separator] if self.separator is not None else ids
                parts.append(np.asarray(both, dtype=self.dtype))
                size += len(both)
        tokens = np.concatenate(parts)
        if chunk == 0:
            tokens = self._hold_out(tokens, wanted)
        kept, rest = tokens[: self.chunk], tokens[self.chunk :]
        if ended and len(rest) == 0:
            enough = chunk == 0 or len(kept) > self.length * self.batch_size
            files.write(self.directory / "end.json", json.dumps({"chunks": chunk + enough}))
            if not enough:
                return
        files.write(self._file(chunk).with_suffix(".rest.npy"), _bytes(rest))
        behind = {"state": self.source.state(), "ended": ended}
        files.write(self._file(chunk).with_suffix(".json"), json.dumps(behind))
        files.write(self._file(chunk), _bytes(kept))

    def _hold_out(self, tokens: Any, wanted: int) -> Any:
        """Cuts blocks out of the first `wanted` tokens and returns the others."""
        size = min(len(tokens), wanted)
        share = min(self.heldout, max(size // 10, size - self.chunk))
        block = max(1, min(BLOCK, share // 8))  # where the text is short, shorter ones: it may change from part to part
        count = share // block
        starts = (np.arange(count) * (size // max(1, count))).astype(np.int64)
        out = np.zeros(len(tokens), dtype=bool)
        for start in starts:
            out[start : start + block] = True
        files.write(self.directory / "heldout.npy", _bytes(tokens[out]))
        return tokens[~out]


def _cut(tokens: Any, starts: Any, length: int) -> Batch:
    at = np.asarray(starts)[:, None] + np.arange(length + 1)
    rows: Int[torch.Tensor, "batch length+1"] = torch.from_numpy(tokens[at].astype(np.int64))
    return Batch(rows[:, :-1], rows[:, 1:])


def _bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
