"""Transitions of systems whose a_t are known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens import transitions
from ssmlens.lens.subject import Access, Subject
from ssmlens.recurrence import Coefficients

from .models import hybrid, model, tokens
from .systems import ACCESS, Recurrence


class Known(nn.Module):
    """A mixer that only has coefficients: a_t is what `a` says, (length, *state)."""

    def __init__(self, a, ones=None, zeros=None):
        super().__init__()
        self.a = a
        none = torch.zeros(a.shape[1:], dtype=torch.bool)
        self.ones, self.zeros = (none if m is None else m for m in (ones, zeros))

    def forward(self, x):
        return x

    def coefficients(self, x):
        a = self.a[None].expand(x.shape[0], *self.a.shape)
        return Coefficients(
            batch=x.shape[0], length=x.shape[1], state_shape=tuple(self.a.shape[1:]),
            a_at=lambda t: a[:, t], u_at=lambda t: a[:, t], b_at=None, dt=None, ones=self.ones, zeros=self.zeros,
        )  # fmt: skip


class Block(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)


def subject(*mixers):
    table = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    access = Access(embed=lambda m, t: table[t], run=lambda m, x: m(x), blocks=lambda m: list(m.children()))
    return Subject("known", nn.Sequential(*[Block(m) for m in mixers]), access)


def test_constant_transitions_do_not_move():
    a = torch.tensor([0.5, 0.9, 0.99]).expand(100, 3)
    found = transitions.measure(subject(Known(a)), tokens(2, 100))
    layer = found.layers[0]
    assert layer.ranges.max() == 0
    assert found.share_below(0.0).value == 1
    np.testing.assert_allclose(
        layer.half_lives[0], [1, math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.99)], rtol=1e-5
    )
    assert found.half_life_quantile(0.5).value == pytest.approx(math.log(0.5) / math.log(0.9), rel=1e-5)
    assert found.share_remembering().value == 0
    shorter = transitions.measure(subject(Known(a[:60])), tokens(2, 60))
    assert shorter.share_remembering().value == pytest.approx(1 / 3)


@pytest.mark.parametrize("length", [9, 64, 101, 300])
def test_a_state_keeps_the_product_of_its_transitions(length):
    """0.99 and 0.1 in turn: the median would call it slow or fast by the parity of the length; the product is what is left."""
    a = torch.tensor([0.99, 0.1]).repeat(length)[:length].view(-1, 1)
    found = transitions.measure(subject(Known(a)), tokens(2, length))
    left = float(a[1:, 0].double().prod())  # a_1 acts on nothing
    rate = -math.log(left) / (length - 1)
    assert found.half_life_quantile(0.5).value == pytest.approx(math.log(2) / rate, rel=1e-6)
    assert found.half_life_quantile(0.5).value < 0.65
    assert found.share_remembering().value == 0


def test_one_zero_empties_a_state_except_at_the_first_token():
    a = torch.full((80, 2), 0.999)
    a[0, 0] = a[40, 1] = 0
    found = transitions.measure(subject(Known(a)), tokens(2, 80))
    np.testing.assert_allclose(found.layers[0].half_lives[0], [math.log(0.5) / math.log(0.999), 0], rtol=1e-4)
    assert found.share_remembering().value == 0.5


def test_the_layers_of_a_hybrid_keep_their_numbers():
    found = transitions.measure(hybrid(0), tokens(2, 20))
    assert found.numbers == [2, 3]
    assert [row[1] for row in found.table_rows()] == [2, 3]
    assert next(f for f in found.figures() if f.id == "memory-horizon").series[0].x == [2, 3]
    with pytest.raises(UserError, match="does not show its transitions"):
        transitions.measure(hybrid(0, 1, 2), tokens(1, 10))


@pytest.mark.parametrize("length", [30, 64, 200])
def test_extremes_sums_and_histogram_over_all_tokens_but_the_first(length):
    """Also beyond one chunk. The first transition meets an empty state: it says nothing."""
    a = torch.rand(length, 4, 3, generator=torch.Generator().manual_seed(length))
    first, a = a.clone(), a[1:]
    first[0] = 0
    layer = transitions.measure(subject(Known(first)), tokens(1, length)).layers[0]
    np.testing.assert_allclose(layer.high[0] - layer.low[0], (a.amax(0) - a.amin(0)).flatten(), rtol=1e-6)
    np.testing.assert_allclose(layer.logsum[0], a.double().log().sum(0).flatten(), rtol=1e-6)
    assert layer.histogram.sum() == a.numel()
    assert layer.histogram[0, 0] == (a < 0.02).sum()


def test_pinned_channels_are_counted_and_left_out():
    a = torch.tensor([1.0, 0.5, 0.7, 0.0]).expand(20, 2, 4).clone()
    a[::2, :, 1] = 0.9  # the only one that moves
    ones, zeros = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    ones[:, 0], zeros[:, 3] = True, True
    found = transitions.measure(subject(Known(a, ones, zeros)), tokens(2, 20))
    assert found.pinned() == (2, 2, 8)
    assert found.layers[0].ranges.shape == (2, 4)
    assert found.share_below(0.1).value == 0.5
    assert found.share_below(0.5).value == 1
    assert found.layers[0].histogram.sum() == 2 * 19 * 4
    row = dict(zip([c.name for c in transitions.table([found]).columns], found.table_rows()[0], strict=True))
    assert (row["state channels"], row["held at one"], row["held at zero"]) == (8, 2, 2)
    assert row["largest a of those at zero"] == 0


def test_all_pinned_leaves_nothing_to_say():
    ones = torch.ones(3, dtype=torch.bool)
    found = transitions.measure(subject(Known(torch.ones(10, 3), ones)), tokens(1, 10))
    with pytest.raises(UserError, match="all are pinned"):
        found.share_below(0.5)
    assert found.table_rows()[0][-1] is None
    assert found.figures() == []


def test_half_life_at_the_ends():
    np.testing.assert_allclose(
        transitions.half_life(np.array([-math.inf, 10 * math.log(0.5), 0.0]), 10), [0, 1, math.inf]
    )


def test_a_channel_that_never_forgets_has_an_infinite_quantile():
    found = transitions.measure(subject(Known(torch.tensor([0.5, 1.0, 1.0]).expand(10, 3))), tokens(2, 10))
    assert found.half_life_quantile(0.9).value == math.inf
    assert found.half_life_quantile(0.9).stderr is None
    assert len(found.figures()) == 2, "no horizon can be drawn where all are infinite"


def test_complex_transitions_count_by_modulus():
    a = torch.polar(torch.full((10, 2), 0.8), torch.linspace(0, 3, 20).view(10, 2))
    layer = transitions.measure(subject(Known(a)), tokens(1, 10)).layers[0]
    np.testing.assert_allclose(layer.logsum, 9 * math.log(0.8), rtol=1e-5)
    assert layer.ranges.max() < 1e-6


def test_mamba_polarized():
    m, x = model(polarization={"ones": 1, "zeros": 2}), tokens(2, 40)
    found = transitions.measure(m, x)
    assert found.pinned() == (2 * 32, 2 * 64, 2 * 32 * 19)
    with torch.no_grad():
        a = m.backbone.blocks[0].mixer.coefficients(m.backbone.blocks[0].norm(m.backbone.embedding(x))).a
    np.testing.assert_allclose(found.layers[0].low, a.amin(1).flatten(1), rtol=1e-5)
    np.testing.assert_allclose(found.layers[0].high, a.amax(1).flatten(1), rtol=1e-5)
    value = found.share_below(0.02, layer=0)
    shares = ((a.amax(1) - a.amin(1))[..., 1:-2] <= 0.02).float().flatten(1).mean(1)
    assert value.value == pytest.approx(float(shares.mean()), abs=2e-3)
    assert {f.id for f in found.figures()} == {"transition-ranges", "transition-values", "memory-horizon"}


def test_values_that_do_not_pin_show_it():
    """The released code's zero channel, exp(-100 Δ), is not zero: the table says how far it is from that."""
    found = transitions.measure(model(polarization={"ones": 0, "zeros": 1, "zero": -100.0}), tokens(1, 40))
    assert 0.1 < found.table_rows()[0][5] < 1


def test_attention_has_none():
    with pytest.raises(UserError, match="does not show its transitions"):
        transitions.measure(Subject("s", Recurrence(torch.ones(2), np.eye(2)), ACCESS), tokens(1, 10, 16))
