"""S4D (Gu et al. 2022, arXiv 2206.11893) and DSS (Gupta et al. 2022, arXiv 2203.14343): a diagonal, time-invariant state space model.

    h_t = ā h_{t-1} + (ā - 1)/A x_t,  ā = exp(Δ A)  (zero-order hold)      s_t = 2 Re(C h_t) + D x_t      y = GLU(W gelu(s))

    complex A: one of each conjugate pair is kept, hence 2 Re, and d_state = N means N/2 complex modes; real A: N modes, and C h_t
    A begins as    lin  -½ + iπn      inv  -½ + i(N/π)(N/(2n+1) - 1)      legs, dss  the normal part of HiPPO-LegS      real  -(n+1)
    The input matrix B is one: of a diagonal A only C B matters, and the B of "legs" is in its C.

    x, y: (batch, length, d_model)   A, C: (d_model, modes)   Δ, D: (d_model,)   state h: (batch, d_model, modes), float32 or complex64

DSS-exp is this recurrence with "dss" as its start (no HiPPO B in C; their W is 2C, their d_state = N our 2N). DSS-softmax divides the
kernel by its sum over a fixed length L: for Re A < 0 that is this recurrence with C / (exp(L Δ A) - 1), as which a checkpoint of it can
be written; for Re A > 0 it is no recurrence at all, so it is not offered.

Polarization pins state channels, the same ones for every inner channel: A = 0 (a = 1) first, A = -inf (a = 0) last, the learned modes
between. They are written with Δ x_t, and read with a real `C_pinned`, as their state is real. One of each is 2 of 34 modes (append, at
d_state = 64) or 2 of 32 (replace: in place of the lowest and the highest frequency).
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads, hippo
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.ops.reference import zero_order_hold
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class StateSpaceConfig(MixerConfig):
    """d_state: N, real numbers of learned state for each inner channel. dt_min, dt_max: Δ begins log-uniform between them."""

    d_state: int = Field(default=64, ge=1)
    dt_min: float = Field(default=0.001, gt=0)
    dt_max: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> "StateSpaceConfig":
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min ({self.dt_min:g}) is above dt_max ({self.dt_max:g})")
        return self


class S4DConfig(StateSpaceConfig):
    """initialization: of A (and with it whether the state is complex)."""

    initialization: Literal["lin", "inv", "legs", "dss", "real"] = "lin"

    @model_validator(mode="after")
    def _paired(self) -> "S4DConfig":
        if self.initialization != "real" and self.d_state % 2:
            raise ValueError(
                f"complex state channels come in conjugate pairs, so d_state must be even, got {self.d_state}"
            )
        return self


def initial_modes(initialization: str, d_state: int) -> tuple[Tensor, Tensor]:
    """A and the standard deviation of C, slowest first, each (modes,) in float64 (A complex, except for "real")."""
    if initialization == "real":
        return -torch.arange(1, d_state + 1, dtype=torch.float64), torch.ones(d_state, dtype=torch.float64)
    n = torch.arange(d_state // 2, dtype=torch.float64)
    scale = torch.full_like(n, math.sqrt(0.5))  # of real and imaginary part, so that C has variance one
    if initialization == "lin":
        frequency = math.pi * n
    elif initialization == "inv":
        frequency = (d_state / math.pi * (d_state / (2 * n + 1) - 1)).flip(0)
    else:
        normal = hippo.normal_plus_low_rank(d_state)
        frequency = normal.Lambda.imag
        scale = scale * normal.b if initialization == "legs" else torch.full_like(n, 0.5)
    return torch.complex(torch.full_like(frequency, -0.5), frequency), scale


class DiagonalKernel(nn.Module):
    """The diagonal state space model of `channels` inner channels: parameters, and the map x → (s, h) without anything around it."""

    def __init__(self, channels: int, config: S4DConfig, polarization: Polarization | None) -> None:
        super().__init__()
        self.channels, self.config, self.polarization = channels, config, polarization
        self.complex = config.initialization != "real"
        self.units = config.d_state // 2 if self.complex else config.d_state
        self.pinned = polarization.pinned if polarization else 0
        learned, _ = heads.sizes(self.units, polarization)
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(channels, learned))  # log(-Re A)
        self.A_imag = nn.Parameter(torch.empty(channels, learned)) if self.complex else None
        self.C = nn.Parameter(torch.empty(channels, learned, 2) if self.complex else torch.empty(channels, learned))
        self.C_pinned = nn.Parameter(torch.empty(channels, self.pinned)) if polarization else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: Gu et al. 2022, Sections 4.2 and 5; state-spaces/s4. "replace" gives up the slowest modes for the ones, the fastest
        for the zeros."""
        initial_steps(self.log_dt, self.config)
        A, scale = initial_modes(self.config.initialization, self.config.d_state)
        if self.polarization and self.polarization.mode == "replace":
            kept = slice(self.polarization.ones, len(A) - self.polarization.zeros)
            A, scale = A[kept], scale[kept]
        self.log_A_real.copy_((-A.real).log().expand_as(self.log_A_real))
        if self.A_imag is not None:
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.C.normal_()
        self.C.mul_((scale[:, None] if self.complex else scale).to(self.C))
        if self.C_pinned is not None:
            nn.init.normal_(self.C_pinned, std=math.sqrt(0.5) if self.complex else 1.0)

    def no_weight_decay(self) -> set[str]:
        return {"log_dt", "log_A_real"} | ({"A_imag"} if self.complex else set())

    def dt(self) -> Float[Tensor, "channels"]:
        return torch.exp(at_least_float32(self.log_dt))

    def A(self) -> Tensor:
        """The continuous transition (channels, modes), pinned columns included."""
        A = -torch.exp(at_least_float32(self.log_A_real))
        if self.A_imag is not None:
            A = torch.complex(A, at_least_float32(self.A_imag))
        return heads.pinned(A, self.polarization)

    def read_out(self) -> Tensor:
        """What h is multiplied with, (channels, modes): 2C, where one of each conjugate pair is kept, else C."""
        C = at_least_float32(self.C)
        if self.complex:
            C = 2 * torch.view_as_complex(C.contiguous())
        if self.C_pinned is None or self.polarization is None:
            return C
        pinned = (at_least_float32(self.C_pinned) * (2 if self.complex else 1)).to(C.dtype)
        return torch.cat([pinned[:, : self.polarization.ones], C, pinned[:, self.polarization.ones :]], -1)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """ā and b̄, each (channels, modes)."""
        A = self.A()
        return zero_order_hold(A, torch.ones_like(A), self.dt())

    def masks(self) -> tuple[Tensor, Tensor]:
        """Which of (channels, modes) are held at one, which at zero."""
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        return ones.expand(self.channels, -1), zeros.expand(self.channels, -1)

    def forward(
        self, x: Tensor, D: Tensor, h: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """s (batch, length, channels) and the state after the last token."""
        A = self.A()
        s, h = ops.lti_convolution(
            heads.visible(x, mask), A, torch.ones_like(A), self.read_out(), self.dt(), D=at_least_float32(D), h0=h, reset=reset,
            return_final_state=True,
        )  # fmt: skip
        return s, h


@torch.no_grad()
def initial_steps(log_dt: Tensor, config: StateSpaceConfig) -> None:
    nn.init.uniform_(log_dt, math.log(config.dt_min), math.log(config.dt_max))


class S4DState(NamedTuple):
    h: Tensor


class StateSpaceBlock(Mixer):
    """What surrounds the state space model in the blocks of S4 and S4D: skip, GELU, and a linear layer with a gate."""

    kernel: nn.Module

    def __init__(
        self, d_model: int, config: StateSpaceConfig, polarization: Polarization | None, kernel: nn.Module
    ) -> None:
        super().__init__(d_model, config, polarization)
        self.kernel = kernel
        self.D = nn.Parameter(torch.empty(d_model))
        self.output_linear = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The kernel's own, D ~ N(0, 1), the output projection a linear layer's default with its ungated half made smaller."""
        self.kernel.reset_parameters()  # type: ignore[operator]
        nn.init.normal_(self.D)
        self.output_linear.reset_parameters()
        for p in (self.output_linear.weight, self.output_linear.bias):
            p[: self.d_model] /= math.sqrt(self.config.n_residuals)

    def no_weight_decay(self) -> set[str]:
        return {"D"} | {f"kernel.{name}" for name in self.kernel.no_weight_decay()}  # type: ignore[operator]

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: S4DState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], S4DState]:
        s, h = self.kernel(x, self.D, None if state is None else state.h, mask, reset)
        return self._out(s), S4DState(h)

    def _out(self, s: Tensor) -> Tensor:
        return F.glu(self.output_linear(F.gelu(s)), -1)


class S4D(StateSpaceBlock):
    config_class: ClassVar[type[MixerConfig]] = S4DConfig
    kernel: DiagonalKernel
    title: ClassVar[str] = "S4D"
    source: ClassVar[str] = "Gu et al. 2022, arXiv 2206.11893; Gupta et al. 2022, arXiv 2203.14343"
    transition: ClassVar[str] = "complex or real diagonal, time-invariant"
    unit: ClassVar[str] = "a state channel of each inner channel"

    def __init__(self, d_model: int, config: S4DConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization, DiagonalKernel(d_model, config, polarization))

    def state_size(self) -> int:
        """A complex mode has two numbers."""
        return self.d_model * (self.kernel.C[0].numel() + self.kernel.pinned)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """Complex a_t and u_t for complex A. dt is Δ, so b_t = (ā - 1)/(Δ A) x_t."""
        return time_invariant(self.kernel, at_least_float32(x))

    def decode(self, states: Tensor, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        s = (states * self.kernel.read_out()).sum(-1).real + at_least_float32(self.D) * x
        return self._out(s.to(x.dtype))


def time_invariant(kernel: DiagonalKernel, x: Float[Tensor, "batch length ... channels"]) -> Coefficients:
    """The kernel as the recurrence on its input x, whose dimensions between length and channels belong to the state."""
    a, b = kernel.discrete()
    dt = kernel.dt()
    shape = (*x.shape[2:], a.shape[-1])
    ones, zeros = (m.expand(shape) for m in kernel.masks())
    return Coefficients(
        batch=x.shape[0], length=x.shape[1], state_shape=shape,
        a_at=lambda t: a.expand(*x[:, t].shape, -1),
        u_at=lambda t: b * x[:, t, ..., None],
        b_at=lambda t: b / dt[:, None] * x[:, t, ..., None],
        dt=dt.expand(x.shape), ones=ones, zeros=zeros,
    )  # fmt: skip
