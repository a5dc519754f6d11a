"""Classifiers on the command line: train, evaluate, diagnose. In this process: what a process adds is tested in test_cli."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import ssmlens
from ssmlens.errors import UserError
from ssmlens.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig
from ssmlens.tasks import images

RUN = """
seed = 1
[model]
d_model = 16
n_layers = 1
mixer = "mamba"
mixer_config = { d_state = 4 }
pooling = "mean"
mean = [0.3]
std = [0.3]
[data]
task = "images"
source = "digits"
train_images = 640
validation_images = 100
batch_size = 32
[training]
steps = 60
lr = 3e-2
"""


def call(*args):
    from ssmlens.cli.app import app

    app([str(a) for a in args], standalone_mode=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    where = tmp_path_factory.mktemp("run")
    (where / "digits.toml").write_text(RUN)
    call("train", where / "digits.toml", "--out", where / "out")
    return where / "out" / "model"


def saved(path, **changes):
    torch.manual_seed(0)
    fields = {"d_input": 1, "n_classes": 10, "d_model": 8, "n_layers": 1, "mixer_config": {"d_state": 2}}
    Classifier(ClassifierConfig(**{**fields, **changes})).save_pretrained(path)
    return path


def record(where):
    return json.loads((where / "results.json").read_text())


def test_train_infers_the_classifier_from_its_data(trained):
    model = ssmlens.load(trained)
    assert isinstance(model, Classifier)
    assert (model.config.d_input, model.config.n_classes) == (1, 10)
    history = [json.loads(line) for line in (trained.parent / "history.jsonl").read_text().splitlines()]
    assert history[-1]["evaluation"]["accuracy"] > 0.2  # a tenth by guessing
    assert json.loads((trained / "data.json").read_text())["source"] == "digits"


def test_evaluate_counts_what_the_model_says(trained, tmp_path):
    call(
        "evaluate",
        trained,
        saved(tmp_path / "fresh"),
        "--images",
        "digits",
        "--out",
        tmp_path / "out",
        "--batch-size",
        100,
    )
    found = record(tmp_path / "out")
    test = images.digits().test
    with torch.no_grad():
        right = ssmlens.load(trained)(images.to_unit(test.pixels)).logits.argmax(-1).numpy() == test.labels
    table = found["tables"][0]
    assert [row[0] for row in table["rows"]] == ["out", "fresh"]
    assert table["rows"][0][1]["value"] == pytest.approx(100 * right.mean())
    assert table["rows"][0][1]["stderr"] == pytest.approx(100 * right.std(ddof=1) / np.sqrt(359))
    assert found["tables"][1]["rows"][3][0] == "3"
    assert "of 359 test images right" in found["verdict"][0]
    assert "fresh gets fewer right than out" in found["verdict"][2]
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_interval_is_wilsons():
    from ssmlens.cli.evaluate import Found

    low, high = Found("m", np.array([True] * 8 + [False] * 2), np.zeros(10)).interval()
    assert (low, high) == pytest.approx((49.0, 94.3), abs=0.1)
    assert Found("m", np.ones(10, bool), np.zeros(10)).interval()[1] == pytest.approx(100)


def test_evaluate_a_balanced_part(trained, tmp_path):
    call("evaluate", trained, "--images", "digits", "--limit", 30, "--out", tmp_path)
    found = record(tmp_path)
    assert found["tables"][0]["rows"][0][3] == 30
    assert {row[1]["n"] for row in found["tables"][1]["rows"]} == {3}


def test_diagnose_classifiers_side_by_side(trained, tmp_path):
    args = ("--images", "digits", "--sequences", 3, "--measure", "reading")
    call("diagnose", trained, saved(tmp_path / "fresh"), *args, "--out", tmp_path / "out")
    found = record(tmp_path / "out")
    assert found["config"]["images"]["name"] == "digits"
    assert found["config"]["images"]["sha256"] == images.digits().sha256
    assert {t["id"] for t in found["tables"]} >= {"reading", "models"}
    assert any("3 test images of 8 × 8 pixels" in note for note in found["notes"])
    assert sum("read off the mean over all hidden states" in note for note in found["notes"]) == 1


def test_images_are_made_as_small_as_in_training(tmp_path):
    model = saved(tmp_path / "m")
    diagnose = (
        "diagnose",
        model,
        "--images",
        "digits",
        "--sequences",
        2,
        "--measure",
        "reading",
        "--out",
        tmp_path / "out",
    )
    (model / "data.json").write_text('{"side": 4}')
    call(*diagnose)
    assert any("2 test images of 4 × 4 pixels" in note for note in record(tmp_path / "out")["notes"])
    call(*diagnose, "--side", 2)
    assert any("2 test images of 2 × 2 pixels" in note for note in record(tmp_path / "out")["notes"])
    right = {}
    for side in (4, 8):
        call("evaluate", model, "--images", "digits", "--side", side, "--out", tmp_path / str(side))
        right[side] = record(tmp_path / str(side))["tables"][0]["rows"][0][2]["value"]
    call("evaluate", model, "--images", "digits", "--out", tmp_path / "own")
    assert record(tmp_path / "own")["tables"][0]["rows"][0][2]["value"] == right[4] != right[8]
    with pytest.raises(UserError, match=r"m: 4 × 4, .*other: not said"):
        call(*diagnose[:2], saved(tmp_path / "other"), *diagnose[2:])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_diagnose_vectors_of_a_file(tmp_path, suffix):
    model = saved(tmp_path / "m", d_input=5)
    x = np.random.default_rng(0).random((7, 12, 5), np.float32)
    file = tmp_path / f"x{suffix}"
    np.save(file, x) if suffix == ".npy" else save_file({"inputs": x, "other": x[0]}, file)
    call("diagnose", model, "--inputs", file, "--sequences", 4, "--measure", "reading", "--out", tmp_path / "out")
    assert any("4 of 7 sequences of 12 vectors" in note for note in record(tmp_path / "out")["notes"])


def test_what_does_not_fit_is_named(trained, tmp_path):
    LanguageModel(LanguageModelConfig(d_model=8, n_layers=1)).save_pretrained(tmp_path / "lm")
    colour, odd = saved(tmp_path / "colour", d_input=3), saved(tmp_path / "odd", n_classes=7)
    np.save(tmp_path / "ints.npy", np.zeros((2, 9, 1), int))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "wide.npy", np.zeros((2, 9, 4), np.float32))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    save_file({"a": np.zeros(3), "b": np.zeros(3)}, tmp_path / "two.safetensors")
    diagnose = ("diagnose", trained, "--out", tmp_path / "o")
    for args, message in {
        diagnose: "reads vectors and no text: give --images SOURCE or --inputs FILE",
        ("diagnose", tmp_path / "lm", "--images", "digits", "--out", tmp_path / "o"): "lm reads tokens",
        (*diagnose, "--images", "digits", "--inputs", "x.npy"): "one of --images and --inputs, not both",
        (*diagnose, "--images", "nonesuch"): "no images at nonesuch",
        (*diagnose, "--inputs", "x.npy", "--side", 4): "--side makes images smaller",
        (*diagnose, "--inputs", tmp_path / "no.npy"): "cannot read",
        (*diagnose, "--inputs", tmp_path / "ints.npy"): "must hold floats",
        (*diagnose, "--inputs", tmp_path / "objects.npy"): "cannot read",
        (*diagnose, "--inputs", tmp_path / "wide.npy"): "d_input 1, the inputs have 4",
        (*diagnose, "--inputs", tmp_path / "cut.safetensors"): "cannot read",
        (*diagnose, "--inputs", tmp_path / "two.safetensors"): "none is named inputs",
        ("diagnose", colour, "--images", "digits", "--out", tmp_path / "o"): "reads 3 numbers a pixel, digits has 1",
        (
            "evaluate",
            colour,
            "--images",
            "digits",
            "--out",
            tmp_path / "o",
        ): "digits has 1 channels and 10 classes, colour 3 and 10",
        ("evaluate", odd, "--images", "digits", "--out", tmp_path / "o"): "10 classes, odd 1 and 7",
        ("evaluate", tmp_path / "lm", "--images", "digits", "--out", tmp_path / "o"): "evaluate is for classifiers",
    }.items():
        with pytest.raises(UserError) as e:
            call(*args)
        assert message in str(e.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pooling", "vocab_size = 9\npooling", "no key 'vocab_size'"),
        ("n_layers", "n_classes = 4\nn_layers", "10 classes, the model 1 and 4"),
        ('"images"', '"corpus"', "no key 'source'"),
        ('"digits"', '"digit"', "no images at digit"),
    ],
)
def test_wrong_training_files_are_named(tmp_path, old, new, message):
    (tmp_path / "x.toml").write_text(RUN.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        call("train", tmp_path / "x.toml", "--out", tmp_path / "out")


def test_training_goes_on_from_a_classifier(trained, tmp_path):
    (tmp_path / "more.toml").write_text("[data]" + RUN.split("[data]")[1].replace("steps = 60", "steps = 3"))
    call("train", tmp_path / "more.toml", "--from", trained, "--out", tmp_path / "out")
    assert isinstance(ssmlens.load(tmp_path / "out" / "model"), Classifier)
    text = '[data]\ntask = "corpus"\nlength = 16\nbatch_size = 2\n[training]\nsteps = 2\n'
    (tmp_path / "text.toml").write_text(text)
    with pytest.raises(UserError, match=r"a classifier learns from task = .images."):
        call("train", tmp_path / "text.toml", "--from", trained, "--out", tmp_path / "out2")
