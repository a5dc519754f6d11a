"""block = norm + mixer + residual (+ norm + MLP + residual); backbone = embedding + blocks + norm.

x: (batch, length, d_model), the residual stream; a state for every block."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssmlens.mixers import Mixer
from ssmlens.models.parts import MLP, BlockState, ChannelMix, Embedding, norm

SEGMENT = 1 << 14  # tokens (times batch) that go through all blocks at once where no gradient is wanted


class Block(nn.Module):
    """x + mixer(norm(x)), then, with an MLP, x + mlp(mlp_norm(x)); parallel: x + mixer(norm(x)) + mlp(mlp_norm(x))."""

    def __init__(
        self,
        mixer: Mixer,
        norm_eps: float,
        mlp: MLP | ChannelMix | None = None,
        *,
        norm_kind: Literal["rms", "layer"] = "rms",
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm(norm_kind, mixer.d_model, norm_eps)
        self.mixer = mixer
        self.mlp_norm = norm(norm_kind, mixer.d_model, norm_eps) if mlp else None
        self.mlp = mlp
        self.parallel = parallel

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Any]:
        last: Tensor | None = None
        if isinstance(state, BlockState):
            state, last = state
        y, state = self.mixer(self.norm(x), state, mask=mask, reset=reset)
        if self.mlp is None or self.mlp_norm is None:
            return x + y, state
        seen = self.mlp_norm(x if self.parallel else x + y)
        if isinstance(self.mlp, ChannelMix):
            z, last = self.mlp(seen, last, mask=mask, reset=reset)
            state = BlockState(state, last)
        else:
            z = self.mlp(seen)
        return x + y + z, state


class Backbone(nn.Module):
    """Embedding, blocks, final norm. forward takes embeddings, so that influence can be measured from them; `embedding` makes them.
    They are multiplied by embedding_scale, and normalised where embedding_norm, before the first block."""

    def __init__(
        self,
        vocab_size: int,
        blocks: list[Block],
        norm_eps: float,
        *,
        norm_kind: Literal["rms", "layer"] = "rms",
        embedding_scale: float = 1.0,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__()
        d_model = blocks[0].mixer.d_model
        self.embedding: nn.Embedding = Embedding(vocab_size, d_model)
        self.embedding_scale = embedding_scale
        self.embedding_norm = norm(norm_kind, d_model, norm_eps) if embedding_norm else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(norm_kind, d_model, norm_eps)

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
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
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
