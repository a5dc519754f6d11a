"""Regions, noise, donors, and the gradient attack against a linear model, whose strongest attack is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.tasks import pixels
from ssmlens.tasks.pixels import PGD, Region

PAPER = ["992:1024", "0:32", "928:1024", "0:96", "1014:1024", "0:10", "768:1024", "0:256", "512:544", "480:576"]


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("0:32", (0, 32)),
        (":32", (0, 32)),
        ("-32:", (32, 64)),
        ("[8:16]", (8, 16)),
        (" 8:64 ", (8, 64)),
        ("-10:-2", (54, 62)),
        (":", (0, 64)),
    ],
)
def test_regions_are_read_as_python_reads_them(text, region):
    assert Region.parse(text, 64) == Region(*region)


@pytest.mark.parametrize(
    ("text", "says"),
    [("32", "START:STOP"), ("a:b", "START:STOP"), ("", "START:STOP"), ("1:2:3", "START:STOP"), ("32:32", "not within"), ("40:20", "not within"),
     ("0:65", "the 64 pixels"), ("-65:3", "not within")],
)  # fmt: skip
def test_what_is_no_region_is_named(text, says):
    with pytest.raises(UserError, match=says):
        Region.parse(text, 64)


def test_the_papers_regions_keep_their_place_and_equal_widths():
    there = [Region.parse(text, 1024) for text in PAPER]
    assert [r.scaled(1024, 1024) for r in there] == there
    quarter = [str(r.scaled(256, 1024)) for r in there]
    assert quarter == [
        "[248:256]",
        "[0:8]",
        "[232:256]",
        "[0:24]",
        "[253:256]",
        "[0:3]",
        "[192:256]",
        "[0:64]",
        "[128:136]",
        "[120:144]",
    ]
    with pytest.raises(UserError, match="shorter than the image"):
        pixels.positions(64, 64)


@given(st.integers(1, 1023), st.integers(2, 1024))
def test_scaled_ends_stay_ends_and_are_alike(width, length):
    leading, trailing = (r.scaled(length, 1024) for r in (Region(0, width), Region(1024 - width, 1024)))
    assert leading.start == 0
    assert trailing.stop == length
    assert leading.width == trailing.width >= 1
    assert abs(leading.width - width * length / 1024) <= max(0.5, 1 - width * length / 1024)


@given(st.integers(0, 1000), st.integers(1, 30), st.integers(0, 29), st.integers(1, 3))
def test_noise_is_in_its_region_alone_and_a_function_of_the_seed(seed, length, start, channels):
    start = min(start, length - 1)
    region = Region(start, length)
    x = torch.rand(2, length, channels)
    one, two = pixels.corrupted(x, region, (seed, 1)), pixels.corrupted(x, region, (seed, 1))
    assert torch.equal(one, two)
    assert torch.equal(one[:, :start], x[:, :start])
    assert not torch.equal(one[:, start:], x[:, start:])
    assert not torch.equal(pixels.corrupted(x, region, (seed, 2))[:, start:], one[:, start:])


def test_noise_is_standard_normal():
    z = pixels.normal((100_001,), (3,)).double()
    moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert z.abs().max() > 3.5
    u = pixels.uniform((100_000,), (4,))
    assert 0 < u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    assert float(torch.corrcoef(torch.stack([z[:-1:2], z[1::2]]))[0, 1]) == pytest.approx(0, abs=0.02)


def test_donors_are_of_the_target_class_and_all_of_them_serve():
    labels = np.arange(200) % 4
    found = pixels.donors(labels, 3, (0, 3))
    assert set(labels[found]) == {3}
    assert set(np.bincount(found[labels != 3], minlength=200)[3::4]) == {3}  # each of 50 for 150 victims
    uneven = pixels.donors(labels[:50], 3, (0, 3))[labels[:50] != 3]
    assert set(np.bincount(uneven, minlength=50)[3::4]) == {3, 4}  # 12 for 38
    assert (pixels.donors(labels, 3, (1, 3)) != found).mean() > 0.9
    assert (pixels.donors(labels, 3, (0, 3)) == found).all()
    with pytest.raises(UserError, match="no image is of class 9"):
        pixels.donors(labels, 9, (0,))


class Linear:
    """logits = W x (all pixels and channels), and how often it was asked."""

    def __init__(self, length=6, channels=2, classes=3, scale=1.0):
        torch.manual_seed(0)
        self.weight = scale * torch.randn(classes, length * channels)
        self.asked = 0

    def __call__(self, x):
        self.asked += 1
        return x.flatten(1) @ self.weight.T


def images(n=40, length=6, channels=2):
    torch.manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(n, length, channels)
    return x, Linear()(x).argmax(1)


def test_two_classes_of_a_linear_model_are_attacked_as_strongly_as_can_be():
    x, _ = images()
    model = Linear(classes=2)
    y = model(x).argmax(1)
    region, epsilon = Region(1, 4), 0.05
    found = pixels.pgd(model, x, y, region, PGD(epsilon, 10), seed=(7,))
    # the loss grows with the other logit minus the own one: the best step is ε sign of that difference of weights
    slope = torch.where(y == 0, 1.0, -1.0)[:, None] * (model.weight[1] - model.weight[0])
    best = x + epsilon * slope.view_as(x).sign() * torch.tensor([0, 1, 1, 1, 0, 0])[None, :, None]
    assert torch.allclose(found.pixels, best, atol=1e-6)
    assert torch.equal(found.predicted, model(best).argmax(1))
    assert (found.after > found.before).all()


@given(st.floats(0, 0.5), st.integers(0, 4), st.integers(1, 5), st.integers(0, 3))
def test_it_stays_in_ball_region_and_range_and_never_helps(epsilon, start, width, seed):
    x, y = images(8)
    x[0], x[1] = 0.0, 1.0
    region = Region(start, min(6, start + width))
    model = Linear()
    found = pixels.pgd(model, x, y, region, PGD(epsilon, 4), seed=(seed,))
    moved = found.pixels - x
    outside = torch.ones(6, dtype=torch.bool)
    outside[region.here] = False
    assert (moved[:, outside] == 0).all()
    assert moved.abs().max() <= epsilon + 1e-6
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1
    assert torch.equal(model(found.pixels).argmax(1), found.predicted)
    wrong = model(x).argmax(1) != y
    assert (found.predicted != y)[wrong].all()  # what was wrong stays wrong
    assert (found.after >= found.before - 1e-5)[~wrong | (found.predicted == y)].all()


def test_without_room_it_is_the_clean_image():
    x, y = images()
    found = pixels.pgd(Linear(), x, y, Region(0, 6), PGD(0.0, 3))
    assert torch.equal(found.pixels, x)
    assert torch.equal(found.predicted, y)
    assert torch.equal(found.before, found.after)


def test_more_steps_and_more_room_are_not_weaker():
    x, y = images(200)
    model = Linear(scale=0.3)
    right = [
        int((pixels.pgd(model, x, y, Region(0, 3), PGD(0.1, steps, 0.01)).predicted == y).sum()) for steps in (1, 5, 20)
    ]
    assert right[0] >= right[1] >= right[2]
    assert right[0] > right[2]
    room = [int((pixels.pgd(model, x, y, Region(0, 3), PGD(e, 10)).predicted == y).sum()) for e in (0.01, 0.05, 0.2)]
    assert room[0] > room[1] > room[2]
    # the gradient finds what chance does not
    by_chance = x.clone()
    by_chance[:, :3] += 0.1 * (pixels.uniform((200, 3, 2), (1,)) - 0.5).sign()
    assert int((model(by_chance).argmax(1) == y).sum()) > right[2]


def test_a_target_is_aimed_at():
    x, y = images(60)
    model = Linear()
    found = pixels.pgd(model, x, y, Region(0, 6), PGD(0.3, 10), target=2)
    others = y != 2
    assert int((found.predicted == 2)[others].sum()) > 0.8 * int(others.sum())
    assert (found.predicted == 2)[~others].all()
    assert (found.after <= found.before + 1e-5).all()


@given(st.floats(0, 0.5), st.integers(0, 4), st.integers(1, 5), st.integers(0, 3))
def test_the_search_stays_in_ball_region_and_range_and_never_helps(epsilon, start, width, seed):
    x, y = images(8)
    x[0], x[1] = 0.0, 1.0
    region, model = Region(start, min(6, start + width)), Linear()
    found = pixels.search(model, x, y, region, epsilon, 6, seed=(seed,))
    moved = found.pixels - x
    moved[:, region.here] = 0
    assert (moved == 0).all()
    assert (found.pixels - x).abs().max() <= epsilon + 1e-6
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1
    assert torch.equal(model(found.pixels).argmax(1), found.predicted)
    assert (found.after >= found.before).all()
    assert (found.after[found.predicted != y] >= 0).all()
    assert (found.after[found.predicted == y] <= 0).all()
    parts = pixels.search(model, x, y, region, epsilon, 6, seed=(seed,), batch_size=3)
    assert torch.allclose(parts.pixels, found.pixels)


def test_the_search_needs_no_gradient_and_grows_with_its_queries():
    x, y = images(200)
    slow = Linear(scale=0.3)
    model = lambda x: torch.floor(slow(x) * 100)  # noqa: E731  flat everywhere
    y = model(x).argmax(1)
    right = [int((pixels.search(model, x, y, Region(0, 4), 0.1, n).predicted == y).sum()) for n in (0, 5, 60)]
    assert right[0] > right[1] > right[2]
    best = int((pixels.pgd(slow, x, y, Region(0, 4), PGD(0.1, 20)).predicted == y).sum())
    assert best <= right[2] <= best + 20  # of 200: nearly what the gradient of the smooth model finds


def test_slopes_are_the_gradient_of_each_images_own_loss():
    x, y = images(7)
    model = Linear()
    found = pixels.slopes(model, x, y, batch_size=3)
    expected = (model(x).softmax(1) - torch.nn.functional.one_hot(y, 3)) @ model.weight
    assert torch.allclose(found.flatten(1), expected, atol=1e-5)


def test_batches_change_nothing_and_parameters_get_no_gradient():
    x, y = images(10)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    attack = PGD(0.1, 3)
    whole, parts = (
        pixels.pgd(model, x, y, Region(2, 5), attack, seed=(3,), batch_size=size).pixels for size in (10, 3)
    )
    assert torch.allclose(whole, parts, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("epsilon", "steps", "says"),
    [
        (1.5, 3, "change of pixels"),
        (-0.1, 3, "change of pixels"),
        (math.nan, 3, "change"),
        (0.1, 0, "at least one step"),
    ],
)
def test_attacks_that_cannot_be_are_named(epsilon, steps, says):
    with pytest.raises(UserError, match=says):
        PGD(epsilon, steps)


def test_a_region_beyond_the_image_is_named():
    x, y = images(2)
    with pytest.raises(UserError, match="not within the 6 pixels"):
        pixels.corrupted(x, Region(4, 8), (0,))
    with pytest.raises(UserError, match="not within the 6 pixels"):
        pixels.pgd(Linear(), x, y, Region(4, 8), PGD(0.1))
