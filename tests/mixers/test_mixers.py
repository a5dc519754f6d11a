"""What every mixer must do, for every mixer and every kind of polarization."""

import pytest
import torch
from cases import close

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.polarization import Polarization

POLARIZATIONS = {
    "none": None,
    "append": Polarization(),
    "replace": Polarization(mode="replace"),
    "ones": Polarization(ones=2, zeros=0),
    "zeros": Polarization(ones=0, zeros=1),
    "released": Polarization(zero=-100.0),
}
every = pytest.mark.parametrize(
    ("name", "polarization"),
    [pytest.param(n, p, id=f"{n}-{k}") for n in mixers.names() for k, p in POLARIZATIONS.items()],
)


def make(name, polarization, d_model=10, dtype=torch.float64):
    torch.manual_seed(0)
    return mixers.build(name, d_model, polarization=polarization).to(dtype)


def inputs(batch=2, length=11, d_model=10, dtype=torch.float64):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)


@every
def test_step_equals_forward(name, polarization):
    mixer, x = make(name, polarization), inputs()
    want, last = mixer(x)
    ys, state = [], None
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        ys.append(y)
    close(torch.stack(ys, 1), want, torch.float32)
    for got, ref in zip(state, last, strict=True):
        close(got, ref, torch.float32)


@every
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_prefill_in_pieces_equals_one_pass(name, polarization, cut):
    mixer, x = make(name, polarization), inputs()
    first, state = mixer(x[:, :cut])
    second, _ = mixer(x[:, cut:], state)
    close(torch.cat([first, second], 1), mixer(x)[0], torch.float32)


@every
def test_decoding_the_recurrence_gives_the_output(name, polarization):
    """The view as h_t = a_t h_{t-1} + u_t is exact, not an approximation."""
    mixer, x = make(name, polarization), inputs()
    c = mixer.coefficients(x)
    assert c.a.shape == c.u.shape == (c.batch, c.length, *c.state_shape)
    close(mixer.decode(c.states(), x), mixer(x)[0], torch.float64)
    close(c.a_at(slice(3, 6)), c.a[:, 3:6], torch.float64)
    close(c.u_at(slice(3, 6)), c.u[:, 3:6], torch.float64)
    if c.b is not None and c.dt is not None:
        dt = c.dt.reshape(*c.dt.shape, *(1 for _ in range(c.u.dim() - c.dt.dim())))
        close(dt * c.b, c.u, torch.float64)


@every
def test_causal(name, polarization):
    mixer, x = make(name, polarization), inputs().requires_grad_()
    y, _ = mixer(x)
    (g,) = torch.autograd.grad(y[:, 6].pow(2).sum(), x)
    assert not g[:, 7:].any()
    assert (g[:, :7].abs().sum(-1) > 0).all()


@every
def test_left_padding_leaves_no_trace(name, polarization):
    mixer, x = make(name, polarization), inputs()
    padded = torch.cat([100 * torch.ones(2, 4, 10, dtype=x.dtype), x], 1)
    mask = torch.arange(15) >= 4
    y, state = mixer(padded, mask=mask.expand(2, -1))
    want, last = mixer(x)
    close(y[:, 4:], want, torch.float32)
    for got, ref in zip(state, last, strict=True):
        close(got, ref, torch.float32)


@every
def test_packed_sequences_do_not_see_each_other(name, polarization):
    mixer, x = make(name, polarization), inputs()
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[:, [4, 5]] = True
    y, _ = mixer(x, reset=reset)
    want = [mixer(part)[0] for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    close(y, torch.cat(want, 1), torch.float32)


@pytest.mark.parametrize("name", mixers.names())
def test_pinned_channels_are_exact_and_alive(name):
    """Exactly one and exactly zero, whatever the input and parameters; and input weights and read-outs get gradients."""
    mixer = make(name, Polarization(), dtype=torch.float32)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.05)
    for _ in range(3):
        x = 3 * inputs(dtype=torch.float32)
        c = mixer.coefficients(x)
        a = c.a
        assert c.ones.any()
        assert c.zeros.any()
        assert bool((a[..., c.ones] == 1).all())
        assert bool((a[..., c.zeros] == 0).all())
        learned = a[..., ~(c.ones | c.zeros)]
        assert bool(((learned >= 0) & (learned <= 1)).all())
        optimizer.zero_grad()
        mixer(x)[0].pow(2).mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in mixer.parameters())
    # each pinned state channel is written to, and read: changing it changes the output
    states = c.states().detach().requires_grad_()
    (g,) = torch.autograd.grad(mixer.decode(states, x).pow(2).sum(), states)
    for pinned in (c.ones, c.zeros):
        assert (c.u[..., pinned].abs().amax((0, 1)) > 0).all()
        assert (g[..., pinned].abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("name", mixers.names())
def test_a_channel_at_one_holds_the_first_token_for_ten_thousand_steps(name):
    mixer = make(name, Polarization(), d_model=4, dtype=torch.float32)
    x = inputs(1, 10_000, 4, torch.float32)
    c = mixer.coefficients(x)
    held = c.a[..., c.ones].prod(1)
    assert torch.equal(held, torch.ones_like(held))
    first = x.clone().requires_grad_()
    c = mixer.coefficients(first)
    (g,) = torch.autograd.grad(c.u[:, 0][..., c.ones].sum(), first)
    assert g[:, 0].abs().max() > 0
    # measured through the layer: a one-channel carries the first token to the last; without, far less arrives
    (kept,) = torch.autograd.grad(mixer(first)[0][:, -1].sum(), first)
    plain = make(name, None, d_model=4, dtype=torch.float32)
    (lost,) = torch.autograd.grad(plain(first)[0][:, -1].sum(), first)
    assert kept[:, 0].abs().max() > 10 * lost[:, 0].abs().max()


@pytest.mark.parametrize("name", mixers.names())
def test_configuration_errors_name_the_nearest_key(name):
    field = next(iter(mixers.configure(name, {}).__class__.model_fields))
    with pytest.raises(UserError, match=f"did you mean '{field}'"):
        mixers.build(name, 8, **{field + "x": 3})
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        mixers.build(name + "q", 8)


@pytest.mark.parametrize("name", mixers.names())
def test_no_weight_decay_names_exist(name):
    mixer = make(name, Polarization())
    assert mixer.no_weight_decay() <= {n for n, _ in mixer.named_parameters()}


@pytest.mark.parametrize("name", mixers.names())
def test_odd_shapes_and_low_precision(name):
    mixer = make(name, Polarization(), d_model=5, dtype=torch.float32)
    for batch, length in [(1, 1), (3, 2), (1, 70)]:
        assert mixer(inputs(batch, length, 5, torch.float32))[0].shape == (batch, length, 5)
    x = inputs(2, 40, 5, torch.float32)
    want = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        close(mixer(x)[0], want, torch.bfloat16, slack=3)
