import math

import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization


def build(d_model=12, **config):
    torch.manual_seed(0)
    return mixers.build("mamba2", d_model, **{"d_state": 5, "d_head": 4, **config}).double()


def theirs(family, n_groups):
    """A mixer of transformers with random weights, and the configuration that ours then has; all of width 24, 6 heads of 8."""
    import transformers

    torch.manual_seed(0)
    hybrid = {
        "hidden_size": 24, "num_hidden_layers": 1, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 10, "mamba_n_groups": n_groups,
        "mamba_chunk_size": 16, "rms_norm_eps": 1e-3,
    }  # fmt: skip
    config = {"d_head": 8, "d_state": 10, "n_groups": n_groups, "norm_eps": 1e-3}
    if family == "mamba2":
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        c = transformers.Mamba2Config(
            hidden_size=24, num_heads=6, head_dim=8, state_size=10, n_groups=n_groups, num_hidden_layers=1, chunk_size=16,
            layer_norm_epsilon=1e-3, time_step_limit=(0.01, 0.05),
        )  # fmt: skip
        return Mamba2Mixer(c, layer_idx=0), config | {"dt_lower": 0.01, "dt_upper": 0.05}
    if family == "bamba":
        from transformers.models.bamba.modeling_bamba import BambaMixer

        return BambaMixer(transformers.BambaConfig(**hybrid), layer_idx=0), config
    if family == "granite":
        from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

        return GraniteMoeHybridMambaLayer(
            transformers.GraniteMoeHybridConfig(**hybrid, layer_types=["mamba"]), layer_idx=0
        ), config
    if family.startswith("falcon_h1"):
        from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector

        norm = family == "falcon_h1"
        c = transformers.FalconH1Config(**hybrid, mamba_rms_norm=norm, mamba_norm_before_gate=False, mamba_d_ssm=48)
        mixer = FalconH1Mixer(c, layer_idx=0)
        mixer.mup_vector = compute_mup_vector(
            c
        )  # their multipliers, all one here: a checkpoint's belong into its projection
        return mixer, config | {"gated_norm": norm}
    if family == "zamba2":
        from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

        c = transformers.Zamba2Config(
            hidden_size=24, num_hidden_layers=1, mamba_expand=2, n_mamba_heads=6, mamba_headdim=8, mamba_d_state=10, mamba_ngroups=n_groups,
            chunk_size=16, time_step_min=0.01, layers_block_type=["mamba"],
        )  # fmt: skip
        return Zamba2MambaMixer(c, layer_idx=0), config | {"dt_lower": 0.01, "norm_eps": 1e-5}
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    c = transformers.NemotronHConfig(
        hidden_size=24, mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=10, n_groups=n_groups, chunk_size=16, layer_norm_epsilon=1e-3,
        layers_block_type=["mamba"], time_step_min=0.01,
    )  # fmt: skip
    return NemotronHMamba2Mixer(c, layer_idx=0), config | {"dt_lower": 0.01}


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize(
    "family", ["mamba2", "bamba", "granite", "falcon_h1", "falcon_h1 without norm", "zamba2", "nemotron_h"]
)
def test_agrees_with_transformers_layer(family, n_groups):
    layer, config = theirs(family, n_groups)
    ours = mixers.build("mamba2", 24, **config)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.2 * torch.randn_like(p)
        layer.dt_bias.uniform_(-6, -1)
    names = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "norm.weight": "norm_weight"}
    state = {names.get(k, k): v for k, v in layer.state_dict().items() if names.get(k, k) in ours.state_dict()}
    state["conv_weight"] = state["conv_weight"].squeeze(1)
    if "norm_weight" in state:
        state["norm_weight"] = state["norm_weight"].view(6, 8)
    ours.load_state_dict(state)
    x = torch.randn(2, 60, 24)
    with torch.no_grad():
        want, (got, _) = layer.eval()(x), ours(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    if config.get("dt_lower"):
        dt = ours.coefficients(x).dt.detach()
        assert dt.min().item() == pytest.approx(0.01), "the limit was met"


def test_authors_initialisation():
    torch.manual_seed(0)
    m = mixers.build("mamba2", 512, d_head=8, n_residuals=9)
    dt, A = F.softplus(m.dt_bias), m.A()
    assert 0.0009 < dt.min() < 0.003
    assert 0.04 < dt.max() < 0.101
    assert -16 <= A.min() < -14
    assert -3 < A.max() <= -1
    assert abs(A.mean() + 8.5) < 1.2, "uniform between -16 and -1"
    assert m.out_proj.weight.abs().max() <= 1 / math.sqrt(1024) / 3 + 1e-6
    assert (m.D == 1).all()
    assert mixers.build("mamba2", 128).in_proj.weight.shape == (256 + (256 + 2 * 128) + 4, 128)


def test_append_and_replace():
    plain, append = build(), build(polarization=Polarization(ones=2, zeros=1))
    replace = build(polarization=Polarization(ones=2, zeros=1, mode="replace"))
    assert (plain.n_heads, append.n_heads, replace.n_heads) == (6, 9, 6)
    assert [m.A_log.numel() for m in (plain, append, replace)] == [6, 6, 3]
    assert append.A()[:2].tolist() == [0, 0]
    assert append.A()[-1] == -torch.inf
    assert replace.in_proj.weight.shape == plain.in_proj.weight.shape
    assert [m.state_size() for m in (plain, append, replace)] == [6 * 5 * 4, 9 * 5 * 4, 6 * 5 * 4]
    with pytest.raises(UserError, match="replace 2 of only 1"):
        mixers.build("mamba2", 12, polarization=Polarization(mode="replace"))
    with pytest.raises(UserError, match="does not divide"):
        build(n_groups=4)


@pytest.mark.parametrize("n_groups", [1, 2, 3])
def test_new_heads_with_silent_outputs_change_nothing(n_groups):
    """The norm takes in whole groups of heads; pinned ones are left out of them."""
    plain, more = build(n_groups=n_groups), build(n_groups=n_groups, polarization=Polarization(ones=1, zeros=2))
    wide = torch.arange(more.d_inner)[4:-8]  # the old heads' inner channels, among one new before and two after
    bc = more.d_inner + torch.arange(more.sizes[1] - more.d_inner)
    conv = torch.cat([wide, bc])
    rows = torch.cat([wide, more.d_inner + conv, sum(more.sizes[:2]) + torch.arange(9)[1:-2]])
    with torch.no_grad():
        more.in_proj.weight[rows] = plain.in_proj.weight
        more.conv_weight[conv], more.conv_bias[conv] = plain.conv_weight, plain.conv_bias
        more.dt_bias[1:-2], more.D[1:-2] = plain.dt_bias, plain.D
        more.A_log.copy_(plain.A_log)
        more.out_proj.weight.zero_()
        more.out_proj.weight[:, wide] = plain.out_proj.weight
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)


def test_norm_groups():
    mixer = build(n_groups=2, polarization=Polarization(ones=1, zeros=1, mode="replace"))
    sizes = (mixer._norm_groups() > 0).sum(1)
    assert sizes.tolist() == [1, 2, 2, 2, 2, 1], "pinned heads alone, two learned heads left in each group of three"
    assert mixer._groups().tolist() == [0, 0, 0, 1, 1, 1]
    assert build(n_groups=2, polarization=Polarization())._groups().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_zero_is_exact_at_every_step_size_and_gives_the_step_no_gradient():
    mixer, x = build(polarization=Polarization()), torch.randn(1, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        mixer.dt_bias.fill_(-math.inf)
    c = mixer.coefficients(x)
    assert not c.dt.any()
    assert not c.a[..., c.zeros].any()
    assert (c.a[..., ~c.zeros] == 1).all()
    c = build(polarization=Polarization()).coefficients(x)
    (g,) = torch.autograd.grad(c.a[..., c.zeros | c.ones].sum(), c.dt, allow_unused=True)
    assert g is None or not g.any()
    mixer(x)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
