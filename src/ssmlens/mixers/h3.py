"""H3 (Fu et al. 2022, arXiv 2212.14052): a shift, then a diagonal state space model, with multiplicative gates between.

    q, k, v = W_q x, W_k x, W_v x        k̃_t = Σ_j F_j k_{t-j}, j < d_shift  (a state space model whose A shifts, so A^d_shift = 0)
    per head, for pairs (i, j) of its d_head dimensions:   h_t = ā h_{t-1} + (ā - 1)/A k̃_{t,i} v_{t,j}   (S4D: the same ā, C, D for all)
    y_{t,j} = Σ_i q_{t,i} (2 Re(C h_t) + D k̃_t v_t)_{ij}, then a linear layer

    x, q, k, v, y: (batch, length, d_model)   F: (d_model, d_shift), last column for the current token   A, C: (heads, modes)
    state: the last d_shift - 1 keys, and h: (batch, d_head, d_head, heads, modes), complex64 (or real), at least float32

The diagonal model is what `coefficients` and `decode` speak of, its input k̃ v; the shift has no transition other than zero. The authors
add D_k k_t to the shifted key; that is F's last column here, whose start has their D_k ~ N(0, 1) in it. Their default, the bilinear rule, is
this recurrence with another A and C (benchmarks/agreement/h3.py has the map).

Polarization pins state channels of the diagonal model, the same ones in every head and pair, as in S4D: 2 of 34 modes (append) or 2 of 32.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from ssmlens import ops
from ssmlens.errors import UserError
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig, at_least_float32
from ssmlens.mixers.s4d import DiagonalKernel, S4DConfig, time_invariant
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class H3Config(S4DConfig):
    """d_shift: tokens the shift remembers, the current one included. d_head: every head has d_head² diagonal models, so that a key is
    stored with a value; 1 is the default of the authors' code, 8 what their language models have."""

    d_shift: int = Field(default=64, ge=1)
    d_head: int = Field(default=1, ge=1)


class H3State(NamedTuple):
    keys: Float[Tensor, "batch d_shift-1 d_model"]
    h: Tensor


class H3(Mixer):
    config_class: ClassVar[type[MixerConfig]] = H3Config
    config: H3Config
    title: ClassVar[str] = "H3"
    source: ClassVar[str] = "Fu et al. 2022, arXiv 2212.14052"
    transition: ClassVar[str] = "complex or real diagonal, time-invariant, after a shift"
    unit: ClassVar[str] = "a state channel of the diagonal model of each head"

    def __init__(self, d_model: int, config: H3Config, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        if d_model % config.d_head:
            raise UserError(f"d_head ({config.d_head}) does not divide d_model ({d_model})")
        self.n_heads = d_model // config.d_head
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.shift = nn.Parameter(torch.empty(d_model, config.d_shift))
        self.kernel = DiagonalKernel(self.n_heads, config, polarization)
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.output_linear = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: Fu et al. 2022 and their code: linear layers at their default, the filter like a convolution's, D ~ N(0, 1)."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.output_linear):
            linear.reset_parameters()
        for p in (self.output_linear.weight, self.output_linear.bias):
            p /= math.sqrt(self.config.n_residuals)
        bound = 1 / math.sqrt(self.config.d_shift)
        nn.init.uniform_(self.shift, -bound, bound)
        self.shift[:, -1] += torch.randn_like(self.shift[:, -1])
        self.kernel.reset_parameters()
        nn.init.normal_(self.D)

    def no_weight_decay(self) -> set[str]:
        return {"D"} | {f"kernel.{name}" for name in self.kernel.no_weight_decay()}

    def state_size(self) -> int:
        """Of the diagonal model; a complex mode has two numbers."""
        return self.config.d_head * self.d_model * (self.kernel.C[0].numel() + self.kernel.pinned)

    def _write(
        self, x: Tensor, keys: Tensor | None, mask: Tensor | None, reset: Tensor | None
    ) -> tuple[Float[Tensor, "batch length d_head d_head heads"], Float[Tensor, "batch d_shift-1 d_model"]]:
        """k̃ v, the input of the diagonal model, and the keys that the next token's shift sees."""
        k, v = self.k_proj(x), self.v_proj(x)
        k, keys = ops.causal_conv1d(
            heads.visible(k, mask), self.shift, initial=keys, reset=reset, return_final_state=True
        )
        k, v = self._heads(k), self._heads(v)
        return k[:, :, :, None] * v[:, :, None], keys

    def _heads(self, x: Tensor) -> Float[Tensor, "batch length d_head heads"]:
        return x.unflatten(-1, (self.n_heads, self.config.d_head)).mT

    def _read(self, s: Float[Tensor, "batch length d_head d_head heads"], x: Tensor) -> Tensor:
        q = self._heads(self.q_proj(x))
        y = (q[:, :, :, None] * s).sum(2)
        return self.output_linear(y.mT.flatten(2).to(x.dtype))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: H3State | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], H3State]:
        keys, h = state if state is not None else (None, None)
        kv, keys = self._write(x, keys, mask, reset)
        batch, length, d = kv.shape[:3]
        # the pairs of a head share one kernel: to it they are more batch
        inner = kv.permute(0, 2, 3, 1, 4).reshape(batch * d * d, length, self.n_heads)
        before = None if h is None else h.flatten(0, 2)
        flags = [None if f is None else f.repeat_interleave(d * d, 0) for f in (mask, reset)]
        s, after = self.kernel(inner, self.D, before, *flags)
        s = s.view(batch, d, d, length, self.n_heads).permute(0, 3, 1, 2, 4)
        return self._read(s, x), H3State(keys, after.unflatten(0, (batch, d, d)))

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """Of the diagonal model: dt is Δ, b_t = (ā - 1)/(Δ A) k̃_t v_t; complex for complex A."""
        return time_invariant(self.kernel, at_least_float32(self._write(x, None, None, None)[0]))

    def decode(self, states: Tensor, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        kv = at_least_float32(self._write(x, None, None, None)[0])
        s = (states * self.kernel.read_out()).sum(-1).real + at_least_float32(self.D) * kv
        return self._read(s.to(kv.dtype), x)
