"""What a block holds beside its mixer: norms, the MLP, RWKV's channel mixing; and the embeddings of tokens and of numbers.

x: (batch, length, d_model)   d_hidden: width inside an MLP"""

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens import ops
from ssmlens.errors import UserError
from ssmlens.mixers import heads

MLPKind = Literal["none", "gelu", "swiglu", "geglu", "channel_mix"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return ops.rms_norm(x, self.weight, eps=self.eps)


NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": nn.LayerNorm}


def norm(kind: Literal["rms", "layer"], width: int, eps: float) -> nn.Module:
    return NORMS[kind](width, eps)


class Embedding(nn.Embedding):
    """Token embedding, N(0, 0.02²) at the beginning."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class PixelEmbedding(nn.Module):
    """Numbers to vectors: W (x - mean) / std + b; behind them a learned class token, if class_token; plus a learned vector for each of
    so many `positions` (the class token's included), if there are any. mean, std: of every channel, or one for all; empty: 0 and 1."""

    def __init__(
        self, d_input: int, d_model: int, *, class_token: bool, positions: int | None, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:  # fmt: skip
        super().__init__()
        self.mean, self.std = mean, std
        self.linear = nn.Linear(d_input, d_model)
        self.class_token = nn.Parameter(torch.empty(d_model)) if class_token else None
        self.positions = nn.Parameter(torch.empty(positions, d_model)) if positions else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A linear layer's default; class token and positions N(0, 0.02²)."""
        self.linear.reset_parameters()
        for p in (self.class_token, self.positions):
            if p is not None:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Float[Tensor, "batch length d_input"]) -> Float[Tensor, "batch tokens d_model"]:
        """tokens: length, and one more with a class token. Raises UserError for more of them than positions."""
        if self.mean:
            x = x - x.new_tensor(self.mean)
        if self.std:
            x = x / x.new_tensor(self.std)
        x = self.linear(x)
        if self.class_token is not None:
            x = torch.cat([x, self.class_token.expand(x.shape[0], 1, -1)], 1)
        if self.positions is None:
            return x
        if x.shape[1] > len(self.positions):
            raise UserError(f"the model has {len(self.positions)} positions, the input {x.shape[1]} tokens")
        return x + self.positions[: x.shape[1]]


class MLP(nn.Module):
    """Mixes width, token by token: W_out f(W_in x), f = gelu; or W_out (f(W_gate x) · W_in x), f = silu ("swiglu") or gelu by its
    tanh formula ("geglu") (Shazeer 2020). in_proj holds W_gate above W_in."""

    def __init__(
        self, d_model: int, kind: Literal["gelu", "swiglu", "geglu"], d_hidden: int, n_residuals: int, bias: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_residuals = n_residuals
        self.in_proj = nn.Linear(d_model, d_hidden * (1 if kind == "gelu" else 2), bias=bias)
        self.out_proj = nn.Linear(d_hidden, d_model, bias=bias)
        self.kind = kind
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A linear layer's default; the output smaller by the square root of the number of residual branches, as in the mixers."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        self.out_proj.weight /= math.sqrt(self.n_residuals)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        if self.kind == "gelu":
            return self.out_proj(F.gelu(self.in_proj(x)))
        gate, x = self.in_proj(x).chunk(2, -1)
        return self.out_proj((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")) * x)


class ChannelMix(nn.Module):
    """RWKV's other half (Peng et al. 2023, Section 3.1.2): y = σ(W_r x_r) ⊙ W_v relu(W_k x_k)², where x_r and x_k are mixtures of the
    token and the one before. State: the last token, (batch, d_model)."""

    def __init__(self, d_model: int, d_hidden: int, layer: int, n_layers: int) -> None:
        super().__init__()
        self.layer, self.n_layers = layer, n_layers
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.key = nn.Linear(d_model, d_hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_hidden, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Source: Peng et al. 2023, Appendix E. Receptance and value begin at zero: a fresh layer does nothing."""
        nn.init.orthogonal_(self.key.weight, gain=math.sqrt(max(1.0, self.key.out_features / self.key.in_features)))
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)
        width = len(self.time_mix_key)
        part = torch.arange(width, dtype=torch.float32, device=self.time_mix_key.device) / width
        for mix in (self.time_mix_key, self.time_mix_receptance):
            mix.copy_(part ** (1 - self.layer / self.n_layers))

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        last: Float[Tensor, "batch d_model"] | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch d_model"]]:
        x = heads.visible(x, mask)
        before, last = heads.token_shift(x, last, reset)
        k, r = (
            linear(x * mix.to(x.dtype) + before * (1 - mix).to(x.dtype))
            for linear, mix in ((self.key, self.time_mix_key), (self.receptance, self.time_mix_receptance))
        )
        return torch.sigmoid(r) * self.value(torch.relu(k).square()), last


class BlockState(NamedTuple):
    """The state of a block whose MLP has one too."""

    mixer: Any
    mlp: Float[Tensor, "batch d_model"]


def map_state(f: Any, state: Any) -> Any:
    """f of every tensor in a state: a named tuple of tensors and of such tuples."""
    if isinstance(state, Tensor):
        return f(state)
    return type(state)(*(map_state(f, part) for part in state))


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state, or of a list of them."""
    return [state] if isinstance(state, Tensor) else [t for part in state for t in tensors(part)]
