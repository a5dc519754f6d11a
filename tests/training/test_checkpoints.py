"""Checkpoints on disk: what goes in comes out, and what is not complete does not count."""

import json
import os
import random
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_tiny import Stream, Tiny, call

from ssmlens.errors import UserError
from ssmlens.training import TrainConfig, checkpoints, default_groups
from ssmlens.training.optimizer import adamw


def trained(seed=0):
    model = Tiny(seed)
    optimizer = adamw(default_groups(model, 0.1), TrainConfig(steps=9, lr=0.1))
    for step in range(2):
        call(model, Stream().batch(step)).loss.backward()
        optimizer.step()
    return model, optimizer


def save(directory, step=3, seed=0, **state):
    model, optimizer = trained(seed)
    path = checkpoints.save(directory, step, model=model, optimizer=optimizer, rng=[checkpoints.get_rng()], state=state)
    return path, model, optimizer


def test_a_round_trip_is_exact(tmp_path):
    path, model, optimizer = save(tmp_path, window=[[0.1 + 0.2, 1.0, 3.0]])
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optimizer.pt", "rng.pt", "state.json"]
    state = checkpoints.read_state(path)
    assert (state["step"], state["window"]) == (3, [[0.1 + 0.2, 1.0, 3.0]])

    other = Tiny(seed=5)
    fresh = adamw(default_groups(other, 0.1), TrainConfig(steps=9, lr=0.1))
    checkpoints.load(path, other, fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    left, right = optimizer.state_dict(), fresh.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for index, entries in left["state"].items():
        for name, tensor in entries.items():
            assert torch.equal(right["state"][index][name], tensor)
    assert other.head.weight is other.embedding.weight


def test_tied_tensors_are_stored_once_and_views_alone(tmp_path):
    model = Tiny()
    base = torch.arange(6.0).reshape(2, 3)
    model.register_buffer("row", base[1])
    model.register_buffer("column", base[:, 1])
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    optimizer = adamw(default_groups(model, 0.1), TrainConfig(steps=1))
    path = checkpoints.save(tmp_path, 1, model=model, optimizer=optimizer, rng=[], state={})
    stored = load_file(path / "model.safetensors")
    assert set(stored) == {"embedding.weight", "mix.weight", "mix.bias", "calls", "row", "column"}
    assert checkpoints.read_state(path)["tied"] == {"head.weight": "embedding.weight"}
    assert stored["column"].tolist() == [1.0, 4.0]
    model.row.zero_()
    checkpoints.load_model(path, model)
    assert model.row.tolist() == [3.0, 4.0, 5.0]


def test_all_random_number_generators_continue(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    random.gauss(), np.random.randn(), torch.rand(1)  # noqa: NPY002 (leaves a second gaussian in store)

    def draw():
        return random.random(), random.gauss(), np.random.randn(), np.random.rand(), torch.randn(3).tolist()  # noqa: NPY002

    path, *_ = save(tmp_path)
    rng = checkpoints.get_rng()
    torch.save(rng, tmp_path / "rng.pt")
    first = draw()
    checkpoints.set_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == first
    assert isinstance(torch.load(path / "rng.pt", weights_only=True), list)


def test_only_the_last_two_are_kept(tmp_path):
    for step in (5, 9, 10, 200):
        save(tmp_path, step)
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-00000200"]
    assert checkpoints.latest(tmp_path).name == "step-00000200"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"a") if path.suffix == ".json" else len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [truncate, flip, os.remove, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng.pt", "state.json", "manifest.json"])
def test_a_broken_one_is_passed_over(tmp_path, harm, name):
    good, *_ = save(tmp_path, 4)
    bad, *_ = save(tmp_path, 8)
    harm(bad / name)
    assert checkpoints.latest(tmp_path) == good
    save(tmp_path, 8, seed=1)  # the run gets there again: the broken one makes way
    assert checkpoints.latest(tmp_path) == bad


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "null", '{"model.safetensors": null}', '{"../x": {}}'])
def test_strange_manifests_do_not_count(tmp_path, manifest):
    path, *_ = save(tmp_path)
    (path / "manifest.json").write_text(manifest)
    assert checkpoints.latest(tmp_path) is None


def test_what_is_not_one_is_ignored(tmp_path):
    good, *_ = save(tmp_path, 4)
    for name in (".step-00000008.tmp-00000000-123-0", "step-notanumber", "step-00000012"):
        (tmp_path / name).mkdir()
    assert checkpoints.latest(tmp_path) == good
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_others_may_read_them(tmp_path):
    before = os.umask(0o022)
    try:
        path, *_ = save(tmp_path)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        os.listdir(path), "0o644"
    )


# bytes at which the system fails as it does for a full disk: in the model, the optimizer, the generators
@pytest.mark.parametrize("bytes_", [500, 2500, 6000])
def test_a_full_disk_leaves_the_earlier_ones_alone(tmp_path, bytes_):
    good, *_ = save(tmp_path, 4)
    sizes = [(good / f"{name}").stat().st_size for name in ("model.safetensors", "optimizer.pt", "rng.pt")]
    assert 500 < sizes[0] < 2500 < sizes[1] < 6000 < sizes[2]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*step-00000008"):
            save(tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [good.name]
    assert checkpoints.latest(tmp_path) == good


def test_what_does_not_fit_is_said(tmp_path):
    path, model, _ = save(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the model: .*mix\.weight"):
        checkpoints.load(path, nn.Sequential(nn.Linear(2, 2)))
    optimizer = adamw([{"params": list(model.parameters())}], TrainConfig(steps=1))
    with pytest.raises(UserError, match="other optimizer groups"):
        checkpoints.load(path, model, optimizer)


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path):
    path, model, optimizer = save(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"state": Evil(), "param_groups": []}, path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoints.load(path, model, optimizer)
    assert not (tmp_path / "owned").exists()


def test_state_is_plain_json(tmp_path):
    path, *_ = save(tmp_path, note="π")
    assert json.loads((path / "state.json").read_text())["note"] == "π"
