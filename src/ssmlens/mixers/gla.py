"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635): a decay for each key dimension, from the token.

    a_t = σ(W₂ W₁ x_t + b)^{1/τ}        Δ_t b_t(x_t) = k_t v_tᵀ        c_t(H_t) = silu(W_g x_t) ⊙ norm(H_tᵀ q_t), then projected
    q, k, v = W_q x_t / √d_key, W_k x_t, W_v x_t; W₂ W₁ has rank 16, τ = 16: a_t begins near σ(0)^{1/16} = 0.958.
    norm: RMS over each head's values, one weight (d_value) for all heads.

    q, k, a: (batch, length, heads, d_key)   v, g: (batch, length, heads, d_value)
    state: H (batch, heads, d_key, d_value), float32

Polarization pins key dimensions of each head: a = 1 for the first, a = 0 for the last. Their keys and queries are ordinary rows of
W_k and W_q; W₂ has no rows for them. With d_model = 128 (4 heads, d_key 16), one of each takes 2 of 18 (append) or 2 of 16
(replace) of the state. The norm is over values, so key dimensions whose queries are zero change nothing.
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
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class GLAConfig(MixerConfig):
    """d_key, d_value, of one head; None: half and all of d_model / n_heads, rounded up. gate_rank: the rank of W₂ W₁.
    temperature: τ; the larger, the slower the decay."""

    n_heads: int = Field(default=4, ge=1)
    d_key: int | None = Field(default=None, ge=1)
    d_value: int | None = Field(default=None, ge=1)
    gate_rank: int = Field(default=16, ge=1)
    temperature: float = Field(default=16, gt=0)
    norm_eps: float = Field(default=1e-5, gt=0)


class GLAState(NamedTuple):
    h: Float[Tensor, "batch heads d_key d_value"]


class _Projected(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    log_a: Tensor


class GLA(Mixer):
    config_class: ClassVar[type[MixerConfig]] = GLAConfig
    config: GLAConfig
    title: ClassVar[str] = "GLA"
    source: ClassVar[str] = "Yang et al. 2024, arXiv 2312.06635"
    transition: ClassVar[str] = "real diagonal over key dimensions, input-dependent"
    unit: ClassVar[str] = "a key dimension of each head"

    def __init__(self, d_model: int, config: GLAConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.n_heads = n = config.n_heads
        self.units = config.d_key or math.ceil(d_model / (2 * n))
        self.learned, self.d_key = heads.sizes(self.units, polarization)
        self.d_value = config.d_value or math.ceil(d_model / n)

        self.q_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.k_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.v_proj = nn.Linear(d_model, n * self.d_value, bias=False)
        self.g_proj = nn.Linear(d_model, n * self.d_value, bias=False)
        self.gate_down = nn.Linear(d_model, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, n * self.learned)
        self.norm_weight = nn.Parameter(torch.empty(self.d_value))
        self.out_proj = nn.Linear(n * self.d_value, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's with gain 2^{-2.5} everywhere, biases zero: the layer of flash-linear-attention, by the same first author, from its
        beginning until March 2025 (since then the library leaves layers to each model's N(0, 0.02²)). The paper's own release
        (berlino/gated_linear_attention) has the same for q, k and the gate, and N(0, 0.02²) for v, g and the output."""
        for linear in (
            self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gate_down, self.gate_up, self.out_proj
        ):  # fmt: skip
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        self.out_proj.weight /= math.sqrt(self.config.n_residuals)
        nn.init.zeros_(self.gate_up.bias)
        nn.init.ones_(self.norm_weight)

    def no_weight_decay(self) -> set[str]:
        return {"norm_weight"}

    def _project(self, x: Tensor, mask: Tensor | None) -> _Projected:
        q, k, v, g = (
            heads.split(linear(x), self.n_heads) for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        gate = heads.split(at_least_float32(self.gate_up(self.gate_down(x))), self.n_heads)
        log_a = heads.pinned(F.logsigmoid(gate) / self.config.temperature, self.polarization)
        return _Projected(q * self.units**-0.5, heads.visible(k, mask), v, g, log_a)

    def _finish(self, y: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        y = heads.head_rms_norm(y, self.norm_weight, self.config.norm_eps) * F.silu(g)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: GLAState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], GLAState]:
        p = self._project(x, mask)
        h0 = None if state is None else state.h
        y, h = ops.gated_linear_attention(p.q, p.k, p.v, p.log_a, h0=h0, reset=reset, return_final_state=True)
        return self._finish(y, p.g, x.dtype), GLAState(h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x, None)
        return heads.matrix_coefficients(p.log_a, p.k, p.v, *heads.pinned_masks(self.units, self.polarization))

    def decode(
        self, states: Float[Tensor, "batch length heads d_key d_value"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x, None)
        return self._finish(heads.read(p.q, states), p.g, x.dtype)
