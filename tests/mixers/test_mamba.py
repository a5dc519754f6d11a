import math

import pytest
import torch
from cases import close
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


def test_the_released_initialisation_comes_apart_into_two_halves():
    dt, weights = (
        mixers.build("mamba", 256, initialization=f"released_{half}", n_residuals=2) for half in ("dt", "weights")
    )
    assert not dt.dt_proj.bias.any()
    assert dt.in_proj.weight.std() > 0.03
    assert 0.019 < weights.in_proj.weight.std() < 0.021
    steps = F.softplus(weights.dt_proj.bias)
    assert 0.0009 < steps.min() < 0.01 < steps.max() < 0.11


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


def as_ours(state):
    """A mixer of transformers → ours."""
    names = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias"} | {
        f"{theirs}_layernorm.weight": f"{ours}_norm_weight" for theirs, ours in (("dt", "dt"), ("b", "B"), ("c", "C"))
    }
    return {names.get(n, n): p.squeeze(1) if n == "conv1d.weight" else p for n, p in state.items()}


def theirs(family):
    """A mixer of transformers with random weights, everywhere away from its start, and the configuration that ours then has."""
    import transformers

    torch.manual_seed(0)
    if family == "mamba":
        from transformers.models.mamba.modeling_mamba import MambaMixer

        mixer, ours = MambaMixer(transformers.MambaConfig(hidden_size=24, num_hidden_layers=1), layer_idx=0), {}
    elif family == "falcon_mamba":
        from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

        config = transformers.FalconMambaConfig(hidden_size=24, num_hidden_layers=1, mixer_rms_eps=1e-3)
        mixer = FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)
        mixer.init_falcon_mamba_weights()  # which its constructor calls too early for a mixer by itself
        ours = {"bcdt_norm": "plain", "bcdt_eps": 1e-3}
    else:
        from transformers.models.jamba.modeling_jamba import JambaMambaMixer

        config = transformers.JambaConfig(hidden_size=24, num_hidden_layers=1, mamba_dt_rank=2, rms_norm_eps=1e-3)
        mixer, ours = JambaMambaMixer(config, layer_idx=0), {"bcdt_norm": "weighted", "bcdt_eps": 1e-3}
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn_like(p)
    return mixer.eval(), ours


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_agrees_with_transformers_layer(family):
    layer, config = theirs(family)
    ours = mixers.build("mamba", 24, **config)
    ours.load_state_dict(as_ours(layer.state_dict()))
    x = torch.randn(2, 60, 24)
    with torch.no_grad():
        want, (got, _) = layer(x), ours(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("kind", ["plain", "weighted"])
def test_an_unread_pinned_channel_changes_nothing_under_the_norms(kind):
    """Their mean is over learned state channels alone, so that a trained layer can be polarized."""
    torch.manual_seed(0)
    plain = mixers.build("mamba", 8, bcdt_norm=kind, d_state=4).double()
    more = mixers.build("mamba", 8, bcdt_norm=kind, d_state=4, polarization=Polarization()).double()
    rank = plain.dt_rank
    B, C = (torch.arange(rank + i * 6 + 1, rank + i * 6 + 5) for i in range(2))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in ("B_norm_weight", "C_norm_weight"):
                more.get_parameter(name)[1:-1] = p.uniform_(0.5, 2)
            elif name != "x_proj.weight":
                more.get_parameter(name).copy_(p)
        more.x_proj.weight[torch.cat([torch.arange(rank), B, C])] = plain.x_proj.weight
        more.x_proj.weight[[rank + 6, rank + 11]] = 0  # C of the pinned ones
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)
    c = more.coefficients(x)
    assert (c.u[..., c.ones | c.zeros].abs().amax((0, 1)) > 0).all(), "written to all the same"
