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


@pytest.mark.parametrize("n_groups", [1, 2])
def test_agrees_with_transformers_layer(n_groups):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, state_size=10, n_groups=n_groups, num_hidden_layers=1, chunk_size=16
    )
    theirs = Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 2)
        theirs.D.uniform_(-1, 1)
    ours = mixers.build("mamba2", 24, d_head=8, d_state=10, n_groups=n_groups)
    names = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "norm.weight": "norm_weight"}
    state = {names.get(k, k): v for k, v in theirs.state_dict().items()}
    state["conv_weight"] = state["conv_weight"].squeeze(1)
    state["norm_weight"] = state["norm_weight"].view(6, 8)
    ours.load_state_dict(state)
    x = torch.randn(2, 60, 24)
    want = theirs(x)
    assert (ours(x)[0] - want).abs().max() <= 1e-5 * want.abs().max()


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
