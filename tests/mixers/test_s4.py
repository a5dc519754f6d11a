import math

import numpy as np
import pytest
import torch
from cases import close
from scipy.signal import cont2discrete
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers import hippo
from ssmlens.polarization import Polarization


def build(d_model=3, polarization=None, dtype=torch.float64, trained=True, **config):
    """With `trained`, every parameter is moved away from its start."""
    torch.manual_seed(0)
    m = mixers.build("s4", d_model, polarization=polarization, **config)
    if trained:
        for p in m.kernel.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return m.to(dtype)


def tokens(batch=2, length=40, d_model=3, dtype=torch.float64):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)


def full(m, d):
    """The dense A, B, C of inner channel d with both of every conjugate pair, and Δ; numpy."""
    Lambda, p, b, C = (z[d].detach().numpy() for z in m.kernel.continuous())
    p, b, C = (np.concatenate([z, z.conj()]) for z in (p, b, C))
    A = np.diag(np.concatenate([Lambda, Lambda.conj()])) - np.outer(p, p.conj())
    return A, b, C, math.exp(m.kernel.log_dt[d].item())


def written_out_kernel(m, d, length):
    """C Ā^j B̄ with scipy's bilinear discretisation of the dense matrix, and the pinned channels' part."""
    A, b, C, dt = full(m, d)
    a_bar, b_bar, *_ = cont2discrete((A, b[:, None], C[None], np.zeros((1, 1))), dt, method="bilinear")
    K, h = [], b_bar[:, 0]
    for _ in range(length):
        K.append((C @ h).real)
        h = a_bar @ h
    K = np.array(K)
    if m.polarization:
        pinned = 2 * dt * m.kernel.C_pinned[d].detach().numpy()
        K += pinned[: m.polarization.ones].sum()
        K[0] += pinned[m.polarization.ones :].sum()
    return torch.from_numpy(K)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 100, 192])
@pytest.mark.parametrize("polarization", [None, Polarization(ones=2, zeros=1)])
def test_agrees_with_the_written_out_convolution(polarization, length):
    m = build(2, polarization, d_state=8)
    x = tokens(2, length, 2)
    K = torch.stack([written_out_kernel(m, d, length) for d in range(2)], -1)
    s = torch.stack([(K[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(length)], 1) + m.D.detach() * x
    z = m.output_linear(F.gelu(s))
    want = z[..., :2] * torch.sigmoid(z[..., 2:])
    close(m(x)[0], want, torch.float64, slack=10)
    m, x = m.float(), x.float()
    close(m(x)[0], want, torch.float32)


def test_starts_as_hippo_legs():
    """The kernel of the fresh layer is that of the dense HiPPO matrix, read by the same C in its own basis."""
    m, length, n = build(2, d_state=16, trained=False), 50, 16
    A, B = (z.numpy() for z in hippo.legs(n))
    V = hippo.normal_plus_low_rank(n).V.numpy()
    for d in range(2):
        C = 2 * (m.kernel.continuous()[3][d].detach().numpy() @ V.conj().T).real
        dt = math.exp(m.kernel.log_dt[d].item())
        a_bar, b_bar, *_ = cont2discrete((A, B[:, None], C[None], np.zeros((1, 1))), dt, method="bilinear")
        K = [C @ np.linalg.matrix_power(a_bar, j) @ b_bar[:, 0] for j in range(length)]
        close(
            written_out_kernel(m, d, length), torch.tensor(np.array(K)), torch.float32
        )  # parameters are born in float32


def test_agrees_with_the_cauchy_kernel_in_the_frequency_domain():
    """The authors' way to the same kernel (Gu et al. 2021, Algorithm 1): the generating function, cut off at L, at the roots of unity,
    each value four Cauchy products joined by Woodbury's identity."""
    m, length = build(1, d_state=8), 32
    A, b, C, dt = full(m, 0)
    half = len(b) // 2
    Lambda, p, _, _ = (z[0].detach().numpy() for z in m.kernel.continuous())
    Lambda, p = np.concatenate([Lambda, Lambda.conj()]), np.concatenate([p, p.conj()])
    inverse = np.linalg.inv(np.eye(2 * half) - dt / 2 * A)
    cut = C @ (np.eye(2 * half) - np.linalg.matrix_power(inverse @ (np.eye(2 * half) + dt / 2 * A), length))
    z = np.exp(-2j * np.pi * np.arange(length) / length)
    g = (2 / dt * (1 - z)[:, None]) / (1 + z)[:, None]  # at z = -1 infinite: taken as a limit below

    def cauchy(left, right):
        with np.errstate(invalid="ignore", divide="ignore"):
            return (left * right / (g - Lambda)).sum(-1)

    with np.errstate(invalid="ignore", divide="ignore"):
        values = cauchy(cut, b) - cauchy(cut, p) * cauchy(p.conj(), b) / (1 + cauchy(p.conj(), p))
        values = 2 / (1 + z) * values
    values[length // 2] = dt / 2 * cut @ b  # 2/(1+z) · 1/g, there
    K = np.fft.ifft(values)
    assert np.abs(K.imag).max() < 1e-8
    want = written_out_kernel(m, 0, length)
    assert np.abs(K.real - want.numpy()).max() < 1e-8 * want.abs().max()


def test_a_long_sequence_in_float32():
    m = build(4, Polarization(), trained=False)
    x = tokens(1, 3000, 4)
    want, last = m(x)
    got, state = m.float()(x.float())
    close(got, want, torch.float32)
    close(state.h, last.h, torch.float32)


def test_initialisation_and_sizes():
    m = build(256, trained=False)
    dt = m.kernel.log_dt.exp()
    assert 0.001 <= dt.min() < 0.0012
    assert 0.09 < dt.max() <= 0.1
    assert torch.view_as_complex(m.kernel.C).abs().pow(2).mean().item() == pytest.approx(1, rel=0.05)
    append, replace = build(polarization=Polarization()), build(polarization=Polarization(mode="replace"))
    assert (build().state_size(), append.state_size(), replace.state_size()) == (3 * 64, 3 * 66, 3 * 62)
    assert append(tokens())[1].h[0].numel() == append.state_size()
    with pytest.raises(UserError, match="even"):
        build(d_state=5)


def test_pinned_channels_are_exact_and_alive():
    m = build(polarization=Polarization(ones=2, zeros=1), dtype=torch.float32)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        m(tokens(dtype=torch.float32))[0].pow(2).mean().backward()
        assert (m.kernel.C_pinned.grad.abs() > 0).all()
        (g,) = torch.autograd.grad(m(tokens(dtype=torch.float32))[1].h[..., -3:].pow(2).sum(), m.kernel.log_dt)
        assert (g.abs() > 0).all(), "Δ is the weight of their input"
        optimizer.step()
    A, B, _ = m.kernel.discrete()
    block = A[:, -3:]
    assert torch.equal(
        block, torch.cat([torch.zeros(3, 64), torch.diag(torch.tensor([1.0, 1.0, 0.0]))], -1).expand(3, -1, -1)
    )
    assert torch.equal(B[:, -3:], m.kernel.log_dt.exp()[:, None].expand(-1, 3))
    x = torch.zeros(1, 10_000, 3)
    x[:, 0] = 1
    held = m(x)[1].h[0, :, -3:]  # after 10,000 steps: the first token, unchanged
    assert torch.equal(held[:, :2], m.kernel.log_dt.exp()[:, None].expand(-1, 2))
    assert not held[:, 2].any()


def test_a_carried_state_with_padding_and_with_resets():
    m = build(polarization=Polarization(), d_state=8)
    x, more = tokens(), tokens(length=12)
    _, state = m(x)
    want, _ = m(torch.cat([x, more], 1))
    mask = torch.ones(2, 52, dtype=torch.bool)
    mask[0, :45] = False  # the first call is nothing but padding for the first sequence
    stream = torch.cat([x, more], 1).masked_fill(~mask[..., None], 7.0)
    y, after = m(stream[:, 40:], m(stream[:, :40], mask=mask[:, :40])[1], mask=mask[:, 40:])
    alone, last = m(more[:1, 5:])
    close(y[0, 5:], alone[0], torch.float64)
    close(y[1], want[1, 40:], torch.float64)
    close(after.h[:1], last.h, torch.float64)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 3] = True
    y, _ = m(more, state, reset=reset)
    close(y[1], want[1, 40:], torch.float64)
    close(y[0, 3:], m(more[:1, 3:])[0][0], torch.float64)


@pytest.mark.parametrize("carried", [False, True])
def test_packed_sequences_longer_and_shorter_than_a_chunk(carried):
    m = build(polarization=Polarization(), d_state=8)
    rows = [[70, 1, 64, 65, 3], [203], [1, 1, 128, 73]]
    x = tokens(3, 203).requires_grad_()
    reset = torch.zeros(3, 203, dtype=torch.bool)
    for flags, lengths in zip(reset, rows, strict=True):
        flags[torch.tensor(lengths)[:-1].cumsum(0)] = True
    reset[2, 0] = True
    before = m(tokens(3, 9))[1] if carried else None
    y, last = m(x, before, reset=reset)
    wanted, ends = [], []
    for i, lengths in enumerate(rows):
        state = before._replace(h=before.h[i : i + 1]) if carried and i < 2 else None
        for part in x[i : i + 1].split(lengths, 1):
            out, state = m(part, state)
            wanted.append(out[0])
            end, state = state.h, None
        ends.append(end)
    want = torch.cat(wanted).view_as(y)
    close(y, want, torch.float64)
    close(last.h, torch.cat(ends), torch.float64)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    got, ref = (torch.autograd.grad((out * weight).sum(), [x, m.kernel.P], retain_graph=True) for out in (y, want))
    for g, r in zip(got, ref, strict=True):
        close(g, r, torch.float64, slack=10)


def test_runs_in_bfloat16_with_a_float32_state():
    m = build(dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    want = m(x)[0]
    y, state = m.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.h.dtype == torch.float32
    close(y, want, torch.bfloat16, slack=5)
