import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization


def build(d_model=16, **config):
    torch.manual_seed(0)
    return mixers.build("gla", d_model, **{"n_heads": 2, **config}).double()


def test_agrees_with_its_parallel_form():
    """Σ_{s≤t} q_tᵀ diag(Π_{s<r≤t} a_r) k_s v_s, with the products written out from the sigmoid itself."""
    mixer, x = build(), torch.randn(2, 19, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.gate_up.weight.mul_(30)  # far from the start, where every a is 0.958
    q, k, v, g = (p(x).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    a = torch.sigmoid(mixer.gate_up(mixer.gate_down(x))).pow(1 / 16).unflatten(-1, (2, -1))
    assert a.std() > 0.01
    y = torch.zeros_like(v)
    for t in range(19):
        for s in range(t + 1):
            product = a[:, s + 1 : t + 1].prod(1)
            y[:, t] += (q[:, t] * product * k[:, s]).sum(-1, keepdim=True) * v[:, s] / 4**0.5
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight
    close(mixer(x)[0], mixer.out_proj((F.silu(g) * y).flatten(2)), torch.float64, slack=10)


def test_sizes_and_state():
    plain, append = build(d_model=128, n_heads=4), build(d_model=128, n_heads=4, polarization=Polarization())
    replace = build(d_model=128, n_heads=4, polarization=Polarization(mode="replace"))
    assert (plain.d_key, append.d_key, replace.d_key) == (16, 18, 16)
    assert [m.state_size() for m in (plain, append, replace)] == [4 * 16 * 32, 4 * 18 * 32, 4 * 16 * 32]
    assert append.gate_up.weight.shape == (4 * 16, 16), "no gate for a pinned decay"
    assert replace.gate_up.weight.shape == (4 * 14, 16)
    assert mixers.build("gla", 13).out_proj.weight.shape == (13, 16)  # a width that heads do not divide


def test_pinned_dimensions_first_and_last():
    mixer, x = build(polarization=Polarization(ones=2, zeros=1)), torch.randn(1, 6, 16, dtype=torch.float64)
    c = mixer.coefficients(x)
    a = c.a[0, :, :, :, 0]
    assert (a[..., :2] == 1).all()
    assert (a[..., -1] == 0).all()
    assert ((a[..., 2:-1] > 0) & (a[..., 2:-1] < 1)).all()
    close(c.states()[..., :2, :], c.u[..., :2, :].cumsum(1), torch.float64, "a one-dimension is a cumulative sum")
    mixer(x)[0].pow(2).sum().backward()
    for weight in (mixer.q_proj.weight, mixer.k_proj.weight):
        assert (weight.grad.unflatten(0, (2, -1)).abs().amax(-1) > 0).all()


def test_authors_initialisation():
    torch.manual_seed(0)
    m = mixers.build("gla", 256, n_residuals=4)
    bound = 2**-2.5 * (6 / (256 + 128)) ** 0.5
    assert 0.99 * bound < m.k_proj.weight.abs().max() <= bound
    bound = 2**-2.5 * (6 / (256 + 256)) ** 0.5 / 2
    assert 0.99 * bound < m.out_proj.weight.abs().max() <= bound
    own = mixers.build("gla", 256)  # by itself, without the model's 1/√n_residuals
    for linear in (
        m.q_proj,
        m.v_proj,
        m.g_proj,
        m.gate_down,
        m.gate_up,
        own.out_proj,
    ):  # uniform: std = gain √(2 / (in + out))
        assert linear.weight.std().item() == pytest.approx(2**-2.5 * (2 / sum(linear.weight.shape)) ** 0.5, rel=0.03)
    assert not m.gate_up.bias.any()
    assert (m.norm_weight == 1).all()
    a = m.coefficients(torch.randn(1, 50, 256)).a
    assert abs(a.mean() - 0.5 ** (1 / 16)) < 0.001
    assert m.config.gate_rank == 16


def test_new_key_dimensions_with_silent_queries_change_nothing():
    plain, more = build(), build(polarization=Polarization())
    rows = torch.arange(2 * more.d_key).unflatten(0, (2, -1))[:, 1:-1].flatten()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name in ("q_proj.weight", "k_proj.weight"):
                if name == "q_proj.weight":
                    more.q_proj.weight.zero_()
                more.get_parameter(name)[rows] = p
            else:
                more.get_parameter(name).copy_(p)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)
