"""S4 (Gu et al. 2021, arXiv 2111.00396): a time-invariant state space model whose A is diagonal plus low rank.

    A = Λ - p p*      h_t = Ā h_{t-1} + B̄ x_t      s_t = 2 Re(C h_t) + D x_t      y = GLU(W gelu(s))
    bilinear:  R = (I - Δ/2 A)⁻¹,  Ā = 2R - I,  B̄ = Δ R b,  and by Woodbury, with r = 1/(1 - Δ/2 Λ),
               R v = r v - r p · Δ Re(p* r v) / (1 + Δ Re(p* r p))

    One of each conjugate pair is kept, so that (p p*) h means 2 p Re(p* h). A begins as HiPPO-LegS. Λ, p, b, C and Δ are learned, for
    every inner channel its own.
    x, y: (batch, length, d_model)   Λ, p, b, C: (d_model, modes)   Δ, D: (d_model,)
    state: (batch, d_model, 2 modes + pinned), real: Re h, Im h, then the pinned state channels

A is not normal, and HiPPO's eigenvectors are conditioned like 2^N: written in its own eigenbasis the recurrence would be diagonal and
useless in any precision. So this mixer is not diagonal, and `coefficients` refuses. In the basis given, A + A* = -1 - 2 p p* < 0, so Ā is
a contraction and its powers are safe to form. A sequence goes through in chunks of 64 tokens: inside, the convolution with K_j = C Ā^j B̄
as a matrix product; between chunks, the state. Packed sequences are first moved apart, so that each ends with a chunk. (The authors get the same K by a Cauchy kernel in the frequency domain, which needs
Ā^L as well, O(N L) complex memory and a second way to the final state. The tests compare with it.)

Polarization pins state channels, the same ones for every inner channel, beside the diagonal-plus-low-rank block: a = exp(Δ A) with A = 0
or -inf, written with Δ x_t, read with `C_pinned`. One of each is 2 of 34 modes (append, at d_state = 64) or 2 of 32; "replace" begins with
the HiPPO matrix of the smaller order.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from ssmlens.mixers import heads, hippo
from ssmlens.mixers.base import MixerConfig, at_least_float32
from ssmlens.mixers.s4d import StateSpaceBlock, StateSpaceConfig, initial_steps
from ssmlens.ops._check import full_precision
from ssmlens.ops.chunked.dense import Discrete, dense_recurrence
from ssmlens.ops.reference import transition
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class S4Config(StateSpaceConfig):
    @model_validator(mode="after")
    def _paired(self) -> "S4Config":
        if self.d_state % 2:
            raise ValueError(
                f"complex state channels come in conjugate pairs, so d_state must be even, got {self.d_state}"
            )
        return self


class LowRankKernel(nn.Module):
    """The state space model of every inner channel: parameters, and the map x → (s, h)."""

    def __init__(self, channels: int, config: S4Config, polarization: Polarization | None) -> None:
        super().__init__()
        self.channels, self.config, self.polarization = channels, config, polarization
        self.modes, _ = heads.sizes(config.d_state // 2, polarization)
        self.pinned = polarization.pinned if polarization else 0
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(channels, self.modes))  # log(-Re Λ)
        self.A_imag = nn.Parameter(torch.empty(channels, self.modes))
        self.P = nn.Parameter(torch.empty(channels, self.modes, 2))
        self.B = nn.Parameter(torch.empty(channels, self.modes, 2))
        self.C = nn.Parameter(torch.empty(channels, self.modes, 2))
        self.C_pinned = nn.Parameter(torch.empty(channels, self.pinned)) if polarization else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: Gu et al. 2021, Sections 3 and 4, Theorem 1; state-spaces/s4. C is complex normal of variance one."""
        initial_steps(self.log_dt, self.config)
        normal = hippo.normal_plus_low_rank(2 * self.modes)
        self.log_A_real.fill_(math.log(0.5))
        self.A_imag.copy_(normal.Lambda.imag.expand_as(self.A_imag))
        for parameter, start in ((self.P, normal.p), (self.B, normal.b)):
            parameter.zero_()
            parameter[..., 0] = start.to(parameter)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        if self.C_pinned is not None:
            nn.init.normal_(self.C_pinned, std=math.sqrt(0.5))

    def no_weight_decay(self) -> set[str]:
        return {"log_dt", "log_A_real", "A_imag", "P", "B"}

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Λ, p, b, C, each (channels, modes), complex."""
        Lambda = torch.complex(-torch.exp(at_least_float32(self.log_A_real)), at_least_float32(self.A_imag))
        p, b, C = (torch.view_as_complex(at_least_float32(m).contiguous()) for m in (self.P, self.B, self.C))
        return Lambda, p, b, C

    def discrete(self) -> Discrete:
        """The bilinear discretisation in closed form; pinned state channels by the zero-order hold."""
        Lambda, p, b, C = self.continuous()
        dt = torch.exp(at_least_float32(self.log_dt))[:, None]
        r = 1 / (1 - dt / 2 * Lambda)
        rp, rows = r * p, r * p.conj()  # p* r v is a sum over modes of rows · v
        gain = dt / (1 + dt * (rows * p).sum(-1, keepdim=True).real)
        # r v as a real matrix on [Re v, Im v], then the rank one part, whose read-out is Re(rows · v)
        diagonal, cross = torch.diag_embed(r.real), torch.diag_embed(r.imag)
        R = torch.cat([torch.cat([diagonal, -cross], -1), torch.cat([cross, diagonal], -1)], -2)
        R = R - (gain * _real(rp))[..., :, None] * _real(rows.conj())[..., None, :]
        A = 2 * R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        B = dt * (R @ _real(b)[..., None])[..., 0]
        read = 2 * _real(C.conj())
        if self.C_pinned is None or self.polarization is None:
            return Discrete(A, B, read)
        a = transition(dt, self.polarization.join(dt[:, :0]))
        zero = A.new_zeros(self.channels, A.shape[-1], self.pinned)
        A = torch.cat([torch.cat([A, zero], -1), torch.cat([zero.mT, torch.diag_embed(a)], -1)], -2)
        return Discrete(
            A, torch.cat([B, dt.expand_as(a)], -1), torch.cat([read, 2 * at_least_float32(self.C_pinned)], -1)
        )

    def forward(
        self, x: Tensor, D: Tensor, h: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """s (batch, length, channels) and the state after the last token."""
        with full_precision(x):
            system = self.discrete()
            inputs = heads.visible(x.to(system.A.dtype), mask)
            s, h = dense_recurrence(system, inputs, h0=h, reset=reset)
            return (s + at_least_float32(D) * inputs).to(x.dtype), h


def _real(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], -1)


class S4(StateSpaceBlock):
    config_class: ClassVar[type[MixerConfig]] = S4Config
    kernel: LowRankKernel
    title: ClassVar[str] = "S4"
    source: ClassVar[str] = "Gu et al. 2021, arXiv 2111.00396"
    transition: ClassVar[str] = "diagonal plus low rank, complex, time-invariant"
    unit: ClassVar[str] = "a state channel of each inner channel, beside the low-rank block"
    diagonal: ClassVar[bool] = False

    def __init__(self, d_model: int, config: S4Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization, LowRankKernel(d_model, config, polarization))

    def state_size(self) -> int:
        return self.d_model * (2 * self.kernel.modes + self.kernel.pinned)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        raise ValueError("S4's transition is diagonal plus low rank: it has no a_t of each state channel (S4D has)")

    def decode(self, states: Tensor, x: Float[Tensor, "batch length d_model"]) -> Tensor:
        raise ValueError(
            "S4's transition is diagonal plus low rank: there are no states of a diagonal recurrence to decode"
        )
