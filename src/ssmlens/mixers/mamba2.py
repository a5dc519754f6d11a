"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state space model whose A_t is a scalar for each head ("SSD").

    a_t = exp(Δ_t A)        Δ_t b_t(x_t) = Δ_t B_t x_tᵀ        c_t(H_t) = norm((H_tᵀ C_t + D x_t) ⊙ silu(z_t)), then projected
    z, x, B, C, Δ come from one projection; x, B, C pass a short convolution and SiLU; Δ_t = softplus(Δ_t + b_Δ).

    x, z: (batch, length, heads, d_head)   B, C: (batch, length, groups, d_state)   Δ: (batch, length, heads)   A, D: (heads,)
    state: the last d_conv - 1 tokens of the convolution, and H: (batch, heads, d_state, d_head), float32
    heads = d_inner / d_head with d_inner = expand · d_model; head i reads the B and C of group i // (heads / groups).

Polarization pins heads: A = 0 (a = 1) for the first, A = -inf (a = 0) for the last, the learned ones between; A starts random, so
"replace" has no order to follow. A pinned head keeps its Δ_t, which is the weight of its input; its x, z and D are its own; its B
and C are those of the first group (ones) or the last (zeros). With d_model = 128 there are 4 heads of 64, so one of each takes
2 of 6 (append) or 2 of 4 (replace) of the state: choose a smaller d_head to pin less.

The norm is RMS over groups of heads, those that read the same B and C, as the authors have it; a pinned head is a group alone.
So a new head whose columns of the output projection are zero changes nothing, although the norm is not for each head.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.errors import UserError
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.mixers.mamba import initial_steps
from ssmlens.ops.reference import per_head
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class Mamba2Config(MixerConfig):
    """expand: d_inner / d_model. d_head: at most, where it does not divide d_inner. n_groups: of heads that share B and C.
    A_min, A_max: -A begins uniform between them. dt_min, dt_max: Δ begins log-uniform between them.
    dt_lower, dt_upper: Δ never leaves them (Zamba2 and Nemotron-H: 0.001 from below). gated_norm: False leaves the norm out (Falcon-H1)."""

    d_state: int = Field(default=128, ge=1)
    d_head: int = Field(default=64, ge=1)
    n_groups: int = Field(default=1, ge=1)
    d_conv: int = Field(default=4, ge=1)
    expand: int | float = Field(default=2, gt=0)
    A_min: float = Field(default=1, gt=0)
    A_max: float = Field(default=16, gt=0)
    dt_min: float = Field(default=0.001, gt=0)
    dt_max: float = Field(default=0.1, gt=0)
    dt_floor: float = Field(default=1e-4, gt=0)
    dt_lower: float = Field(default=0, ge=0)
    dt_upper: float | None = Field(default=None, gt=0)
    gated_norm: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)
    conv_bias: bool = True
    bias: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Mamba2Config":
        for name, low, high in (("A", self.A_min, self.A_max), ("dt", self.dt_min, self.dt_max)):
            if low > high:
                raise ValueError(f"{name}_min ({low:g}) is above {name}_max ({high:g})")
        if self.dt_upper is not None and self.dt_lower > self.dt_upper:
            raise ValueError(f"dt_lower ({self.dt_lower:g}) is above dt_upper ({self.dt_upper:g})")
        return self


class Mamba2State(NamedTuple):
    conv: Float[Tensor, "batch d_conv-1 d_inner+2*groups*d_state"]
    h: Float[Tensor, "batch heads d_state d_head"]


class _Projected(NamedTuple):
    x: Tensor
    z: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    conv: Tensor


class Mamba2(Mixer):
    config_class: ClassVar[type[MixerConfig]] = Mamba2Config
    config: Mamba2Config
    title: ClassVar[str] = "Mamba-2"
    source: ClassVar[str] = "Dao and Gu 2024, arXiv 2405.21060"
    transition: ClassVar[str] = "real scalar for each head, input-dependent"
    unit: ClassVar[str] = "a head"
    slower: ClassVar[str] = (
        "its authors' d_state of 128 makes the largest state of all: 256 numbers for each of d_model, 16 times GLA's"
    )

    def __init__(self, d_model: int, config: Mamba2Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        width = round(config.expand * d_model)
        if width < 1 or abs(width - config.expand * d_model) > 1e-6 * width:
            raise UserError(f"expand ({config.expand:g}) times d_model ({d_model}) is no whole number")
        self.units, self.d_head = heads.heads_of(width, config.d_head)
        if self.units % config.n_groups:
            raise UserError(f"n_groups ({config.n_groups}) does not divide the {self.units} heads of d_model {d_model}")
        self.learned, self.n_heads = heads.sizes(self.units, polarization)
        self.d_inner = self.n_heads * self.d_head
        d_bc = config.n_groups * config.d_state
        self.sizes = [self.d_inner, self.d_inner + 2 * d_bc, self.n_heads]

        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=config.bias)
        self.conv_weight = nn.Parameter(torch.empty(self.sizes[1], config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.sizes[1])) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.learned))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.n_heads, self.d_head)) if config.gated_norm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every parameter, from torch's global generator. Source: the authors' mamba_ssm."""
        c = self.config
        for linear in (self.in_proj, self.out_proj):
            linear.reset_parameters()
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)
        self.out_proj.weight /= math.sqrt(c.n_residuals)
        bound = 1 / math.sqrt(c.d_conv)
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        initial_steps(self.dt_bias, c.dt_min, c.dt_max, c.dt_floor)
        nn.init.uniform_(self.A_log, c.A_min, c.A_max).log_()
        nn.init.ones_(self.D)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"} | ({"norm_weight"} if self.config.gated_norm else set())

    def A(self) -> Float[Tensor, " heads"]:
        """The continuous transition, float32 (float64 for a float64 model), pinned heads included."""
        return heads.pinned(-torch.exp(at_least_float32(self.A_log)), self.polarization)

    def _groups(self) -> Tensor:
        """The group whose B and C each head reads: even shares of the configured heads; new heads join the end they stand at."""
        index = torch.arange(self.n_heads)
        if self.n_heads > self.units and self.polarization:
            index = (index - self.polarization.ones).clamp(0, self.units - 1)
        return index // (self.units // self.config.n_groups)

    def _norm_groups(self) -> Tensor:
        """(heads, heads), rows of 1/n: the mean over the heads that a head is normalised with."""
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        own = self._groups()
        own = torch.where(ones | zeros, self.config.n_groups + torch.arange(self.n_heads), own)
        same = (own[:, None] == own).float()
        return same / same.sum(1, keepdim=True)

    def _project(
        self, x: Tensor, conv: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> _Projected:
        z, xBC, dt = self.in_proj(x).split(self.sizes, dim=-1)
        xBC, conv = ops.causal_conv1d(
            heads.visible(xBC, mask), self.conv_weight, self.conv_bias, activation="silu", initial=conv, reset=reset,
            return_final_state=True,
        )  # fmt: skip
        d_bc = self.config.n_groups * self.config.d_state
        x, B, C = xBC.split([self.d_inner, d_bc, d_bc], dim=-1)
        dt = F.softplus(at_least_float32(dt) + at_least_float32(self.dt_bias))
        if self.config.dt_lower or self.config.dt_upper is not None:
            dt = dt.clamp(self.config.dt_lower, self.config.dt_upper)
        B, C = heads.split(B, self.config.n_groups), heads.split(C, self.config.n_groups)
        if self.config.n_groups > 1 and self.n_heads > self.units:  # shares are no longer even
            index = self._groups().to(B.device)
            B, C = B[:, :, index], C[:, :, index]
        return _Projected(
            heads.split(x, self.n_heads), heads.split(z, self.n_heads), heads.visible(dt, mask), B, C, conv
        )

    def _log_a(self, dt: Tensor) -> Tensor:
        """Δ A, (batch, length, heads, 1), and -inf where A is: also at Δ = 0, and with no gradient to Δ."""
        A = self.A()
        dead = torch.isneginf(A)
        return (dt * A.masked_fill(dead, 0)).masked_fill(dead, -math.inf)[..., None]

    def _finish(self, y: Tensor, p: _Projected, dtype: torch.dtype) -> Tensor:
        y = (at_least_float32(y) + at_least_float32(self.D)[:, None] * p.x) * F.silu(at_least_float32(p.z))
        if self.norm_weight is not None:
            power = y.square().mean(-1) @ self._norm_groups().to(y.device, y.dtype).mT
            y = y * torch.rsqrt(power + self.config.norm_eps)[..., None] * self.norm_weight.to(y.dtype)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: Mamba2State | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Mamba2State]:
        conv, h = state if state is not None else (None, None)
        p = self._project(x, conv, mask, reset)
        y, h = ops.gated_linear_attention(
            p.C, p.B, p.dt[..., None] * p.x, self._log_a(p.dt), h0=h, reset=reset, return_final_state=True
        )
        return self._finish(y, p, x.dtype), Mamba2State(p.conv, h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x)
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        return heads.matrix_coefficients(self._log_a(p.dt), p.B, p.x, ones[:, None], zeros[:, None], p.dt)

    def decode(
        self, states: Float[Tensor, "batch length heads d_state d_head"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x)
        return self._finish(heads.read(per_head(p.C, p.x), states), p, x.dtype)
