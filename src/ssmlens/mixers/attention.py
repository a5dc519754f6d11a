"""Causal softmax attention (Vaswani et al. 2017), the baseline: it forgets nothing, and its state grows with the sequence.

    y_t = W_o concat_heads( Σ_{s ≤ t} softmax_s(q_tᵀ k_s / √d_head) v_s )        q, k, v = W x
    RoPE (Su et al. 2021): q and k of a token at position p are rotated by p θ_i in the plane of dimensions i and i + d_head/2,
    θ_i = base^(-2i/d_head); or a learned vector for each position is added to x; or nothing tells positions apart.
    Grouped heads (Ainslie et al. 2023): several heads of q share one of k and v. Window: only the last `window` tokens are seen, t included.

    q: (batch, heads, length, d_head)   k, v: (batch, kv_heads, length, d_head)
    state (the cache): k, v: (batch, seen, kv_heads, d_head), which of them later tokens see: (batch, seen) bool, next position: (batch,)

Positions count the tokens of a sequence: they begin at 0 behind left padding and at every reset. With a window the cache keeps
window - 1 tokens. There is no diagonal transition, so `coefficients` refuses, and nothing to polarize.

Where more than causality decides who sees whom (a window, padding, resets, a cache), queries go through in blocks, each with a mask over the
keys that some query of the block may see. With a window, or many short packed sequences, time and memory are then linear in length;
else the masks that a backward pass needs are half of (length, length) for each sequence.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.errors import UserError
from ssmlens.mixers import heads
from ssmlens.mixers.base import Mixer, MixerConfig
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients

BLOCK = 256  # queries at a time: with as many keys beside a window of 256, half of the scores are used


class AttentionConfig(MixerConfig):
    """n_kv_heads: heads of keys and values; None: as many as n_heads. d_head: None: d_model / n_heads. window: how many tokens a token
    sees, itself included; None: all before it. max_length: how many positions are learned; only with positions "learned".
    rope_fraction: of the dimensions of a head, the first so many are rotated (GPT-NeoX: a quarter). rope_frequencies: θ_i one by one
    instead of by rope_base (what a model made for longer texts stretches). bias: of all four projections, of q, k and v, or of the output."""

    n_heads: int = Field(default=1, ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    d_head: int | None = Field(default=None, ge=1)
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_base: float = Field(default=10_000.0, gt=0)
    rope_fraction: float = Field(default=1.0, gt=0, le=1)
    rope_frequencies: tuple[float, ...] | None = None
    max_length: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    bias: bool | Literal["qkv", "output"] = False

    @model_validator(mode="after")
    def _consistent(self) -> "AttentionConfig":
        if (self.positions == "learned") != (self.max_length is not None):
            raise ValueError(
                'max_length goes with positions "learned": it says how many there are, and nothing else needs it'
            )
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) does not divide n_heads ({self.n_heads})")
        return self


class AttentionState(NamedTuple):
    k: Float[Tensor, "batch seen kv_heads d_head"]
    v: Float[Tensor, "batch seen kv_heads d_head"]
    visible: Bool[Tensor, "batch seen"]
    position: Int[Tensor, "batch"]


class Attention(Mixer):
    config_class: ClassVar[type[MixerConfig]] = AttentionConfig
    config: AttentionConfig
    title: ClassVar[str] = "Softmax attention"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"
    transition: ClassVar[str] = "none: a cache of keys and values"
    unit: ClassVar[str] = "nothing: attention has no transition to pin"
    diagonal: ClassVar[bool] = False
    polarizable: ClassVar[bool] = False

    def __init__(self, d_model: int, config: AttentionConfig, polarization: Polarization | None = None) -> None:
        super().__init__(d_model, config, polarization)
        if polarization:
            raise UserError("attention cannot be polarized: it has no transition to hold at one or zero")
        if config.d_head is None and d_model % config.n_heads:
            raise UserError(f"n_heads ({config.n_heads}) does not divide d_model ({d_model}); give d_head")
        self.d_head = config.d_head or d_model // config.n_heads
        self.kv_heads = config.n_kv_heads or config.n_heads
        self.rotated = int(self.d_head * config.rope_fraction) // 2  # pairs
        if config.rope_frequencies is not None and len(config.rope_frequencies) != self.rotated:
            raise UserError(
                f"rope_frequencies has {len(config.rope_frequencies)} values for {self.rotated} rotated pairs"
            )
        qkv_bias, output_bias = config.bias in (True, "qkv"), config.bias in (True, "output")
        self.q_proj = nn.Linear(d_model, config.n_heads * self.d_head, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, self.kv_heads * self.d_head, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, self.kv_heads * self.d_head, bias=qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * self.d_head, d_model, bias=output_bias)
        self.position = nn.Parameter(torch.empty(config.max_length, d_model)) if config.max_length else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02²), the output smaller by the square root of the number of residual branches (Radford et al. 2019, Section 2.3)."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.o_proj.weight.div_(math.sqrt(self.config.n_residuals))
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"position"} if self.position is not None else set()

    def state_size(self) -> int:
        """Of the keys and values in a window. Raises ValueError where there is none: that state grows."""
        if self.config.window is None:
            raise ValueError("attention without a window has no state of constant size: it keeps every token")
        return 2 * (self.config.window - 1) * self.kv_heads * self.d_head

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: AttentionState | None = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], AttentionState]:
        """Raises UserError where the sequence is longer than the positions learned."""
        batch, length = x.shape[:2]
        here = torch.ones(batch, length, dtype=torch.bool, device=x.device) if mask is None else mask
        at, following = heads.positions(x, None if state is None else state.position, mask, reset)
        if self.position is not None:
            at = at.masked_fill(~here, 0)
            longest = length if state is None and mask is None and reset is None else int(at.max()) + 1
            if longest > len(self.position):
                raise UserError(f"the sequence has {longest} tokens, but max_length is {len(self.position)}")
            x = x + self.position[at].to(x.dtype)
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.d_head)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, length, heads, d_head)
        if self.config.positions == "rope" and self.rotated:
            frequencies = self.config.rope_frequencies
            if frequencies is None:
                width = int(self.d_head * self.config.rope_fraction)
                by = heads.rotation(at, self.rotated, self.config.rope_base, 2 * (self.rotated - 1) / width)
            else:
                by = heads.turns(at, frequencies)
            q, k = _rotated(q, by), _rotated(k, by)
        # segment: how many resets came before; a cached token is seen from the same segment, 0, if it is visible at all
        segment = torch.zeros_like(here, dtype=torch.long) if reset is None else reset.cumsum(1)
        seen, keys_in = here, segment
        if state is not None:
            k, v = torch.cat([state.k.to(k.dtype), k], 1), torch.cat([state.v.to(v.dtype), v], 1)
            seen = torch.cat([state.visible, here], 1)
            keys_in = torch.cat([torch.zeros_like(state.visible, dtype=torch.long), segment], 1)
        if state is None and mask is None and reset is None and length <= (self.config.window or length):
            y = self._attend(q, k, v, None)
        else:
            gaps = state is not None or mask is not None or reset is not None
            y = self._in_blocks(q, k, v, seen, keys_in, segment, gaps, reset)
        visible = seen & (keys_in == segment[:, -1:])
        return self.o_proj(y.flatten(2)), self._cache(k, v, visible, following, mask is not None or reset is not None)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None
    ) -> Float[Tensor, "batch queries heads d_head"]:
        """allowed: (queries, keys) or (batch, 1, queries, keys) bool; None: causal."""
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allowed, is_causal=allowed is None,
            enable_gqa=self.kv_heads != self.config.n_heads,
        ).transpose(1, 2)  # fmt: skip

    def _in_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor,
        keys_in: Tensor,
        segment: Tensor,
        gaps: bool,
        reset: Tensor | None,
    ) -> Float[Tensor, "batch length heads d_head"]:
        """seen, keys_in: (batch, keys)   segment: (batch, length). gaps: some of the keys may be hidden, or in another segment."""
        length, window = q.shape[1], self.config.window
        before = k.shape[1] - length  # keys from the cache
        size = BLOCK if window is None else min(max(window, BLOCK // 4), BLOCK)
        oldest = [0] * length  # for each block: no packed sequence that goes on in it begins before
        if reset is not None:
            begins = torch.where(reset, torch.arange(length, device=reset.device), 0).cummax(1).values
            oldest = begins[:, ::size].amin(0).tolist()
        ys = []
        for block, start in enumerate(range(0, length, size)):
            end = min(start + size, length)
            first = before + oldest[block] if oldest[block] else 0
            if window is not None:
                first = max(first, before + start - window + 1)
            queries, keys = slice(start, end), slice(first, before + end)
            at = torch.arange(first, before + end, device=q.device)
            later = at[before + start - first :, None] - at
            allowed = (later >= 0) & (later < (window or k.shape[1]))
            if gaps:  # every query sees itself, padding too: a softmax over nothing would be NaN
                allowed = allowed & seen[:, None, keys] & (keys_in[:, None, keys] == segment[:, queries, None])
                allowed = (allowed | (later == 0))[:, None]
            ys.append(self._attend(q[:, queries], k[:, keys], v[:, keys], allowed))
        return torch.cat(ys, 1) if len(ys) > 1 else ys[0]

    def _cache(self, k: Tensor, v: Tensor, visible: Tensor, position: Tensor, gaps: bool) -> AttentionState:
        """What later tokens can still see: the last window - 1, and, where there are gaps (padding, resets), none that is hidden from
        every sequence of the batch."""
        first = 0 if self.config.window is None else max(0, k.shape[1] - self.config.window + 1)
        if gaps:
            first = max(first, int((~visible.any(0)).sum()))  # hidden tokens come before visible ones
        return AttentionState(k[:, first:], v[:, first:], visible[:, first:], position)

    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        raise ValueError("attention has no transition a_t: it is not a recurrence over a state of constant size")

    def decode(self, states: Tensor, x: Float[Tensor, "batch length d_model"]) -> Tensor:
        raise ValueError("attention has no transition a_t, and no states of a recurrence to decode")


def _rotated(x: Float[Tensor, "batch length heads d_head"], by: tuple[Tensor, Tensor]) -> Tensor:
    """Dimensions beyond the rotated pairs stay as they are."""
    half = by[0].shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([*heads.turned(first, second, by), rest], -1).to(x.dtype)
