"""minLSTM (Feng et al. 2024, arXiv 2410.01201): an LSTM whose gates and candidate do not look at the state.

    f_t = σ(W_f x_t + b_f)     i_t = σ(W_i x_t + b_i)     f'_t = f_t / (f_t + i_t)     i'_t = i_t / (f_t + i_t)
    h̃_t = g(W_h x_t + b_h)     h_t = f'_t h_{t-1} + i'_t h̃_t     y = W_out h      (g as in minGRU)

    x, y: (batch, length, d_model)   f, i, h̃, h: (batch, length, width), width = expand · d_model   state: h (batch, width), float32

Polarization pins width channels: a = 1 first, a = 0 last, the learned ones between, one of each of width + 2 (append) or of width
(replace: there is no order among them; the first and the last give way). The input weight i' of a learned channel is 1 - f'; a pinned
one keeps its input gate, i_t, which is what i' is at a typical f = ½. W_f has no rows for pinned channels.
"""

from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.mixers.base import MixerConfig, at_least_float32
from ssmlens.mixers.mingru import MinimalConfig, MinimalRecurrence
from ssmlens.polarization import Polarization


class MinLSTMConfig(MinimalConfig):
    """forget_bias: added to the start of b_f. The authors advise a larger one where training starts slowly; needs `bias`."""

    forget_bias: float = 0.0

    @model_validator(mode="after")
    def _has_bias(self) -> "MinLSTMConfig":
        if self.forget_bias and not self.bias:
            raise ValueError("forget_bias is given, but bias is off")
        return self


class MinLSTM(MinimalRecurrence):
    config_class: ClassVar[type[MixerConfig]] = MinLSTMConfig
    config: MinLSTMConfig
    title: ClassVar[str] = "minLSTM"
    source: ClassVar[str] = "Feng et al. 2024, arXiv 2410.01201"
    transition: ClassVar[str] = "real diagonal, input-dependent"

    def __init__(self, d_model: int, config: MinLSTMConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.to_forget = nn.Linear(d_model, self.learned, bias=config.bias)
        self.to_input = nn.Linear(d_model, self.width, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.to_forget.bias is not None:
            self.to_forget.bias.add_(self.config.forget_bias)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.polarization.ones if self.polarization else 0
        forget, gate = at_least_float32(self.to_forget(x)), at_least_float32(self.to_input(x))
        ones, gate, zeros = gate.split([first, self.learned, self.width - first - self.learned], -1)
        difference = F.softplus(-forget) - F.softplus(-gate)  # log i - log f, so that f' = σ(-difference)
        return F.logsigmoid(-difference), torch.sigmoid(difference), torch.sigmoid(torch.cat([ones, zeros], -1))
