import math

import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers.griffin import FACTOR_AT_ONE, _safe_sqrt
from ssmlens.polarization import Polarization


def build(d_model=8, polarization=None, dtype=torch.float64, **config):
    torch.manual_seed(0)
    return mixers.build("griffin", d_model, polarization=polarization, **config).to(dtype)


def tokens(batch=2, length=20, d_model=8, dtype=torch.float64):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)


def as_ours(state):
    """transformers' recurrent block → ours; their gates hold a block's matrix input first, ours a row for every output."""
    ours = {n: state[n] for n in state if n.startswith("linear_")}
    ours["conv_weight"], ours["conv_bias"] = state["conv_1d.weight"].squeeze(1), state["conv_1d.bias"]
    for gate in ("input_gate", "recurrent_gate"):
        ours[f"{gate}_weight"] = state[f"rg_lru.{gate}_weight"].mT.flatten(0, 1)
        ours[f"{gate}_bias"] = state[f"rg_lru.{gate}_bias"].flatten()
    return ours | {"Lambda": state["rg_lru.recurrent_param"]}


@pytest.mark.parametrize("reset_at", [None, 7])
def test_agrees_with_transformers_recurrent_block(reset_at):
    import transformers
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(hidden_size=24, lru_width=32, num_attention_heads=4, conv1d_width=4)
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = mixers.build("griffin", 24, width=32, n_blocks=4)
    ours.load_state_dict(as_ours(theirs.state_dict()))
    x, positions = torch.randn(2, 60, 24), torch.arange(60).expand(2, -1)
    if reset_at is None:
        want, _ = theirs(x, positions, None, use_cache=False)
        got, state = ours(x)
        close(state.h, theirs.rg_lru.recurrent_states, torch.float32, slack=0.5)
    else:  # their recurrence restarts at position 0; their convolution looks over the boundary, so it is run in two parts
        want = torch.cat([theirs(p, positions[:, : p.shape[1]], None, use_cache=False)[0]
                          for p in (x[:, :reset_at], x[:, reset_at:])], 1)  # fmt: skip
        got, _ = ours(x, reset=torch.arange(60).eq(reset_at).expand(2, -1))
    close(got, want, torch.float32, slack=0.5)  # 1e-5


def test_first_token():
    """a = 0 and factor 1 at the first token, after a reset, and at the first token behind padding, however the padding is cut."""
    m, x = build(), tokens()
    c = m.coefficients(x)
    assert not c.a[:, 0].any()
    assert torch.equal(c.dt[:, 0], torch.ones_like(c.dt[:, 0]))
    assert (c.a[:, 1:] > 0).all()
    assert torch.allclose(c.dt[:, 1:] ** 2 + c.a[:, 1:] ** 2, torch.ones_like(c.a[:, 1:]))
    want, last = m(x)
    padded = torch.cat([torch.full_like(x[:, :6], 5.0), x], 1)
    mask = (torch.arange(26) >= 6).expand(2, -1)
    ys, state = [], None
    for part in (slice(0, 4), slice(4, 9), slice(9, 26)):  # the first call sees nothing but padding
        y, state = m(padded[:, part], state, mask=mask[:, part])
        ys.append(y)
    close(torch.cat(ys, 1)[:, 6:], want, torch.float64)
    close(state.h, last.h, torch.float64)
    assert state.begun.all()


def test_initialisation():
    m = build(512, dtype=torch.float32)
    radius = torch.exp(-F.softplus(m.Lambda))
    assert 0.9 <= radius.min() < 0.91
    assert 0.99 < radius.max() <= 0.999
    assert (radius**2).mean().item() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=0.01)
    a = m.coefficients(tokens(1, 200, 512, torch.float32)).a[:, 1:]
    # the typical factor at which a channel held at one is written
    assert (1 - a**2).sqrt().median().item() == pytest.approx(FACTOR_AT_ONE, abs=0.05)
    assert m.input_gate_weight.shape == (512, 32)
    assert m.input_gate_weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert m.linear_x.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert m.conv_weight.std().item() == pytest.approx(math.sqrt(0.01 / 4), rel=0.05)
    assert build(512, n_residuals=16).linear_out.weight.std().item() == pytest.approx(512**-0.5 / 4, rel=0.05)


def test_gradients_stay_finite_where_a_is_one():
    x = torch.tensor([0.0, 1e-12, 1e-3, 0.5], dtype=torch.float64, requires_grad=True)
    y = _safe_sqrt(x)
    assert torch.allclose(y, x.sqrt())
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(g, torch.tensor([1000.0, 1000.0, 0.5 / 1e-3**0.5, 0.5**0.5], dtype=torch.float64))
    m = build(dtype=torch.float32)
    m.Lambda.data.fill_(-200.0)  # softplus is 0 in float32: a = 1
    m(tokens(dtype=torch.float32))[0].pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_pinned_channels_have_an_input_gate_and_no_recurrent_gate(mode):
    m, x = build(16, Polarization(ones=2, zeros=1, mode=mode)), tokens(d_model=16)
    width = 19 if mode == "append" else 16
    assert m.state_size() == m.width == width
    assert m.recurrent_gate_weight.shape[0] == len(m.Lambda) == len(m.recurrent_gate_bias) == width - 3
    c = m.coefficients(x)
    assert torch.equal(c.dt[..., c.ones], torch.full_like(c.dt[..., c.ones], FACTOR_AT_ONE))
    assert (c.dt[..., c.zeros] == 1).all()
    assert torch.allclose(c.states()[..., c.ones], FACTOR_AT_ONE * c.b[..., c.ones].cumsum(1))
    assert torch.equal(c.states()[..., c.zeros], c.u[..., c.zeros])
    m(x)[0].pow(2).sum().backward()
    for p in m.parameters():  # nothing exists for a pinned decay alone
        assert (p.grad.abs() > 0).all() if p.dim() == 1 else (p.grad.abs().amax(1) > 0).all()
    gate = m.pinned_gate.weight if mode == "append" else m.input_gate_weight[[0, 1, -1]]
    assert gate.shape[0] == 3


def test_replace_keeps_the_blocks():
    """The gates of a replaced layer see the blocks of the plain one: with the same weights, channels far from the pinned ones agree."""
    plain, replace = build(16, n_blocks=4), build(16, Polarization(mode="replace"), n_blocks=4)
    with torch.no_grad():
        for name, p in replace.named_parameters():
            source = plain.get_parameter(name)
            p.copy_(source if source.shape == p.shape else source[1:-1])
    x = tokens(d_model=16)
    got, want = replace.coefficients(x), plain.coefficients(x)
    close(got.a[..., 1:-1], want.a[..., 1:-1], torch.float64)
    close(got.u[..., 1:-1], want.u[..., 1:-1], torch.float64)


def test_configuration():
    assert build(24).n_blocks == 8
    assert build(7).n_blocks == 1
    assert build(24, width=32, n_blocks=4).linear_out.weight.shape == (24, 32)
    with pytest.raises(UserError, match="n_blocks"):
        build(24, n_blocks=5)
