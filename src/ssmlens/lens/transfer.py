"""The filter of a time-invariant layer, from its parameters (SPEC §3; Definition D.3, Proposition D.4).

    continuous   F(ω) = Σ_n c_n b_n / (iω - a_n)              ω in radians per unit of the layer's own time; Δ of them to a token
    discrete     H(ω) = Σ_n c_n b̄_n e^{iω} / (e^{iω} - ā_n)   ω in radians per token, up to π (Nyquist: every other token)
    cut-off      Ω(ε) = the smallest Ω such that |F(ω)| ≤ ε for all |ω| ≥ Ω
    D.4's bound  Ω(ε) ≤ ‖b‖‖c‖/ε + max|a_n|, and ≤ ‖b‖‖c‖/ε + max|Im a_n|, as |iω - a| ≥ |ω - Im a|

Time-invariant layers, one filter for each inner channel: S4D and the diagonal model of H3 (Re(c h): a conjugate pair for each complex mode), and S4, whose A
is not diagonal: there c (iω - A)⁻¹ b, and the bound with the operator norms of A and of (A - A*)/2 instead of max|a_n| and max|Im a_n| (no point of A's
numerical range is nearer to iω than that; not in the paper). The skip D and state channels held at zero pass every frequency alike, and one held at one
is not integrable, so the proposition speaks of none of them: they are left out of F, H and Ω. `flat` is what skip and zeros add to H.

Legend: d inner channels, m modes, w frequencies.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from ssmlens.lens.layers import in_double
from ssmlens.mixers.s4 import LowRankKernel
from ssmlens.mixers.s4d import DiagonalKernel

Array = np.ndarray
_GRID = 256


class System(NamedTuple):
    """Learned modes of one time-invariant layer, complex128: h' = A h + b x, y = c h, A = diag(a) - p p*; a, b, c, p: (d, m), p None where A is diagonal.
    a_bar, b_bar: zero-order hold, for one token; None with p, whose layers use the bilinear rule. dt: (d,), units of time in a token.
    flat: (d,) what passes at every frequency (skip and state channels at zero). ones, zeros: state channels held there, of each inner channel."""

    a: Tensor
    b: Tensor
    c: Tensor
    p: Tensor | None
    a_bar: Tensor | None
    b_bar: Tensor | None
    dt: Tensor
    flat: Tensor
    ones: int
    zeros: int

    def continuous(self, omega: Float[Tensor, "d w"]) -> Complex[Tensor, "d w"]:
        """F(ω); each inner channel has frequencies of its own, radians per unit of time."""
        return _resolvent(1j * omega, self.a, self.b, self.c, self.p)

    def discrete(self, omega: Float[Tensor, " w"]) -> Complex[Tensor, "d w"]:
        """H(ω), the same frequencies for all, radians per token in (0, π)."""
        z = torch.exp(1j * omega.to(self.dt)).expand(len(self.dt), -1)
        if self.a_bar is not None and self.b_bar is not None:
            return z * _resolvent(z, self.a_bar, self.b_bar, self.c, None)
        # bilinear: (z - Ā)⁻¹ B̄ = 2/(z + 1) (s - A)⁻¹ b with s = 2/Δ (z - 1)/(z + 1)
        s = 2 / self.dt[:, None] * (z - 1) / (z + 1)
        return z * 2 / (z + 1) * _resolvent(s, self.a, self.b, self.c, self.p)

    def norms(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, " d"]]:
        """‖b‖‖c‖, max|a_n| and max|Im a_n|, or the operator norms that stand for them."""
        product = self.b.norm(dim=-1) * self.c.norm(dim=-1)
        if self.p is None:
            return product, self.a.abs().amax(-1), self.a.imag.abs().amax(-1)
        A = torch.diag_embed(self.a) - self.p[..., :, None] * self.p.conj()[..., None, :]
        return product, torch.linalg.matrix_norm(A, 2), torch.linalg.matrix_norm((A - A.mH) / 2, 2)

    def cut_off(self, epsilon: float) -> tuple[Array, Array, Array]:
        """Ω(ε) measured, D.4's bound and the tighter one, each (d,), radians per unit of time; ε = epsilon · max_ω |F(ω)| of each inner channel.

        Measured on a grid that is fine around every resonance, from there to the bound, beyond which nothing can be; then by bisection."""
        centre, width = self.a.imag.abs(), self.a.real.abs()
        if not self.a.imag.any():
            centre = centre[:, :1]
        elif self.a.shape[1] % 2 == 0:  # pairs: one of each is enough
            centre, width = centre[:, : centre.shape[1] // 2], width[:, : centre.shape[1] // 2]
        beside = torch.logspace(-2, 2, 8)
        around = torch.cat([-beside, torch.zeros(1), beside]).to(width)
        grid = (centre[..., None] + width[:, : centre.shape[1], None] * around).flatten(1).clamp_min(0)
        product, radius, imaginary = self.norms()
        slow = torch.cat([torch.zeros(1), torch.logspace(-6, 0, _GRID)]).to(radius)
        grid = torch.cat([grid, radius[:, None] * slow], 1)
        level = epsilon * self.continuous(grid).abs().amax(1)
        bound, tight = product / level + radius, product / level + imaginary
        grid = torch.cat([grid.clamp(max=bound[:, None]), bound[:, None] * slow], 1).sort(1).values
        above = self.continuous(grid).abs() > level[:, None]
        last = (above * torch.arange(grid.shape[1], device=above.device)).amax(1, keepdim=True)
        low, high = grid.gather(1, last), grid.gather(1, (last + 1).clamp(max=grid.shape[1] - 1))
        for _ in range(40):
            middle = (low + high) / 2
            over = self.continuous(middle).abs() > level[:, None]
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return high[:, 0].numpy(force=True), bound.numpy(force=True), tight.numpy(force=True)


@torch.no_grad()
def system(mixer: nn.Module) -> System | None:
    """The time-invariant filter in a mixer (S4D, H3, S4), or None where it has none."""
    kernel = getattr(mixer, "kernel", None)
    if not isinstance(kernel, DiagonalKernel | LowRankKernel):
        return None
    twin: Any = in_double(kernel)
    D: Any = mixer.D
    D, dt = D.detach().to(twin.log_dt), torch.exp(twin.log_dt)
    ones, zeros = (kernel.polarization.ones, kernel.polarization.zeros) if kernel.polarization else (0, 0)
    if isinstance(kernel, DiagonalKernel):
        a, c, (a_bar, b_bar) = twin.A(), twin.read_out(), twin.discrete()
        kept = slice(ones, a.shape[1] - zeros)
        flat = D + (c * b_bar)[:, kept.stop :].sum(-1).real
        a, c, a_bar, b_bar = (x[:, kept].to(torch.complex128) for x in (a, c, a_bar, b_bar))
        if kernel.complex:  # Re(c h): half of a mode, half of its conjugate
            a, c, a_bar, b_bar = (torch.cat([x, x.conj()], -1) for x in (a, c / 2, a_bar, b_bar))
        return System(a, torch.ones_like(a), c, None, a_bar, b_bar, dt, flat, ones, zeros)
    a, p, b, c = (torch.cat([x, x.conj()], -1) for x in twin.continuous())  # y = 2 Re(c h)
    parts = twin.discrete()
    flat = D + (parts.C * parts.B)[:, parts.B.shape[1] - zeros :].sum(-1)
    return System(a, b, c, p, None, None, dt, flat, ones, zeros)


def _resolvent(z: Complex[Tensor, "d w"], a: Tensor, b: Tensor, c: Tensor, p: Tensor | None) -> Complex[Tensor, "d w"]:
    """c (z - diag(a) + p p*)⁻¹ b, one inner channel at a time (d · w · m at once would be gigabytes); by Woodbury where there is a p."""
    out = torch.empty_like(z)
    for i in range(len(z)):
        r = 1 / (z[i, :, None] - a[i])
        out[i] = r @ (c[i] * b[i])
        if p is not None:
            out[i] -= (r @ (c[i] * p[i])) * (r @ (p[i].conj() * b[i])) / (1 + r @ (p[i].conj() * p[i]))
    return out
