"""Text that is packed on disk: every token once, in windows of the source, the same after a kill."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.tasks.streamed import Files, Hub, PackedStream, source_of


class Counting:
    """Documents of ten tokens that say where they stand: document i is 10 i .. 10 i + 9."""

    name = "counting"

    def __init__(self, documents: int) -> None:
        self.count, self.at, self.read = documents, 0, 0

    def documents(self, state: Any = None) -> Any:
        self.at = state or 0
        while self.at < self.count:
            self.at += 1
            self.read += 1
            yield str(self.at - 1)

    def state(self) -> Any:
        return self.at


def encode(texts: list[str]) -> list[list[int]]:
    return [list(range(10 * int(t), 10 * int(t) + 10)) for t in texts]


def stream(directory: Path, documents: int = 2000, **options: Any) -> PackedStream:
    settings: dict[str, Any] = {"length": 16, "batch_size": 4, "heldout": 800, "chunk": 4096} | options
    return PackedStream(Counting(documents), encode, 10 * documents, directory, **settings)


def steps_of_an_epoch(s: PackedStream) -> int:
    s.batch(10_000)  # to the end and over it
    return sum(s._batches(i) for i in range(s._ended() or 0))


def test_an_epoch_shows_every_window_once_and_nothing_held_out(tmp_path: Path) -> None:
    s = stream(tmp_path)
    total = steps_of_an_epoch(s)
    seen = torch.cat([s.batch(i).tokens.flatten() for i in range(total)])
    assert len(seen.unique()) == len(seen), "no token twice"
    held = s.validation(1000).tokens.flatten()
    assert 700 <= len(held) <= 800
    assert not set(held.tolist()) & set(seen.tolist())
    assert len(seen) > 0.95 * (20_000 - len(held))
    assert held.max() > 3500, "blocks from all of the first chunk"


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    batch = stream(tmp_path).batch(3)
    assert batch.tokens.shape == batch.targets.shape == (4, 16)
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_a_second_epoch_has_the_same_windows_in_another_order(tmp_path: Path) -> None:
    s = stream(tmp_path, documents=300)
    total = steps_of_an_epoch(s)
    first, second = (torch.cat([s.batch(e * total + i).tokens for i in range(total)]) for e in (0, 1))
    assert not torch.equal(first, second)
    assert len(set(first.flatten().tolist()) & set(second.flatten().tolist())) > 0.8 * first.numel()


def test_a_new_process_finds_the_same_batches_and_reads_nothing_again(tmp_path: Path) -> None:
    s = stream(tmp_path / "a")
    wanted = [s.batch(i) for i in (0, 100, 200)]
    again = stream(tmp_path / "a")
    for i, batch in zip((0, 100, 200), wanted, strict=True):
        assert torch.equal(again.batch(i).tokens, batch.tokens)
    assert again.source.read == 0  # type: ignore[attr-defined]
    # a kill between two chunks: what is missing is made again from where the source stood
    for part in (tmp_path / "a").glob("00002*"):
        part.unlink()
    third = stream(tmp_path / "a")
    assert torch.equal(third.batch(200).tokens, wanted[2].tokens)
    assert stream(tmp_path / "b").identity == s.identity
    assert third.identity != stream(tmp_path / "c", documents=1000, chunk=2048).identity


def test_a_separator_stands_after_every_document(tmp_path: Path) -> None:
    s = PackedStream(Counting(100), encode, 2000, tmp_path, length=8, batch_size=2, heldout=0, separator=1999)
    tokens = np.load(tmp_path / "00000.npy")
    assert tokens.dtype == np.uint16
    assert tokens[10::11].tolist() == [1999] * 100
    assert s.batch(0).tokens.shape == (2, 8)


def test_too_little_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more text"):
        stream(tmp_path, documents=3)


def test_files_go_on_where_they_stood(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)))
    source = source_of(f"{tmp_path / 'a.txt'},{tmp_path / 'b.jsonl'}")
    assert isinstance(source, Files)
    assert source.name == "a.txt + b.jsonl"
    everything = list(source.documents())
    assert everything == ["one\ntwo\n", "line 0", "line 1", "line 2"]
    assert list(source.documents(source.state())) == []
    some = source.documents()
    next(some), next(some)
    assert list(Files([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]).documents(source.state())) == everything[2:]


@pytest.mark.parametrize("content", [b"{}\n", b"no json\n", b'{"text": "\xff"}\n'])
def test_files_that_are_no_text_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        list(Files([str(path)]).documents())
    with pytest.raises(UserError, match="no text file"):
        source_of(str(tmp_path / "absent.txt"))


def test_the_hub_without_its_package_and_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        source_of("datasets:some/thing")

    class Streamed(list[dict[str, Any]]):
        def load_state_dict(self, state: Any) -> None:
            self[:] = self[state:]

        def state_dict(self) -> int:
            return 1

    asked: list[Any] = []

    def load_dataset(*path: str, **options: Any) -> Streamed:
        asked.append((path, options))
        if path[0] == "absent":
            raise FileNotFoundError("no such\nset")
        return Streamed([{path[0]: "a"}, {path[0]: "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = source_of("datasets:text:small")
    assert isinstance(source, Hub)
    assert asked == [(("text", "small"), {"split": "train", "streaming": True})]
    assert list(source.documents()) == ["a", "b"]
    assert list(source.documents(source.state())) == ["b"]
    with pytest.raises(UserError, match=r"no text column.*picture"):
        Hub("picture")
    with pytest.raises(UserError, match=r"cannot stream datasets:absent: no such set"):
        Hub("absent")
