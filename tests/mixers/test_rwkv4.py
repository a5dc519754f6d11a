import math

import torch
from cases import close

from ssmlens import mixers
from ssmlens.polarization import Polarization


def build(d_model=8, polarization=None, dtype=torch.float64, start=False, **config):
    """Unless `start`, with weights in the place of the authors' zeros."""
    torch.manual_seed(0)
    m = mixers.build("rwkv4", d_model, polarization=polarization, **config)
    if not start:
        for linear in (m.key, m.receptance, m.output):
            torch.nn.init.normal_(linear.weight, std=d_model**-0.5)
    return m.to(dtype)


def tokens(batch=2, length=20, d_model=8, dtype=torch.float64):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_agrees_with_transformers_attention_block():
    import transformers
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    torch.manual_seed(0)
    config = transformers.RwkvConfig(hidden_size=24, attention_hidden_size=32, num_hidden_layers=2)
    theirs = RwkvSelfAttention(config, layer_id=1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ours = mixers.build("rwkv4", 24, width=32)
    ours.load_state_dict({n: p.flatten() if p.dim() == 3 else p for n, p in theirs.state_dict().items()})
    x = torch.randn(2, 60, 24)
    want, _ = theirs(x)
    got, state = ours(x)
    close(got, want, torch.float32, slack=0.5)  # 1e-5
    empty = torch.zeros(2, 24, 2)  # theirs: (batch, width, layers), for the four parts of the state
    wide = torch.zeros(2, 32, 2)
    theirs_state = [empty.clone(), empty.clone(), wide.clone(), wide.clone(), wide.clone() - 1e38]
    theirs(x[:, :40], state=theirs_state, use_cache=True)
    assert torch.equal(theirs_state[1][:, :, 1], x[:, 39])
    _, half = ours(x[:, :40])
    for mine, other in zip(half[1:], theirs_state[2:], strict=True):
        close(mine, other[:, :, 1], torch.float32, slack=0.5)
    close(ours(x[:, 40:], half)[0], want[:, 40:], torch.float32, slack=0.5)
    assert state.shift.shape == (2, 24)


def test_written_out_weighted_mean():
    """y_t = σ(r) · mean of values with weights e^{k_i - (t-1-i) w} and, for the current token, e^{u + k_t}; h_t without bonus."""
    m, x = build(polarization=Polarization()), tokens()
    r, k, v, _ = m._project(x, None, None)
    w = -m.log_decay()
    h = m.coefficients(x).states()

    def weights(seen):
        """Of tokens 0 .. seen - 1; ∞ · 0 is 0 here: the last of them counts in full also where w = ∞."""
        age = torch.arange(seen - 1, -1, -1).double()[:, None]
        return torch.exp(k[:, :seen] - torch.where(age == 0, 0.0, age * w))

    ys = []
    for t in range(20):
        weight = torch.cat([weights(t), torch.exp(m.time_first + k[:, t : t + 1])], 1)
        ys.append((weight * v[:, : t + 1]).sum(1) / weight.sum(1))
        weight = weights(t + 1)
        close(h[:, t], (weight * v[:, : t + 1]).sum(1) / weight.sum(1), torch.float64)
    close(m(x)[0], m.output(torch.sigmoid(r) * torch.stack(ys, 1)), torch.float64)


def test_the_mean_is_normalised():
    m, x = build(polarization=Polarization()), tokens()
    c = m.coefficients(x)
    close(c.a + c.dt, torch.ones_like(c.a), torch.float64)
    assert not c.a[:, 0].any()
    one, zero = c.ones.nonzero().item(), c.zeros.nonzero().item()
    assert (c.decay[one], c.decay[zero]) == (1, 0)
    assert not c.a[..., zero].any()
    assert (c.a[:, 1:, one] > 0).all()
    assert (c.a[..., one] < 1).all()
    close(c.states()[..., zero], c.b[..., zero], torch.float64)
    weight = torch.exp(m._project(x, None, None)[1][..., one])
    close(c.states()[..., one], (weight * c.b[..., one]).cumsum(1) / weight.cumsum(1), torch.float64)


def test_authors_initialisation():
    layers = [build(96, start=True, layer=i, n_layers=3) for i in range(3)]
    for i, m in enumerate(layers):
        assert not any(linear.weight.any() for linear in (m.key, m.receptance, m.output))
        assert not m(tokens(d_model=96))[0].any()
        close(m.value.weight @ m.value.weight.T, torch.eye(96), torch.float32)
        assert (m.time_decay[0], m.time_decay[-1]) == (-5, 3)
        h = torch.arange(96) / 95
        close(m.time_decay, -5 + 8 * h ** (0.7 + 1.3 * i / 2), torch.float32)
        close(m.time_first.detach() - math.log(0.3), 0.5 * torch.tensor([0.0, 1.0, -1.0]).repeat(32), torch.float32)
        part = torch.arange(96) / 96
        close(m.time_mix_key, part ** (1 - i / 3), torch.float32)
        close(m.time_mix_value, part ** (1 - i / 3) + 0.3 * i / 2, torch.float32)
        close(m.time_mix_receptance, part ** (0.5 * (1 - i / 3)), torch.float32)
    wide = build(8, width=32, start=True).value.weight  # more rows than columns: gain √(rows / columns)
    close(wide.T @ wide, 4 * torch.eye(8), torch.float32)


def test_append_and_replace():
    plain, append, replace = build(16), build(16, Polarization()), build(16, Polarization(mode="replace"))
    assert [m.state_size() for m in (plain, append, replace)] == [16, 18, 16]
    assert torch.equal(append.time_decay, plain.time_decay)
    assert torch.equal(replace.time_decay, plain.time_decay[1:-1]), "the slowest and the fastest made room"
    assert replace.key.weight.shape == plain.key.weight.shape
    x = tokens(d_model=16)
    append(x)[0].pow(2).sum().backward()
    for p in append.parameters():  # every row is taught, those of the pinned channels too
        assert (p.grad.flatten(1).abs().sum(1) > 0).all() if p.dim() > 1 else (p.grad.abs() > 0).all()


def test_keys_that_would_overflow():
    m = build(dtype=torch.float32)
    m.key.weight.data *= 1000
    x = tokens(dtype=torch.float32)
    y, _ = m(x)
    assert torch.isfinite(y).all()
    c = m.coefficients(x)
    close(m.decode(c.states(), x), y, torch.float32)
