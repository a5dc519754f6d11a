"""RWKV-5 "Eagle" (Peng et al. 2024, arXiv 2404.05892; version 5.2 of the code): matrix states with constant decays.

    a = exp(-exp(w))        Δ_t b_t(x_t) = k_t v_tᵀ        c_t = silu(g_t) ⊙ norm((H_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t), then projected
    r, k, v, g = W (μ ⊙ x_t + (1 - μ) ⊙ x_{t-1}) with a μ for each of the four ("token shift")
    It reads before it writes: y_t sees H_{t-1}, and the current token through its bonus u. norm: mean and variance over each head's
    values, weight and bias for each.

    r, k: (batch, length, heads, d_key)   v, g: (batch, length, heads, d_head)   w, u: (heads, d_key)
    state: the last token, and H: (batch, heads, d_key, d_head), float32

Polarization pins key dimensions of each head: a = 1 for the first, a = 0 for the last; w has no entries for them. Their keys,
receptances and bonus are ordinary rows. Since reading comes first, a dimension at zero shows the previous token (and, by its
bonus, the current one). With heads of 64, one of each takes 2 of 66 (append) or 2 of 64 (replace) of the state; "replace" takes the
slowest of each head for the ones and the fastest for the zeros. The norm is over values: key dimensions whose receptance is
zero change nothing.
"""

from abc import abstractmethod
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


class MatrixConfig(PlacedConfig):
    """d_head: at most, where it does not divide d_model. layer, n_layers: mixing, decays and bonus begin differently at each depth.
    norm_eps: the code divides by 8 before a norm of 10^-5; this is the same without dividing."""

    d_head: int = Field(default=64, ge=1)
    norm_eps: float = Field(default=64e-5, gt=0)


class MatrixState(NamedTuple):
    shift: Float[Tensor, "batch d_model"]
    h: Float[Tensor, "batch heads d_key d_head"]


class Projected(NamedTuple):
    r: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    log_a: Tensor
    last: Tensor


class MatrixRWKV(Mixer):
    """What RWKV-5 and RWKV-6 share: all but where the token shift's mixing and the decay come from."""

    config: MatrixConfig
    source: ClassVar[str] = "Peng et al. 2024, arXiv 2404.05892"
    unit: ClassVar[str] = "a key dimension of each head"
    mixed: ClassVar[tuple[str, ...]]  # what has a μ

    def __init__(self, d_model: int, config: MatrixConfig, polarization: Polarization | None) -> None:
        super().__init__(d_model, config, polarization)
        self.n_heads, self.d_head = heads.heads_of(d_model, config.d_head)
        self.learned, self.d_key = heads.sizes(self.d_head, polarization)
        n = self.n_heads

        self.mix = nn.ParameterDict({name: torch.empty(d_model) for name in self.mixed})
        self.r_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.k_proj = nn.Linear(d_model, n * self.d_key, bias=False)
        self.v_proj = nn.Linear(d_model, n * self.d_head, bias=False)
        self.g_proj = nn.Linear(d_model, n * self.d_head, bias=False)
        self.decay = nn.Parameter(torch.empty(n, self.learned))
        self.bonus = nn.Parameter(torch.empty(n, self.d_key))
        self.norm_weight = nn.Parameter(torch.empty(n, self.d_head))
        self.norm_bias = nn.Parameter(torch.empty(n, self.d_head))
        self.out_proj = nn.Linear(n * self.d_head, d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' (RWKV-LM), by depth: the output begins at zero, a layer at the identity. μ is left to the version."""
        for linear, gain in ((self.r_proj, 1), (self.k_proj, 0.1), (self.v_proj, 1), (self.g_proj, 0.1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        nn.init.zeros_(self.out_proj.weight)
        self.decay.copy_(decays(self.n_heads, self.d_head, self.learned, self.config, self.polarization))
        self.bonus.copy_(bonuses(self.n_heads, self.d_key, self.config))
        nn.init.constant_(self.norm_weight, ((1 + self.config.layer) / self.config.n_layers) ** 0.7)
        nn.init.zeros_(self.norm_bias)

    def no_weight_decay(self) -> set[str]:
        return {"decay", "bonus", "norm_weight", "norm_bias", *(f"mix.{name}" for name in self.mix)}

    @abstractmethod
    def _project(
        self, x: Tensor, last: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Projected:
        """Everything before the recurrence, pinned dimensions included; `last` of the result is the token to shift in next."""

    def _heads(self, shifted: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, g, from the tokens as each sees them."""
        linears = (("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj), ("g", self.g_proj))
        r, k, v, g = (heads.split(linear(shifted[name]), self.n_heads) for name, linear in linears)
        return r, k, v, g

    def _finish(self, y: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        y = heads.head_group_norm(y, self.norm_weight, self.norm_bias, self.config.norm_eps) * F.silu(g)
        return self.out_proj(y.flatten(2).to(dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: MatrixState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], MatrixState]:
        last, h = state if state is not None else (None, None)
        p = self._project(x, last, mask, reset)
        y, h = ops.gated_linear_attention(
            p.r, p.k, p.v, p.log_a, bonus=self.bonus, h0=h, reset=reset, return_final_state=True
        )
        return self._finish(y, p.g, x.dtype), MatrixState(p.last, h)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        p = self._project(x)
        return heads.matrix_coefficients(p.log_a, p.k, p.v, *heads.pinned_masks(self.d_head, self.polarization))

    def decode(
        self, states: Float[Tensor, "batch length heads d_key d_head"], x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        p = self._project(x)
        return self._finish(heads.read_before_writing(p.r, p.k, p.v, self.bonus, states), p.g, x.dtype)


class RWKV5(MatrixRWKV):
    config_class: ClassVar[type[MixerConfig]] = MatrixConfig
    title: ClassVar[str] = "RWKV-5"
    transition: ClassVar[str] = "real diagonal over key dimensions, constant"
    mixed: ClassVar[tuple[str, ...]] = ("r", "k", "v", "g")

    def __init__(self, d_model: int, config: MatrixConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, share in first_shares(self.d_model, self.config, self.mixed).items():
            self.mix[name].copy_(share)

    def log_a(self) -> Float[Tensor, "heads d_key"]:
        """log a = -exp(w), float32 (float64 for a float64 model), pinned dimensions included."""
        return heads.pinned(-torch.exp(at_least_float32(self.decay)), self.polarization)

    def _project(
        self, x: Tensor, last: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Projected:
        x = heads.visible(x, mask)
        previous, last = heads.token_shift(x, last, reset)
        shifted = {name: torch.lerp(previous, x, mix.to(x.dtype)) for name, mix in self.mix.items()}
        return Projected(*self._heads(shifted), self.log_a().expand(*x.shape[:2], -1, -1), last)


def first_shares(d_model: int, config: PlacedConfig, mixed: tuple[str, ...]) -> dict[str, Tensor]:
    """How much of the current token each channel of a token shift takes at the beginning: (i / d_model)^(1 - layer / n_layers),
    its root for r and g, more with depth for v."""
    share = (torch.arange(d_model, dtype=torch.float32) / d_model) ** (1 - config.layer / config.n_layers)
    special = {"r": share**0.5, "g": share**0.5, "v": share + 0.3 * config.depth}
    return {name: special.get(name, share) for name in mixed}


def decays(n_heads: int, units: int, learned: int, config: PlacedConfig, polarization: Polarization | None) -> Tensor:
    """w at the beginning, (heads, learned): -6 (slow) to -1 (fast) over all dimensions of all heads. "replace" leaves out the
    slowest of each head for the ones, the fastest for the zeros."""
    i = torch.arange(n_heads * units, dtype=torch.float32) / max(1, n_heads * units - 1)
    first = polarization.ones if polarization and polarization.mode == "replace" else 0
    return (-6 + 5 * i ** (0.7 + 1.3 * config.depth)).view(n_heads, units)[:, first : first + learned]


def bonuses(n_heads: int, d_key: int, config: PlacedConfig) -> Tensor:
    """u at the beginning, (heads, d_key): a zigzag of ±0.1 around a slope that grows with depth."""
    i = torch.arange(n_heads * d_key, dtype=torch.float32)
    slope = config.depth * (1 - i / max(1, n_heads * d_key - 1))
    return (slope + 0.1 * ((i + 1) % 3 - 1)).view(n_heads, d_key)
