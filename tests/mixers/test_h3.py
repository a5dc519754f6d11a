import math

import pytest
import torch
from cases import close

from ssmlens import mixers, ops
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization


def build(d_model=6, polarization=None, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return mixers.build("h3", d_model, polarization=polarization, **({"d_state": 8, "d_shift": 5} | config)).to(dtype)


def tokens(batch=2, length=20, d_model=6):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(m, x):
    """Both state space models as sums over the past, head by head and pair by pair."""
    q, k, v = (proj(x).detach() for proj in (m.q_proj, m.k_proj, m.v_proj))
    length = x.shape[1]
    F = m.shift.detach()
    width = F.shape[1]
    shifted = torch.zeros_like(k)
    for t in range(length):
        for j in range(min(width, t + 1)):
            shifted[:, t] += F[:, width - 1 - j] * k[:, t - j]
    d, kernel, p = m.config.d_head, m.kernel, m.polarization
    y = torch.zeros_like(x)
    for head in range(m.n_heads):
        A = torch.complex(-kernel.log_A_real[head].exp(), kernel.A_imag[head]).detach()
        C, dt = torch.view_as_complex(kernel.C[head].detach()), kernel.log_dt[head].detach().exp()
        powers = (dt * A).exp() ** torch.arange(length)[:, None]
        K = 2 * (powers * C * ((dt * A).exp() - 1) / A).sum(-1).real
        if p:
            pinned = 2 * dt * kernel.C_pinned[head].detach()
            K = K + pinned[: p.ones].sum()
            K[0] += pinned[p.ones :].sum()
        for i in range(d):
            for j in range(d):
                key, value = head * d + i, head * d + j
                kv = shifted[..., key] * v[..., value]
                s = torch.stack([(K[: t + 1].flip(0) * kv[:, : t + 1]).sum(1) for t in range(length)], 1)
                y[..., value] += q[..., key] * (s + m.D[head].detach() * kv)
    return m.output_linear(y).detach()


@pytest.fixture(params=["auto", "chunked"])
def _backend(request, monkeypatch):
    """On a CPU the scan takes the place of the FFT convolution; "chunked" is what runs where there is no such kernel."""
    if request.param != "auto":
        monkeypatch.setattr(ops, "backend_for", lambda *_: request.param)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("d_head", [1, 2, 3])
@pytest.mark.parametrize("polarization", [None, Polarization(ones=2, zeros=1)])
def test_agrees_with_the_written_out_convolutions(polarization, d_head):
    m = build(polarization=polarization, d_head=d_head)
    x = tokens()
    want = written_out(m, x)
    close(m(x)[0], want, torch.float64, slack=10)
    c = m.coefficients(x)
    close(m.decode(c.states(), x), want, torch.float64, slack=10)
    assert c.state_shape == (d_head, d_head, 6 // d_head, 4 + (3 if polarization else 0))
    first, state = m(x[:, :7])
    state_after_one, ys = state, [first]
    for t in range(7, 20):
        y, state_after_one = m.step(x[:, t], state_after_one)
        ys.append(y[:, None])
    close(torch.cat(ys, 1), want, torch.float64, slack=10)
    m.float()
    close(m(x.float())[0], want, torch.float32)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("d_head", [1, 3])
def test_padding_resets_and_a_carried_state_in_heads(d_head):
    m = build(polarization=Polarization(), d_head=d_head)
    x = tokens()
    padded = torch.cat([torch.full_like(x[:, :3], 9.0), x], 1)
    y, state = m(padded, mask=(torch.arange(23) >= 3).expand(2, -1))
    want, last = m(x)
    close(y[:, 3:], want, torch.float64)
    close(state.keys, last.keys, torch.float64)
    close(state.h, last.h, torch.float64)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 4], reset[1, 9] = True, True
    y, _ = m(x, reset=reset)
    close(y[0, 4:], m(x[:1, 4:])[0][0], torch.float64)
    close(y[1, 9:], m(x[1:, 9:])[0][0], torch.float64)


def test_the_shift_starts_like_a_convolution_with_a_skip():
    m = build(512, d_shift=64)
    assert m.shift[:, :-1].abs().max() <= 1 / 8
    assert m.shift[:, -1].std().item() == pytest.approx(1, abs=0.1)
    assert 0.001 <= m.kernel.dt().min() < 0.0012
    assert m.D.std().item() == pytest.approx(1, abs=0.1)
    small = build(512, n_residuals=16)
    assert small.output_linear.weight.abs().max() <= 1 / math.sqrt(512) / 4 + 1e-6


def test_sizes():
    assert build().state_size() == 6 * 8
    assert build(d_head=3).state_size() == 3 * 6 * 8
    assert build(polarization=Polarization()).state_size() == 6 * 10
    assert build(polarization=Polarization(mode="replace")).state_size() == 6 * 6
    with pytest.raises(UserError, match="d_head"):
        build(d_head=4)


def test_stores_a_key_and_its_value_together():
    """What the gates are for: with a channel at one, the token after a key brings its value into the state under that key."""
    m = build(2, Polarization(ones=1, zeros=0), d_head=2, d_shift=2)
    for p in m.parameters():
        p.data.zero_()
    m.k_proj.weight.data.copy_(torch.eye(2))
    m.v_proj.weight.data.copy_(torch.eye(2))
    m.shift.data[:, 0] = 1  # the key of the token before
    key, value = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    h = m(torch.stack([key, value])[None])[1].h[0, ..., 0, 0].real
    assert h[0, 1] == m.kernel.dt()[0]
    assert h.count_nonzero() == 1
