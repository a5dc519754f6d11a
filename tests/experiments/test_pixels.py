"""Classifiers of pixel sequences under attack: against models whose weaknesses are known, and the items and the verb as a whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ssmlens.cli.app import app
from ssmlens.errors import UserError
from ssmlens.experiments import (
    Request,
    find,
    pixels,
    pixels_claims,
    pixels_images,
    pixels_measure,
    pixels_models,
    pixels_noise,
    pixels_trained,
)
from ssmlens.experiments.pixels_claims import Sides
from ssmlens.experiments.pixels_measure import Plan, Predictions, measure
from ssmlens.experiments.pixels_models import SCALES, Model
from ssmlens.experiments.pixels_runs import Runs, crossed
from ssmlens.results import Record
from ssmlens.tasks import images
from ssmlens.tasks.images import ImageSet, Split
from ssmlens.tasks.pixels import Region

LENGTH, CLASSES = 16, 4
FIRST, LAST = Region(0, 4), Region(12, 16)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Reads(nn.Module):
    """Its logits are the mean of the pixels, channel by channel, over `region` alone: a class is a channel that is bright."""

    def __init__(self, region):
        super().__init__()
        self.region = region
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Output(self.gain * x[:, self.region.here].mean(1) * 20)


def bright(n=80):
    """Images whose class is the channel that is bright, everywhere."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % CLASSES
    pixels_ = rng.integers(0, 100, (n, LENGTH, CLASSES)).astype(np.uint8)
    pixels_[np.arange(n), :, labels] += 100
    return pixels_, labels.astype(np.int64)


PLAN = Plan(
    noise=(FIRST, LAST), draws=2, target=(FIRST, LAST), classes=(0, 1, 2, 3), gradient=(FIRST, LAST), epsilons=(0.02, 0.3), steps=4, images=40, hardest=True
)  # fmt: skip


def measured(model, plan=PLAN, store=None):
    x, y = bright()
    found = measure(model, x, y, plan, store or Predictions())
    return Runs.of("m", y, [found.found], [found.losses])


def test_a_model_that_reads_the_last_pixels_is_weak_there_and_nowhere_else():
    runs = measured(Reads(LAST))
    assert runs.clean().mean() == 1
    assert runs.noise(FIRST).mean() == 1
    assert runs.noise(LAST).mean() < 0.5  # four channels of noise: chance
    assert runs.asymmetry(LAST, FIRST).interval()[0] > 40
    assert runs.success(FIRST, [0, 1, 2, 3]).mean() == 0
    assert runs.success(LAST, [0, 1, 2, 3]).mean() == 1
    assert runs.success(None, [2]).mean() == 0
    assert runs.success(LAST, [2]).shape == (1, 60)  # images of class 2 are no victims
    assert runs.gradient(FIRST, 0.3).mean() == 1
    assert runs.gradient(LAST, 0.02).mean() == 1  # bright by 100 of 255: out of reach
    assert runs.gradient(LAST, 0.3).mean() == 0
    assert runs.gradient(LAST, 0.3, "signs").mean() > 0.9
    assert runs.gradient(Region(0, LENGTH), 1.0).shape == (1, 10)
    s = Sides(4, LENGTH)
    assert pixels_claims.advantage(runs, s, [1]).value == 100


def test_a_model_that_reads_everything_has_no_weak_end():
    runs = measured(Reads(Region(0, LENGTH)))
    assert abs(runs.asymmetry(LAST, FIRST).value) < 15
    assert runs.asymmetry(LAST, FIRST).p_value() > 0.01


def test_the_order_of_images_and_the_size_of_batches_change_nothing():
    x, y = bright()
    one = measure(Reads(LAST), x, y, PLAN, Predictions(), batch_size=7)
    two = measure(Reads(LAST), x, y, PLAN, Predictions(), batch_size=80)
    assert one.found.keys() == two.found.keys()
    assert all((one.found[k] == two.found[k]).all() for k in one.found)


def test_progress_adds_up_and_the_model_is_left_as_it_was():
    x, y = bright()
    model, passes = Reads(LAST).train(), []
    measure(model, x, y, PLAN, Predictions(), advance=passes.append)
    assert sum(passes) == PLAN.work(len(y))
    assert model.training
    assert model.gain.requires_grad
    assert model.gain.grad is None
    assert float(torch.full((1,), 1e-40) * 1.0) > 0  # subnormal numbers are back


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path):
    class Counts(Reads):
        asked = 0

        def forward(self, x):
            Counts.asked += 1
            return super().forward(x)

    path = tmp_path / "p.json"
    first = measured(Counts(LAST), store=Predictions(path, {"a": 1}))
    asked = Counts.asked
    tree = json.loads(path.read_text())
    del tree["predictions"]["noise 12:16 #1"]
    path.write_text(json.dumps(tree))
    again = measured(Counts(LAST), store=Predictions(path, {"a": 1}))
    assert Counts.asked == asked + 1
    assert (again.noise(LAST) == first.noise(LAST)).all()
    with pytest.raises(UserError, match="a differ"):
        Predictions(path, {"a": 2})
    with pytest.raises(UserError, match="--resume"):
        Predictions(path, {"a": 1}, resume=False)
    path.write_text('{"identity": {}, "predictions": {"clean": "%"}, "losses": {}}')
    with pytest.raises(UserError, match="damaged"):
        Predictions(path)


def test_a_model_of_nan_is_refused():
    class Broken(Reads):
        def forward(self, x):
            return Output(super().forward(x).logits * float("nan"))

    with pytest.raises(UserError, match="NaN"):
        measured(Broken(LAST))


@pytest.mark.parametrize(("by_seed", "by_image"), [(0.0, 1.0), (1.0, 0.0), (0.5, 1.0)])
def test_the_interval_covers_as_often_as_it_says(by_seed, by_image):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        rows = by_seed * rng.normal(size=(4, 1)) + by_image * rng.normal(size=(1, 60)) + 0.5 * rng.normal(size=(4, 60))
        low, high = crossed(rows).interval()
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.995


def test_with_one_seed_it_is_the_mean_over_images():
    rows = np.random.default_rng(0).normal(size=(1, 50))
    value = crossed(rows)
    assert (value.n, value.value) == (50, pytest.approx(rows.mean()))
    assert value.stderr == pytest.approx(rows.std(ddof=1) / np.sqrt(50))


def test_the_papers_rows_are_the_papers():
    """The relative losses that it prints beside them."""
    for mixer, region, lost in (("mamba", "992:1024", 81.24), ("mamba", "0:96", 3.98), ("rwkv4", "928:1024", 70.88), ("h3", "992:1024", 13.04),
                                ("attention", "0:32", 22.95)):  # fmt: skip
        row = pixels_claims.PAPER[mixer]
        assert 100 * (1 - row[region] / row["clean"]) == pytest.approx(lost, abs=0.25)
        assert set(row) == {"clean", *pixels_models.PAPER_REGIONS}
    assert Sides.of_paper(32, 256).asymmetry_in_paper("mamba") == pytest.approx(53.2)
    assert Sides.of_paper(32, 256).asymmetry_in_paper("mamba-polarized") is None
    assert Sides.of_paper(256, 256).width == 64


def synthetic(found_last, found_first, seeds=3, n=200):
    """Runs that are right on so large a share of images with noise at either end."""
    labels = np.arange(n) % 10
    s, everything = Sides.of_paper(32, 256), {}
    rng = np.random.default_rng(0)
    for width in pixels_models.PAPER_WIDTHS:
        sides = Sides.of_paper(width, 256)
        for region, share in ((sides.leading, found_first), (sides.trailing, found_last)):
            everything[pixels_measure.key("noise", region, "#0")] = np.where(
                rng.random((seeds, n)) < share, labels, (labels + 1) % 10
            )
    everything[pixels_measure.key("noise", Region(480, 576).scaled(256, 1024), "#0")] = np.where(
        rng.random((seeds, n)) < 0.4, labels, 11
    )
    everything["clean"] = np.where(rng.random((seeds, n)) < 0.6, labels, (labels + 1) % 10)
    return Runs("m", labels, {k: v.astype(np.uint8) for k, v in everything.items()}), s


@pytest.mark.parametrize(
    ("last", "first", "outcome"), [(0.1, 0.6, "agrees"), (0.6, 0.1, "differs"), (0.4, 0.4, "undecided")]
)
def test_claims_are_decided_by_the_interval(last, first, outcome):
    runs, _ = synthetic(last, first)
    claims = pixels_claims.noise_claims({"mamba": runs}, 256, 10, learned=True)
    assert all(c.claim.endswith(".") for c in claims)
    table1 = [c for c in claims if c.item == "Table 1" and "far more" not in c.claim]
    assert [c.outcome for c in table1] == [outcome] * 2
    assert {c.outcome for c in pixels_claims.noise_claims({"mamba": runs}, 256, 10, learned=False)} == {
        "not comparable"
    }
    as_transformer = pixels_claims.noise_claims({"attention": runs}, 256, 10, learned=True)
    opposite = {"agrees": "differs", "differs": "agrees", "undecided": "undecided"}[outcome]
    assert [c.outcome for c in as_transformer if c.item == "Table 1"] == [opposite] * 2
    assert [c.outcome for c in as_transformer if "25 %" in c.claim] == ["not comparable"]  # 1.4 points of one run


@pytest.mark.parametrize(
    ("last", "first", "says"),
    [
        (0.1, 0.6, "loses more to noise in its trailing 8"),
        (0.6, 0.1, "loses more to noise in its leading 8"),
        (0.4, 0.4, "shows no difference"),
    ],
)
def test_sentences_say_what_the_interval_says(last, first, says):
    runs, s = synthetic(last, first)
    found = {"mamba": runs, "mamba-polarized": replace(runs, name="p")}
    sentences = pixels_noise.sentences(found, s, 10)
    assert [says in text for text in sentences] == [True, False, True]
    assert "the paper's, at length 1,024: +53.2" in sentences[0]
    assert "paper" not in sentences[2]
    assert (
        sentences[1]
        == "p, against m: trailing minus leading changes by +0.0 points (+0.0 to +0.0): no change that can be told."
    )


def test_a_model_no_better_than_chance_is_not_compared():
    runs, s = synthetic(0.1, 0.6)
    chance = replace(runs, predictions={**runs.predictions, "clean": np.zeros((3, 200), np.uint8)})
    claims = pixels_claims.noise_claims({"mamba": chance}, 256, 10, learned=True)
    assert {c.outcome for c in claims} == {"not comparable"}
    assert "not shown to beat chance" in pixels_noise.sentences({"mamba": chance}, s, 10)[0]


@pytest.mark.parametrize("name", [n for n in pixels_models.names() if not n.endswith("-mean")])
def test_every_mixer_makes_a_classifier_of_the_laptop_size(name):
    scale = replace(SCALES["laptop"], layers=1, side=4)
    small = Split(np.zeros((10, 16, 3), np.uint8), np.arange(10))
    config = pixels_models.classifier(
        scale, Model.of(name), ImageSet("none", "", tuple("abcdefghij"), 4, 4, 3, small, small)
    )
    net = pixels_models.build(config, 0, 16)
    assert net(torch.rand(2, 16, 3)).logits.shape == (2, 10)
    assert Model.of(name).name == name
    assert (config.polarization is not None) == name.endswith("-polarized")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("smoke")
    request = Request(
        scale="smoke", out=out, variants=("mamba", "mamba-polarized", "attention"), seeds=2, processes=0, progress=False
    )
    return request, find("pixels").run(request)


def test_smoke_has_all_parts_and_resuming_trains_nothing(smoke, monkeypatch):
    request, record = smoke
    assert {t.id for t in record.tables} >= {
        "claims",
        "corruption",
        "asymmetry-table",
        "change",
        "figure3-table",
        "figure10-table",
        "gradient-table",
        "checks",
    }
    assert {m.id for m in record.maps} == {"lost", "by-class", "under-gradient"}
    assert record.verdict == [record.verdict[0]]
    assert "Smoke" in record.verdict[0]
    assert record.config["claims"]
    assert all(c["outcome"] == "not comparable" for c in record.config["claims"])
    assert Record.from_json(record.to_json()).to_json() == record.to_json()
    assert str(request.out) not in record.to_json()

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(pixels, "train", refuse)
    assert find("figure3").run(replace(request, resume=True)).tables == record.tables


def test_a_run_that_was_cut_while_measuring_goes_on(smoke, tmp_path):
    once = replace(smoke[0], out=tmp_path, variants=("mamba",), seeds=1)
    first = find("table1").run(once)
    run = tmp_path / "runs" / "mamba-seed0"
    (run / "result.json").unlink()
    tree = json.loads((run / "predictions.json").read_text())
    tree["predictions"] = {"clean": tree["predictions"]["clean"]}
    (run / "predictions.json").write_text(json.dumps(tree))
    again = find("table1").run(replace(once, resume=True))
    assert again.tables == first.tables


def test_models_trained_elsewhere_stand_on_the_same_page(smoke, tmp_path, monkeypatch):
    """A classifier of the run itself, given as a trained one, shows what the run has measured of it."""
    runs = smoke[0].out / "runs"
    once = replace(smoke[0], out=tmp_path, variants=("mamba",), seeds=1)
    both = replace(once, models=tuple(str(runs / f"mamba-seed{seed}" / "model") for seed in (0, 1)))
    plain, record = find("pixels").run(once), find("pixels").run(replace(both, resume=True))
    tables = {t.id: t for t in record.tables}
    own, trained = tables["corruption"], tables["trained-64-corruption"]
    assert [c.name for c in trained.columns] == [c.name for c in own.columns]
    assert [row[0] for row in trained.rows] == ["mamba-seed0", "mamba-seed1"]
    assert trained.rows[0][1:] == own.rows[0][1:]
    assert tables["trained-64-target-table"].rows[0][1:] == tables["figure10-table"].rows[0][1:]
    assert tables["trained-64-gradient-table"].rows[0][1:] == tables["gradient-table"].rows[0][1:]
    assert plain.tables == record.tables[: len(plain.tables)]
    assert "mamba-seed1 (mamba, class token last" in record.notes[-1]
    assert set(record.config["trained"][0]["models"]) == {"mamba-seed0", "mamba-seed1"}
    assert Record.from_json(record.to_json()).to_json() == record.to_json()

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(pixels_measure.attacks, "pgd", refuse)
    assert find("pixels").run(replace(both, resume=True)).tables == record.tables


def test_models_trained_elsewhere_read_no_more_tokens_and_keep_their_size(smoke, tmp_path):
    """Twice as high and wide: four times the tokens, a quarter of the images."""
    scale = replace(SCALES["smoke"], side=4, test_images=80, attacked=12)
    group, = pixels_trained.opened([str(smoke[0].out / "runs" / "mamba-seed0" / "model")], "digits", scale)  # fmt: skip
    assert (group.images.length, len(group.images.test), group.plan.images) == (64, 20, 3)
    assert np.bincount(group.images.test.labels).tolist() == [2] * 10


def test_models_that_do_not_fit_are_named_before_anything_is_trained(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(pixels, "sweep", refuse)
    request = Request(scale="smoke", out=tmp_path, processes=0, progress=False)
    with pytest.raises(UserError, match="no classifier of images"):
        find("pixels").run(replace(request, models=("mamba-default",)))
    with pytest.raises(UserError, match="nowhere"):
        find("pixels").run(replace(request, models=(str(tmp_path / "nowhere"),)))


def test_images_that_do_not_fit_are_named(tmp_path):
    request = Request(scale="laptop", out=tmp_path, processes=0, progress=False)
    with pytest.raises(UserError, match="--data"):
        find("table1").run(request)
    with pytest.raises(UserError, match="8 × 8 pixels, which squares do not take to 16"):
        find("table1").run(replace(request, data="digits"))
    with pytest.raises(UserError, match="did you mean 'mamba'"):
        find("table1").run(replace(request, variants=("mmba",)))


def test_images_are_averaged_over_squares():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    split = Split(data.reshape(20, 64, 3), np.arange(20) % 10)
    small = pixels_images.shrunk(images.base.assembled("x", tuple("abcdefghij"), (8, 8, 3), split, split), 4)
    assert (small.height, small.width, small.length) == (4, 4, 16)
    expected = data[3, 2:4, 4:6].mean((0, 1))
    assert np.abs(small.test.pixels[3, 1 * 4 + 2] - expected).max() <= 0.5


@pytest.fixture
def call():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, ["attack", *map(str, arguments)])


def test_the_verb_attacks_a_saved_model(smoke, call, tmp_path):
    runs = smoke[0].out / "runs"
    small = [
        "--images",
        "digits",
        "--limit",
        "20",
        "--pgd-limit",
        "5",
        "--steps",
        "2",
        "--eps",
        "8/255",
        "--target",
        "3",
        "--target",
        "5",
    ]
    done = call(runs / "mamba-seed0" / "model", runs / "attention-seed0" / "model", *small, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    record = Record.read(tmp_path / "results.json")
    assert [r[0] for r in record.tables[0].rows] == ["mamba-seed0", "attention-seed0"]
    assert {t.id for t in record.tables} == {
        "corruption",
        "asymmetry-table",
        "target-table",
        "gradient-table",
        "checks",
    }
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "lost.png").exists()


def test_the_verb_takes_regions_and_goes_on(smoke, call, tmp_path):
    own = (smoke[0].out / "runs" / "mamba-seed0" / "model", "--images", "digits", "--limit", "20", "--kind", "noise", "--region", "3:9", "--out", tmp_path)  # fmt: skip
    done = call(*own)
    assert done.exit_code == 0, done.output
    table = Record.read(tmp_path / "results.json").tables[0]
    assert [c.name for c in table.columns] == ["model", "clean", "[3:9]"]
    assert "--resume" in str(call(*own).exception)
    assert call(*own, "--resume").exit_code == 0
    assert Record.read(tmp_path / "results.json").tables == [table]
    assert "plan differ" in str(call(*own, "--resume", "--seed", "1").exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--kind", "nois"], "did you mean 'noise'"), (["--region", "60:70"], "not within the 64 pixels"), (["--region", "x"], "START:STOP"),
     (["--eps", "3"], "at most 1"), (["--eps", "8/0"], "such as 8/255"), (["--eps", "abc"], "such as 8/255"), (["--target", "horse"], "no class 'horse'"),
     (["--side", "5"], "a multiple of 5"), (["--images", "nowhere"], "no images at nowhere"), (["--device", "tpu"], "unknown device")],
)  # fmt: skip
def test_what_cannot_be_is_named(smoke, call, tmp_path, arguments, says):
    found = call(smoke[0].out / "runs" / "mamba-seed0" / "model", "--images", "digits", "--out", tmp_path, *arguments)
    assert found.exit_code != 0
    assert isinstance(found.exception, UserError)
    assert says in str(found.exception)


def test_models_that_read_other_things_are_named(call, tmp_path):
    found = call("mamba-default", "--images", "digits", "--out", tmp_path)
    assert "no classifier of images" in str(found.exception)
