"""Pixel experiments: what is scaled with the sequence, what is held out, how sure the intervals are, and when a gradient attack is believed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ssmlens.experiments import Request, pixels, pixels_checks, pixels_claims, pixels_gradient, pixels_models
from ssmlens.experiments.pixels_claims import Sides
from ssmlens.experiments.pixels_measure import Plan, Predictions, donors, key, measure
from ssmlens.experiments.pixels_models import SCALES, Model
from ssmlens.experiments.pixels_runs import Runs, comparable, crossed
from ssmlens.tasks.images import ImageSet, Split
from ssmlens.tasks.pixels import Region


def built(name, side):
    split = Split(np.zeros((10, side * side, 3), np.uint8), np.arange(10))
    images = ImageSet("none", "", tuple("abcdefghij"), side, side, 3, split, split)
    scale = replace(SCALES["laptop"], side=side)
    return pixels_models.build(pixels_models.classifier(scale, Model.of(name), images), 0, scale.length)


def test_memory_is_scaled_with_the_sequence():
    half_lives = [
        [np.log(2) / -b.mixer.log_decay().detach()[1:-1].numpy() for b in built("rwkv4-polarized", side).backbone.blocks] for side in (16, 32)
    ]  # fmt: skip
    for short, long in zip(*half_lives, strict=True):
        assert np.allclose(4 * short, long, rtol=1e-4)
    assert max(half_lives[1][0]) == pytest.approx(
        np.log(2) * np.exp(5), rel=1e-3
    )  # 103 tokens of 1,024: as the authors begin
    shifts = [built("h3", side).backbone.blocks[0].mixer.config.d_shift for side in (16, 32)]
    assert shifts == [16, 64]


def test_the_learning_curve_is_of_images_that_are_neither_trained_on_nor_tested(tmp_path):
    scale = SCALES["smoke"]
    kept = pixels.prepared(scale, Request(scale="smoke", out=tmp_path))
    assert len(kept.train) == scale.train_images + scale.validation_images
    stream = pixels.streamed(scale, 0, kept)
    apart = np.concatenate([b.targets.numpy() for b in stream.validation()])
    assert len(apart) == 20
    trained = {bytes(x.numpy().tobytes()) for i in range(5) for x in stream.batch(i).tokens}
    assert not trained & {bytes(x.numpy().tobytes()) for b in stream.validation() for x in b.tokens}
    assert SCALES["paper"].validation_images == 0


def test_the_laptop_has_more_seeds_of_the_main_claim():
    seeds = SCALES["laptop"].models
    assert min(seeds.values()) == 3
    assert {name for name, n in seeds.items() if n == 5} == {"mamba", "mamba-polarized", "mamba-mean", "attention"}


# ---- statistics


def chance(rights, n=100):
    """Runs of classifiers that have so many of n clean images right, of 10 classes."""
    labels = np.arange(n) % 10
    return Runs(
        "m",
        labels,
        {"clean": np.stack([np.where(np.arange(n) < right, labels, 10) for right in rights]).astype(np.uint8)},
    )


@pytest.mark.parametrize(
    ("rights", "beats"), [((44, 48), True), ((20,), True), ((16,), False), ((44, 12), False), ((10, 10, 10), False)]
)
def test_every_seed_must_beat_chance(rights, beats):
    assert comparable(chance(rights), 10) is beats


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_donors_that_serve_often_widen_the_interval(share):
    """share: of the variance, that donors explain."""
    rng = np.random.default_rng(1)
    labels = np.arange(300) % 10
    runs = Runs("m", labels, {"clean": np.zeros((3, 300), np.uint8)})
    victims, of = pairs = runs.pairs([4])
    assert (labels[of] == 4).all()
    assert (victims == np.flatnonzero(labels != 4)).all()
    assert (of == donors(labels, 4, 0)[victims]).all()
    rounds, covered, naive = 500, 0, 0
    for _ in range(rounds):
        rows = np.sqrt(share) * rng.normal(size=300)[of] + np.sqrt(1 - share) * rng.normal(size=(3, len(of)))
        (low, high), (low_, high_) = crossed(rows, "", pairs).interval(), crossed(rows).interval()
        covered += low <= 0 <= high
        naive += low_ <= 0 <= high_
    assert 0.92 <= covered / rounds <= 0.985
    assert share == 0 or naive < covered - 0.1 * rounds


def test_pairs_of_their_own_are_what_images_are():
    rows = np.random.default_rng(0).normal(size=(3, 50))
    alone = np.arange(50)
    one, two = crossed(rows), crossed(rows, "", (alone, alone))
    assert (one.value, one.stderr, one.n) == (two.value, pytest.approx(two.stderr), two.n)


# ---- the gradient attack and what checks it

LENGTH, LAST, FIRST = 16, Region(12, 16), Region(0, 4)
S = Sides(4, LENGTH)
PLAN = Plan(gradient=(FIRST, LAST), epsilons=(0.2, 0.3), steps=4, images=40, queries=30, hardest=True)


class Output:
    def __init__(self, logits):
        self.logits = logits


class Reads(nn.Module):
    """Reads both ends alike; the gradient to the first `hidden` pixels is zero."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.gain = hidden, nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = torch.cat([x[:, : self.hidden].detach(), x[:, self.hidden :]], 1)
        return Output(self.gain * 20 * (x[:, FIRST.here].mean(1) + x[:, LAST.here].mean(1)))


def measured(model):
    """On images whose class is the channel that is brighter, by 60 to 120 of 255."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 4
    x = rng.integers(60, 100, (80, LENGTH, 4)).astype(np.uint8)
    x[np.arange(80), :, labels] += rng.integers(60, 120, (80, 1)).astype(np.uint8)
    found = measure(model, x, labels, PLAN, Predictions())
    return Runs.of("m", labels, [found.found], [found.losses])


def test_a_gradient_that_hides_pixels_is_found_out():
    fair, masked = measured(Reads(0)), measured(Reads(4))
    assert fair.slope(FIRST)[0] < 0.05  # those of which the model is wholly sure
    assert masked.slope(FIRST) == (1, 0)
    assert masked.slope(LAST)[0] < 0.05
    assert pixels_checks.failures(fair, PLAN.gradient, PLAN, LENGTH) == []
    failed = pixels_checks.failures(masked, PLAN.gradient, PLAN, LENGTH)
    assert [f.split(" (")[0] for f in failed] == [
        "it is not shown to beat random signs",
        "much of the gradient is exactly zero",
    ]
    assert all("[0:4]" in f for f in failed)
    assert masked.gradient(FIRST, 0.3).mean() == masked.gradient(FIRST, 0.3, "signs").mean() == 1
    assert masked.gradient(FIRST, 0.3, "search").mean() < 0.8  # it needs no gradient
    assert pixels_checks.searched(masked, PLAN)
    says = pixels_gradient.sentences({"m": masked}, S, PLAN, 4)
    assert len(says) == 1
    assert says[0].startswith("Where a gradient attack on m does more harm is not said: it is not shown to beat")
    table = pixels_checks.table({"m": masked}, {FIRST: "leading 4", LAST: "trailing 4"}, PLAN, LENGTH)
    assert [row[-1][:3] for row in table.rows] == ["no:", "yes"]


def attacked(first, last, n=100, plan=PLAN):
    """Runs that are right on so large a share of images, of kind (pgd, search), with either end attacked; random signs do nothing."""
    labels, right = np.arange(n) % 10, lambda share: np.arange(n) >= n * (1 - share)
    found = {"clean": np.stack([labels] * 3)}
    for region, (pgd, search) in ((FIRST, first), (LAST, last)):
        for e in plan.epsilons:
            share = pgd if e == plan.middle else 0.5 + pgd / 2
            found[key("pgd", region, f"~{e:.6g}")] = np.where(right(share), labels, 10)
            found[key("signs", region, f"~{e:.6g}")] = labels
        found[key("search", region, f"~{plan.middle:.6g}")] = np.where(right(search), labels, 10)
        found[key("pgd", region, f"~{plan.middle:.6g} ×4")] = found[key("pgd", region, f"~{plan.middle:.6g}")]
    found[key("pgd", Region(0, LENGTH), "~1")] = np.full(n, 10)
    losses = {key("slope", r): [[0.0, 1.0]] * 3 for r in (FIRST, LAST)}
    return Runs("m", labels, {k: np.broadcast_to(v, (3, n)).astype(np.uint8) for k, v in found.items()}, losses)


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [
        ((0.8, 0.9), (0.2, 0.9), "A gradient attack on m does more harm in the trailing pixels: accuracy 20.0 % with trailing and 80.0 % with leading"),
        ((0.2, 0.9), (0.8, 0.9), "A gradient attack on m does more harm in the leading pixels"),
        ((0.8, 0.1), (0.2, 0.9), "The worse, for each image, of a gradient attack and one without gradients on m does more harm in the leading pixels: "
                                 "accuracy 20.0 % with trailing and 10.0 % with leading"),
        ((0.5, 0.9), (0.5, 0.9), "does no more harm at one end than at the other that could be told (up to 0.0 points"),
        ((0.04, 0.9), (0.0, 0.9), "takes nearly everything at either end, so nothing is left to tell them apart: accuracy 0.0 % with trailing and 4.0 %"),
    ],
)  # fmt: skip
def test_sentences_are_of_the_attack_that_is_stronger(first, last, says):
    found = pixels_gradient.sentences({"m": attacked(first, last)}, S, PLAN, 10)
    assert len(found) == 1
    assert says in found[0]


def test_where_the_middle_takes_everything_a_smaller_bound_is_told():
    (said,) = pixels_gradient.sentences({"m": attacked((0.04, 0.9), (0.0, 0.9))}, S, PLAN, 10)
    assert (
        "at the largest smaller ε where something is, by the gradient alone and unchecked: accuracy 50.0 % with trailing and 52.0 %"
        in said
    )
    assert "at ε = 76.5/255" in said


def test_far_more_is_decided_by_its_own_interval():
    def runs(last, first):
        labels, found = np.arange(200) % 10, {"clean": np.arange(200) % 10}
        for width in pixels_models.PAPER_WIDTHS:
            s = Sides.of_paper(width, 256)
            for region, lost in ((s.leading, first), (s.trailing, last)):
                found[key("noise", region, "#0")] = np.where(np.arange(200) % 100 < 100 * lost, 10, labels)
        found[key("noise", Region(120, 144), "#0")] = labels
        return Runs("m", labels, {k: np.stack([v] * 3).astype(np.uint8) for k, v in found.items()})

    outcomes = {}
    for name, ends in (("far", (0.8, 0.02)), ("more", (0.3, 0.2))):
        claims = pixels_claims.noise_claims({"mamba": runs(*ends)}, 256, 10, learned=True)
        more = next(c for c in claims if "loses more" in c.claim and "(32 of" in c.claim)
        (far,) = (c for c in claims if "far more" in c.claim)
        outcomes[name] = (more.outcome, far.outcome)
        assert far.paper == "54.8 against 1.6 points"
    assert outcomes == {"far": ("agrees", "agrees"), "more": ("agrees", "differs")}
