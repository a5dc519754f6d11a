"""Hidden attention against closed forms, and against what the layers compute: weights times values are the outputs."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ssmlens import mixers, ops
from ssmlens.errors import UserError
from ssmlens.lens import hidden_attention
from ssmlens.lens.hidden_attention import contributions, recorded, weights
from ssmlens.lens.subject import Access, Subject
from ssmlens.mixers import Mixer, MixerConfig
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients

from .models import hybrid, model, tokens

DIAGONAL = [n for n in mixers.names() if mixers.get(n).diagonal]
LENGTH = 12


def make(name, polarization=None, **config):
    torch.manual_seed(0)
    mixer = mixers.build(name, 8, polarization=polarization, **config)
    for p in mixer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return mixer.double()


def inputs(length=LENGTH):
    return torch.randn(1, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(alpha, call, c):
    """y of the operator from the weights and the values that they weigh."""
    given = call.arguments
    if call.name in ("selective_scan", "lti_convolution"):
        y = torch.einsum("gts,sg->tg", alpha, given["x"][0]) + given["D"] * given["x"][0]
        return y * F.silu(given["z"][0]) if given.get("z") is not None else y
    if call.name == "gated_linear_attention":
        return torch.einsum("hts,shv->thv", alpha, given["v"][0])
    if call.name == "linear_scan":
        return torch.einsum("gts,sg->tg", alpha, c.u[0] if c.b is None else c.b[0])
    return torch.sigmoid(given["r"][0]) * torch.einsum("gts,sg->tg", alpha, given["v"][0])


@pytest.mark.parametrize("polarization", [None, Polarization()])
@pytest.mark.parametrize("name", DIAGONAL)
def test_weights_times_values_are_the_output(name, polarization):
    mixer, x = make(name, polarization), inputs()
    alpha = weights(mixer, x)
    with recorded() as calls, torch.no_grad():
        mixer(x)
    if name == "h3":  # its pairs of dimensions are rows of a batch: one kernel for all
        calls[0].arguments["x"], y = calls[0].arguments["x"][:1], calls[0].y[:1]
    else:
        y = calls[0].y
    torch.testing.assert_close(read(alpha, calls[0], mixer.coefficients(x)), y[0], rtol=1e-9, atol=1e-11)
    assert (alpha.triu(1) == 0).all()
    if name == "rwkv4":
        torch.testing.assert_close(alpha.sum(2), torch.ones_like(alpha[..., 0]))


@pytest.mark.parametrize("name", DIAGONAL)
def test_a_window_is_a_part_of_the_whole(name):
    mixer, x = make(name), inputs()
    torch.testing.assert_close(weights(mixer, x, slice(5, 11)), weights(mixer, x)[:, 5:11, 5:11])
    torch.testing.assert_close(contributions(mixer, x, slice(5, 11)), contributions(mixer, x)[5:11, 5:11])


def test_the_kernel_of_s4d():
    """α_{t,s} = 2 Re(Σ_n C_n ā_n^{t-s} b̄_n)."""
    mixer = make("s4d")
    alpha, kernel = weights(mixer, inputs()), mixer.kernel
    with torch.no_grad():
        A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
        dt = kernel.log_dt.exp()[:, None]
        C, gain = 2 * torch.view_as_complex(kernel.C), (torch.exp(dt * A) - 1) / A
        powers = torch.stack([(C * torch.exp(dt * A * d) * gain).sum(-1).real for d in range(LENGTH)], 1)
    for t in range(LENGTH):
        torch.testing.assert_close(alpha[:, t, : t + 1], powers[:, : t + 1].flip(1))


def test_gla_is_a_query_a_product_and_a_key():
    """α_{t,s} = q_tᵀ (Π_{r=s+1..t} a_r) k_s of every head, from the layer's own weights."""
    mixer, x = make("gla", n_heads=2, d_key=3), inputs()
    alpha = weights(mixer, x)
    with torch.no_grad():
        q, k = (linear(x)[0].unflatten(-1, (2, 3)) for linear in (mixer.q_proj, mixer.k_proj))
        a = mixer.coefficients(x).a[0, ..., 0]
        for t in range(LENGTH):
            for s in range(t + 1):
                expected = (q[t] / math.sqrt(3) * a[s + 1 : t + 1].prod(0) * k[s]).sum(-1)
                torch.testing.assert_close(alpha[:, t, s], expected)


def test_mamba_is_c_the_product_and_delta_b():
    mixer, x = make("mamba", d_state=3), inputs()
    alpha, c = weights(mixer, x), mixer.coefficients(x)
    with recorded() as calls, torch.no_grad():
        mixer(x)
    B, C = calls[0].arguments["B"][0], calls[0].arguments["C"][0]
    t, s = 9, 4
    expected = (C[t] * c.a[0, s + 1 : t + 1].prod(0) * c.dt[0, s, :, None] * B[s]).sum(-1)
    torch.testing.assert_close(alpha[:, t, s], expected.detach())


class Exponential(Mixer):
    """h_t = a h_{t-1} + x_t, y = h, on no operator of ours."""

    config_class = MixerConfig

    def __init__(self, a):
        super().__init__(len(a), MixerConfig(), None)
        self.a = torch.nn.Parameter(torch.as_tensor(a))

    def forward(self, x, state=None, *, mask=None, reset=None):
        return self.coefficients(x).states(), None

    def coefficients(self, x):
        return Coefficients.of(self.a.to(x).expand_as(x), x)

    def decode(self, states, x):
        return 1.0 * states

    def reset_parameters(self):
        pass


def test_contributions_of_an_exponential_layer():
    mixer, x = Exponential([0.5, 0.9]), inputs()[..., :2]
    assert weights(mixer, x) is None
    found = contributions(mixer, x)
    for t in range(LENGTH):
        for s in range(t + 1):
            expected = (torch.tensor([0.5, 0.9], dtype=torch.float64) ** (t - s) * x[0, s]).norm()
            assert float(found[t, s]) == pytest.approx(float(expected), rel=1e-6)
    assert (found.triu(1) == 0).all()


@pytest.mark.parametrize("name", DIAGONAL)
def test_contributions_are_what_the_output_loses(name):
    """For a token that has written little: decoding without it, to first order."""
    mixer, x = make(name), inputs()
    found, t, s = contributions(mixer, x), 9, 4
    c = mixer.coefficients(x)
    with torch.no_grad():
        states, trace = c.states(), torch.zeros_like(c.u)
        trace[:, s] = c.u[:, s]
        for r in range(s + 1, LENGTH):
            trace[:, r] = c.a[:, r] * trace[:, r - 1]
        h = 1e-6
        change = (mixer.decode(states + h * trace, x) - mixer.decode(states - h * trace, x)) / (2 * h)
    assert float(found[t, s]) == pytest.approx(float(change[0, t].norm()), rel=1e-4, abs=1e-9)


def test_operators_are_as_they_were_afterwards_even_after_an_error():
    before = [getattr(ops, name) for name in ("linear_scan", "selective_scan")]
    x = torch.ones(1, 3, 2)
    with recorded() as calls:
        ops.linear_scan(x, x)
        with pytest.raises(ValueError, match="dimensions"):
            ops.linear_scan(x[0], x)
        assert ops.linear_scan is not before[0]
    assert [call.name for call in calls] == ["linear_scan"]
    assert [getattr(ops, name) for name in ("linear_scan", "selective_scan")] == before


@pytest.mark.parametrize("name", ["mamba", "gla", "rwkv4"])
def test_measured_in_a_model(name):
    m, x = model(mixer=name), tokens(3, 40)
    found = hidden_attention.measure(m, x, window=16, start=8)
    assert list(found.matrices) == [1, 2]
    assert found.matrices[1].shape == (3, 16, 16)
    assert set(found.kinds.values()) == {"weights"}
    with torch.no_grad():
        block = m.backbone.blocks[0]
        inside = block.norm(m.backbone.embedding(x[1:2]))
        expected = weights(block.mixer, inside, slice(8, 24)).abs().mean(0)
    np.testing.assert_allclose(found.matrices[1][1], expected, rtol=1e-4, atol=1e-7)
    shares = found.shares(1)
    np.testing.assert_allclose(shares.sum(2), 1)
    by_distance = found.by_distance(1)
    assert len(by_distance) == 9
    assert by_distance[3].value == pytest.approx(np.mean([shares[:, t, t - 3] for t in range(8, 16)]))
    assert by_distance[3].n == 3
    assert found.on_itself(1).value == pytest.approx(by_distance[0].value)
    back = sum(shares[:, t, s] * (t - s) for t in range(8, 16) for s in range(t + 1)) / 8
    assert found.mean_distance(1).value == pytest.approx(back.mean())
    assert [len(s.x) for s in found.figures()[0].series] == [9, 9]
    assert [row[1] for row in found.table_rows()] == [1, 2]
    canvas = found.plot(1, words=[str(i) for i in range(16)])
    images = [image for axis in canvas.axes for image in axis.get_images()]
    assert len(images) == 2
    np.testing.assert_allclose(images[0].get_array().filled(0), np.where(shares[1] > 0, shares[1], 0))


def test_a_mixer_without_an_operator_is_measured_by_its_contributions():
    table = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Exponential([0.5, 0.5])

        def forward(self, x):
            return self.mixer(x)[0]

    access = Access(embed=lambda m, t: table[t], run=lambda m, x: m(x), blocks=lambda m: list(m.children()))
    found = hidden_attention.measure(Subject("own", torch.nn.Sequential(Block()), access), tokens(2, 20), window=20)
    assert found.kinds == {1: "contributions"}
    x = table[tokens(2, 20)][0]
    assert found.matrices[1][0, 10, 7] == pytest.approx(float(0.125 * x[7].norm()), rel=1e-5)


def test_models_side_by_side_and_what_is_refused():
    one, other = (
        hidden_attention.measure(Subject(n, hybrid(0, n_layers=3)), tokens(1, 20), window=8) for n in ("a", "b")
    )
    assert list(one.matrices) == [2, 3]
    assert one.start == 12
    assert [row[0] for row in hidden_attention.table([one, other]).rows] == ["a", "a", "b", "b"]
    assert len(hidden_attention.plot([one, other]).axes) == 5
    with pytest.raises(UserError, match="no number 1"):
        one.plot(1)
    with pytest.raises(UserError, match="diagonal transition"):
        hidden_attention.measure(model(mixer="attention"), tokens(1, 20))
    for wrong in ({"window": 21}, {"window": 1}, {"window": 8, "start": 13}, {"window": 8, "start": -1}):
        with pytest.raises(UserError, match="window"):
            hidden_attention.measure(model(), tokens(1, 20), **wrong)
    for layers in (0, [], [3]):
        with pytest.raises(UserError, match="layers"):
            hidden_attention.measure(model(), tokens(1, 20), window=8, layers=layers)
