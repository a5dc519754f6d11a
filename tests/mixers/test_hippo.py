import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ssmlens.errors import UserError
from ssmlens.mixers import hippo


def test_the_matrix():
    A, B = hippo.legs(3)
    want = [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]]
    assert torch.allclose(A, torch.tensor(want, dtype=torch.float64))
    assert torch.allclose(B, torch.tensor([1, 3, 5], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("n", [2, 8, 64])
def test_decomposition(n):
    A, B = hippo.legs(n)
    d = hippo.normal_plus_low_rank(n)
    V = torch.cat([d.V, d.V.conj()], 1)
    eye = torch.eye(n, dtype=V.dtype)
    assert torch.allclose(V.mH @ V, eye, atol=1e-10)
    Lambda, p, b = torch.cat([d.Lambda, d.Lambda.conj()]), torch.cat([d.p, d.p]), torch.cat([d.b, d.b])
    in_basis = torch.diag(Lambda) - torch.outer(p, p)
    scale = A.abs().max()
    assert ((V @ in_basis @ V.mH) - A).abs().max() < 1e-11 * scale
    assert (V @ b.to(V.dtype) - B).abs().max() < 1e-11 * scale
    assert (d.Lambda.real == -0.5).all()
    assert (d.Lambda.imag > 0).all()
    assert (d.Lambda.imag.diff() > 0).all()


def test_odd_order_is_refused():
    with pytest.raises(UserError, match="even"):
        hippo.normal_plus_low_rank(7)


@pytest.mark.parametrize("normalised", [True, False])
def test_basis_is_orthonormal_under_the_measure(normalised):
    t = 7.0
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)  # s/t, or e^{s-t}: both run over [0, 1]
    s = r * t if normalised else t + r.log()
    dr = hippo.measure(s, t, normalised=normalised) / (1 / t if normalised else r)
    p = hippo.basis(9, s, t, normalised=normalised)
    assert torch.allclose((p * w * dr) @ p.T, torch.eye(9, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("normalised", [True, False])
def test_impulse_response_is_measure_times_basis(normalised):
    """The memory at t of an impulse at s, by the matrix exponential: with 1/t, time runs as log t, and x enters over s."""
    n, t = 12, 5.0
    A, B = hippo.legs(n)
    s = torch.tensor([0.3, 1.0, 2.5, 4.0, 4.999], dtype=torch.float64)
    spent, entry = (torch.log(t / s), 1 / s) if normalised else (t - s, torch.ones_like(s))
    got = (torch.linalg.matrix_exp(spent[:, None, None] * A) @ B) * entry[:, None]
    want = hippo.basis(n, s, t, normalised=normalised) * hippo.measure(s, t, normalised=normalised)
    assert torch.allclose(got.T, want, atol=1e-9)


@pytest.mark.parametrize("normalised", [True, False])
def test_memory_holds_the_coefficients_under_its_measure(normalised):
    """Against numerical integrals of the piecewise constant signal times basis times measure."""
    n, dt = 5, 0.4
    x = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = hippo.memory(x, n, normalised=normalised, dt=dt)
    for k in (1, 4, 9):
        t = k * dt

        def weight(s, i, t=t):
            at = torch.tensor([s], dtype=torch.float64)
            return float(hippo.basis(n, at, t, normalised=normalised)[i] * hippo.measure(at, t, normalised=normalised))

        for i in range(n):
            want = sum(float(x[j]) * quad(weight, j * dt, (j + 1) * dt, args=(i,), epsabs=1e-12)[0] for j in range(k))
            assert float(h[k - 1, i]) == pytest.approx(want, abs=1e-9)


def test_only_the_normalised_memory_still_sees_the_beginning():
    """The paper's remark: dropping 1/t warps a uniform measure into one that fades as e^{s-t}."""
    x = torch.zeros(40, dtype=torch.float64)
    x[0] = 1
    uniform, fading = (hippo.memory(x, 4, normalised=flag)[-1] for flag in (True, False))
    assert float(uniform[0]) == pytest.approx(1 / 40)
    assert fading.abs().max() < 1e-15
    # the mean of the history itself is the zeroth coefficient
    x = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(hippo.memory(x, 6, normalised=True)[:, 0], x.cumsum(0) / torch.arange(1, 31))
