"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048), its time mixing: a running softmax mean of values, with decay.

    s_t = e^{-w} s_{t-1} + e^{k_t}        a_t = e^{-w} s_{t-1} / s_t        Δ_t = e^{k_t} / s_t        b_t = v_t,  so a_t + Δ_t = 1
    y_t = W_o (σ(r_t) ⊙ (weighted mean of h_{t-1}, weight s_{t-1}, and of v_t, weight e^{u + k_t}))
    r, k, v = W (μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}) with a μ for each of the three ("token shift");  w = exp(time_decay)

    x, y: (batch, length, d_model)   r, k, v, a, h: (batch, length, width)   w, u: (width,)
    state: the last token, and numerator, denominator and running maximum of the mean, each (batch, width), float32

It reads before it writes: y_t sees h_{t-1} and the current token. a_t depends on all earlier keys: outside Theorem 3.1.

Polarization pins the decay e^{-w} of width channels, since a_t itself is normalised: w = 0 (a running softmax mean of everything) first,
w = ∞ (the last token alone) last, the learned ones between. `Coefficients.decay` holds what is pinned; in a channel at one a_t is
s_{t-1} / s_t < 1, in one at zero 0. Keys, values, receptances, bonus and output are ordinary rows. One of each is 2 of width + 2 (append), or 2 of
width (replace: in place of the slowest and the fastest).
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, PlacedConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class RWKV4Config(PlacedConfig):
    """width: of the state; None: d_model. layer, n_layers: mixing and decays begin differently at each depth."""

    width: int | None = Field(default=None, ge=1)


class RWKV4State(NamedTuple):
    shift: Float[Tensor, "batch d_model"]
    numerator: Float[Tensor, "batch width"]
    denominator: Float[Tensor, "batch width"]
    maximum: Float[Tensor, "batch width"]


class RWKV4(Mixer):
    config_class: ClassVar[type[MixerConfig]] = RWKV4Config
    config: RWKV4Config
    title: ClassVar[str] = "RWKV-4"
    source: ClassVar[str] = "Peng et al. 2023, arXiv 2305.13048"
    transition: ClassVar[str] = "real diagonal, constant decay normalised by all keys so far"
    unit: ClassVar[str] = "the decay of a width channel"

    def __init__(self, d_model: int, config: RWKV4Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.units = config.width or d_model
        learned, self.width = heads.sizes(self.units, polarization)
        self.time_decay = nn.Parameter(torch.empty(learned))
        self.time_first = nn.Parameter(torch.empty(self.width))
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_value = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.key = nn.Linear(d_model, self.width, bias=False)
        self.value = nn.Linear(d_model, self.width, bias=False)
        self.receptance = nn.Linear(d_model, self.width, bias=False)
        self.output = nn.Linear(self.width, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: the author's RWKV-LM, RWKV-v4/src/model.py (RWKV_TimeMix, RWKV_Init). Keys, receptances and output begin at zero: a
        fresh layer does nothing. Values are orthogonal, with gain √(rows / columns) where there are more rows."""
        c, device = self.config, self.time_decay.device
        for linear in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear.weight)
        nn.init.orthogonal_(self.value.weight, gain=math.sqrt(max(1.0, self.width / self.d_model)))
        place = torch.arange(self.units, dtype=torch.float32, device=device) / max(1, self.units - 1)
        decay = -5 + 8 * place ** (0.7 + 1.3 * c.depth)  # slowest first
        if self.polarization and self.polarization.mode == "replace":
            decay = decay[self.polarization.ones : self.units - self.polarization.zeros]
        self.time_decay.copy_(decay)
        channel = torch.arange(self.width, device=device)
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        part = torch.arange(self.d_model, dtype=torch.float32, device=device) / self.d_model
        rest = 1 - c.layer / c.n_layers
        self.time_mix_key.copy_(part**rest)
        self.time_mix_value.copy_(part**rest + 0.3 * c.depth)
        self.time_mix_receptance.copy_(part ** (0.5 * rest))

    def no_weight_decay(self) -> set[str]:
        return {"time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance"}

    def log_decay(self) -> Float[Tensor, "width"]:
        """-w, 0 for the channels at one and -inf for those at zero."""
        return heads.pinned(-torch.exp(at_least_float32(self.time_decay)), self.polarization)

    def _project(self, x: Tensor, last: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, k, v and the token that the next one shifts in."""
        before, last = heads.token_shift(x, last, reset)
        r, k, v = (
            linear(x * mix.to(x.dtype) + before * (1 - mix).to(x.dtype))
            for linear, mix in (
                (self.receptance, self.time_mix_receptance),
                (self.key, self.time_mix_key),
                (self.value, self.time_mix_value),
            )
        )
        return r, k, v, last

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: RWKV4State | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], RWKV4State]:
        r, k, v, last = self._project(heads.visible(x, mask), None if state is None else state.shift, reset)
        if mask is not None:  # a key of -inf has no weight
            k = k.masked_fill(~mask[..., None], -math.inf)
        y, mean = ops.rwkv4_attention(
            r, k, v, -self.log_decay(), at_least_float32(self.time_first),
            state=None if state is None else state[1:], reset=reset, return_final_state=True,
        )  # fmt: skip
        return self.output(y), RWKV4State(last, *mean)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, k, v and log s_t of a whole sequence, at least float32."""
        r, k, v = (at_least_float32(p) for p in self._project(x, None, None)[:3])
        log_decay, log_s = self.log_decay(), []
        now = torch.full_like(k[:, 0], -math.inf)
        for t in range(k.shape[1]):
            now = torch.logaddexp(now + log_decay, k[:, t])
            log_s.append(now)
        return r, k, v, torch.stack(log_s, 1)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """dt is Δ_t = 1 - a_t of each channel, b_t = v_t; decay is e^{-w}."""
        _, k, v, log_s = self._weights(x)
        a = torch.exp(_before(log_s, -math.inf) + self.log_decay() - log_s)
        dt = torch.exp(k - log_s)
        ones, zeros = heads.pinned_masks(self.units, self.polarization)
        return Coefficients(
            batch=x.shape[0], length=x.shape[1], state_shape=(self.width,),
            a_at=lambda t: a[:, t], u_at=lambda t: dt[:, t] * v[:, t], b_at=lambda t: v[:, t],
            dt=dt, ones=ones, zeros=zeros, decay=torch.exp(self.log_decay()),
        )  # fmt: skip

    def decode(
        self, states: Float[Tensor, "batch length width"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        r, k, v, log_s = self._weights(x)
        past = torch.sigmoid(_before(log_s, -math.inf) - at_least_float32(self.time_first) - k)  # s / (s + e^{u + k})
        y = torch.sigmoid(r) * (past * _before(states, 0.0) + (1 - past) * v)
        return self.output(y.to(x.dtype))


def _before(x: Tensor, start: float) -> Tensor:
    """x_{t-1}, with `start` before the first token."""
    return torch.cat([torch.full_like(x[:, :1], start), x[:, :-1]], 1)
