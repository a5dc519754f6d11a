"""block = norm + mixer + residual (+ norm + MLP + residual); backbone = embedding + blocks + norm.

x: (batch, length, d_model), the residual stream; a state for every block."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.mixers import Mixer

SEGMENT = 1 << 14  # tokens (times batch) that go through all blocks at once where no gradient is wanted


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


class MLP(nn.Module):
    """Mixes width, token by token. "gelu": W_out gelu(W_in x); "swiglu": W_out (silu(W_gate x) · W_in x) (Shazeer 2020)."""

    def __init__(self, d_model: int, kind: Literal["gelu", "swiglu"], d_hidden: int, n_residuals: int) -> None:
        super().__init__()
        self.n_residuals = n_residuals
        self.in_proj = nn.Linear(d_model, d_hidden * (2 if kind == "swiglu" else 1), bias=False)
        self.out_proj = nn.Linear(d_hidden, d_model, bias=False)
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
        return self.out_proj(F.silu(gate) * x)


class Block(nn.Module):
    """x + mixer(norm(x)), then, with an MLP, x + mlp(norm(x))."""

    def __init__(self, mixer: Mixer, norm_eps: float, mlp: MLP | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model, norm_eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(mixer.d_model, norm_eps) if mlp else None
        self.mlp = mlp

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Any]:
        y, state = self.mixer(self.norm(x), state, mask=mask, reset=reset)
        x = x + y
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class Backbone(nn.Module):
    """Embedding, blocks, final norm. forward takes embeddings, so that influence can be measured from them; `embedding` makes them."""

    def __init__(self, vocab_size: int, blocks: list[Block], norm_eps: float) -> None:
        super().__init__()
        d_model = blocks[0].mixer.d_model
        self.embedding: nn.Embedding = Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(blocks)
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
        """The final hidden states, each block's state, and, if keep, the residual stream before every block and after the last norm.
        Without gradients a long input goes through in segments, states carried: what is in between never exists for all of it."""
        segment = max(1, SEGMENT // max(1, x.shape[0]))
        if not torch.is_grad_enabled() and x.shape[1] > segment:
            return self._in_segments(segment, x, states, mask, reset, keep)
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

    def _in_segments(
        self, size: int, x: Tensor, states: list[Any] | None, mask: Tensor | None, reset: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[Any], tuple[Tensor, ...] | None]:
        hidden = torch.empty_like(x)
        kept: list[tuple[Tensor, ...]] = []
        for start in range(0, x.shape[1], size):
            now = slice(start, start + size)
            parts = [None if flags is None else flags[:, now] for flags in (mask, reset)]
            hidden[:, now], states, stream = self(x[:, now], states, mask=parts[0], reset=parts[1], keep=keep)
            if stream is not None:
                kept.append(stream)
        assert states is not None
        return hidden, states, tuple(torch.cat(parts, 1) for parts in zip(*kept, strict=True)) if keep else None
