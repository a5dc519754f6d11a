"""RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621): linear attention with one constant decay for each head.

    a_t = γ_h = 1 - 2^{-5-h}        Δ_t b_t(x_t) = k_t v_tᵀ        c_t(H_t) = silu(W_g x_t) ⊙ norm(H_tᵀ q_t), then projected
    q_t, k_t = R_t W_q x_t, R_t W_k x_t / √d_key, R_t a rotation by the angles t · 10000^{-i/(d_key/2 - 1)} of neighbouring pairs:
    with γ it makes the authors' relative position encoding (xPos with γ for its scale). norm: RMS over each head's values,
    without a weight.

    q, k: (batch, length, heads, d_key)   v, g: (batch, length, heads, d_value = expand · d_key)   γ: (heads,)
    state: how many tokens there were (the angle of the next), and H: (batch, heads, d_key, d_value), float32

γ is constant ("fixed", the authors') or exp(-exp(w_h)) with w_h learned from there ("learned"). The authors' code also divides
by two sums of weights, which the norm undoes; here only the norm remains, so results differ by as much as its eps matters.

Polarization pins heads: γ = 1 for the first, γ = 0 for the last, the learned ones between, from fast to slow. Their queries, keys,
values and gates are ordinary rows of the projections. With 8 heads, one of each takes 2 of 10 (append) or 2 of 8 (replace) of the
state; "replace" takes the slowest for the ones and the fastest for the zeros. Each head is normalised alone: a new head whose
columns of the output projection are zero changes nothing.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class RetNetConfig(MixerConfig):
    """d_key None: d_model / n_heads, rounded up to an even number. expand: d_value / d_key."""

    n_heads: int = Field(default=8, ge=1)
    d_key: int | None = Field(default=None, ge=2)
    expand: int = Field(default=2, ge=1)
    decay: Literal["fixed", "learned"] = "fixed"
    norm_eps: float = Field(default=1e-6, gt=0)

    @field_validator("d_key")
    @classmethod
    def _pairs(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError(f"pairs of its dimensions are rotated, so it must be even, not {value}")
        return value


class RetNetState(NamedTuple):
    position: Int[Tensor, " batch"]
    h: Float[Tensor, "batch heads d_key d_value"]


class _Projected(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    position: Tensor


class RetNet(Mixer):
    config_class: ClassVar[type[MixerConfig]] = RetNetConfig
    config: RetNetConfig
    title: ClassVar[str] = "RetNet"
    source: ClassVar[str] = "Sun et al. 2023, arXiv 2307.08621"
    transition: ClassVar[str] = "real scalar for each head, constant"
    unit: ClassVar[str] = "a head"

    def __init__(self, d_model: int, config: RetNetConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.learned, self.n_heads = heads.sizes(config.n_heads, polarization)
        self.d_key = config.d_key or 2 * math.ceil(d_model / config.n_heads / 2)
        self.d_value = config.expand * self.d_key

        self.q_proj = nn.Linear(d_model, self.n_heads * self.d_key, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.d_key, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.d_value, bias=False)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.d_value, bias=False)
        self.out_proj = nn.Linear(self.n_heads * self.d_value, d_model, bias=False)
        if config.decay == "learned":
            self.decay = nn.Parameter(torch.empty(self.learned))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: the authors' MultiScaleRetention (microsoft/torchscale): Xavier's with gain 2^{-2.5}, 2^{-1} for the output. Without
        their DeepNorm option, off by default, which makes v and the output smaller by a root of the depth."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        self.out_proj.weight /= math.sqrt(self.config.n_residuals)
        if self.config.decay == "learned":
            self.decay.copy_(torch.log(-self._authors_log_gamma()))

    def no_weight_decay(self) -> set[str]:
        return {"decay"} if self.config.decay == "learned" else set()

    def _authors_log_gamma(self) -> Tensor:
        """log(1 - 2^{-5-h}) of the learned heads, float64."""
        first = self.polarization.zeros if self.polarization and self.polarization.mode == "replace" else 0
        h = torch.arange(first, first + self.learned, dtype=torch.float64)
        return torch.log1p(-torch.exp2(-5 - h))

    def log_gamma(self) -> Float[Tensor, " heads"]:
        """log γ of every head, float32 (float64 for a float64 model), pinned ones included."""
        if self.config.decay == "learned":
            log_gamma = -torch.exp(at_least_float32(self.decay))
        else:
            weight = self.q_proj.weight
            log_gamma = self._authors_log_gamma().to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return heads.pinned(log_gamma, self.polarization)

    def _project(
        self, x: Tensor, position: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> _Projected:
        q, k, v, g = (
            heads.split(linear(x), self.n_heads) for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        at, position = heads.positions(x, position, mask, reset)
        by = heads.rotation(at, self.d_key // 2, 10000, 1)
        k = heads.visible(k, mask) * self.d_key**-0.5
        return _Projected(rotated(q, by), rotated(k, by), v, g, position)

    def _log_a(self, x: Tensor) -> Tensor:
        return self.log_gamma()[:, None].expand(*x.shape[:2], self.n_heads, 1)

    def _finish(self, y: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        y = heads.head_rms_norm(y, None, self.config.norm_eps) * F.silu(g)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: RetNetState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], RetNetState]:
        position, h = state if state is not None else (None, None)
        p = self._project(x, position, mask, reset)
        y, h = ops.gated_linear_attention(p.q, p.k, p.v, self._log_a(x), h0=h, reset=reset, return_final_state=True)
        return self._finish(y, p.g, x.dtype), RetNetState(p.position, h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x)
        ones, zeros = heads.pinned_masks(self.config.n_heads, self.polarization)
        return heads.matrix_coefficients(self._log_a(x), p.k, p.v, ones[:, None], zeros[:, None])

    def decode(
        self, states: Float[Tensor, "batch length heads d_key d_value"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x)
        return self._finish(heads.read(p.q, states), p.g, x.dtype)


def rotated(x: Float[Tensor, "batch length heads d"], by: tuple[Tensor, Tensor]) -> Tensor:
    """Neighbouring pairs of the last dimension turned."""
    return torch.stack(heads.turned(x[..., ::2], x[..., 1::2], by), -1).flatten(-2)
