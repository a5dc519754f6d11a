import pytest
import torch
from cases import close
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers import heads
from ssmlens.mixers.retnet import rotated
from ssmlens.polarization import Polarization


def build(d_model=16, **config):
    torch.manual_seed(0)
    return mixers.build("retnet", d_model, **{"n_heads": 4, **config}).double()


def parallel_form(mixer, x, gamma):
    """Retention as (T x T) weights γ^{t-s} Re(q_t conj(k_s) e^{iθ(t-s)}), with complex numbers for the rotations."""
    T = x.shape[1]
    q, k, v, g = (
        p(x).unflatten(-1, (mixer.n_heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj)
    )
    q, k = (torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) for z in (q, k))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    theta = 10000 ** -torch.linspace(0, 1, mixer.d_key // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), distance[..., None] * theta)
    weights = torch.einsum("bthc,bshc,tsc->bhts", q, k.conj(), turn).real * mixer.d_key**-0.5
    weights = weights * torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp_min(0), 0)
    y = torch.einsum("bhts,bshd->bthd", weights, v)
    y = y / (y.pow(2).mean(-1, keepdim=True) + mixer.config.norm_eps).sqrt()
    return mixer.out_proj((F.silu(g) * y).flatten(2))


def test_agrees_with_its_parallel_form():
    mixer, x = build(), torch.randn(2, 33, 16, dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    close(mixer(x)[0], parallel_form(mixer, x, gamma), torch.float64, slack=10)


def test_polarized_heads_in_the_parallel_form():
    mixer, x = build(polarization=Polarization()), torch.randn(2, 33, 16, dtype=torch.float64)
    gamma = torch.cat([torch.ones(1), 1 - 2.0 ** (-5 - torch.arange(4)), torch.zeros(1)]).double()
    close(mixer(x)[0], parallel_form(mixer, x, gamma), torch.float64, slack=10)


@pytest.mark.parametrize("decay", ["fixed", "learned"])
def test_decays(decay):
    def learned(**config):
        mixer = build(n_heads=8, decay=decay, **config)
        gamma = mixer.log_gamma().exp()
        return gamma[torch.isfinite(gamma.log()) & (gamma < 1)]

    want = 1 - 2.0 ** (-5 - torch.arange(8, dtype=torch.float64))
    exact = torch.float64 if decay == "fixed" else torch.float32  # drawn in float32, then converted
    close(learned(), want, exact)
    close(learned(polarization=Polarization(ones=2, zeros=1)), want, exact)
    replace = learned(polarization=Polarization(ones=2, zeros=1, mode="replace"))
    close(replace, want[1:6], exact, "the slowest made room for the ones, the fastest for the zero")
    parameters = dict(build(decay=decay, polarization=Polarization()).named_parameters())
    assert ("decay" in parameters) == (decay == "learned")
    if decay == "learned":
        assert parameters["decay"].shape == (4,), "nothing is learned for a pinned decay"


def test_decay_is_not_rounded_in_a_half_precision_model():
    mixer = mixers.build("retnet", 16, n_heads=8).bfloat16()
    close(mixer.log_gamma().exp(), 1 - 2.0 ** (-5 - torch.arange(8)), torch.float32)
    assert mixer(torch.randn(1, 5, 16, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_only_relative_positions_matter_even_far_out():
    mixer, x = build().float(), torch.randn(1, 20, 16)
    near, state = mixer(x)
    shifted = type(state)(torch.tensor([1_000_000]), torch.zeros_like(state.h))
    close(mixer(x, shifted)[0], near, torch.float32)
    assert mixer(x, shifted)[1].position.item() == 1_000_020


def test_rotation_keeps_lengths():
    x, at = torch.randn(1, 9, 2, 6, dtype=torch.float64), torch.arange(9)[None]
    turned = rotated(x, heads.rotation(at, 3, 10000, 1))
    close(turned.norm(dim=-1), x.norm(dim=-1), torch.float64)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_authors_initialisation():
    torch.manual_seed(0)
    m = mixers.build("retnet", 512, n_residuals=4)
    assert (m.n_heads, m.d_key, m.d_value) == (8, 64, 128)
    bound = 2**-2.5 * (6 / (512 + 512)) ** 0.5
    assert 0.99 * bound < m.q_proj.weight.abs().max() <= bound
    own = mixers.build("retnet", 512)  # by itself, without the model's 1/√n_residuals
    for linear, gain in (
        (m.q_proj, 2**-2.5),
        (m.k_proj, 2**-2.5),
        (m.v_proj, 2**-2.5),
        (m.g_proj, 2**-2.5),
        (own.out_proj, 0.5),
    ):
        assert linear.weight.std().item() == pytest.approx(gain * (2 / sum(linear.weight.shape)) ** 0.5, rel=0.01)
    bound = 2**-1 * (6 / (512 + 1024)) ** 0.5 / 2
    assert 0.99 * bound < m.out_proj.weight.abs().max() <= bound


def test_a_new_head_with_a_silent_output_changes_nothing():
    """Each head is normalised alone, so heads can be added to a trained layer."""
    plain, more = build(), build(polarization=Polarization(ones=1, zeros=1))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
            theirs = getattr(plain, name).weight
            width = theirs.shape[0] // 4
            getattr(more, name).weight[width:-width] = theirs
        more.out_proj.weight.zero_()
        more.out_proj.weight[:, plain.d_value : -plain.d_value] = plain.out_proj.weight
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    close(more(x)[0], plain(x)[0], torch.float64)


def test_state_size_and_odd_key_dimensions():
    assert build().state_size() == 4 * 4 * 8
    assert build(polarization=Polarization()).state_size() == 6 * 4 * 8
    with pytest.raises(UserError, match="must be even"):
        build(d_key=5)
