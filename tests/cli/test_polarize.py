"""`ssmlens polarize` and `ssmlens train --from`, as a user types them."""

import json

import pytest
import torch
from typer.testing import CliRunner

import ssmlens
from ssmlens.cli.app import app
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.models.retrofit import new_entries

TUNING = """
[data]
task = "corpus"
length = 64
batch_size = 2
validation_windows = 2

[training]
steps = 3
lr = 1e-2
weight_decay = 0.1
checkpoint_every = 1
"""


@pytest.fixture
def plain(tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=2))
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "data.json").write_text("{}")
    (tmp_path / "tune.toml").write_text(TUNING)
    return tmp_path / "plain"


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def fails(*arguments):
    result = call(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, UserError), result.exception
    return str(result.exception)


def test_polarize_train_only_the_new_and_load_back(plain, tmp_path):
    result = call("polarize", plain, "-o", tmp_path / "new", "--ones", 2)
    assert result.exit_code == 0, result.output
    tree = json.loads((tmp_path / "new" / "results.json").read_text())
    assert tree["tables"][0]["rows"][0][3] == 2 * 2 * 3 * 32  # layers, rows of B and C, three channels, d_inner
    assert (tmp_path / "new" / "data.json").exists()
    start = ssmlens.load(tmp_path / "new")
    result = call(
        "train", tmp_path / "tune.toml", "--from", tmp_path / "new", "--only-polarized", "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    tuned = ssmlens.load(tmp_path / "run" / "model")
    entries = new_entries(start)
    for name, value in tuned.state_dict().items():
        changed = value != start.state_dict()[name]
        assert not (changed & ~entries.get(name, torch.zeros_like(changed))).any(), name
    name = "backbone.blocks.0.mixer.x_proj.weight"
    assert (tuned.state_dict()[name] != start.state_dict()[name])[entries[name]].any()


def test_all_parameters_are_trained_without_the_option_and_a_resume_needs_the_same_start(plain, tmp_path):
    call("polarize", plain, "-o", tmp_path / "new")
    run = ["train", tmp_path / "tune.toml", "--from", tmp_path / "new", "--out", tmp_path / "run"]
    assert call(*run).exit_code == 0
    tuned, start = ssmlens.load(tmp_path / "run" / "model"), ssmlens.load(tmp_path / "new")
    assert not torch.equal(tuned.backbone.embedding.weight, start.backbone.embedding.weight)
    assert call(*run, "--resume").exit_code == 0
    run[3] = plain
    assert "another configuration" in fails(*run, "--resume")
    assert "only_polarized" in fails("train", *run[1:3], tmp_path / "new", *run[4:], "--only-polarized", "--resume")


def test_several_models_lie_below_the_directory_and_share_a_page(plain, tmp_path):
    torch.manual_seed(1)
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1, mixer="gla")).save_pretrained(
        tmp_path / "b"
    )
    assert call("polarize", plain, tmp_path / "b", "-o", tmp_path / "new").exit_code == 0
    tree = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row[0] for row in tree["tables"][0]["rows"]] == ["plain", "b"]
    for name in ("plain", "b"):
        assert ssmlens.load(tmp_path / "new" / name).config.architecture.polarization is not None


def test_bad_requests_are_named(plain, tmp_path):
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1, mixer="attention")).save_pretrained(
        tmp_path / "att"
    )
    assert "nothing to add" in fails("polarize", plain, "-o", tmp_path / "x", "--ones", 0, "--zeros", 0)
    assert "nothing to polarize" in fails("polarize", tmp_path / "att", "-o", tmp_path / "x")
    assert "holds a model already" in fails("polarize", plain, "-o", plain)
    tune = tmp_path / "tune.toml"
    assert "neither" in fails("train", tune, "--out", tmp_path / "x")
    assert "not polarized" in fails("train", tune, "--from", plain, "--only-polarized", "--out", tmp_path / "x")
    (tmp_path / "both.toml").write_text("[model]\nd_model = 8\n" + TUNING)
    assert "not both" in fails("train", tmp_path / "both.toml", "--from", plain, "--out", tmp_path / "x")
    assert "--from" in fails("train", tmp_path / "both.toml", "--only-polarized", "--out", tmp_path / "x")
