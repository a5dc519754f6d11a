"""Mamba (Gu and Dao 2023, arXiv 2312.00752): a selective state space model.

    a_t = exp(Δ_t A)        Δ_t b_t(x_t) = Δ_t (W_B x_t) x_t        c_t(h_t) = (W_C x_t)ᵀ h_t + D x_t
    Δ_t = softplus(W_Δ x_t + b_Δ), one for each inner channel; x_t is the token after projection, short convolution and SiLU;
    the output is gated by SiLU(z_t) and projected back.

    x, z: (batch, length, d_inner)   Δ: (batch, length, d_inner)   A: (d_inner, d_state)   B, C: (batch, length, d_state)
    state: the last d_conv - 1 tokens of the convolution, and h: (batch, d_inner, d_state), float32

Polarization pins state channels, the same ones for every inner channel: columns of A at 0 (a = 1) come first, at -inf (a = 0)
last, the learned columns between. With N = 16, one of each takes 2 of 18 (append) or 2 of 16 (replace) of the state. Their input
and read-out are ordinary rows of W_B and W_C, so they are as alive as the others.

FalconMamba (Zuo et al. 2024, arXiv 2410.05355) and Jamba (Lieber et al. 2024, arXiv 2403.19887) divide B_t, C_t and the low-rank part of
Δ_t by their root mean square over state channels (over the rank): `bcdt_norm`. With polarization the mean is over the learned state
channels, and pinned ones are divided by it too: a new state channel that is not read changes nothing.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.ops.reference import transition
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class MambaConfig(MixerConfig):
    """d_state: N, learned state channels (of which "replace" polarization takes some). dt_rank None: d_model / 16, rounded up.
    dt_min, dt_max: Δ begins log-uniform between them.
    bcdt_norm: RMS norm of B, C and the low-rank Δ: "plain" (FalconMamba) or "weighted" (Jamba). bcdt_eps: inside its root.
    initialization: "authors", or "released": what the paper's released code runs, whose initialiser zeroes every linear bias, Δ's
    among them, so that Δ ≈ 0.69 everywhere, and draws linear weights from N(0, 0.02²) (SPEC.md §4); "released_dt" and
    "released_weights": only the one half of it, and only the other."""

    d_state: int = Field(default=16, ge=1)
    d_conv: int = Field(default=4, ge=1)
    expand: int = Field(default=2, ge=1)
    dt_rank: int | None = Field(default=None, ge=1)
    dt_min: float = Field(default=0.001, gt=0)
    dt_max: float = Field(default=0.1, gt=0)
    dt_floor: float = Field(default=1e-4, gt=0)
    conv_bias: bool = True
    bias: bool = False
    bcdt_norm: Literal["none", "plain", "weighted"] = "none"
    bcdt_eps: float = Field(default=1e-6, gt=0)
    initialization: Literal["authors", "released", "released_dt", "released_weights"] = "authors"

    @model_validator(mode="after")
    def _ordered(self) -> "MambaConfig":
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min ({self.dt_min:g}) is above dt_max ({self.dt_max:g})")
        return self


def initial_steps(bias: Tensor, dt_min: float, dt_max: float, dt_floor: float) -> None:
    """Fill `bias` so that softplus(bias) is log-uniform between dt_min and dt_max, and at least dt_floor."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(bias.shape, device=bias.device) * (high - low) + low).clamp_min(dt_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class MambaState(NamedTuple):
    conv: Float[Tensor, "batch d_conv-1 d_inner"]
    h: Float[Tensor, "batch d_inner d_state"]


class _Projected(NamedTuple):
    x: Tensor
    z: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    conv: Tensor


class Mamba(Mixer):
    config_class: ClassVar[type[MixerConfig]] = MambaConfig
    config: MambaConfig
    title: ClassVar[str] = "Mamba"
    source: ClassVar[str] = "Gu and Dao 2023, arXiv 2312.00752"
    transition: ClassVar[str] = "real diagonal, input-dependent"
    unit: ClassVar[str] = "a state channel of each inner channel"
    dt_norm_weight: nn.Parameter | None
    B_norm_weight: nn.Parameter | None
    C_norm_weight: nn.Parameter | None

    def __init__(self, d_model: int, config: MambaConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.d_inner = config.expand * d_model
        self.learned, self.d_state = heads.sizes(config.d_state, polarization)
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.d_inner)) if config.conv_bias else None
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.learned))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        for name, size in (("dt", self.dt_rank), ("B", self.d_state), ("C", self.d_state)):
            weighted = config.bcdt_norm == "weighted"
            self.register_parameter(f"{name}_norm_weight", nn.Parameter(torch.empty(size)) if weighted else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter, from torch's global generator. Source: Gu and Dao 2023, Section 3.6 and Appendix; SPEC.md §4."""
        c = self.config
        small = c.initialization in ("released", "released_weights")
        for linear in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj):
            if small:
                nn.init.normal_(linear.weight, std=0.02)
            else:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))  # U(±1/√fan_in), a linear layer's default
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        bound = 1 / math.sqrt(c.d_conv)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        if small:
            nn.init.normal_(self.out_proj.weight, std=0.02 / math.sqrt(2 * c.n_residuals))
        else:
            self.out_proj.weight /= math.sqrt(c.n_residuals)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        if c.initialization in ("authors", "released_weights"):
            initial_steps(self.dt_proj.bias, c.dt_min, c.dt_max, c.dt_floor)
        # S4D-real: A = -1 .. -N. "replace" gives up the slowest for the ones and the fastest for the zeros.
        first = 1 + (self.polarization.ones if self.polarization and self.polarization.mode == "replace" else 0)
        n = torch.arange(first, first + self.A_log.shape[1], dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(n.log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        for weight in (self.dt_norm_weight, self.B_norm_weight, self.C_norm_weight):
            if weight is not None:
                nn.init.ones_(weight)

    def no_weight_decay(self) -> set[str]:
        norms = {"dt_norm_weight", "B_norm_weight", "C_norm_weight"} if self.config.bcdt_norm == "weighted" else set()
        return {"A_log", "D"} | norms

    def A(self) -> Float[Tensor, "d_inner d_state"]:
        """The continuous transition, float32 (float64 for a float64 model), pinned columns included."""
        return heads.pinned(-torch.exp(at_least_float32(self.A_log)), self.polarization)

    def _project(self, x: Tensor, conv: Tensor | None, mask: Tensor | None, reset: Tensor | None) -> _Projected:
        """Everything before the scan; dt is still the pre-activation, without its bias."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv = ops.causal_conv1d(
            heads.visible(x, mask),
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial=conv,
            reset=reset,
            return_final_state=True,
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.config.bcdt_norm != "none":
            first = self.polarization.ones if self.polarization else 0
            dt = _rms_norm(dt, dt, self.dt_norm_weight, self.config.bcdt_eps)
            B, C = (
                _rms_norm(m, m[..., first : first + self.learned], weight, self.config.bcdt_eps)
                for m, weight in ((B, self.B_norm_weight), (C, self.C_norm_weight))
            )
        return _Projected(x, z, F.linear(dt, self.dt_proj.weight), B, C, conv)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: MambaState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], MambaState]:
        conv, h = state if state is not None else (None, None)
        p = self._project(x, conv, mask, reset)
        dt, dt_bias = p.dt, at_least_float32(self.dt_proj.bias)
        if mask is not None:  # Δ = 0 at padding: the state passes through unchanged
            dt = F.softplus(at_least_float32(dt) + dt_bias) * mask[..., None]
        y, h = ops.selective_scan(
            p.x, dt, self.A(), p.B, p.C, D=at_least_float32(self.D), z=p.z, dt_bias=dt_bias if mask is None else None, dt_softplus=mask is None,
            h0=h, reset=reset, return_final_state=True,
        )  # fmt: skip
        return self.out_proj(y), MambaState(p.conv, h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x, None, None, None)
        dt = F.softplus(at_least_float32(p.dt) + at_least_float32(self.dt_proj.bias))
        A, B, inner = self.A(), at_least_float32(p.B), at_least_float32(p.x)

        def content(t: slice) -> Tensor:
            return inner[:, t, :, None] * B[:, t, None, :]

        ones, zeros = heads.pinned_masks(self.config.d_state, self.polarization)
        shape = (self.d_inner, self.d_state)
        return Coefficients(
            batch=x.shape[0], length=x.shape[1], state_shape=shape,
            a_at=lambda t: transition(dt[:, t, :, None], A),
            u_at=lambda t: dt[:, t, :, None] * content(t),
            b_at=content, dt=dt, ones=ones.expand(shape), zeros=zeros.expand(shape),
        )  # fmt: skip

    def decode(
        self, states: Float[Tensor, "batch length d_inner d_state"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x, None, None, None)
        y = (states * at_least_float32(p.C)[:, :, None]).sum(-1) + at_least_float32(self.D) * p.x
        return self.out_proj((y * F.silu(p.z)).to(x.dtype))


def _rms_norm(x: Tensor, over: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(over²) + eps), times a weight, in x's dtype; computed in float32."""
    scale = torch.rsqrt(at_least_float32(over).square().mean(-1, keepdim=True) + eps)
    y = at_least_float32(x) * scale
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)
