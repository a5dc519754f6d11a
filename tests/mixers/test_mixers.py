"""What every mixer must do, for every mixer and every kind of polarization."""

import copy

import pytest
import torch
from cases import TOLERANCE, close

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
# What a width of 10 needs: enough heads or dimensions of each for "replace" to leave some.
SMALL: dict[str, dict] = {
    "retnet": {"n_heads": 4},
    "gla": {"d_key": 4},
    "mamba2": {"d_head": 5, "d_state": 6},
    "rwkv5": {"d_head": 5},
    "rwkv6": {"d_head": 5},
    "hgrn2": {"d_head": 5},
}
# Other forms of a mixer: they do all that is done here too, with one polarization.
VARIANTS: dict[str, dict] = {
    "h3:real": {"initialization": "real", "d_shift": 3},
    "attention:learned": {"positions": "learned", "max_length": 70, "d_head": 3, "n_heads": 4, "n_kv_heads": 2},
    "attention:window": {"window": 7, "d_head": 3, "n_heads": 2},
    "mingru:plain": {"activation": "none", "bias": False, "expand": 2},
    "s4d:real": {"initialization": "real"},
    "s4d:legs": {"initialization": "legs"},
    "linear_attention:performer": {"feature_map": "performer"},
    "linear_attention:hedgehog": {"feature_map": "hedgehog"},
    "linear_attention:unnormalized": {"normalize": False},
    "retnet:learned": {"decay": "learned"},
    "hgrn2:floor": {"layer": 1, "n_layers": 4},
    "mamba2:grouped": {"d_head": 1, "n_groups": 2},
    "mamba2:bounded": {"dt_lower": 0.01, "dt_upper": 0.05, "gated_norm": False},
    "mamba:plain": {"bcdt_norm": "plain"},
    "mamba:weighted": {"bcdt_norm": "weighted"},
}
NAMES = [*mixers.names(), *VARIANTS]


def family(name):
    return name.partition(":")[0]


def make(name, polarization, d_model=10, dtype=torch.float64):
    torch.manual_seed(0)
    config = SMALL.get(family(name), {}) | VARIANTS.get(name, {})
    mixer = mixers.build(family(name), d_model, polarization=polarization, **config)
    for p in mixer.parameters():  # some authors begin with a zero output projection, which would hide all before it
        if not p.is_meta and not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return mixer.to(dtype)


POLARIZABLE = [n for n in NAMES if mixers.polarizable(family(n))]
DIAGONAL = [n for n in NAMES if make(n, None).diagonal]  # the others have no coefficients to look at


def each(names):
    """A mixer with every kind of polarization, a variant of one without and with a single kind; without, where it cannot be polarized."""
    cases = [(n, k) for n in names for k in (POLARIZATIONS if n not in VARIANTS else ["none", "append"])]
    cases = [(n, k if n in POLARIZABLE else "none") for n, k in cases if n in POLARIZABLE or k in ("none", "append")]
    return pytest.mark.parametrize(
        ("name", "polarization"),
        [pytest.param(n, POLARIZATIONS[k], id=f"{n}-{k}") for n, k in dict.fromkeys(cases)],
    )


every = each(NAMES)


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
    want, last = mixer(x)
    first, state = mixer(x[:, :cut])
    second, _ = mixer(x[:, cut:], state)
    close(torch.cat([first, second], 1), want, torch.float32)
    ys = [first]
    for t in range(cut, x.shape[1]):  # or token by token, as generation does
        y, state = mixer.step(x[:, t], state)
        ys.append(y[:, None])
    close(torch.cat(ys, 1), want, torch.float32)
    for got, ref in zip(state, last, strict=True):
        close(got, ref, torch.float32)


@each(DIAGONAL)
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
    assert g[:, 7:].abs().max() <= TOLERANCE[torch.float64] * g.abs().max()  # an FFT convolution leaves rounding there
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


def gradients(mixer, outputs):
    """Of a fixed loss, to every parameter that the outputs (batch, length, d_model) depend on."""
    weight = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5), dtype=outputs.dtype)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = torch.autograd.grad((outputs * weight).sum(), parameters, allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(names, grads, strict=True) if g is not None}


@pytest.mark.parametrize("name", NAMES)
def test_padded_and_packed_sequences_teach_what_they_teach_alone(name):
    """Gradients, too, are those of the sequences alone, and padding gets none."""
    mixer, x = make(name, Polarization() if name in POLARIZABLE else None), inputs()
    padded = torch.cat([100 * torch.ones(2, 4, 10, dtype=x.dtype), x], 1).requires_grad_()
    mask = (torch.arange(15) >= 4).expand(2, -1)
    reset = (torch.arange(15) == 9).expand(2, -1)
    together = mixer(padded, mask=mask, reset=reset)[0][:, 4:]
    alone = torch.cat([mixer(part)[0] for part in (x[:, :5], x[:, 5:])], 1)
    got, want = gradients(mixer, together), gradients(mixer, alone)
    assert got.keys() == want.keys()
    for parameter, g in want.items():
        close(got[parameter], g, torch.float32, parameter, slack=10)
    (g,) = torch.autograd.grad(together.pow(2).sum(), padded)
    assert not g[:, :4].any()


@each([n for n in NAMES if n not in VARIANTS])
def test_padded_and_packed_sequences_in_pieces(name, polarization):
    """All at once: the first piece nothing but padding for one sequence, the second with a sequence that begins inside it."""
    mixer, x = make(name, polarization), inputs(length=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 6] = True
    _, state = mixer(x[:, :4], mask=mask[:, :4], reset=reset[:, :4])
    y, last = mixer(x[:, 4:], state, mask=mask[:, 4:], reset=reset[:, 4:])
    after, end = mixer(x[:, 6:])
    close(y[:1, :2], mixer(x[:1, 4:6])[0], torch.float32)
    close(y[1:, :2], mixer(x[1:, :6])[0][:, 4:], torch.float32)
    close(y[:, 2:], after, torch.float32)
    for got, ref in zip(last, end, strict=True):
        close(got, ref, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_at_padding_begins_anew(name):
    """As at a token: what follows is a sequence of its own."""
    mixer, x = make(name, None), inputs()
    mask, reset = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    mask[:, :2], reset[:, 0] = False, True
    y, state = mixer(x[:, 4:], mixer(x[:, :4])[1], mask=mask, reset=reset)
    want, last = mixer(x[:, 6:])
    close(y[:, 2:], want, torch.float32)
    for got, ref in zip(state, last, strict=True):
        close(got, ref, torch.float32)


PINNED = [n for n in DIAGONAL if n in POLARIZABLE]  # S4's are looked at in its own file


def assert_exact(c):
    """What is held at one is exactly one, what is held at zero exactly zero; the learned ones lie in [0, 1]."""
    a = c.a
    held = a if c.decay is None else c.decay.expand_as(a)
    assert c.ones.any()
    assert c.zeros.any()
    assert bool((held[..., c.ones] == 1).all())
    assert bool((held[..., c.zeros] == 0).all())
    learned = a[..., ~(c.ones | c.zeros)]
    learned = learned.abs() if learned.is_complex() else learned
    assert bool(((learned >= 0) & (learned <= 1)).all())


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("name", PINNED)
def test_pinned_channels_are_exact_before_and_after_training(name, mode):
    """Whatever the input and the parameters are; and weight decay does not reach them."""
    mixer = make(name, Polarization(ones=1, zeros=1, mode=mode), dtype=torch.float32)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.05, weight_decay=0.1)
    for size in (0.0, 1.0, 3.0, 1000.0):
        x = size * inputs(dtype=torch.float32)
        assert_exact(mixer.coefficients(x))
        optimizer.zero_grad()
        mixer(x.clamp(-10, 10))[0].pow(2).mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in mixer.parameters())
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(3)
    assert_exact(mixer.coefficients(inputs(dtype=torch.float32)))


@pytest.mark.parametrize("kind", ["ones", "zeros"])
@pytest.mark.parametrize("name", PINNED)
def test_pinned_channels_are_alive(name, kind):
    """The loss reaches what writes to them, and what reads them, through themselves alone."""
    mixer, x = make(name, Polarization()), inputs()
    c = mixer.coefficients(x)
    pinned = getattr(c, kind)
    assert (c.u[..., pinned].abs().amax((0, 1)) > 0).all(), "each is written to"
    states = c.states()
    leaf = states.detach().requires_grad_()
    (g,) = torch.autograd.grad(mixer.decode(leaf, x).pow(2).sum(), leaf)
    assert (g[..., pinned].abs().amax((0, 1)) > 0).all(), "each is read"

    parameters = dict(mixer.named_parameters())

    def reached(output, weight=None):
        grads = torch.autograd.grad(output, list(parameters.values()), weight, allow_unused=True)
        return {n: g for n, g in zip(parameters, grads, strict=True) if g is not None and g.any()}

    written_by = reached(states[..., pinned], g[..., pinned])
    assert written_by, "no input weight gets a gradient"
    assert all(torch.isfinite(g).all() for g in written_by.values())
    # the read-out multiplies the state: without the pinned ones in it, its gradient is another
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    silent = states.detach().masked_fill(pinned, 0)
    full, without = (reached((mixer.decode(h, x) * target).sum()) for h in (states.detach(), silent))
    read_by = {n for n, g in full.items() if n not in without or not torch.equal(g, without[n])}
    assert read_by, "no read-out gets a gradient"


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", PINNED)
def test_a_channel_at_one_holds_the_first_token_for_ten_thousand_steps(name, trained):
    mixer = make(name, Polarization(), d_model=4, dtype=torch.float32)
    if trained:
        optimizer = torch.optim.AdamW(mixer.parameters(), lr=0.02)
        for seed in range(3):
            short = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            mixer(short)[0].pow(2).mean().backward()
            optimizer.step()
    x = inputs(1, 10_000, 4, torch.float32)
    c = mixer.coefficients(x)
    held = (c.a if c.decay is None else c.decay.expand_as(c.a))[..., c.ones].prod(1)
    assert torch.equal(held, torch.ones_like(held))
    first = x.clone().requires_grad_()
    c = mixer.coefficients(first)
    (g,) = torch.autograd.grad(c.u[:, 0][..., c.ones].sum().real, first)
    assert g[:, 0].abs().max() > 0
    # measured through the layer: a one-channel carries the first token to the last; without, far less arrives
    (kept,) = torch.autograd.grad(mixer(first)[0][:, -1].sum(), first)
    if trained:
        assert kept[:, 0].abs().max() > 0
        return
    plain = make(name, None, d_model=4, dtype=torch.float32)
    (lost,) = torch.autograd.grad(plain(first)[0][:, -1].sum(), first)
    if bool((plain.coefficients(x).a == 1).all()):  # linear attention: nothing is forgotten without polarization either
        assert kept[:, 0].abs().max() > 0
    else:
        assert kept[:, 0].abs().max() > 10 * lost[:, 0].abs().max()


@pytest.mark.parametrize("name", mixers.names())
def test_configuration_errors_name_the_nearest_key(name):
    field = next(iter(mixers.configure(name, {}).__class__.model_fields))
    with pytest.raises(UserError, match=f"did you mean '{field}'"):
        mixers.build(name, 8, **{field + "x": 3})
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        mixers.build(name + "q", 8)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in DIAGONAL])
def test_without_a_diagonal_transition_coefficients_are_refused(name):
    mixer, x = make(name, None), inputs()
    for look in (lambda: mixer.coefficients(x), lambda: mixer.decode(x, x)):
        with pytest.raises(ValueError, match=r"transition|recurrence"):
            look()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in POLARIZABLE])
def test_without_transitions_polarization_is_refused(name):
    with pytest.raises(UserError, match="polariz"):
        make(name, Polarization())


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_decay_names_exist(name):
    mixer = make(name, Polarization() if name in POLARIZABLE else None)
    assert mixer.no_weight_decay() <= {n for n, _ in mixer.named_parameters()}


@pytest.mark.parametrize("name", PINNED)
def test_weight_decay_does_not_touch_decays(name):
    """What a transition is made of without any input (decays, step sizes, floors) is a vector or named."""
    mixer = make(name, None)
    for n, p in mixer.named_parameters():
        if n in ("conv_bias", "linear_x.bias"):
            torch.nn.init.zeros_(p)  # which is an input of its own
    c = mixer.coefficients(torch.zeros(1, 3, 10, dtype=torch.float64))
    a = c.a if c.decay is None else c.decay
    if not a.requires_grad:  # constant by design
        assert name.partition(":")[0] in ("linear_attention", "retnet")
        return
    grads = torch.autograd.grad(a.abs().sum(), list(mixer.parameters()), allow_unused=True)
    reached = [(n, p) for (n, p), g in zip(mixer.named_parameters(), grads, strict=True) if g is not None and g.any()]
    assert all(p.dim() <= 1 or n in mixer.no_weight_decay() for n, p in reached), [n for n, _ in reached]


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_leaves_nothing_out(name):
    mixer = make(name, Polarization() if name in POLARIZABLE else None)
    with torch.no_grad():
        for p in mixer.state_dict().values():
            p.fill_(torch.nan)
    mixer.reset_parameters()
    for key, p in mixer.state_dict().items():
        assert torch.isfinite(p).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_odd_shapes_and_low_precision(name):
    mixer = make(name, Polarization() if name in POLARIZABLE else None, d_model=5, dtype=torch.float32)
    for batch, length in [(1, 1), (3, 2), (1, 70)]:
        assert mixer(inputs(batch, length, 5, torch.float32))[0].shape == (batch, length, 5)
    x = inputs(2, 40, 5, torch.float32)
    want = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        close(mixer(x)[0], want, torch.bfloat16, slack=3)
    half, x = copy.deepcopy(mixer).bfloat16(), x.bfloat16()
    y, state = half(x)
    assert y.dtype == half.step(x[:, 0], state)[0].dtype == torch.bfloat16
    close(y, copy.deepcopy(half).float()(x.float())[0], torch.bfloat16, slack=3)  # the same rounded parameters


@pytest.mark.parametrize("name", NAMES)
def test_can_be_built_without_memory_and_computes_where_it_is(name):
    """On the meta device, as transformers builds a model before it loads one; a stand-in for a GPU, too."""
    with torch.device("meta"):
        mixer = make(name, Polarization() if name in POLARIZABLE else None)
    assert all(p.is_meta for p in mixer.state_dict().values())
    mixer = mixer.float()
    x, mask = torch.empty(2, 9, 10, device="meta"), torch.ones(2, 9, dtype=torch.bool, device="meta")
    # what a cache keeps behind padding, and where S4 puts packed sequences, depends on values, which are not there
    flags = {"attention": {}, "s4": {"mask": mask}}.get(family(name), {"mask": mask, "reset": mask})
    state = None if mixer.config.model_dump().get("max_length") else mixer(x)[1]
    y, state = mixer(x, state, **flags)  # a tensor left on the CPU would be refused
    assert y.is_meta
    assert all(part.is_meta for part in state)
    if name in DIAGONAL:
        assert mixer.decode(mixer.coefficients(x).states(), x).is_meta


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_says_what_it_is(name):
    mixer = make(name, None)
    for text in (mixer.title, mixer.source, mixer.transition, mixer.unit):
        assert isinstance(text, str)
        assert text.strip() == text != ""
    assert any(c.isdigit() for c in mixer.source), "a source has a year"
    assert isinstance(mixer.slower, str)
    if name in DIAGONAL:
        numbers = torch.Size(mixer.coefficients(inputs()).state_shape).numel()
        assert mixer.state_size() in (numbers, 2 * numbers), "a complex channel has two"
