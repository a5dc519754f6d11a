import math

import numpy as np
import pytest
import torch
from cases import close
from scipy.signal import cont2discrete
from torch.nn import functional as F

from ssmlens import mixers, ops
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization

INITIALIZATIONS = ["lin", "inv", "legs", "dss", "real"]


def build(d_model=6, polarization=None, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return mixers.build("s4d", d_model, polarization=polarization, **config).to(dtype)


def tokens(batch=2, length=40, d_model=6, dtype=torch.float64):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)


def written_out(m, x):
    """The layer from its parameters: the kernel entry by entry, a convolution as a double sum, then what follows it."""
    k, p = m.kernel, m.polarization
    dt = k.log_dt.exp().detach().numpy()
    A = (-k.log_A_real.exp()).detach().numpy().astype(complex)
    C = k.C.detach()
    C = torch.view_as_complex(C).numpy() if k.complex else C.numpy()
    if k.complex:
        A = A + 1j * k.A_imag.detach().numpy()
    factor = 2 if k.complex else 1
    length = x.shape[1]
    y = torch.zeros_like(x)
    for d in range(x.shape[2]):
        # zero-order hold by scipy's matrix exponential, one mode at a time
        K = np.zeros(length)
        for n in range(A.shape[1]):
            system = (np.array([[A[d, n]]]), np.array([[1.0]]), np.array([[1.0]]), np.array([[0.0]]))
            a, b, *_ = cont2discrete(system, dt[d], method="zoh")
            K += factor * np.real(C[d, n] * b[0, 0] * a[0, 0] ** np.arange(length))
        if p:
            pinned = factor * dt[d] * k.C_pinned.detach().numpy()[d]
            K += pinned[: p.ones].sum()
            K[0] += pinned[p.ones :].sum()
        for t in range(length):
            y[:, t, d] = sum(K[t - s] * x[:, s, d] for s in range(t + 1)) + m.D[d].detach() * x[:, t, d]
    z = F.gelu(y) @ m.output_linear.weight.detach().T + m.output_linear.bias.detach()
    left, gate = z.chunk(2, -1)
    return left * torch.sigmoid(gate)


@pytest.fixture(params=["auto", "chunked"])
def _backend(request, monkeypatch):
    """On a CPU the scan takes the place of the FFT convolution; "chunked" is what runs where there is no such kernel."""
    if request.param != "auto":
        monkeypatch.setattr(ops, "backend_for", lambda *_: request.param)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("polarization", [None, Polarization(ones=2, zeros=1)])
@pytest.mark.parametrize("initialization", INITIALIZATIONS)
def test_agrees_with_the_written_out_convolution(initialization, polarization):
    m = build(3, polarization, d_state=8, initialization=initialization)
    x = tokens(2, 25, 3)
    close(m(x)[0], written_out(m, x), torch.float64, slack=10)
    close(build(3, polarization, torch.float32, d_state=8, initialization=initialization)(x.float())[0],
          written_out(m, x), torch.float32)  # fmt: skip


def test_has_the_form_of_the_authors_example_checkpoints():
    """state-spaces/s4's models/s4/s4d.py: its parameters, under its names but for the 1×1 convolution's extra dimension."""
    shapes = {name: tuple(p.shape) for name, p in mixers.build("s4d", 128).named_parameters()}
    assert shapes == {
        "D": (128,), "kernel.C": (128, 32, 2), "kernel.log_dt": (128,), "kernel.log_A_real": (128, 32),
        "kernel.A_imag": (128, 32), "output_linear.weight": (256, 128), "output_linear.bias": (256,),
    }  # fmt: skip


def test_initialisations():
    A = {kind: build(initialization=kind).kernel.A().detach() for kind in INITIALIZATIONS}
    half = torch.full((32,), -0.5)
    assert torch.allclose(A["lin"][0], torch.complex(half, math.pi * torch.arange(32.0)).to(A["lin"]))
    n = torch.arange(31.0, -1, -1)
    assert torch.allclose(A["inv"][0].imag, (64 / math.pi * (64 / (2 * n + 1) - 1)).double())
    assert torch.allclose(A["real"][0], -torch.arange(1.0, 65).double())
    assert torch.equal(A["legs"], A["dss"])
    # S4D-Inv is made to follow the high frequencies of HiPPO-LegS (Gu et al. 2022, Section 4.2)
    assert torch.allclose(A["legs"][0].imag[-3:], A["inv"][0].imag[-3:], rtol=0.08)
    for kind in INITIALIZATIONS:
        k = build(512, initialization=kind).kernel
        dt = k.dt()
        assert 0.001 <= dt.min() < 0.0012
        assert 0.085 < dt.max() <= 0.1
        assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.15)
        power = k.read_out().detach().abs().pow(2).mean(0)  # E|2C|²: 4 for a C of variance one
        want = {"real": 1.0, "lin": 4.0, "inv": 4.0, "dss": 2.0}.get(kind)
        if want:
            assert power.mean().item() == pytest.approx(want, rel=0.05)
    from ssmlens.mixers import hippo

    want = 4 * hippo.normal_plus_low_rank(64).b ** 2
    power = build(2048, initialization="legs").kernel.read_out().detach().abs().pow(2).mean(0)
    assert torch.allclose(power, want, rtol=0.2)
    m = build(64, n_residuals=16)
    assert m.output_linear.weight[:64].abs().max() < 1 / 8 / 4 + 1e-6
    assert m.output_linear.weight[64:].abs().max() > 1 / 8 / 2


def test_append_and_replace():
    append, replace, plain = (
        build(polarization=Polarization()),
        build(polarization=Polarization(mode="replace")),
        build(),
    )
    assert append.kernel.A().shape == (6, 34)
    assert replace.kernel.A().shape == plain.kernel.A().shape == (6, 32)
    A = replace.kernel.A()[0]
    assert A[0] == 0
    assert torch.isneginf(A[-1].real)
    assert torch.allclose(A[1:-1].imag, math.pi * torch.arange(1.0, 31).double()), (
        "lowest and highest frequency made room"
    )
    assert (plain.state_size(), append.state_size(), replace.state_size()) == (6 * 64, 6 * 66, 6 * 62)
    assert build(d_state=4, initialization="real").state_size() == 24
    with pytest.raises(UserError, match="even"):
        build(d_state=5)
    with pytest.raises(UserError, match="dt_min"):
        build(dt_min=0.2)


def test_pinned_channels_are_written_with_the_step_size_and_read_with_their_own_weight():
    m = build(polarization=Polarization())
    x = tokens()
    c = m.coefficients(x)
    held, seen = c.states()[..., 0], c.states()[..., -1]
    dt = m.kernel.dt()
    close(held.real, (dt * x).cumsum(1), torch.float64)
    close(seen.real, dt * x, torch.float64)
    assert not held.imag.any()
    m(x)[0].pow(2).sum().backward()
    assert (m.kernel.C_pinned.grad.abs() > 0).all()
    assert (m.kernel.log_dt.grad.abs() > 0).all()
    m.kernel.C_pinned.data.zero_()
    plain = build()
    state = {n: p for n, p in m.state_dict().items() if n != "kernel.C_pinned"}
    plain.load_state_dict(state)  # an unread pinned channel changes nothing: polarizing a trained layer is adding zeros
    close(m(x)[0], plain(x)[0], torch.float64)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("initialization", ["lin", "real"])
def test_a_carried_state_with_padding_and_with_resets(initialization):
    """Padding that reaches into the second call leaves no trace, and a reset in it forgets the first call."""
    m = build(polarization=Polarization(), d_state=8, initialization=initialization)
    x, more = tokens(), tokens(length=12)
    _, state = m(x)
    want, _ = m(torch.cat([x, more], 1))
    mask = torch.ones(2, 52, dtype=torch.bool)
    mask[0, :45] = False  # the first call is nothing but padding for the first sequence
    stream = torch.cat([x, more], 1).masked_fill(~mask[..., None], 7.0)
    y, after = m(stream[:, 40:], m(stream[:, :40], mask=mask[:, :40])[1], mask=mask[:, 40:])
    alone, last = m(more[:1, 5:])
    close(y[0, 5:], alone[0], torch.float64)
    close(y[1], want[1, 40:], torch.float64)
    close(after.h[:1], last.h, torch.float64)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 3] = True
    y, _ = m(more, state, reset=reset)
    close(y[1], want[1, 40:], torch.float64)
    close(y[0, 3:], m(more[:1, 3:])[0][0], torch.float64)


def test_runs_in_bfloat16_with_a_float32_state():
    m = build(dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    want = m(x)[0]
    half = m.to(torch.bfloat16)
    y, state = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.h.dtype == torch.complex64
    close(y, want, torch.bfloat16, slack=3)
