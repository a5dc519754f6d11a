"""The recurrent block of Griffin and Hawk (De et al. 2024, arXiv 2402.19427), and in it the RG-LRU.

    x' = conv(W_x x)        r_t = σ(W_r x'_t + b_r)        i_t = σ(W_i x'_t + b_i)      (W_r, W_i block-diagonal)
    a_t = exp(-8 softplus(Λ) r_t)        h_t = a_t h_{t-1} + √(1 - a_t²) (i_t x'_t)        y = W_out (gelu(W_y x) h)
    At the first token of a sequence, and at a reset, a_t = 0 and the factor before the input is 1.

    x, y: (batch, length, d_model)   x', r, i, a, h: (batch, length, width)   Λ: (width,)
    state: the last d_conv - 1 tokens of the convolution, h: (batch, width) float32, and whether the sequence has begun: (batch,) bool

The gradient of √(1 - a²) is cut off at 1000, as the authors do, or it would be infinite as a → 1.

Polarization pins width channels: a = 1 first, a = 0 last, the learned ones between, one of each of width + 2 (append) or of width
(replace: Λ starts at random, so there is no order; the first and the last give way). They keep the input gate. The factor √(1 - a²) would
shut a channel at one: its factor is that of a typical learned channel, 0.58 (a = 0.82: the middle of Λ's start at an open half of r); at
zero it is 1, which is √(1 - 0). The gate r has no rows for them. Appended channels have input gates that see only each other.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.errors import UserError
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients

FACTOR_AT_ONE = 0.58
STEEPEST = 1000.0  # the largest gradient of the square root


class GriffinConfig(MixerConfig):
    """width: of the recurrence; None: d_model. n_blocks: of the gates' weights; None: the authors' 16, or the largest power of two
    below that divides the width."""

    width: int | None = Field(default=None, ge=1)
    n_blocks: int | None = Field(default=None, ge=1)
    d_conv: int = Field(default=4, ge=1)


class GriffinState(NamedTuple):
    conv: Float[Tensor, "batch d_conv-1 width"]
    h: Float[Tensor, "batch width"]
    begun: Bool[Tensor, "batch"]


class _Gated(NamedTuple):
    a: Float[Tensor, "batch length width"]
    factor: Float[Tensor, "batch length width"]
    b: Float[Tensor, "batch length width"]
    conv: Tensor
    begun: Tensor


class Griffin(Mixer):
    config_class: ClassVar[type[MixerConfig]] = GriffinConfig
    config: GriffinConfig
    title: ClassVar[str] = "Griffin"
    source: ClassVar[str] = "De et al. 2024, arXiv 2402.19427"
    transition: ClassVar[str] = "real diagonal, input-dependent"
    unit: ClassVar[str] = "a width channel"

    def __init__(self, d_model: int, config: GriffinConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        units = config.width or d_model
        self.n_blocks = config.n_blocks or math.gcd(units, 16)
        if units % self.n_blocks:
            raise UserError(f"n_blocks ({self.n_blocks}) does not divide the width ({units})")
        self.units = units
        self.learned, self.width = heads.sizes(units, polarization)
        block = units // self.n_blocks
        self.linear_x = nn.Linear(d_model, self.width)
        self.linear_y = nn.Linear(d_model, self.width)
        self.linear_out = nn.Linear(self.width, d_model)
        self.conv_weight = nn.Parameter(torch.empty(self.width, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.width))
        # a row for every output of a gate, over the inputs of its block
        self.input_gate_weight = nn.Parameter(torch.empty(units, block))
        self.input_gate_bias = nn.Parameter(torch.empty(units))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(self.learned, block))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(self.learned))
        self.pinned_gate = nn.Linear(self.width - units, self.width - units) if self.width > units else None
        self.Lambda = nn.Parameter(torch.empty(self.learned))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: De et al. 2024, Sections 2.4 and 3.2, and recurrentgemma: exp(-softplus(Λ)) uniform in area on the ring [0.9, 0.999]."""
        for linear in (self.linear_x, self.linear_y):
            nn.init.normal_(linear.weight, std=self.d_model**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.linear_out.weight, std=(self.width * self.config.n_residuals) ** -0.5)
        nn.init.zeros_(self.linear_out.bias)
        nn.init.normal_(self.conv_weight, std=math.sqrt(0.01 / self.config.d_conv))
        nn.init.zeros_(self.conv_bias)
        for weight, bias in (
            (self.input_gate_weight, self.input_gate_bias),
            (self.recurrent_gate_weight, self.recurrent_gate_bias),
            *(((self.pinned_gate.weight, self.pinned_gate.bias),) if self.pinned_gate else ()),
        ):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            nn.init.zeros_(bias)
        decay = -0.5 * torch.empty_like(self.Lambda).uniform_(0.9**2, 0.999**2).log()
        self.Lambda.copy_(torch.expm1(decay).log())  # softplus(Λ) = decay

    def no_weight_decay(self) -> set[str]:
        return {"Lambda"}

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations of i, for all channels, and of r, for the learned ones."""
        ones, zeros = (self.polarization.ones, self.polarization.zeros) if self.polarization else (0, 0)
        if self.pinned_gate is None:  # all channels are in blocks; the pinned ones have no recurrent gate
            recurrent = _blocks(x, F.pad(self.recurrent_gate_weight, (0, 0, ones, zeros)), self.n_blocks)
            recurrent = recurrent[..., ones : self.width - zeros] + self.recurrent_gate_bias
            return _blocks(x, self.input_gate_weight, self.n_blocks) + self.input_gate_bias, recurrent
        first, learned, last = x.split([ones, self.learned, zeros], -1)
        gate = _blocks(learned, self.input_gate_weight, self.n_blocks) + self.input_gate_bias
        pinned = self.pinned_gate(torch.cat([first, last], -1))
        recurrent = _blocks(learned, self.recurrent_gate_weight, self.n_blocks) + self.recurrent_gate_bias
        return torch.cat([pinned[..., :ones], gate, pinned[..., ones:]], -1), recurrent

    def _project(self, x: Tensor, state: GriffinState | None, mask: Tensor | None, reset: Tensor | None) -> _Gated:
        """Everything before the scan; padding writes nothing."""
        x = heads.visible(self.linear_x(x), mask)
        x, conv = ops.causal_conv1d(
            x, self.conv_weight, self.conv_bias, initial=None if state is None else state.conv, reset=reset, return_final_state=True,
        )  # fmt: skip
        gate, recurrent = self._gates(x)
        log_a = -8 * F.softplus(at_least_float32(self.Lambda)) * torch.sigmoid(at_least_float32(recurrent))
        at, following = heads.positions(x, None if state is None else state.begun.long(), mask, reset)
        first = (at == 0)[..., None]
        factor = _safe_sqrt(-torch.expm1(2 * log_a)).masked_fill(first, 1)
        a = torch.exp(heads.pinned(log_a.masked_fill(first, -math.inf), self.polarization))
        if self.polarization:
            factor = F.pad(factor, (self.polarization.ones, 0), value=FACTOR_AT_ONE)
            factor = F.pad(factor, (0, self.polarization.zeros), value=1.0)
        b = heads.visible(at_least_float32(torch.sigmoid(gate) * x), mask)
        return _Gated(a, factor, b, conv, following > 0)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: GriffinState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], GriffinState]:
        p = self._project(x, state, mask, reset)
        h, last = ops.linear_scan(
            p.a, p.factor * p.b, h0=None if state is None else state.h, reset=reset, return_final_state=True
        )
        return self._out(h, x), GriffinState(p.conv, last, p.begun)

    def _out(self, h: Tensor, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_y(x), approximate="tanh") * h.to(x.dtype))

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """dt is the factor √(1 - a²), b_t the gated input. a_1 = 0, as the authors have it (it meets only h_0 = 0)."""
        p = self._project(x, None, None, None)
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        return Coefficients(
            batch=x.shape[0], length=x.shape[1], state_shape=(self.width,),
            a_at=lambda t: p.a[:, t], u_at=lambda t: p.factor[:, t] * p.b[:, t], b_at=lambda t: p.b[:, t],
            dt=p.factor, ones=ones, zeros=zeros,
        )  # fmt: skip

    def decode(
        self, states: Float[Tensor, "batch length width"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return self._out(states, x)


def _blocks(x: Tensor, rows: Float[Tensor, "width block"], n_blocks: int) -> Tensor:
    """A block-diagonal matrix, given by the rows of its blocks, times x (..., width)."""
    x = x.unflatten(-1, (n_blocks, -1))
    return torch.einsum("...nj,nij->...ni", x, rows.to(x.dtype).unflatten(0, (n_blocks, -1))).flatten(-2)


def _safe_sqrt(x: Tensor) -> Tensor:
    """√x, its gradient at most STEEPEST: below (1/(2 STEEPEST))² the square root is continued by its tangent."""
    flat = x < 0.25 / STEEPEST**2
    root = torch.sqrt(x.masked_fill(flat, 1))
    return torch.where(flat, x.detach().sqrt() + STEEPEST * (x - x.detach()), root)
