"""Corpora: what is held out, windows that are really of the text, random access, files that are no text."""

import hashlib
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.tasks import IGNORED
from ssmlens.tasks.corpus import (
    PYTHON_REFERENCE,
    Corpus,
    CorpusConfig,
    CorpusStream,
    python_reference,
    read,
    text_file,
    windows,
)


def counted(size: int) -> np.ndarray:
    """Bytes of which any four in a row say where they stand (for size < 2**16)."""
    return np.arange(-(-size // 2), dtype=">u2").view(np.uint8)[:size]


def file(tmp_path: Path, size: int = 5000) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:06d}\n" for i in range(-(-size // 7)))[:size])
    return path


# ---------------------------------------------------------------------------------------- Python's reference


def test_python_reference_holds_out_by_topic_name() -> None:
    from pydoc_data.topics import topics

    corpus = python_reference()
    train, heldout = corpus.train.tobytes().decode(), corpus.heldout.tobytes().decode()
    for name in ("raise", "string-methods"):  # sha256 of these names ends in a digit 0 as a decimal number
        assert topics[name].strip() in heldout
    for name in ("assert", "for"):
        assert topics[name].strip()[:200] in train
        assert topics[name].strip()[:200] not in heldout
    assert 0.05 < len(corpus.heldout) / (len(corpus.heldout) + len(corpus.train)) < 0.2
    assert len(corpus.train) > 300_000
    assert corpus.name == PYTHON_REFERENCE
    assert corpus.python == platform.python_version()
    assert corpus.sha256 == hashlib.sha256((train + heldout).encode()).hexdigest()
    assert corpus.sha256 == read(PYTHON_REFERENCE).sha256


def test_python_reference_trains_on_nothing_held_out() -> None:
    corpus = python_reference()
    train, heldout = corpus.train.tobytes(), corpus.heldout.tobytes()
    spots = range(0, len(heldout) - 50, 10)
    seen = sum(heldout[i : i + 50] in train for i in spots) / len(spots)
    assert seen < 0.02  # 0.19 when whole topics are left where they fall


def test_python_without_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="give a text file"):
        python_reference()


# ----------------------------------------------------------------------------------------------------- files


def test_text_file_holds_out_its_end(tmp_path: Path) -> None:
    path = file(tmp_path)
    content = path.read_bytes()
    corpus = text_file(path)
    assert corpus.train.tobytes() == content[:4500]
    assert corpus.heldout.tobytes() == content[4500:]
    assert corpus.name == "text.txt"
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()
    whole = read(str(path), heldout=1.0)
    assert len(whole.train) == 0
    assert whole.heldout.tobytes() == content
    assert whole.sha256 == corpus.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x00\x01", "binary"),
        ("naïve".encode("latin-1"), "not UTF-8 (byte 2)"),
        (None, "there is no text file"),
        ("folder", "not a regular file"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "x.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        text_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- windows


@given(st.integers(4, 60), st.integers(0, 400), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_windows_are_even_and_apart(length: int, more: int, count: int) -> None:
    text = counted(length + more)
    tokens, targets, _ = windows(Corpus("t", text[:0], text), length, count)
    assert tokens.dtype == targets.dtype == torch.int64
    assert len(tokens) == min(count, len(text) // length)
    content, at = text.tolist(), 0
    starts = []
    for row, following in zip(tokens.tolist(), targets.tolist(), strict=True):
        starts.append(next(s for s in range(at, len(text)) if content[s : s + length] == row))
        at = starts[-1] + length  # the next window starts behind this one
        assert following[:-1] == row[1:]
        assert following[-1] == (content[at] if at < len(content) else IGNORED)
    if len(starts) > 1:
        gaps = np.diff(starts)
        assert gaps.max() - gaps.min() <= 1
        assert starts[0] == 0
        assert starts[-1] == len(text) - length


def test_the_shortest_windows() -> None:
    text = np.frombuffer(b"abc", dtype=np.uint8)
    tokens, targets, _ = windows(Corpus("t", text[:0], text), 1, 10)
    assert tokens.tolist() == [[97], [98], [99]]
    assert targets.tolist() == [[98], [99], [IGNORED]]


def test_a_text_shorter_than_the_length() -> None:
    corpus = Corpus("mine.txt", counted(0), counted(99))
    with pytest.raises(UserError, match=r"the text of mine\.txt is 99 bytes long, shorter than .* 100"):
        windows(corpus, 100, 3)
    with pytest.raises(UserError, match="at most 99"):
        windows(corpus, 100, 3)
    with pytest.raises(UserError, match="at least 1"):
        windows(corpus, 10, 0)


# ---------------------------------------------------------------------------------------------------- stream


def config(path: Path, **changes: Any) -> CorpusConfig:
    return CorpusConfig(**{"text": str(path), "length": 50, "batch_size": 8, "seed": 3, **changes})


def test_stream_batches_are_text_without_replacement(tmp_path: Path) -> None:
    stream = CorpusStream(config(file(tmp_path)))
    content = stream.corpus.train.tobytes()
    assert stream.batches_per_epoch == (4500 - 50) // 50 // 8 == 11
    offsets = []
    for epoch in range(6):
        batches = [stream.batch(epoch * 11 + i) for i in range(11)]
        starts = []
        for tokens, targets, _ in batches:
            assert tokens.shape == targets.shape == (8, 50)
            assert torch.equal(tokens[:, 1:], targets[:, :-1])
            for row, label in zip(tokens.tolist(), targets.tolist(), strict=True):
                starts.append(content.index(bytes(row)))
                assert content[starts[-1] + 50] == label[-1]
        assert len(set(starts)) == 88
        assert len({s % 50 for s in starts}) == 1
        assert starts != sorted(starts)
        offsets.append(starts[0] % 50)
    assert len(set(offsets)) > 2


def test_stream_stays_inside_the_text_at_every_offset(tmp_path: Path) -> None:
    path = file(tmp_path, 121)  # 109 bytes to train on
    for seed in range(60):
        stream = CorpusStream(config(path, length=12, batch_size=8, seed=seed))
        assert stream.batches_per_epoch == 1
        tokens, targets, _ = stream.batch(0)
        assert tokens.shape == (8, 12)
        assert (targets >= 0).all()


def test_stream_random_access(tmp_path: Path) -> None:
    path = file(tmp_path)
    sequence = [CorpusStream(config(path)).batch(step) for step in range(25)]
    stream = CorpusStream(config(path))
    for step in (24, 3, 11, 10, 0, 24):
        tokens, targets, _ = stream.batch(step)
        assert torch.equal(tokens, sequence[step].tokens)
        assert torch.equal(targets, sequence[step].targets)
    assert not torch.equal(CorpusStream(config(path, seed=4)).batch(0).tokens, sequence[0].tokens)
    with pytest.raises(UserError, match="count from 0"):
        stream.batch(-1)


def test_stream_validates_on_held_out_windows(tmp_path: Path) -> None:
    stream = CorpusStream(config(file(tmp_path), validation_windows=9))
    batches = list(stream.validation())
    assert [len(batch.tokens) for batch in batches] == [8, 1]
    heldout = stream.corpus.heldout.tobytes()
    assert all(bytes(row) in heldout for batch in batches for row in batch.tokens.tolist())
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, stream.validation(), strict=True))


def test_stream_mistakes(tmp_path: Path) -> None:
    path = file(tmp_path)
    with pytest.raises(UserError, match=r"has 4,500 bytes to train on; a batch of 8 windows of 600 needs 5,400"):
        CorpusStream(config(path, length=600))
    with pytest.raises(UserError, match=r"held-out text of text\.txt is 500 bytes"):
        CorpusStream(config(path, length=501, batch_size=2))
    with pytest.raises(UserError, match="did you mean 'length'"):
        config(path, lengt=3)
    with pytest.raises(UserError, match="no text file"):
        CorpusStream(config(tmp_path / "none.txt"))


def test_reference_stream() -> None:
    stream = CorpusStream(CorpusConfig(length=256, batch_size=16))
    assert stream.corpus.name == PYTHON_REFERENCE
    assert stream.batch(0).tokens.shape == (16, 256)
    assert sum(len(batch.tokens) for batch in stream.validation()) == 64


def test_several_files_each_hold_out_their_end(tmp_path: Path) -> None:
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 1000)
    both = read(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")
    assert (both.name, both.train.tobytes(), both.heldout.tobytes()) == (
        "a.txt + b.txt",
        b"a" * 900 + b"b" * 900,
        b"a" * 100 + b"b" * 100,
    )
    odd = tmp_path / "a.txt,b.txt"
    odd.write_text("one file " * 100)
    assert read(str(odd)).name == "a.txt,b.txt", "a comma in the name of a file that is there"
    with pytest.raises(UserError, match="no text file"):
        read(f"{tmp_path / 'a.txt'},{tmp_path / 'c.txt'}")
