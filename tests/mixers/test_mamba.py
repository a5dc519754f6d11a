import math

import pytest
import torch
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization


def test_authors_initialisation():
    torch.manual_seed(0)
    m = mixers.build("mamba", 256, n_residuals=9)
    dt = F.softplus(m.dt_proj.bias)
    assert 0.0009 < dt.min() < 0.002
    assert 0.05 < dt.max() < 0.101
    assert torch.equal(m.A(), -torch.arange(1.0, 17).expand(512, 16).exp().log()) or torch.allclose(
        m.A(), -torch.arange(1.0, 17).expand(512, 16)
    )
    assert m.out_proj.weight.abs().max() <= 1 / math.sqrt(512) / 3 + 1e-6
    slowest = torch.exp(-dt)  # "0.90..0.999" (SPEC.md §4)
    assert slowest.min() > 0.90
    assert slowest.max() > 0.998


def test_released_initialisation_starts_the_slowest_channel_at_one_half():
    m = mixers.build("mamba", 256, initialization="released", n_residuals=2)
    assert not m.dt_proj.bias.any()
    a = torch.exp(-F.softplus(m.dt_proj.bias))
    assert torch.allclose(a, torch.full_like(a, 0.5))
    assert 0.019 < m.in_proj.weight.std() < 0.021
    assert 0.0095 < m.out_proj.weight.std() < 0.0105  # 0.02 / sqrt(2 · 2)


def test_append_and_replace():
    append = mixers.build("mamba", 8, polarization=Polarization())
    replace = mixers.build("mamba", 8, polarization=Polarization(mode="replace"))
    plain = mixers.build("mamba", 8)
    assert (append.d_state, replace.d_state, plain.d_state) == (18, 16, 16)
    assert replace.x_proj.weight.shape == plain.x_proj.weight.shape
    A = replace.A()
    assert (A[:, 0] == 0).all()
    assert torch.isneginf(A[:, -1]).all()
    assert torch.allclose(A[0, 1:-1], -torch.arange(2.0, 16)), (
        "the slowest made room for the one, the fastest for the zero"
    )
    with pytest.raises(UserError, match="replace 2 of only 1"):
        mixers.build("mamba", 8, polarization=Polarization(mode="replace"), d_state=1)


def test_released_and_printed_values_are_not_zero_at_small_steps():
    """SPEC.md §4: at Δ = 0.001 the released -100 holds the channel at 0.90, the printed -1000 at 0.37; ours is 0 at Δ = 0 too."""
    for zero, want in [(-100.0, 0.905), (-1000.0, 0.368), (-math.inf, 0.0)]:
        m = mixers.build("mamba", 8, polarization=Polarization(zero=zero))
        torch.nn.init.zeros_(m.x_proj.weight[: m.dt_rank])
        m.dt_proj.bias.data.fill_(math.log(math.expm1(0.001)))
        c = m.coefficients(torch.randn(1, 3, 8))
        assert c.a[..., c.zeros].mean().item() == pytest.approx(want, abs=1e-3)
    m.dt_proj.bias.data.fill_(-math.inf)  # Δ = 0
    assert not m.coefficients(torch.randn(1, 3, 8)).a[..., c.zeros].any()


def test_gradient_to_the_step_size_is_as_without_the_pinned_channels():
    """A e^{ΔA} vanishes at A = 0 and -inf (the paper, Section 6), so pinned channels reach Δ only through Δ b."""
    m = mixers.build("mamba", 8, polarization=Polarization()).double()
    c = m.coefficients(torch.randn(1, 5, 8, dtype=torch.float64))
    pinned = c.ones | c.zeros
    (g,) = torch.autograd.grad(c.a[..., pinned].sum(), c.dt, allow_unused=True)
    assert g is None or not g.any()


def test_mamba_agrees_with_transformers_layer():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    theirs = MambaMixer(transformers.MambaConfig(hidden_size=24, num_hidden_layers=1), layer_idx=0)
    ours = mixers.build("mamba", 24)
    state = {
        k.replace("conv1d.weight", "conv_weight").replace("conv1d.bias", "conv_bias"): v
        for k, v in theirs.state_dict().items()
    }
    state["conv_weight"] = state["conv_weight"].squeeze(1)
    ours.load_state_dict(state)
    x = torch.randn(2, 60, 24)
    want = theirs(x)
    assert (ours(x)[0] - want).abs().max() <= 1e-5 * want.abs().max()
