import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization


def build(d_model=12, **config):
    torch.manual_seed(0)
    mixer = mixers.build("hgrn2", d_model, **{"d_head": 6, **config}).double()
    for name, p in mixer.named_parameters():
        if name.endswith("proj.weight"):
            torch.nn.init.normal_(p, std=0.3)
    return mixer


@pytest.mark.parametrize("layer", [0, 2])
def test_agrees_with_a_token_loop(layer):
    mixer, x = build(layer=layer, n_layers=4), torch.randn(9, 12, dtype=torch.float64)
    beta = torch.full((12,), layer / 4, dtype=torch.float64)
    S, want = torch.zeros(2, 6, 6, dtype=torch.float64), []
    for token in x:
        q, f, v = F.silu(mixer.q_proj(token)), torch.sigmoid(mixer.f_proj(token)), mixer.v_proj(token)
        f = beta + (1 - beta) * f
        y = []
        for h in range(2):
            at = slice(6 * h, 6 * h + 6)
            S[h] = torch.diag(f[at]) @ S[h].clone() + torch.outer(1 - f[at], v[at])
            y.append(q[at] @ S[h])
        y = torch.cat(y)
        want.append(mixer.out_proj(y / (y.pow(2).mean() + 1e-5).sqrt()))
    close(mixer(x[None])[0][0], torch.stack(want), torch.float64 if layer == 0 else torch.float32)


def test_lower_bounds_can_be_set_exactly_from_the_authors():
    """Theirs: a softmax over layers, summed from the second layer on; the first has none."""
    gamma = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = gamma.softmax(0).cumsum(0) - gamma.softmax(0)[0]
    for layer in range(4):
        mixer = build(layer=layer, n_layers=4)
        if layer == 0:
            assert mixer.floor is None
            with pytest.raises(ValueError, match="no lower bound"):
                mixer.set_lower_bound(theirs[0].view(2, 6))
            continue
        mixer.set_lower_bound(theirs[layer].view(2, 6))
        close(torch.sigmoid(mixer.floor), theirs[layer].view(2, 6), torch.float64)
        a = mixer.coefficients(100 * torch.randn(1, 200, 12, dtype=torch.float64)).a[0, ..., 0]
        close(a.amin(0), theirs[layer].view(2, 6), torch.float32, "the least that is remembered")
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            mixer.set_lower_bound(theirs[layer].view(2, 6) + 1)


def test_lower_bounds_of_zero_and_one_are_exact_and_trainable():
    mixer = build(layer=1, n_layers=2)
    beta = torch.full((2, 6), 0.25, dtype=torch.float64)
    beta[:, 0], beta[:, 1] = 0, 1
    mixer.set_lower_bound(beta)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    c = mixer.coefficients(x)
    assert (c.a[:, :, :, 1] == 1).all()
    assert not c.u[:, :, :, 1].any()
    plain = build()
    close(c.a[:, :, :, 0], plain.coefficients(x).a[:, :, :, 0], torch.float64)
    mixer(x)[0].pow(2).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
    assert (mixer.floor.grad[:, 2:] != 0).all()


def test_authors_initialisation():
    torch.manual_seed(0)
    m = mixers.build("hgrn2", 512, layer=3, n_layers=4, n_residuals=4)
    assert (m.n_heads, m.d_key, m.d_value) == (4, 128, 128)
    assert 0.0198 < m.q_proj.weight.std() < 0.0202
    assert 0.0098 < m.out_proj.weight.std() < 0.0102
    close(torch.sigmoid(m.floor), torch.full((4, 128), 0.75), torch.float32)
    assert mixers.build("hgrn2", 512, layer=3, n_layers=4, lower_bound=False).floor is None


def test_append_and_replace():
    place = {"layer": 1, "n_layers": 4}
    plain, append = build(**place), build(**place, polarization=Polarization(ones=2, zeros=1))
    replace = build(**place, polarization=Polarization(ones=2, zeros=1, mode="replace"))
    assert (plain.d_key, append.d_key, replace.d_key) == (6, 9, 6)
    assert [m.state_size() for m in (plain, append, replace)] == [2 * 6 * 6, 2 * 9 * 6, 2 * 6 * 6]
    assert append.floor.shape == (2, 6), "no floor for a pinned dimension"
    assert replace.f_proj.weight.shape == plain.f_proj.weight.shape


def test_a_pinned_dimension_keeps_an_input_weight_of_its_own():
    """1 - f would be 0 where f = 1; there it is σ(-W x), and W gets a gradient."""
    mixer, x = build(polarization=Polarization(ones=1, zeros=1)), torch.randn(1, 9, 12, dtype=torch.float64)
    k = mixer._project(x, None).k
    want = torch.sigmoid(-mixer.f_proj(x)).unflatten(-1, (2, -1))
    close(k, want, torch.float64)
    mixer(x)[0].pow(2).sum().backward()
    gradients = mixer.f_proj.weight.grad.unflatten(0, (2, -1)).abs().amax(-1)
    assert (gradients[:, [0, -1]] > 0).all()


def test_new_key_dimensions_with_silent_queries_change_nothing():
    plain, more = build(layer=1, n_layers=2), build(layer=1, n_layers=2, polarization=Polarization())
    rows = torch.arange(2 * more.d_key).unflatten(0, (2, -1))[:, 1:-1].flatten()
    with torch.no_grad():
        more.q_proj.weight.zero_()
        for name, p in plain.named_parameters():
            if name in ("q_proj.weight", "f_proj.weight"):
                more.get_parameter(name)[rows] = p
            else:
                more.get_parameter(name).copy_(p)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)
