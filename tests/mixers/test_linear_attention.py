import math

import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers.linear_attention import one_plus_elu, orthogonal_features, random_features
from ssmlens.polarization import Polarization


def build(d_model=12, **config):
    torch.manual_seed(0)
    return mixers.build("linear_attention", d_model, **config).double()


def attention(mixer, x, phi):
    """The quadratic form, (T x T) weights for every head, from the layer's weights and feature maps for q and k."""
    q, k, v = (p(x).unflatten(-1, (mixer.n_heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    weights = torch.einsum("bthf,bshf->bhts", phi(q, 0), phi(k, 1)).tril()
    if mixer.config.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + mixer.config.eps)
    return mixer.out_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))


@pytest.mark.parametrize("normalize", [True, False])
def test_agrees_with_its_quadratic_form(normalize):
    mixer, x = build(normalize=normalize), torch.randn(2, 23, 12, dtype=torch.float64)
    close(mixer(x)[0], attention(mixer, x, lambda z, _: F.elu(z) + 1), torch.float64)


def test_hedgehog_is_two_softmaxes_of_a_learned_map():
    mixer, x = build(feature_map="hedgehog"), torch.randn(2, 23, 12, dtype=torch.float64)
    assert torch.equal(mixer.q_map, torch.eye(3).double().expand(4, 3, 3)), "the identity at the beginning"
    maps = mixer.q_map, mixer.k_map
    for M in maps:
        torch.nn.init.normal_(M)

    def phi(z, which):
        z = torch.einsum("bthd,hmd->bthm", z, maps[which])
        return torch.cat([F.softmax(z, -1), F.softmax(-z, -1)], -1)

    assert mixer.d_feature == 6
    close(mixer(x)[0], attention(mixer, x, phi), torch.float64)


def test_performer_estimates_the_softmax_kernel():
    """E φ(q)ᵀφ(k) = exp(qᵀk/√d), and orthogonal rows of Gaussian norms keep it unbiased."""
    d = 8
    q, k = 0.5 * torch.randn(
        2, 20, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )  # else heavy tails
    want = (q * k).sum(-1).div(math.sqrt(d)).exp()
    estimates = []
    for seed in range(60):
        w = orthogonal_features(64, d, seed).double()
        estimates.append((random_features(q, w) * random_features(k, w)).sum(-1))
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - want) / estimates.std(0) * math.sqrt(len(estimates))
    assert error.abs().max() < 4, "more than four standard errors off"
    assert error.pow(2).mean().sqrt() < 2


def test_random_features_are_orthogonal_seeded_and_kept():
    w = orthogonal_features(11, 4, seed=3)
    directions = F.normalize(w, dim=-1)
    for block in (directions[:4], directions[4:8], directions[8:]):
        close(block @ block.T, torch.eye(len(block)), torch.float32)
    assert torch.equal(w, orthogonal_features(11, 4, seed=3))
    assert not torch.equal(w, orthogonal_features(11, 4, seed=4))
    mixer = build(feature_map="performer", n_features=9, seed=3)
    assert torch.equal(mixer.projection, orthogonal_features(9, 3, seed=3).double())
    assert "projection" in mixer.state_dict(), "a checkpoint holds the features it was trained with"
    assert "projection" not in dict(mixer.named_parameters())
    assert build(d_model=256, feature_map="performer").units == int(64 * math.log(64))


def test_features_stay_positive_and_finite_at_extreme_inputs():
    x = torch.tensor([-90.0, -30.0, -1e-3, 0.0, 1e-3, 80.0])
    assert (one_plus_elu(x) > 0).all()
    close(one_plus_elu(x.double()), F.elu(x.double()) + 1, torch.float64)
    phi = random_features(100 * torch.randn(50, 16), orthogonal_features(40, 16, 0))
    assert torch.isfinite(phi).all()
    assert (phi > 0).all()
    y, _ = mixers.build("linear_attention", 32, feature_map="performer")(100 * torch.randn(1, 9, 32))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("feature_map", ["elu", "performer", "hedgehog"])
def test_polarization_of_features(feature_map):
    size = {"n_heads": 2, "d_head": 6, "feature_map": feature_map}
    plain, append = build(**size), build(**size, polarization=Polarization(ones=2, zeros=1))
    replace = build(**size, polarization=Polarization(ones=2, zeros=1, mode="replace"))
    assert append.d_feature == plain.d_feature + 3
    assert replace.d_feature == plain.d_feature
    assert plain.state_size() == 2 * plain.d_feature * 7
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    c = append.coefficients(x)
    assert c.ones[0, :, 0].tolist() == [True] * 2 + [False] * (append.d_feature - 2)
    assert c.zeros[0, :, 0].tolist() == [False] * (append.d_feature - 1) + [True]
    # a zero dimension holds its feature of the current token, and nothing else
    close(c.states()[..., c.zeros], c.u[..., c.zeros], torch.float64)
    # rows of its own, mapped by 1 + ELU
    rows = append.k_proj.weight.unflatten(0, (2, -1)) @ x[0, 3] + append.k_proj.bias.unflatten(0, (2, -1))
    close(append._project(x, None).k[0, 3, :, -1], F.elu(rows[:, -1]) + 1, torch.float64)
    if feature_map == "elu":
        assert replace.k_proj.weight.shape == plain.k_proj.weight.shape


def test_normaliser_is_the_last_column_of_the_state():
    mixer, x = build(), torch.randn(1, 7, 12, dtype=torch.float64)
    k = mixer.k_proj(x).unflatten(-1, (4, -1))
    close(mixer(x)[1].h[..., -1], (F.elu(k) + 1).sum(1), torch.float64)
    assert mixer(x)[1].h.shape[-1] == 4
    assert build(normalize=False)(x)[1].h.shape[-1] == 3


def test_options_that_do_not_belong_are_refused():
    with pytest.raises(UserError, match="belongs to the feature map 'performer'"):
        build(n_features=4)
