"""RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892; version 6.0 of the code): decays and token shift from the token.

    a_t = exp(-exp(w + W₂ᵀ tanh(W₁ᵀ x^w_t)))        Δ_t b_t(x_t) = k_t v_tᵀ
    c_t = silu(g_t) ⊙ norm((H_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t), then projected
    x^j_t = x_t + (μ_j + M_jᵀ tanh(N_jᵀ x'_t)) ⊙ (x_{t-1} - x_t) for j in w, k, v, r, g, where x'_t = x_t + μ_x ⊙ (x_{t-1} - x_t);
    r, k, v, g = W x^j_t. The ranks are 32 (N, M) and 64 (W₁, W₂). Norm and bonus u are RWKV-5's.

    r, k, a: (batch, length, heads, d_key)   v, g: (batch, length, heads, d_head)   w: (heads, learned)   u: (heads, d_key)
    state: the last token, and H: (batch, heads, d_key, d_head), float32

Polarization pins key dimensions of each head: a = 1 for the first, a = 0 for the last; w and W₂ have no entries for them. Their
keys, receptances and bonus are ordinary rows. Since reading comes first, a dimension at zero shows the previous token (and, by
its bonus, the current one). With heads of 64, one of each takes 2 of 66 (append) or 2 of 64 (replace) of the state; "replace" takes
those that begin slowest for the ones, fastest for the zeros. The norm is over values: key dimensions whose receptance is zero
change nothing.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, PlacedConfig, at_least_float32
from ssmlens.mixers.rwkv5 import bonuses, decays, first_share
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class RWKV6Config(PlacedConfig):
    """d_head: at most, where it does not divide d_model. mix_rank: of N, M. decay_rank: of W₁, W₂.
    layer, n_layers: mixing, decays and bonus begin differently at each depth."""

    d_head: int = Field(default=64, ge=1)
    mix_rank: int = Field(default=32, ge=1)
    decay_rank: int = Field(default=64, ge=1)
    norm_eps: float = Field(default=64e-5, gt=0)


class RWKV6State(NamedTuple):
    shift: Float[Tensor, "batch d_model"]
    h: Float[Tensor, "batch heads d_key d_head"]


class _Projected(NamedTuple):
    r: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    log_a: Tensor
    last: Tensor


class RWKV6(Mixer):
    config_class: ClassVar[type[MixerConfig]] = RWKV6Config
    config: RWKV6Config
    title: ClassVar[str] = "RWKV-6"
    source: ClassVar[str] = "Peng et al. 2024, arXiv 2404.05892"
    transition: ClassVar[str] = "real diagonal over key dimensions, input-dependent"
    unit: ClassVar[str] = "a key dimension of each head"
    mixed: ClassVar[tuple[str, ...]] = ("w", "k", "v", "r", "g")  # the order of N's and M's parts

    def __init__(self, d_model: int, config: RWKV6Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.n_heads, self.d_head = heads.heads_of(d_model, config.d_head)
        self.learned = polarization.learned(self.d_head) if polarization else self.d_head
        self.d_key = polarization.total(self.d_head) if polarization else self.d_head
        n = self.n_heads

        self.mix = nn.ParameterDict({name: torch.empty(d_model) for name in ("x", *self.mixed)})
        self.mix_down = nn.Parameter(torch.empty(d_model, len(self.mixed) * config.mix_rank))
        self.mix_up = nn.Parameter(torch.empty(len(self.mixed), config.mix_rank, d_model))
        self.r_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.k_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.v_proj = nn.Linear(d_model, n * self.d_head, bias=False)
        self.g_proj = nn.Linear(d_model, n * self.d_head, bias=False)
        self.decay = nn.Parameter(torch.empty(n, self.learned))
        self.decay_down = nn.Parameter(torch.empty(d_model, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, n * self.learned))
        self.bonus = nn.Parameter(torch.empty(n, self.d_key))
        self.norm_weight = nn.Parameter(torch.empty(n, self.d_head))
        self.norm_bias = nn.Parameter(torch.empty(n, self.d_head))
        self.out_proj = nn.Linear(n * self.d_head, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' (RWKV-LM), by depth: mixing and decays begin constant, the output at zero, a layer at the identity."""
        share = first_share(self.d_model, self.config)
        starts = {
            "x": share,
            "w": share,
            "k": share,
            "v": share + 0.3 * self.config.depth,
            "r": share**0.5,
            "g": share**0.5,
        }
        for name, start in starts.items():
            self.mix[name].copy_(1 - start)
        for linear, gain in ((self.r_proj, 1), (self.k_proj, 0.1), (self.v_proj, 1), (self.g_proj, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)
        nn.init.zeros_(self.out_proj.weight)
        self.decay.copy_(decays(self.n_heads, self.d_head, self.learned, self.config, self.polarization))
        self.bonus.copy_(bonuses(self.n_heads, self.d_key, self.config))
        nn.init.constant_(self.norm_weight, ((1 + self.config.layer) / self.config.n_layers) ** 0.7)
        nn.init.zeros_(self.norm_bias)

    def no_weight_decay(self) -> set[str]:
        low_rank = {"mix_down", "mix_up", "decay_down", "decay_up"}
        return {"decay", "bonus", "norm_weight", "norm_bias", *low_rank, *(f"mix.{name}" for name in self.mix)}

    def _project(
        self, x: Tensor, last: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> _Projected:
        x = heads.visible(x, mask)
        previous, last = heads.token_shift(x, last, reset)
        change = previous - x
        inner = torch.tanh((x + change * self.mix["x"].to(x.dtype)) @ self.mix_down)
        more = torch.einsum("bljr,jrd->jbld", inner.unflatten(-1, (len(self.mixed), -1)), self.mix_up)
        shifted = {name: x + change * (self.mix[name] + more[j]).to(x.dtype) for j, name in enumerate(self.mixed)}
        r, k, v, g = (
            heads.split(linear(shifted[name]), self.n_heads)
            for name, linear in (("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj), ("g", self.g_proj))
        )
        change_of_w = heads.split(torch.tanh(shifted["w"] @ self.decay_down) @ self.decay_up, self.n_heads)
        w = at_least_float32(self.decay) + at_least_float32(change_of_w)
        log_a = -torch.exp(w.clamp_max(10))  # a is 0 long before; exp(w) beyond 88 would be inf, its gradient inf · 0
        return _Projected(r, k, v, g, heads.pinned(log_a, self.polarization), last)

    def _finish(self, y: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        y = heads.head_group_norm(y, self.norm_weight, self.norm_bias, self.config.norm_eps) * F.silu(g)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: RWKV6State | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], RWKV6State]:
        last, h = state if state is not None else (None, None)
        p = self._project(x, last, mask, reset)
        y, h = ops.gated_linear_attention(
            p.r, p.k, p.v, p.log_a, bonus=self.bonus, h0=h, reset=reset, return_final_state=True
        )
        return self._finish(y, p.g, x.dtype), RWKV6State(p.last, h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x)
        return heads.matrix_coefficients(p.log_a, p.k, p.v, *heads.pinned_masks(self.d_head, self.polarization))

    def decode(
        self, states: Float[Tensor, "batch length heads d_key d_head"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x)
        return self._finish(heads.read_before_writing(p.r, p.k, p.v, self.bonus, states), p.g, x.dtype)
