"""block = norm + mixer + residual (+ norm + MLP + residual); stack = blocks + norm; backbone = token embedding + stack.

x: (batch, length, d_model), the residual stream; a state for every block."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.mixers import Mixer
from ssmlens.models.parts import MLP, BlockState, ChannelMix, Embedding, norm

NormPosition = Literal["pre", "post"]
SEGMENT = 1 << 14  # tokens (times batch) that go through all blocks at once where no gradient is wanted


class Block(nn.Module):
    """x + mixer(norm(x)), then, with an MLP, x + mlp(mlp_norm(x)); parallel: x + mixer(norm(x)) + mlp(mlp_norm(x)).
    position "post": norm(x + mixer(x)), then mlp_norm(x + mlp(x)). dropout: of what mixer and MLP add."""

    def __init__(
        self,
        mixer: Mixer,
        norm_eps: float,
        mlp: MLP | ChannelMix | None = None,
        *,
        norm_kind: Literal["rms", "layer"] = "rms",
        parallel: bool = False,
        position: NormPosition = "pre",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if parallel and position == "post":
            raise UserError('a block whose MLP is parallel to its mixer has its norms before them: norm_position "pre"')
        self.norm = norm(norm_kind, mixer.d_model, norm_eps)
        self.mixer = mixer
        self.mlp_norm = norm(norm_kind, mixer.d_model, norm_eps) if mlp else None
        self.mlp = mlp
        self.parallel = parallel
        self.position = position
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

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
        pre = self.position == "pre"
        y, state = self.mixer(self.norm(x) if pre else x, state, mask=mask, reset=reset)
        y = self.dropout(y)
        if not pre:
            x, y = self.norm(x + y), None
        if self.mlp is None or self.mlp_norm is None:
            return x if y is None else x + y, state
        if y is not None and not self.parallel:
            x, y = x + y, None
        seen = self.mlp_norm(x) if pre else x
        if isinstance(self.mlp, ChannelMix):
            z, last = self.mlp(seen, last, mask=mask, reset=reset)
            state = BlockState(state, last)
        else:
            z = self.mlp(seen)
        z = x + self.dropout(z) if y is None else x + y + self.dropout(z)
        return z if pre else self.mlp_norm(z), state


class Stack(nn.Module):
    """Blocks and a final norm (none where blocks end in one), from embeddings to hidden states. first: modules that come before the blocks,
    in the order of parameters too: the states of optimizers and what a seed initialises depend on it."""

    def __init__(
        self,
        blocks: list[Block],
        norm_eps: float,
        *,
        norm_kind: Literal["rms", "layer"] = "rms",
        first: Mapping[str, nn.Module | None] | None = None,
    ) -> None:
        super().__init__()
        for name, module in (first or {}).items():
            self.add_module(name, module)
        self.blocks = nn.ModuleList(blocks)
        post = blocks[-1].position == "post"
        self.norm = nn.Identity() if post else norm(norm_kind, blocks[0].mixer.d_model, norm_eps)

    def enter(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        """What happens to embeddings before the first block."""
        return x

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
        x = self.enter(x)
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


class Backbone(Stack):
    """Embedding, blocks, final norm. forward takes embeddings, so that influence can be measured from them; `embedding` makes them.
    They are multiplied by embedding_scale, and normalised where embedding_norm, before the first block."""

    embedding: nn.Embedding
    embedding_norm: nn.Module | None

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
        d_model = blocks[0].mixer.d_model
        first = {
            "embedding": Embedding(vocab_size, d_model),
            "embedding_norm": norm(norm_kind, d_model, norm_eps) if embedding_norm else None,
        }
        super().__init__(blocks, norm_eps, norm_kind=norm_kind, first=first)
        self.embedding_scale = embedding_scale

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        return self.embedding(tokens)

    def enter(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        return x if self.embedding_norm is None else self.embedding_norm(x)
