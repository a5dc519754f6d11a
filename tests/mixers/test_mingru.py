"""minGRU and minLSTM: they differ in their gates."""

import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization


def build(name="mingru", d_model=8, polarization=None, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return mixers.build(name, d_model, polarization=polarization, **config).to(dtype)


def tokens(batch=2, length=30, d_model=8):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def log_g(v):
    return torch.where(v >= 0, (F.relu(v) + 0.5).log(), -F.softplus(-v))


def in_log_space(log_a, log_u):
    """The authors' parallel form (their Appendix B): a cumulative log-sum-exp, no loop and no scan."""
    total = log_a.cumsum(1)
    return (total + (log_u - total).logcumsumexp(1)).exp()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mingru_agrees_with_the_authors_form_in_log_space(dtype):
    m, x = build(expand=3), tokens()
    k = m.to_gate(x)
    h = in_log_space(-F.softplus(k), -F.softplus(-k) + log_g(m.to_hidden(x)))
    want = m.to_out(h)
    close(m.to(dtype)(x.to(dtype))[0], want, dtype, slack=5 if dtype == torch.float64 else 1)


def test_plain_activation():
    m, x = build(activation="none"), tokens(length=6)
    h = torch.zeros(2, 8).double()
    for t in range(6):
        z = torch.sigmoid(m.to_gate(x[:, t]))
        h = (1 - z) * h + z * m.to_hidden(x[:, t])
        close(m(x[:, : t + 1])[0][:, -1], m.to_out(h), torch.float64)


def test_initialisation():
    m = build(d_model=256, n_residuals=16)
    assert 0.059 < m.to_gate.weight.abs().max() <= 1 / 16
    assert m.to_out.weight.abs().max() <= 1 / 64
    assert build(bias=False).to_hidden.bias is None


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_pinned_channels_keep_their_input_gate(name, mode):
    m, x = build(name, polarization=Polarization(ones=2, zeros=1, mode=mode)), tokens()
    width = 11 if mode == "append" else 8
    assert m.width == m.state_size() == width
    gate = torch.sigmoid((m.to_gate if name == "mingru" else m.to_input)(x))
    c = m.coefficients(x)
    pinned = c.ones | c.zeros
    close(c.dt[..., pinned], gate[..., pinned], torch.float64)
    close((c.a + c.dt)[..., ~pinned], torch.ones(2, 30, width - 3), torch.float64)
    close(c.states()[..., c.ones], (c.dt * c.b)[..., c.ones].cumsum(1), torch.float64)
    m(x)[0].pow(2).sum().backward()
    assert all((p.grad.abs() > 0).any(-1).all() for p in m.parameters()), "a row that nothing teaches"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minlstm_agrees_with_the_authors_form_in_log_space(dtype):
    m, x = build("minlstm", expand=2), tokens()
    difference = F.softplus(-m.to_forget(x)) - F.softplus(-m.to_input(x))
    h = in_log_space(-F.softplus(difference), -F.softplus(-difference) + log_g(m.to_hidden(x)))
    want = m.to_out(h)
    close(m.to(dtype)(x.to(dtype))[0], want, dtype, slack=5 if dtype == torch.float64 else 1)


def test_minlstm_gates_are_normalised():
    m, x = build("minlstm", forget_bias=2.0), tokens()
    c = m.coefficients(x)
    f, i = torch.sigmoid(m.to_forget(x)), torch.sigmoid(m.to_input(x))
    close(c.a, f / (f + i), torch.float64)
    close(c.dt, i / (f + i), torch.float64)
    assert m.to_forget.bias.mean() > 1.5
    with pytest.raises(UserError, match="forget_bias"):
        build("minlstm", forget_bias=1.0, bias=False)


def test_the_forget_gate_has_no_rows_for_pinned_channels():
    for mode, learned in (("append", 8), ("replace", 6)):
        m = build("minlstm", polarization=Polarization(mode=mode))
        assert m.to_forget.weight.shape == (learned, 8)
        assert m.to_input.weight.shape == (learned + 2, 8)


def test_extreme_gates():
    """Both gates shut: their ratio is still right, where f / (f + i) would be 0 / 0 in float32."""
    m = build("minlstm", dtype=torch.float32)
    m.to_forget.bias.data.fill_(-200.0)
    m.to_input.bias.data.fill_(-200.0)
    c = m.coefficients(torch.zeros(1, 3, 8))
    assert torch.allclose(c.a, torch.full_like(c.a, 0.5))
    m(torch.zeros(1, 3, 8))[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())
