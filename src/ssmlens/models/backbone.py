"""block = norm + mixer + residual; backbone = embedding + blocks + norm.

x: (batch, length, d_model), the residual stream; a state for every block."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.mixers import Mixer


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
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Embedding(nn.Embedding):
    """Token embedding, N(0, 0.02²) at the beginning."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, mixer: Mixer, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model, norm_eps)
        self.mixer = mixer

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Any]:
        y, state = self.mixer(self.norm(x), state, mask=mask, reset=reset)
        return x + y, state


class Backbone(nn.Module):
    """Embedding, blocks, final norm. forward takes embeddings, so that influence can be measured from them; `embedding` makes them."""

    def __init__(self, vocab_size: int, mixers: list[Mixer], norm_eps: float) -> None:
        super().__init__()
        d_model = mixers[0].d_model
        self.embedding: nn.Embedding = Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(mixer, norm_eps) for mixer in mixers)
        self.norm = RMSNorm(d_model, norm_eps)

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        return self.embedding(tokens)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        states: list[Any] | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        keep: bool = False,
    ) -> tuple[Float[Tensor, "batch length d_model"], list[Any], tuple[Tensor, ...] | None]:
        """The final hidden states, each block's state, and, if keep, the residual stream before every block and after the last norm."""
        before = states if states is not None else [None] * len(self.blocks)
        after: list[Any] = []
        kept: list[Tensor] = []
        for block, state in zip(self.blocks, before, strict=True):
            if keep:
                kept.append(x)
            x, state = block(x, state, mask=mask, reset=reset)
            after.append(state)
        x = self.norm(x)
        return x, after, (*kept, x) if keep else None
