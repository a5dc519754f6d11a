"""minGRU (Feng et al. 2024, arXiv 2410.01201): a GRU whose gate and candidate do not look at the state.

    z_t = σ(W_z x_t + b_z)        h̃_t = g(W_h x_t + b_h)        h_t = (1 - z_t) h_{t-1} + z_t h̃_t        y = W_out h
    g(v) = v + ½ for v ≥ 0, σ(v) below: continuous and positive, which the authors' form in log space needs. Ours runs the recurrence
    itself, so that g may be left out (activation "none": the authors' plain form).

    x, y: (batch, length, d_model)   z, h̃, h: (batch, length, width), width = expand · d_model   state: h (batch, width), float32

W_out is always there (the authors have it where the width is not d_model), as is the bias of their linear layers.

Polarization pins width channels: a = 1 first, a = 0 last, the learned ones between, one of each of width + 2 (append) or of width
(replace: there is no order among them; the first and the last give way). The input weight of a learned channel is 1 - a; a pinned one
keeps z_t, so that all rows of W_z live: h_t = h_{t-1} + z_t h̃_t at one, h_t = z_t h̃_t at zero.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class MinimalConfig(MixerConfig):
    """expand: width of the state over d_model. activation: of the candidate state."""

    expand: int = Field(default=1, ge=1)
    activation: Literal["g", "none"] = "g"
    bias: bool = True


class MinimalState(NamedTuple):
    h: Float[Tensor, "batch width"]


class Gated(NamedTuple):
    """a_t, the input weight (dt) and the candidate state, each (batch, length, width), at least float32."""

    a: Tensor
    dt: Tensor
    b: Tensor


class MinimalRecurrence(Mixer):
    """What minGRU and minLSTM share: h_t = a_t h_{t-1} + dt_t h̃_t of width channels, then a linear layer."""

    config: MinimalConfig
    unit: ClassVar[str] = "a width channel"

    def __init__(self, d_model: int, config: MinimalConfig, polarization: Polarization | None) -> None:
        super().__init__(d_model, config, polarization)
        self.units = config.expand * d_model
        self.learned, self.width = heads.sizes(self.units, polarization)
        self.to_hidden = nn.Linear(d_model, self.width, bias=config.bias)
        self.to_out = nn.Linear(self.width, d_model, bias=config.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers at their default; the output smaller by the square root of the number of residual branches."""
        for linear in self.children():
            linear.reset_parameters()  # type: ignore[operator]
        for p in self.to_out.parameters():
            p.div_(math.sqrt(self.config.n_residuals))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log a (batch, length, learned), the input weights of these, and those of the pinned channels, ones first."""
        raise NotImplementedError

    def _gated(self, x: Tensor) -> Gated:
        v = at_least_float32(self.to_hidden(x))
        b = torch.where(v >= 0, v + 0.5, torch.sigmoid(v)) if self.config.activation == "g" else v
        log_a, dt, pinned = self._gates(x)
        if self.polarization is None:
            return Gated(torch.exp(log_a), dt, b)
        ones = self.polarization.ones
        return Gated(
            torch.exp(self.polarization.join(log_a)), torch.cat([pinned[..., :ones], dt, pinned[..., ones:]], -1), b
        )

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: MinimalState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], MinimalState]:
        p = self._gated(x)
        u = heads.visible(p.dt * p.b, mask)
        h, last = ops.linear_scan(p.a, u, h0=None if state is None else state.h, reset=reset, return_final_state=True)
        return self.decode(h, x), MinimalState(last)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """dt is the input weight of each channel, b_t = h̃_t."""
        p = self._gated(x)
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        return Coefficients(
            batch=x.shape[0], length=x.shape[1], state_shape=(self.width,),
            a_at=lambda t: p.a[:, t], u_at=lambda t: p.dt[:, t] * p.b[:, t], b_at=lambda t: p.b[:, t],
            dt=p.dt, ones=ones, zeros=zeros,
        )  # fmt: skip

    def decode(
        self, states: Float[Tensor, "batch length width"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return self.to_out(states.to(x.dtype))


class MinGRU(MinimalRecurrence):
    config_class: ClassVar[type[MixerConfig]] = MinimalConfig
    title: ClassVar[str] = "minGRU"
    source: ClassVar[str] = "Feng et al. 2024, arXiv 2410.01201"
    transition: ClassVar[str] = "real diagonal, input-dependent"

    def __init__(self, d_model: int, config: MinimalConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.to_gate = nn.Linear(d_model, self.width, bias=config.bias)
        self.reset_parameters()

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate = at_least_float32(self.to_gate(x))
        first = self.polarization.ones if self.polarization else 0
        last = self.width - first - self.learned
        ones, learned, zeros = gate.split([first, self.learned, last], -1)
        return F.logsigmoid(-learned), torch.sigmoid(learned), torch.sigmoid(torch.cat([ones, zeros], -1))
