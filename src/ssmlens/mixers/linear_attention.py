"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): attention with a kernel φ(q)ᵀφ(k) in place of exp(qᵀk).

    a_t = 1        Δ_t b_t(x_t) = φ(k_t) v_tᵀ        c_t(H_t) = H_tᵀ φ(q_t), divided by φ(q_t)ᵀ Σ_{s≤t} φ(k_s) with the normaliser
    q, k, v = W_q x_t, W_k x_t, W_v x_t; three feature maps φ, all positive:
      elu        1 + ELU(x)
      performer  exp(w_iᵀx - |x|²/2) / √m with m random w_i and x scaled by d^{-1/4}: φ(q)ᵀφ(k) estimates exp(qᵀk/√d) without
                 bias (Choromanski et al. 2021, arXiv 2009.14794)
      hedgehog   [softmax(M x), softmax(-M x)], M learned, one for q and one for k of each head, the identity at the
                 beginning (Zhang et al. 2024, arXiv 2402.04347)

    q, k: (batch, length, heads, d_head)   φ: (batch, length, heads, d_feature)   v: (batch, length, heads, d_head)
    state: H (batch, heads, d_feature, d_head + 1), float32; its last column, of a value that is always 1, is Σ φ(k_s) itself.
    Without the normaliser there is no such column.

Performer's w_i: m rows, orthogonal in blocks of d_head (each block the Q of a Gaussian matrix, uniform over rotations), with the
norms of Gaussian rows. They are a buffer, drawn from a generator of their own (`seed`), the same for all heads, and never redrawn.
The authors subtract the largest exponent, over all tokens for the keys: a token would depend on later ones. Here nothing is
subtracted; the exponent is at most |w_i|²/2, about d_head/2, which float32 holds up to heads of about 150. Their additive 10^-4 is kept.

Polarization pins feature dimensions of each head. Every learned a is one already, so a dimension at one adds capacity and no
new kind of memory; a dimension at zero holds φ(k_t) v_t alone: the current token counts twice. Their features are 1 + ELU
of rows of their own in W_q and W_k, under every map. "replace" takes rows of W_q, W_k (elu), random features (performer) or rows
of the softmaxes (hedgehog). With 4 heads of 32, one of each takes 2 of 34 (append) or 2 of 32 of the state.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients

FEATURE_FLOOR = 1e-4  # Performer's: no token has weight zero


class LinearAttentionConfig(MixerConfig):
    """d_head None: d_model / n_heads, rounded up. n_features (performer): m; None: d_head · ln d_head, its authors' choice.
    normalize: divide by the sum of the weights. eps is added to that sum."""

    n_heads: int = Field(default=4, ge=1)
    d_head: int | None = Field(default=None, ge=1)
    feature_map: Literal["elu", "performer", "hedgehog"] = "elu"
    n_features: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    normalize: bool = True
    eps: float = Field(default=1e-6, gt=0)
    bias: bool = True

    @model_validator(mode="after")
    def _features(self) -> "LinearAttentionConfig":
        if self.n_features is not None and self.feature_map != "performer":
            raise ValueError(f"n_features belongs to the feature map 'performer', not to {self.feature_map!r}")
        return self


class LinearAttentionState(NamedTuple):
    h: Float[Tensor, "batch heads d_feature d_head+normalize"]


class _Projected(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


class LinearAttention(Mixer):
    config_class: ClassVar[type[MixerConfig]] = LinearAttentionConfig
    config: LinearAttentionConfig
    title: ClassVar[str] = "Linear attention"
    source: ClassVar[str] = "Katharopoulos et al. 2020, arXiv 2006.16236"
    transition: ClassVar[str] = "identity"
    unit: ClassVar[str] = "a feature dimension of each head"
    projection: Tensor

    def __init__(self, d_model: int, config: LinearAttentionConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.n_heads = config.n_heads
        self.d_head = d = config.d_head or math.ceil(d_model / config.n_heads)
        self.units = {"elu": d, "hedgehog": 2 * d, "performer": config.n_features or max(1, int(d * math.log(d)))}[
            config.feature_map
        ]
        self.learned, self.d_feature = heads.sizes(self.units, polarization)
        rows = self.d_feature if config.feature_map == "elu" else d + (polarization.pinned if polarization else 0)

        self.q_proj = nn.Linear(d_model, self.n_heads * rows, bias=config.bias)
        self.k_proj = nn.Linear(d_model, self.n_heads * rows, bias=config.bias)
        self.v_proj = nn.Linear(d_model, self.n_heads * d, bias=config.bias)
        self.out_proj = nn.Linear(self.n_heads * d, d_model, bias=config.bias)
        if config.feature_map == "performer":
            self.register_buffer("projection", torch.empty(self.learned, d))
        if config.feature_map == "hedgehog":
            self.q_map = nn.Parameter(torch.empty(self.n_heads, math.ceil(self.learned / 2), d))
            self.k_map = nn.Parameter(torch.empty_like(self.q_map))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A linear layer's default for the projections (Katharopoulos et al.), identities for Hedgehog's maps."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            linear.reset_parameters()
        self.out_proj.weight /= math.sqrt(self.config.n_residuals)
        if self.config.feature_map == "performer":
            self.projection.copy_(orthogonal_features(self.learned, self.d_head, self.config.seed))
        if self.config.feature_map == "hedgehog":
            for M in (self.q_map, self.k_map):
                M.copy_(torch.eye(*M.shape[1:]).expand_as(M))

    def _features(self, x: Tensor, M: Tensor | None) -> Tensor:
        """φ of (batch, length, heads, rows), the rows of pinned dimensions first (ones) and last (zeros)."""
        x = at_least_float32(x)
        if self.config.feature_map == "elu":
            return one_plus_elu(x)
        ones = self.polarization.ones if self.polarization else 0
        first, x, last = x.split([ones, self.d_head, x.shape[-1] - ones - self.d_head], dim=-1)
        if M is None:
            phi = random_features(x, at_least_float32(self.projection))
        else:
            mapped = torch.einsum("blhd,hmd->blhm", x, at_least_float32(M))
            phi = torch.cat([mapped.softmax(-1), (-mapped[..., : self.learned // 2]).softmax(-1)], -1)
        return torch.cat([one_plus_elu(first), phi, one_plus_elu(last)], -1)

    def _project(self, x: Tensor, mask: Tensor | None) -> _Projected:
        q, k, v = (heads.split(p(x), self.n_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        M_q, M_k = (self.q_map, self.k_map) if self.config.feature_map == "hedgehog" else (None, None)
        v = at_least_float32(v)
        if self.config.normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return _Projected(self._features(q, M_q), heads.visible(self._features(k, M_k), mask), v)

    def _log_a(self, like: Tensor) -> Tensor:
        log_a = heads.pinned(like.new_zeros(self.learned), self.polarization)
        return log_a.expand(*like.shape[:2], self.n_heads, -1)

    def _finish(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.normalize:
            y = y[..., :-1] / (y[..., -1:] + self.config.eps)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: LinearAttentionState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], LinearAttentionState]:
        p = self._project(x, mask)
        h0 = None if state is None else state.h
        y, h = ops.gated_linear_attention(p.q, p.k, p.v, self._log_a(p.v), h0=h0, reset=reset, return_final_state=True)
        return self._finish(y, x.dtype), LinearAttentionState(h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x, None)
        return heads.matrix_coefficients(self._log_a(p.v), p.k, p.v, *heads.pinned_masks(self.units, self.polarization))

    def decode(
        self, states: Float[Tensor, "batch length heads d_feature d_value"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        return self._finish(heads.read(self._project(x, None).q, states), x.dtype)


def one_plus_elu(x: Tensor) -> Tensor:
    """1 + ELU(x), as x + 1 or exp(x): positive in float32 down to x = -100, where the sum would round to 0 at -17."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def random_features(x: Tensor, w: Tensor) -> Tensor:
    """(exp(w x - |x|²/2) + floor) / √m for x (..., d) scaled by d^{-1/4}, w: (m, d)."""
    x = x * x.shape[-1] ** -0.25
    exponent = x @ w.mT - x.square().sum(-1, keepdim=True) / 2
    return (exponent.exp() + FEATURE_FLOOR) / math.sqrt(len(w))


def orthogonal_features(m: int, d: int, seed: int) -> Tensor:
    """m random rows (m, d), float32: orthogonal in blocks of d, of the norms of Gaussian rows."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(m / d)):
        Q, R = torch.linalg.qr(torch.randn(d, d, generator=generator, device="cpu"))
        blocks.append(Q * R.diagonal().sign())  # these signs make Q uniform
    return torch.cat(blocks)[:m] * torch.randn(m, d, generator=generator, device="cpu").norm(dim=1, keepdim=True)
