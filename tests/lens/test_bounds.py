"""Both theorems over random systems that satisfy their assumptions (they must hold), over systems that do not (they must be seen to fail), and
what is measured on models against what is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.lens import bounds
from ssmlens.lens.subject import Access, Subject
from ssmlens.lens.theorems import inequality, products
from ssmlens.mixers import Mixer, MixerConfig
from ssmlens.recurrence import Coefficients
from ssmlens.results import Value

from .models import hybrid, model, tokens


def system(a, dt, b, ones=None):
    """Coefficients of one sequence from arrays (length, F); dt may be (length,)."""
    a, dt, b = (torch.as_tensor(np.asarray(x, dtype=float))[None] for x in (a, dt, b))
    none = torch.zeros(b.shape[2:], dtype=torch.bool)
    wide = dt.reshape(*dt.shape, *(1 for _ in range(b.dim() - dt.dim())))
    return Coefficients(
        batch=1, length=b.shape[1], state_shape=tuple(b.shape[2:]), a_at=lambda t: a[:, t], u_at=lambda t: (wide * b)[:, t],
        b_at=lambda t: b[:, t], dt=dt, ones=none if ones is None else ones, zeros=none,
    )  # fmt: skip


def drawn(seed, length, channels, bias):
    """Transitions that may be near one or at zero, and inputs that may lie on one side of zero."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 1, (length, channels)) ** rng.choice([0.01, 1, 5], channels)
    a[rng.random(a.shape) < 0.1] = 0
    return rng, a, rng.normal(bias, 1, (length, channels))


SIZES = {"seed": st.integers(0, 10**6), "length": st.integers(2, 70), "channels": st.integers(1, 4), "bias": st.sampled_from([-5, 0, 5])}  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(**SIZES, case=st.sampled_from(["i", "ii", "mixed"]))
def test_memories_differ_by_no_more_than_the_corrected_bound(seed, length, channels, bias, case):
    rng, a, b = drawn(seed, length, channels, bias)
    share = np.ones_like(a) if case == "i" else rng.uniform(0, 1, a.shape)
    if case == "mixed":
        share[:, ::2] = 1
    found = inequality(system(a, (1 - a) * share, b))
    assert found.assumed
    assert found.holds
    assert found.left <= found.right * (1 + 1e-9) + 1e-12
    if case == "i":
        assert found.conserving == 1


@settings(deadline=None, max_examples=60)
@given(**SIZES)
def test_conserving_systems_that_begin_at_their_input_need_no_zero(seed, length, channels, bias):
    """h_1 = b_1, RWKV-4's start: the inequality as printed."""
    _, a, b = drawn(seed, length, channels, bias)
    a[0] = 0
    found = inequality(system(a, 1 - a, b))
    assert found.right == found.printed
    assert found.holds
    assert found.case_i == 1


@settings(deadline=None, max_examples=100)
@given(**SIZES, scale=st.sampled_from([1e-3, 1, 100]))
def test_rescaling_restores_the_assumption_whatever_the_steps(seed, length, channels, bias, scale):
    rng, a, b = drawn(seed, length, channels, bias)
    found = inequality(system(a, scale * rng.uniform(0, 1, a.shape), b), rescaled=True)
    assert found.assumed
    assert found.holds
    assert found.covered == 1


def test_case_i_as_printed_fails_from_an_empty_state():
    """b = 1, a = ½: memories climb from ½ to 1, inputs do not differ at all."""
    found = inequality(system(np.full((40, 1), 0.5), np.full((40, 1), 0.5), np.ones((40, 1))))
    assert found.case_i == 1
    assert found.printed == 0
    assert found.left == pytest.approx(0.5)
    assert found.right == pytest.approx(1)


def test_case_ii_as_printed_fails_without_its_condition_on_signs():
    found = inequality(system(np.full((40, 1), 0.5), np.full((40, 1), 0.25), np.ones((40, 1))))
    assert (found.case_i, found.case_ii, found.sufficient) == (0, 0, 1)
    assert found.left > found.printed == 0
    assert found.holds, "with 0 in the range of inputs the signs do not matter"
    both = inequality(system(np.full((40, 1), 0.5), np.full((40, 1), 0.25), np.resize([1.0, -1.0], (40, 1))))
    assert both.case_ii == 1
    assert both.printed == both.right


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_steps_that_are_too_long_break_it(dt):
    """RetNet's Δ = 1, or Mamba's exp(-Δ) + Δ > 1."""
    b = np.resize(np.repeat([1.0, -0.1], 20), (60, 1))
    found = inequality(system(np.full((60, 1), 0.9), np.full(60, dt), b))
    assert not found.assumed
    assert not found.holds
    assert found.expanding == 1
    assert found.ratio.value > 1
    assert found.slack.value < 0
    again = inequality(system(np.full((60, 1), 0.9), np.full(60, dt), b), rescaled=True)
    assert again.left == found.left
    assert again.holds
    mamba = inequality(system(np.full((60, 1), math.exp(-dt)), np.full(60, dt), b))
    assert mamba.expanding == 1


def test_both_sides_by_brute_force_beyond_a_chunk():
    rng, a, b = drawn(3, 150, 3, 1.0)
    a = 0.2 + 0.6 * a
    dt = rng.uniform(0, 1, 150)
    found = inequality(system(a, dt, b))
    h, states = np.zeros(3), []
    for t in range(150):
        h = a[t] * h + dt[t] * b[t]
        states.append(h)
    states = np.array(states)
    ranges = np.maximum(b.max(0), 0) - np.minimum(b.min(0), 0)
    assert found.left == pytest.approx(np.ptp(states, axis=0).max())
    assert found.right == pytest.approx((1 - a[1:].min() ** 149) * ranges.max())
    assert found.printed == pytest.approx((1 - a[1:].min() ** 149) * np.ptp(b, axis=0).max())
    assert found.a_min == a[1:].min()
    assert found.expanding == pytest.approx((a + dt[:, None] > 1).mean())
    assert found.typical == pytest.approx(np.median(np.ptp(states, axis=0) / ((1 - a[1:].min(0) ** 149) * ranges)))


def test_what_is_held_at_one_is_left_out_of_the_rescaled_form():
    a = np.stack([np.ones(30), np.full(30, 0.5)], 1)
    found = inequality(system(a, np.ones((30, 2)), np.random.default_rng(0).normal(size=(30, 2))), rescaled=True)
    assert found.covered == 0.5
    assert found.holds
    nothing = inequality(system(a[:, :1], np.ones((30, 1)), np.ones((30, 1))), rescaled=True)
    assert nothing.covered == 0
    assert not nothing.assumed


def test_complex_transitions_have_no_such_theorem():
    a = torch.polar(torch.full((1, 9, 2), 0.9), torch.ones(1, 9, 2))
    with pytest.raises(UserError, match="no complex version"):
        inequality(Coefficients.of(a, torch.ones_like(a)))


def test_the_products_of_one_exponential_channel():
    found = products(system(np.full((200, 1), 0.9), np.ones(200), np.ones((200, 1))))
    expected = np.arange(200) * math.log(0.9)
    for curve in (found.slowest, found.slowest_learned, found.mean):
        np.testing.assert_allclose(curve[0], expected, atol=1e-9)
    assert found.a_max == 0.9


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), length=st.integers(2, 150), channels=st.integers(1, 4))
def test_products_are_those_of_the_transitions_and_below_the_bound(seed, length, channels):
    _, a, b = drawn(seed, length, channels, 0)
    found = products(system(a, np.ones(length), b))
    direct = np.ones((length, channels))
    for d in range(1, length):
        direct[d] = direct[d - 1] * a[length - d]
    np.testing.assert_allclose(np.exp(found.slowest[0]), direct.max(1), rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(np.exp(found.mean[0]), direct.mean(1), rtol=1e-5, atol=1e-300)
    with np.errstate(divide="ignore"):
        limit = np.arange(1, length) * np.log(found.a_max)
    assert (found.slowest[0, 1:] <= limit + 1e-9).all()


def test_pinned_state_channels_make_the_bound_vacuous_and_are_told_apart():
    a = np.stack([np.ones(50), np.full(50, 0.8), np.zeros(50)], 1)
    found = products(system(a, np.ones(50), a, ones=torch.tensor([True, False, False])))
    assert found.a_max == 1
    assert found.a_max_learned == 0.8
    assert (found.slowest == 0).all()
    np.testing.assert_allclose(found.slowest_learned[0], np.arange(50) * math.log(0.8), atol=1e-9)
    np.testing.assert_allclose(np.exp(found.mean[0, 1:]), (1 + 0.8 ** np.arange(1, 50)) / 3)


class Selective(torch.nn.Module):
    """h_t = a(x_t) h_{t-1} + b(x_t) with a in (0, a_max): every derivative is bounded by hand."""

    def __init__(self, seed, a_max, gain):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.w, self.v, self.c = (torch.from_numpy(rng.normal(size=4)) * s for s in (gain, gain, 1))
        self.a_max = a_max

    def forward(self, x):
        h = torch.zeros(4, dtype=torch.float64)
        for t in range(len(x)):
            h = self.a_max * torch.sigmoid(self.w * x[t]) * h + torch.tanh(self.v * x[t])
        return self.c @ h

    def constant(self):
        """C of Theorem 3.1: what comes through b_s, and what comes through A_s, where |h| ≤ 1/(1 - A_max)."""
        through_b, through_a = self.v.abs(), self.a_max * self.w.abs() / 4 / (1 - self.a_max)
        return float((self.c.abs() * (through_b + through_a)).sum())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), a_max=st.floats(0.05, 0.99), gain=st.sampled_from([0.1, 1.0, 10.0]))
def test_influence_of_selective_systems_falls_at_least_as_the_theorem_says(seed, a_max, gain):
    made = Selective(seed, a_max, gain)
    x = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=40)).requires_grad_()
    (gradient,) = torch.autograd.grad(made(x), x)
    scores = gradient.abs().flip(0).numpy()
    assert (scores <= made.constant() * a_max ** np.arange(40) * (1 + 1e-9) + 1e-300).all()


def test_a_transition_that_depends_on_an_earlier_token_is_outside_the_theorem():
    """a_t = σ(x_1) for all t: token 1 keeps its influence although every a is below one half."""
    x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    h = torch.zeros((), dtype=torch.float64)
    scores = []
    for _ in range(60):
        h = torch.sigmoid(x) * h + 1
        scores.append(float(torch.autograd.grad(h, x, retain_graph=True)[0]))
    assert scores[59] == pytest.approx(scores[29], rel=1e-6)
    assert scores[59] > 1e6 * scores[1] * float(torch.sigmoid(x.detach())) ** 58


class Exponential(Mixer):
    """h_t = a h_{t-1} + x_t, y = h: everything about it is known."""

    config_class = MixerConfig

    def __init__(self, a):
        super().__init__(len(a), MixerConfig(), None)
        self.a = torch.nn.Parameter(torch.as_tensor(a))
        self.reset_parameters()

    def forward(self, x, state=None, *, mask=None, reset=None):
        return self.coefficients(x).states(), None

    def coefficients(self, x):
        return Coefficients.of(self.a.to(x).expand_as(x), x)

    def decode(self, states, x):
        return states

    def reset_parameters(self):
        pass


class Block(torch.nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)[0]


def subject(*layers):
    table = torch.randn(32, layers[0].d_model, generator=torch.Generator().manual_seed(0))
    access = Access(embed=lambda m, t: table[t], run=lambda m, x: m(x), blocks=lambda m: list(m.children()))
    return Subject("known", torch.nn.Sequential(*[Block(m) for m in layers]), access)


def test_an_exponential_layer_forgets_exactly_as_fast_as_it_must():
    found = bounds.measure(subject(Exponential([0.9, 0.9]), Exponential([0.5, 0.9])), tokens(2, 80))
    for layer in found.layers:
        assert layer.bound.value == pytest.approx(math.log(1 / 0.9), rel=1e-6)
        assert layer.exact.value == pytest.approx(math.log(1 / 0.9), rel=1e-6)
        assert layer.applies
        assert not layer.vacuous
    first = found.layers[0]
    assert first.measured.value == pytest.approx(math.log(1 / 0.9), rel=1e-5)
    np.testing.assert_allclose(first.score, math.sqrt(2) * 0.9 ** np.arange(80), rtol=1e-5)
    curves = next(f for f in found.figures() if f.id == "bounds-decay").series
    assert [s.style for s in curves] == ["line", "fit", "fit"]
    for line in curves[1:]:  # both are tight here
        np.testing.assert_allclose(line.y, curves[0].y[3:], rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in mixers.names() if mixers.get(n).diagonal])
def test_every_diagonal_mixer_goes_through(name):
    m = model(mixer=name, n_layers=1)
    for p in m.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    found = bounds.measure(m, tokens(2, 40), probes=2)
    layer = found.layers[0]
    assert layer.applies == (name != "rwkv4")
    assert layer.vacuous == (name == "linear_attention")
    assert (layer.original is None) == (name in ("s4d", "h3"))
    if layer.rescaled is not None and name != "linear_attention":
        assert layer.rescaled.assumed
        assert layer.rescaled.holds
        assert layer.rescaled.ratio.value <= 1
    if layer.original is not None and layer.original.assumed:
        assert layer.original.holds
    assert layer.exact.value >= layer.bound.value - 1e-9
    if name != "linear_attention":
        score = np.log(layer.score[4:])
        slowest = layer.products.slowest.max(0)[4:]
        assert (score - slowest).max() - (score - slowest).min() < 40, "within a constant of the exact products"
    remark = bounds.recency_remark(layer)
    assert remark.startswith({"rwkv4": "outside", "linear_attention": "vacuous"}.get(name, "bounded"))
    assert len(found.table_rows()) == 1
    assert len(found.tables()[1].rows) == (1 if layer.original is None else 2)
    assert found.figures()


def test_polarization_makes_the_bound_vacuous_but_not_that_of_the_learned_channels():
    plain, pinned = model(), model(polarization={"ones": 1, "zeros": 1})
    found = [bounds.measure(Subject(n, m), tokens(2, 40)) for n, m in (("plain", plain), ("polarized", pinned))]
    layer = found[1].layers[0]
    assert layer.vacuous
    assert layer.bound.value == 0
    assert layer.bound_learned.value > 0
    assert "pinned state channels only" in bounds.recency_remark(layer)
    assert 0.9 < layer.rescaled.covered[0] < 1
    rates = next(f for f in bounds.figures(found) if f.id == "bounds-rates")
    assert "polarized: guaranteed" not in [s.name for s in rates.series]
    assert [t.rows[0][0] for t in bounds.tables(found)] == ["plain", "plain"]
    assert isinstance(bounds.table(found).rows[2][2], Value)


def test_the_layers_of_a_hybrid_keep_their_numbers_and_attention_is_refused():
    found = bounds.measure(hybrid(0), tokens(2, 20))
    assert found.numbers == [2, 3]
    assert bounds.measure(hybrid(0), tokens(1, 20), layers=[3]).numbers == [3]
    assert bounds.measure(hybrid(0), tokens(1, 20), layers=1).numbers == [2]
    with pytest.raises(UserError, match="among 2, 3"):
        bounds.measure(hybrid(0), tokens(1, 20), layers=[1])
    with pytest.raises(UserError, match="no diagonal transition"):
        bounds.measure(model(mixer="attention"), tokens(1, 10))
    with pytest.raises(UserError, match="probe"):
        bounds.measure(model(), tokens(1, 10), probes=0)


def test_measuring_leaves_the_model_as_it_was():
    m, x = model(), tokens(1, 30)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    y = m(x).logits
    bounds.measure(m, x)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(m(x).logits, y)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in m.parameters())
