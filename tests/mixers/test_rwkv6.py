import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization


def build(d_model=12, **config):
    torch.manual_seed(0)
    mixer = mixers.build("rwkv6", d_model, **{"d_head": 6, "mix_rank": 3, "decay_rank": 4, **config}).double()
    for name in ("out_proj.weight", "norm_bias", "mix_down", "mix_up", "decay_down", "decay_up"):
        torch.nn.init.normal_(mixer.get_parameter(name), std=0.5)
    return mixer


def test_agrees_with_a_token_loop():
    """Finch's equations (the paper's Section 4.2), one token and one head at a time."""
    mixer, x = build(layer=1, n_layers=3), torch.randn(9, 12, dtype=torch.float64)
    want = []
    S = torch.zeros(2, 6, 6, dtype=torch.float64)
    before = torch.zeros(12, dtype=torch.float64)
    for token in x:
        toward = before - token
        code = torch.tanh((token + toward * mixer.mix["x"]) @ mixer.mix_down).view(5, 3)

        def ddlerp(j, token=token, toward=toward, code=code):
            return token + toward * (mixer.mix["wkvrg"[j]] + code[j] @ mixer.mix_up[j])

        k, v, r, g = (
            p.weight @ ddlerp(j)
            for j, p in ((1, mixer.k_proj), (2, mixer.v_proj), (3, mixer.r_proj), (4, mixer.g_proj))
        )
        w = mixer.decay.flatten() + torch.tanh(ddlerp(0) @ mixer.decay_down) @ mixer.decay_up
        a = torch.exp(-torch.exp(w))
        y = []
        for h in range(2):
            at = slice(6 * h, 6 * h + 6)
            kv = torch.outer(k[at], v[at])
            y.append(r[at] @ (S[h] + torch.diag(mixer.bonus[h]) @ kv))
            S[h] = torch.diag(a[at]) @ S[h].clone() + kv
        y = F.group_norm(torch.cat(y)[None], 2, mixer.norm_weight.flatten(), mixer.norm_bias.flatten(), eps=64e-5)[0]
        want.append(mixer.out_proj.weight @ (y * F.silu(g)))
        before = token
    got, state = mixer(x[None])
    close(got[0], torch.stack(want), torch.float64, slack=10)
    close(state.h[0], S, torch.float64)
    assert torch.equal(state.shift[0], x[-1])


def test_authors_initialisation():
    torch.manual_seed(0)
    first, last = (mixers.build("rwkv6", 128, layer=i, n_layers=4) for i in (0, 3))
    assert first.mix_down.shape == (128, 5 * 32)
    assert first.decay_down.shape == (128, 64)
    assert not first.mix_down.any()
    assert not first.decay_down.any()
    assert 0.0099 < first.decay_up.abs().max() <= 0.01
    close(first.mix["x"], 1 - torch.arange(128) / 128, torch.float32)
    close(last.mix["v"], 1 - (torch.arange(128) / 128) ** 0.25 - 0.3, torch.float32)
    # decays begin as RWKV-5's constants
    x = torch.randn(2, 3, 128)
    five = mixers.build("rwkv5", 128, layer=3, n_layers=4)
    close(last._project(x).log_a[1, 2], five.log_a(), torch.float32)
    assert not last.out_proj.weight.any()


def test_append_and_replace():
    plain, append = build(), build(polarization=Polarization(ones=2, zeros=1))
    replace = build(polarization=Polarization(ones=2, zeros=1, mode="replace"))
    assert (plain.d_key, append.d_key, replace.d_key) == (6, 9, 6)
    assert [m.state_size() for m in (plain, append, replace)] == [2 * 6 * 6, 2 * 9 * 6, 2 * 6 * 6]
    assert torch.equal(replace.decay, plain.decay[:, 2:5])
    assert append.decay_up.shape == (4, 2 * 6), "no decay for a pinned dimension"
    assert replace.decay_up.shape == (4, 2 * 3)
    a = append.coefficients(torch.randn(2, 5, 12, dtype=torch.float64)).a
    assert (a[:, :, :, :2] == 1).all()
    assert (a[:, :, :, -1] == 0).all()
    assert a[:, :, :, 2:-1].std(1).min() > 1e-4, "the others depend on the token"


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


def test_decay_survives_extreme_inputs():
    mixer = mixers.build("rwkv6", 12, d_head=6)
    with torch.no_grad():
        mixer.decay_down.normal_(std=100)
        mixer.decay_up.normal_(std=100)
    y, state = mixer(100 * torch.randn(1, 30, 12))
    assert torch.isfinite(y).all()
    assert torch.isfinite(state.h).all()
    with torch.no_grad():
        mixer.out_proj.weight.normal_()
    mixer(100 * torch.randn(1, 30, 12))[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
