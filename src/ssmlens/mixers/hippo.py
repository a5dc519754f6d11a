"""HiPPO-LegS (Gu et al. 2020, arXiv 2008.07669): the state matrix that keeps a history as Legendre coefficients.

A_nk = -√(2n+1) √(2k+1)  for n > k,   -(n+1)  for n = k,   0 above      B_n = √(2n+1)

with the normaliser      h'(t) = (A h(t) + B x(t)) / t    keeps   h_n(t) = ∫ x(s) p_n(s/t) ds / t  over [0, t]: a uniform measure
without (S4, Mamba)      h'(t) =  A h(t) + B x(t)         keeps   h_n(t) = ∫ x(s) p_n(e^{s-t}) e^{s-t} ds  over (-∞, t]: a fading one
p_n(r) = √(2n+1) P_n(2r - 1), the Legendre polynomials that are orthonormal on [0, 1]

A + P Pᵀ with P = B/√2 is normal (-½ plus a skew-symmetric matrix), so A = V (Λ - p p*) V*, V unitary (Gu et al. 2021, arXiv 2111.00396).
A: (n, n)   B, P: (n,)   Λ, p, b = V* B: (n/2,) complex, one of each conjugate pair   V: (n, n/2)   all float64
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ssmlens.errors import UserError


class NormalPlusLowRank(NamedTuple):
    """A = Λ - p p* and B in the eigenbasis of the normal part, one of each conjugate pair, slowest oscillation first. The phase of
    an eigenvector is free: it is chosen so that b, and with it p = b/√2, is real and positive."""

    Lambda: Complex[Tensor, "half"]
    p: Float[Tensor, "half"]
    b: Float[Tensor, "half"]
    V: Complex[Tensor, "n half"]


def legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """A and B of order n."""
    B = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return A, B


def normal_plus_low_rank(n: int) -> NormalPlusLowRank:
    """The decomposition of `legs(n)`. Raises UserError for odd n, whose eigenvalues do not pair."""
    if n % 2 or n < 2:
        raise UserError(f"HiPPO's complex modes come in pairs: their number must be even and at least 2, got {n}")
    A, B = legs(n)
    skew = A + torch.outer(B, B) / 2 + torch.eye(n, dtype=torch.float64) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending, symmetric about zero
    frequency, V = frequency[n // 2 :], V[:, n // 2 :]
    b = V.mH @ B.to(V.dtype)
    V = V * (b / b.abs())
    return NormalPlusLowRank(torch.complex(torch.full_like(frequency, -0.5), frequency), b.abs() / 2**0.5, b.abs(), V)


def measure(s: Tensor, t: float, *, normalised: bool) -> Tensor:
    """The weight of time s ≤ t in the memory at time t: 1/t on [0, t] with the normaliser, e^{s-t} without."""
    return (s >= 0).to(s.dtype) / t if normalised else torch.exp(s - t)


def basis(n: int, s: Float[Tensor, "times"], t: float, *, normalised: bool) -> Float[Tensor, "n times"]:
    """The functions of time whose coefficients the memory keeps at time t; orthonormal under `measure`."""
    r = 2 * (s / t if normalised else torch.exp(s - t)) - 1
    P = [torch.ones_like(r), r]
    for k in range(1, n - 1):
        P.append(((2 * k + 1) * r * P[k] - k * P[k - 1]) / (k + 1))
    return torch.sqrt(2 * torch.arange(n, dtype=r.dtype) + 1)[:, None] * torch.stack(P[:n])


def memory(x: Float[Tensor, "length"], n: int, *, normalised: bool, dt: float = 1.0) -> Float[Tensor, "length n"]:
    """h at the end of every token, for a signal that holds x_k during ((k-1) dt, k dt]: exact for such a signal, no discretisation
    error. (With the normaliser the result does not depend on dt.)"""
    A, B = legs(n)
    k = torch.arange(1, len(x) + 1, dtype=torch.float64)
    # with 1/t, the time that counts is log t; the first token comes from log 0, so nothing is left of what was before
    spent = torch.log(k[1:] / k[:-1]) if normalised else torch.full_like(k, dt)
    decay = torch.linalg.matrix_exp(spent[:, None, None] * A)
    if normalised:
        decay = torch.cat([torch.zeros_like(A)[None], decay])
    rest = torch.linalg.solve(A, B)
    h, states = torch.zeros_like(B), []
    for now, value in zip(decay, x.double(), strict=True):
        h = now @ h + (now @ rest - rest) * value
        states.append(h)
    return torch.stack(states)
