"""A causal language model over any mixer, as a transformers PreTrainedModel: save_pretrained, from_pretrained, generate.

    tokens (batch, length) → embedding → blocks → norm → head → logits (batch, length, vocab_size)

Its cache holds one state for every block, of constant size: generation costs the same at the millionth token as at the first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from ssmlens.models.architecture import Envelope, StackConfig, StackModel
from ssmlens.models.backbone import Backbone
from ssmlens.models.parts import map_state, tensors
from ssmlens.targets import IGNORED


class Architecture(StackConfig):
    """What a language model is: a stack (see StackConfig) between embedding and head. embedding_scale, embedding_norm: before the first
    block. logit_cap: logits become cap · tanh(logits / cap)."""

    vocab_size: int = Field(default=256, ge=1)
    embedding_scale: float = Field(default=1.0, gt=0)
    embedding_norm: bool = False
    tie_word_embeddings: bool = True
    logit_cap: float | None = Field(default=None, gt=0)


class LanguageModelConfig(Envelope):
    """transformers' envelope around `Architecture`."""

    model_type = "ssmlens"
    wraps = Architecture

    def __init__(self, **fields: Any) -> None:  # without one, transformers would write another
        super().__init__(**fields)

    @property
    def architecture(self) -> Architecture:
        found: Architecture = self._unwrapped()
        return found


class StateCache:
    """One state for every block: what generation carries from token to token. Constant size."""

    is_compileable = False  # transformers asks

    def __init__(self, states: list[Any], length: int) -> None:
        self.states = states
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def numbers(self) -> int:
        """How many numbers the cache holds."""
        return sum(t.numel() for t in tensors(self.states))

    def reorder_cache(self, beam_idx: Tensor) -> "StateCache":
        """Follow the beams that a beam search keeps."""
        self.states = [map_state(lambda t: t.index_select(0, beam_idx.to(t.device)), s) for s in self.states]
        return self

    def repeated(self, count: int) -> "StateCache":
        """Each sequence's state `count` times, one after the other; this cache stays as it is."""
        return StateCache([map_state(lambda t: t.repeat_interleave(count, 0), s) for s in self.states], self.length)


@dataclass
class LanguageModelOutput(ModelOutput):
    """logits: (batch, length, vocab_size), or with targets (n_targets, vocab_size), only where there is one.
    loss: mean cross-entropy over targets, in nats. hidden_states: the residual stream before each block, then last_hidden_state."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: StateCache | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    n_targets: Tensor | None = None
    n_correct: Tensor | None = None


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over rows, float32, in blocks: the probabilities of a long sequence are as large as its logits."""
    blocks = zip(logits.split(1 << 16), targets.split(1 << 16), strict=True)
    return torch.stack([F.cross_entropy(z.float(), t, reduction="sum") for z, t in blocks]).sum()


class LanguageModel(StackModel, GenerationMixin):
    config_class = LanguageModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012
    _is_stateful = True  # the cache cannot be rolled back: no assisted decoding

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        architecture = config.architecture
        self.backbone = Backbone(
            architecture.vocab_size, architecture.build_blocks(), architecture.norm_eps, norm_kind=architecture.norm,
            embedding_scale=architecture.embedding_scale, embedding_norm=architecture.embedding_norm,
        )  # fmt: skip
        self.lm_head = nn.Linear(architecture.d_model, architecture.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length d_model"] | None = None,
        targets: Int[Tensor, "batch length"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> LanguageModelOutput:
        """targets[t] is what position t is to predict, -100 where nothing is: logits are computed there only.
        labels: transformers' convention, the tokens themselves, shifted here (labels = input_ids trains a language model).
        attention_mask: 0 at left padding. reset: True at the first token of each packed sequence.
        past_key_values: what an earlier call with use_cache=True returned. logits_to_keep: only the last that many positions.
        return_dict is transformers' and changes nothing: the output is always a LanguageModelOutput.

        Raises ValueError for both or neither of input_ids and inputs_embeds, both targets and labels, or right padding."""
        if targets is not None and labels is not None:
            raise ValueError("give targets (aligned) or labels (shifted by the model), not both")
        if input_ids is not None and inputs_embeds is None:
            x = self.backbone.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds
        else:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        seen = 0 if past_key_values is None else past_key_values.length
        mask = self._mask(attention_mask, x.shape[1], seen)
        states = None if past_key_values is None else past_key_values.states
        hidden, states, kept = self.backbone(x, states, mask=mask, reset=reset, keep=bool(output_hidden_states))
        output = LanguageModelOutput(last_hidden_state=hidden, hidden_states=kept)
        if use_cache:
            output.past_key_values = StateCache(states, seen + x.shape[1])
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if targets is None:
            output.logits = self.head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
            return output
        at = targets != IGNORED
        wanted = targets[at]
        output.logits = self.head(hidden[at])
        # the mean over no targets is NaN; a batch without any (packed data) must train on nothing instead
        output.loss = _cross_entropy(output.logits, wanted) / max(1, wanted.numel())
        output.n_targets = at.sum()
        output.n_correct = (output.logits.argmax(-1) == wanted).sum()
        return output

    def head(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab_size"]:
        """Hidden states, after the final norm, to logits."""
        logits, cap = self.lm_head(hidden), self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _mask(self, attention_mask: Tensor | None, length: int, seen: int) -> Tensor | None:
        """The last `length` columns as bool, or None where nothing is padded. Padding after a real token, in this call or in an earlier
        one whose state is carried, would end in the state: refused."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape (batch, length), got {tuple(attention_mask.shape)}")
        mask = attention_mask.bool()
        if mask.shape[1] not in (length, seen + length):
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, the input has {length}"
                + (f" after {seen}" if seen else "")
            )
        if bool(mask[:, -length:].all()):
            return None
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or (seen and mask.shape[1] == length):
            raise ValueError(
                "attention_mask pads on the right or in the middle; pad on the left (tokenizer.padding_side = 'left'), and with "
                "past_key_values let it cover the earlier tokens too"
            )
        return mask[:, -length:]


AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel)
