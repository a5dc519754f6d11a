"""HGRN2 (Qin et al. 2024, arXiv 2404.07904): a gated linear RNN whose state is expanded by an outer product.

    a_t = f_t = β + (1 - β) σ(W_f x_t)        Δ_t b_t(x_t) = (1 - f_t) v_tᵀ        c_t(H_t) = W_o norm(H_tᵀ q_t)
    q_t = silu(W_q x_t), v_t = W_v x_t; β, one for each key dimension, is the least that a layer remembers. norm: RMS over all heads
    together, with a weight.

    q, f: (batch, length, heads, d_key)   v: (batch, length, heads, d_value)   β: (heads, learned)
    state: H (batch, heads, d_key, d_value), float32

The authors tie the β of all layers: β_l is the sum over layers 1..l of a softmax over layers (of one parameter for each layer and
dimension), so it grows with depth, and the first layer has none. A mixer knows only itself: here β = σ(b) with b learned for each
layer, beginning where theirs does (softmax of zeros: β = layer / n_layers), and `set_lower_bound` takes over their values
exactly; that β stays larger in deeper layers is then no longer enforced.

Polarization pins key dimensions of each head: a = 1 for the first, a = 0 for the last. The input weight 1 - f_t would be 0 and 1
there; a pinned dimension keeps one of its own, σ(-W_f x_t), what it would be without the pin: its rows of W_f gate the input and
nothing else. b has no entries for them. With d_model = 128 (one head of 128), one of each takes 2 of 130 (append) or 2 of 128
(replace) of the state. The norm is over values: key dimensions whose queries are zero change nothing.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, PlacedConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class HGRN2Config(PlacedConfig):
    """d_head: width of a head, of keys and values, at most, where it does not divide d_model (the authors' expansion ratio).
    lower_bound: False leaves β out. layer, n_layers: where β begins; the first layer has none."""

    d_head: int = Field(default=128, ge=1)
    lower_bound: bool = True
    norm_eps: float = Field(default=1e-5, gt=0)


class HGRN2State(NamedTuple):
    h: Float[Tensor, "batch heads d_key d_value"]


class _Projected(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_a: Tensor


class HGRN2(Mixer):
    config_class: ClassVar[type[MixerConfig]] = HGRN2Config
    config: HGRN2Config
    title: ClassVar[str] = "HGRN2"
    source: ClassVar[str] = "Qin et al. 2024, arXiv 2404.07904"
    transition: ClassVar[str] = "real diagonal over key dimensions, input-dependent, with a learned floor"
    unit: ClassVar[str] = "a key dimension of each head"

    def __init__(self, d_model: int, config: HGRN2Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.n_heads, self.d_value = heads.heads_of(d_model, config.d_head)
        self.units = self.d_value
        self.learned, self.d_key = heads.sizes(self.units, polarization)
        n = self.n_heads

        self.q_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.f_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.v_proj = nn.Linear(d_model, n * self.d_value, bias=False)
        self.floor = nn.Parameter(torch.empty(n, self.learned)) if config.lower_bound and config.layer else None
        self.norm_weight = nn.Parameter(torch.empty(n * self.d_value))
        self.out_proj = nn.Linear(n * self.d_value, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02²) for the projections, as the authors' language models."""
        for linear in (self.q_proj, self.f_proj, self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.out_proj.weight /= math.sqrt(self.config.n_residuals)
        nn.init.ones_(self.norm_weight)
        if self.floor is not None:
            beta = self.config.layer / self.config.n_layers
            nn.init.constant_(self.floor, math.log(beta / (1 - beta)))

    @torch.no_grad()
    def set_lower_bound(self, beta: Float[Tensor, "heads learned"]) -> None:
        """β of every learned dimension, each in [0, 1]. Raises ValueError elsewhere, and in a layer without β."""
        if self.floor is None:
            raise ValueError("this layer has no lower bound (layer 0, or lower_bound=False)")
        if not bool(((beta >= 0) & (beta <= 1)).all()):
            raise ValueError("a lower bound must lie in [0, 1]")
        self.floor.copy_(torch.logit(beta.to(self.floor.device, torch.float64)))

    def no_weight_decay(self) -> set[str]:
        return {"norm_weight", *(["floor"] if self.floor is not None else [])}

    def _project(self, x: Tensor, mask: Tensor | None) -> _Projected:
        q, f, v = (heads.split(linear(x), self.n_heads) for linear in (self.q_proj, self.f_proj, self.v_proj))
        f = at_least_float32(f)
        k = torch.sigmoid(-f)
        ones = self.polarization.ones if self.polarization else 0
        first, own, last = k.split([ones, self.learned, self.d_key - ones - self.learned], dim=-1)
        log_a = F.logsigmoid(f[..., ones : ones + self.learned])
        if self.floor is not None:
            floor = at_least_float32(self.floor)
            log_a = torch.logaddexp(F.logsigmoid(floor), F.logsigmoid(-floor) + log_a)
            own = own * torch.sigmoid(-floor)  # 1 - f = (1 - β) σ(-W_f x), without subtracting
        k = torch.cat([first, own, last], -1)
        return _Projected(F.silu(q), heads.visible(k, mask), v, heads.pinned(log_a, self.polarization))

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out_proj(heads.head_rms_norm(y.flatten(2), self.norm_weight, self.config.norm_eps).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: HGRN2State | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], HGRN2State]:
        p = self._project(x, mask)
        h0 = None if state is None else state.h
        y, h = ops.gated_linear_attention(p.q, p.k, p.v, p.log_a, h0=h0, reset=reset, return_final_state=True)
        return self._finish(y, x.dtype), HGRN2State(h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x, None)
        return heads.matrix_coefficients(p.log_a, p.k, p.v, *heads.pinned_masks(self.units, self.polarization))

    def decode(
        self, states: Float[Tensor, "batch length heads d_key d_value"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return self._finish(heads.read(self._project(x, None).q, states), x.dtype)
