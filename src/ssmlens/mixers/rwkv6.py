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

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ssmlens.mixers import heads
from ssmlens.mixers.base import MixerConfig, at_least_float32
from ssmlens.mixers.rwkv5 import MatrixConfig, MatrixRWKV, Projected, first_shares
from ssmlens.polarization import Polarization


class RWKV6Config(MatrixConfig):
    """mix_rank: of N, M. decay_rank: of W₁, W₂."""

    mix_rank: int = Field(default=32, ge=1)
    decay_rank: int = Field(default=64, ge=1)


class RWKV6(MatrixRWKV):
    config_class: ClassVar[type[MixerConfig]] = RWKV6Config
    config: RWKV6Config
    title: ClassVar[str] = "RWKV-6"
    transition: ClassVar[str] = "real diagonal over key dimensions, input-dependent"
    shifted: ClassVar[tuple[str, ...]] = ("w", "k", "v", "r", "g")  # the order of N's and M's parts
    mixed: ClassVar[tuple[str, ...]] = ("x", *shifted)

    def __init__(self, d_model: int, config: RWKV6Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.mix_down = nn.Parameter(torch.empty(d_model, len(self.shifted) * config.mix_rank))
        self.mix_up = nn.Parameter(torch.empty(len(self.shifted), config.mix_rank, d_model))
        self.decay_down = nn.Parameter(torch.empty(d_model, config.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(config.decay_rank, self.n_heads * self.learned))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mixing and decays begin constant."""
        super().reset_parameters()
        for name, share in first_shares(self.d_model, self.config, self.mixed).items():
            self.mix[name].copy_(1 - share)
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up)):
            nn.init.zeros_(down)
            nn.init.uniform_(up, -0.01, 0.01)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mix_down", "mix_up", "decay_down", "decay_up"}

    def _project(
        self, x: Tensor, last: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Projected:
        x = heads.visible(x, mask)
        previous, last = heads.token_shift(x, last, reset)
        change = previous - x
        inner = torch.tanh((x + change * self.mix["x"].to(x.dtype)) @ self.mix_down)
        more = torch.einsum("bljr,jrd->jbld", inner.unflatten(-1, (len(self.shifted), -1)), self.mix_up)
        shifted = {name: x + change * (self.mix[name] + more[j]).to(x.dtype) for j, name in enumerate(self.shifted)}
        change_of_w = heads.split(torch.tanh(shifted["w"] @ self.decay_down) @ self.decay_up, self.n_heads)
        w = at_least_float32(self.decay) + at_least_float32(change_of_w)
        log_a = -torch.exp(w.clamp_max(10))  # a is 0 long before; exp(w) beyond 88 would be inf, its gradient inf · 0
        return Projected(*self._heads(shifted), heads.pinned(log_a, self.polarization), last)
