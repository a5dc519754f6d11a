import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization


def build(d_model=12, **config):
    torch.manual_seed(0)
    mixer = mixers.build("rwkv5", d_model, **{"d_head": 6, **config}).double()
    for p in (mixer.out_proj.weight, mixer.norm_bias):
        torch.nn.init.normal_(p)
    return mixer


def test_agrees_with_a_token_loop():
    """Eagle's equations (the paper's Section 4.1), one token and one head at a time."""
    mixer, x = build(layer=1, n_layers=3), torch.randn(9, 12, dtype=torch.float64)
    want = []
    S = torch.zeros(2, 6, 6, dtype=torch.float64)
    decay = torch.exp(-torch.exp(mixer.decay))
    before = torch.zeros(12, dtype=torch.float64)
    for token in x:
        r, k, v, g = (
            p.weight @ (token * mixer.mix[n] + before * (1 - mixer.mix[n]))
            for n, p in (("r", mixer.r_proj), ("k", mixer.k_proj), ("v", mixer.v_proj), ("g", mixer.g_proj))
        )
        y = []
        for h in range(2):
            at = slice(6 * h, 6 * h + 6)
            kv = torch.outer(k[at], v[at])
            y.append(r[at] @ (S[h] + torch.diag(mixer.bonus[h]) @ kv))
            S[h] = torch.diag(decay[h]) @ S[h].clone() + kv
        y = F.group_norm(torch.cat(y)[None] / 8, 2, mixer.norm_weight.flatten(), mixer.norm_bias.flatten(), eps=1e-5)[0]
        want.append(mixer.out_proj.weight @ (y * F.silu(g)))
        before = token
    got, state = mixer(x[None])
    close(got[0], torch.stack(want), torch.float64, slack=10)
    close(state.h[0], S, torch.float64)
    assert torch.equal(state.shift[0], x[-1])


def test_authors_initialisation():
    torch.manual_seed(0)
    first, last = (mixers.build("rwkv5", 128, layer=i, n_layers=4) for i in (0, 3))
    assert (first.n_heads, first.d_head) == (2, 64)
    assert first.decay.flatten()[0] == -6
    assert first.decay.flatten()[-1] == -1
    assert (first.decay.flatten().diff() > 0).all()
    halfway = first.decay.flatten()[64], last.decay.flatten()[64]
    assert halfway[0] > halfway[1], "deeper layers decay more slowly in the middle"
    close(first.mix["k"], torch.arange(128) / 128, torch.float32)
    close(last.mix["v"], (torch.arange(128) / 128) ** 0.25 + 0.3, torch.float32)
    close(first.bonus.flatten()[:4], torch.tensor([0, 0.1, -0.1, 0]), torch.float32)
    assert last.bonus.flatten()[0] == 1
    assert not first.out_proj.weight.any()
    assert abs(last.norm_weight.mean() - 1) < 1e-6
    assert abs(first.norm_weight.mean() - 0.25**0.7) < 1e-6
    close(first.k_proj.weight @ first.k_proj.weight.T, 0.01 * torch.eye(128), torch.float32)
    close(first.r_proj.weight @ first.r_proj.weight.T, torch.eye(128), torch.float32)
    with pytest.raises(UserError, match="counted from 0"):
        mixers.build("rwkv5", 8, layer=2, n_layers=2)


def test_append_and_replace():
    plain, append = build(), build(polarization=Polarization(ones=2, zeros=1))
    replace = build(polarization=Polarization(ones=2, zeros=1, mode="replace"))
    assert (plain.d_key, append.d_key, replace.d_key) == (6, 9, 6)
    assert [m.state_size() for m in (plain, append, replace)] == [2 * 6 * 6, 2 * 9 * 6, 2 * 6 * 6]
    assert torch.equal(append.decay, plain.decay)
    assert torch.equal(replace.decay, plain.decay[:, 2:5]), (
        "the slowest of each head for the ones, the fastest for zeros"
    )
    assert replace.k_proj.weight.shape == plain.k_proj.weight.shape
    assert (append.log_a()[:, :2] == 0).all()
    assert torch.isneginf(append.log_a()[:, -1]).all()


def test_a_zero_dimension_shows_the_previous_token():
    """It reads before it writes: with the bonus off, the output through it depends on the previous token's key and value alone."""
    mixer = build(polarization=Polarization(ones=0, zeros=1))
    with torch.no_grad():
        mixer.bonus.zero_()
        mixer.r_proj.weight.unflatten(0, (2, -1))[:, :-1] = 0  # only the zero dimension is read
        for mix in mixer.mix.values():
            mix.fill_(1)  # no token shift, which would show the previous token too
    x = torch.randn(1, 8, 12, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(mixer(x)[0][0, 5].pow(2).sum(), x)
    seen = g[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 4 + [True] * 2 + [False] * 2  # token 5 by its receptance and gate


def test_new_key_dimensions_with_silent_receptance_change_nothing():
    plain, more = build(), build(polarization=Polarization())
    rows = torch.arange(2 * more.d_key).unflatten(0, (2, -1))[:, 1:-1].flatten()
    with torch.no_grad():
        more.r_proj.weight.zero_()
        for name, p in plain.named_parameters():
            if name in ("r_proj.weight", "k_proj.weight"):
                more.get_parameter(name)[rows] = p
            elif name == "bonus":
                more.bonus[:, 1:-1] = p
            else:
                more.get_parameter(name).copy_(p)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)
