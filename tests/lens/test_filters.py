"""Frequency responses that are known in closed form, and Proposition D.4."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.lens import filters
from ssmlens.lens.subject import Subject
from ssmlens.lens.transfer import System, system
from ssmlens.mixers import Mixer, MixerConfig
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients

from .models import hybrid, model, tokens
from .systems import ACCESS, Recurrence


def continuous(a, b, c, p=None):
    a, b, c = (torch.as_tensor(np.atleast_2d(x)).to(torch.complex128) for x in (a, b, c))
    flat = torch.zeros(len(a), dtype=torch.float64)
    return System(a, b, c, p, None, None, flat + 1, flat, 0, 0)


def test_one_exponential_in_continuous_time():
    """F(ω) = c b / (iω + λ): |F| falls to ε of F(0) at λ √(1/ε² - 1)."""
    one = continuous([-2.0], [3.0], [0.5])
    omega = torch.tensor([[0.0, 1.0, 2.0, 50.0]], dtype=torch.float64)
    np.testing.assert_allclose(one.continuous(omega).abs()[0], 1.5 / np.hypot(omega[0].numpy(), 2))
    for epsilon in (0.1, 0.01):
        measured, bound, tight = (x[0] for x in one.cut_off(epsilon))
        assert measured == pytest.approx(2 * math.sqrt(1 / epsilon**2 - 1), rel=1e-6)
        assert tight == pytest.approx(1.5 / (epsilon * 0.75))
        assert bound == pytest.approx(tight + 2)


def test_a_resonance_is_found_however_narrow():
    """A mode at ±100 of width 10⁻³: almost all of its response lies around ω = 100."""
    one = continuous([-1e-3 + 100j, -1e-3 - 100j], [1, 1], [0.5, 0.5])
    measured, bound, tight = (x[0] for x in one.cut_off(0.1))
    assert 100 < measured < 100.1
    assert measured <= tight <= bound


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), modes=st.integers(1, 6), epsilon=st.sampled_from([0.5, 0.1, 0.01]), real=st.booleans())  # fmt: skip
def test_no_response_beyond_the_bound_and_none_above_epsilon_beyond_the_cut_off(seed, modes, epsilon, real):
    rng = np.random.default_rng(seed)
    a = -np.exp(rng.normal(0, 2, (1, modes))) + (0 if real else 1j * rng.normal(0, 10, (1, modes)))
    b, c = (rng.normal(size=(1, modes)) + (0 if real else 1j * rng.normal(size=(1, modes))) for _ in range(2))
    a, b, c = (np.concatenate([x, np.conj(x)], 1) for x in (a, b, c))
    one = continuous(a, b, c)
    measured, bound, tight = (x[0] for x in one.cut_off(epsilon))
    assert measured <= tight * (1 + 1e-9) <= bound * (1 + 1e-9)
    around = np.abs(a.imag)[0, :, None] + np.abs(a.real)[0, :, None] * np.linspace(
        -3, 3, 101
    )  # narrow resonances lie between points of a grid
    omega = torch.from_numpy(np.concatenate([np.geomspace(1e-4, 1e4, 20000), np.abs(around).flatten()]))[None]
    size = one.continuous(omega).abs()[0].numpy()
    level = epsilon * size.max()
    assert (size[omega[0].numpy() >= tight] <= level * (1 + 1e-9)).all()
    beyond = size[omega[0].numpy() >= measured * (1 + 1e-6)]
    assert (beyond <= level * 1.01).all()


@pytest.mark.parametrize("name", ["s4d", "s4", "h3"])
@pytest.mark.parametrize("pinned", [None, Polarization()])
def test_the_discrete_response_is_the_transform_of_the_kernel(name, pinned):
    """Against the impulse response of the layer's own recurrence, skip and channels at zero included, those at one taken out."""
    torch.manual_seed(0)
    mixer = mixers.build(name, 4, polarization=pinned, d_state=8, dt_min=0.5, dt_max=1.0).double()
    kernel = mixer.kernel
    with torch.no_grad():
        if pinned:
            kernel.C_pinned[:, 0] = 0
        x = torch.zeros(1, 400, kernel.channels, dtype=torch.float64)
        x[:, 0] = 1
        impulse = kernel(x, mixer.D, None, None, None)[0][0].numpy()
    found = filters.invariant(mixer)
    e = np.exp(-1j * found.omega[:, None] * np.arange(400))
    np.testing.assert_allclose(found.whole, np.abs(e @ impulse).T, rtol=1e-6, atol=1e-8)
    assert (found.ones, found.zeros) == ((1, 1) if pinned else (0, 0))
    skip = np.abs(e @ (impulse - mixer.D.detach().numpy() * x[0].numpy())).T
    if pinned is None:
        np.testing.assert_allclose(found.learned, skip, rtol=1e-6, atol=1e-8)
    else:
        assert np.abs(found.learned - skip).max() > 1e-3, "the channel at zero is left out"


def test_the_low_rank_part_of_s4_by_a_dense_solve():
    torch.manual_seed(0)
    made = system(mixers.build("s4", 3, d_state=6))
    A = torch.diag_embed(made.a) - made.p[..., :, None] * made.p.conj()[..., None, :]
    omega = torch.tensor([0.0, 0.3, 4.0], dtype=torch.float64).expand(3, -1)
    dense = torch.stack(
        [
            (made.c * torch.linalg.solve(1j * w * torch.eye(6) - A, made.b[..., None])[..., 0]).sum(-1)
            for w in (0, 0.3, 4)
        ],
        1,
    )
    torch.testing.assert_close(made.continuous(omega), dense)
    for epsilon in (0.1, 0.01):
        measured, bound, tight = made.cut_off(epsilon)
        assert (measured <= tight).all()
        assert (tight <= bound).all()


class Averaging(Mixer):
    """h_t = a h_{t-1} + (1 - a) x_t, y = x - h for `high`, else h: gains known at every frequency."""

    config_class = MixerConfig

    def __init__(self, d, a, high=False):
        super().__init__(d, MixerConfig(), None)
        self.a, self.high = torch.nn.Parameter(torch.full((d,), a)), high

    def forward(self, x, state=None, *, mask=None, reset=None):
        h = self.coefficients(x).states()
        return (x - h if self.high else h), None

    def coefficients(self, x):
        a = self.a.to(x)
        return Coefficients.of(a.expand_as(x), (1 - a) * x)

    def decode(self, states, x):
        return states

    def reset_parameters(self):
        pass


def test_the_measured_response_of_a_linear_layer_is_its_transfer_function():
    x = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0))
    found = filters.response(Averaging(3, 0.8), x)
    z = np.exp(1j * found.omega)
    np.testing.assert_allclose(np.sqrt(found.gain[0]), 0.2 / np.abs(1 - 0.8 / z), rtol=1e-4)
    assert found.omega[0] == pytest.approx(2 * math.pi / 128)
    assert found.omega[-1] == pytest.approx(math.pi)
    assert found.coherent().value == pytest.approx(1, abs=1e-6)
    assert filters.verdict(found) == "low-pass"
    assert found.high_over_low().value < 0.3
    other = filters.response(Averaging(3, 0.8, high=True), x)
    np.testing.assert_allclose(np.sqrt(other.gain[0]), np.abs(1 - 0.2 / (1 - 0.8 / z)), rtol=1e-4)
    assert filters.verdict(other) == "high-pass"


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_has_a_measured_response(name):
    m = model(mixer=name)
    for p in m.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    found = filters.measure(m, tokens(2, 48), layers=1, points=5, directions=1)
    one = found.responses[1]
    assert one.gain.shape == one.power.shape == (2, len(one.omega))
    assert (one.gain > 0).all()
    assert (one.gain <= one.power * (1 + 1e-9)).all(), "what comes out at one frequency is part of what comes out"
    assert set(found.invariant) == ({1, 2} if name in ("s4", "s4d", "h3") else set())
    assert len(found.figures()) == (3 if found.invariant else 1)
    assert len(found.tables()) == (2 if found.invariant else 1)
    assert found.table_rows()[0][:2] == ["model", 1]


def test_the_derivative_is_that_of_autograd():
    torch.manual_seed(0)
    mixer, x = mixers.build("mamba", 6), torch.randn(1, 40, 6)
    found = filters.response(mixer, x, points=4, directions=1, seed=(3,))
    twin = mixers.build("mamba", 6).double()
    twin.load_state_dict({k: v.double() for k, v in mixer.state_dict().items()})
    v = torch.from_numpy(np.random.default_rng([3]).normal(size=6))
    v /= v.norm()
    t = torch.arange(40, dtype=torch.float64)
    w = float(found.omega[0])
    J = torch.autograd.functional.jacobian(lambda x: twin(x)[0][0, 20:], x.double())[:, :, 0]
    z = torch.einsum("tjsd,s,d->tj", J.to(torch.complex128), torch.exp(1j * w * t), v.to(torch.complex128))
    coherent = (z * torch.exp(-1j * w * t[20:])[:, None]).mean(0).abs().square().sum()
    assert found.gain[0, 0] == pytest.approx(float(coherent), rel=1e-4)
    assert found.power[0, 0] == pytest.approx(float(z.abs().square().sum(-1).mean()), rel=1e-4)


def test_zeros_let_fast_changes_through():
    torch.manual_seed(0)
    mixer = mixers.build("s4d", 8, polarization=Polarization(ones=0, zeros=1), initialization="real")
    found = filters.invariant(mixer)
    assert (found.learned[:, -1] / found.learned[:, 0]).max() < 1
    assert np.median(found.whole[:, -1] / found.whole.max(1)) > 10 * np.median(
        found.learned[:, -1] / found.learned.max(1)
    )


def test_layers_are_chosen_spread_or_by_number():
    m, x = hybrid(1, n_layers=5), tokens(2, 40)
    options = {"points": 3, "directions": 1}
    assert set(filters.measure(m, x, layers=3, **options).responses) == {1, 3, 5}
    found = filters.measure(m, x, layers=[2, 4], **options)
    assert set(found.responses) == {2, 4}
    both = filters.table([found, filters.measure(Subject("other", model()), x, layers=1, **options)])
    assert [row[0] for row in both.rows] == ["model", "model", "other"]
    for wrong in (0, [6], []):
        with pytest.raises(UserError, match="layer"):
            filters.measure(m, x, layers=wrong)
    with pytest.raises(UserError, match="direction"):
        filters.measure(m, x, directions=0)
    with pytest.raises(UserError, match="no mixers"):
        filters.measure(Subject("s", Recurrence(torch.ones(2), np.eye(2)), ACCESS), tokens(1, 40, 16))
