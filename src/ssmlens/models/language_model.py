"""A causal language model over any mixer, as a transformers PreTrainedModel: save_pretrained, from_pretrained, generate.

    tokens (batch, length) → embedding → blocks → norm → head → logits (batch, length, vocab_size)

Its cache holds one state for every block, of constant size: generation costs the same at the millionth token as at the first.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from ssmlens import mixers
from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.mixers import Mixer
from ssmlens.models.backbone import Backbone, Block
from ssmlens.models.parts import MLP, ChannelMix, Embedding, MLPKind, RMSNorm, map_state, tensors
from ssmlens.polarization import Polarization
from ssmlens.targets import IGNORED


class Architecture(Config):
    """What a language model is. mixer: a name of `ssmlens.mixers.names()`, or a list of names that is repeated until every layer has
    one (a hybrid). mixer_config: the keys of the mixer's configuration; in a hybrid, these by name: {"attention": {"heads": 4}}.
    polarization: of every mixer that can be polarized. mlp: after each mixer, of hidden width mlp_ratio · d_model; parallel: beside it.
    embedding_scale, embedding_norm: before the first block. logit_cap: logits become cap · tanh(logits / cap)."""

    vocab_size: int = Field(default=256, ge=1)
    d_model: int = Field(default=64, ge=1)
    n_layers: int = Field(default=2, ge=1, le=1000)
    mixer: str | tuple[str, ...] = "mamba"
    mixer_config: dict[str, Any] = Field(default_factory=dict)
    polarization: Polarization | None = None
    mlp: MLPKind = "none"
    mlp_ratio: float = Field(default=4.0, gt=0)
    mlp_bias: bool = False
    parallel: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(default=1e-5, gt=0)
    embedding_scale: float = Field(default=1.0, gt=0)
    embedding_norm: bool = False
    tie_word_embeddings: bool = True
    logit_cap: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_mixers(self) -> "Architecture":
        if not self.mixer:
            raise ValueError("mixer names no mixer")
        if isinstance(self.mixer, tuple):
            unknown = [name for name in self.mixer_config if name not in self.mixer]
            if unknown:
                raise ValueError(
                    f"mixer_config of a hybrid is {{mixer: its keys}}; {unknown[0]!r} is not among its mixers"
                )
        return self

    @property
    def n_residuals(self) -> int:
        return self.n_layers * (1 if self.mlp == "none" else 2)

    def mixers(self) -> list[str]:
        """The mixer's name, layer by layer."""
        pattern = (self.mixer,) if isinstance(self.mixer, str) else self.mixer
        return [pattern[i % len(pattern)] for i in range(self.n_layers)]

    def complete(self) -> dict[str, Any]:
        """mixer_config with every default spelled out. Raises UserError for unknown mixers and keys."""

        def of(name: str, given: dict[str, Any]) -> dict[str, Any]:
            return mixers.configure(name, {"n_residuals": self.n_residuals, **given}).model_dump(mode="json")

        if isinstance(self.mixer, str):
            return of(self.mixer, self.mixer_config)
        return {name: of(name, self.mixer_config.get(name, {})) for name in dict.fromkeys(self.mixer)}

    def build_blocks(self) -> list[Block]:
        """Raises UserError where polarization is asked for and no mixer can have it."""
        names, given = self.mixers(), self.complete()
        if self.polarization and not any(mixers.polarizable(name) for name in names):
            raise UserError(f"polarization is asked for, but {', '.join(dict.fromkeys(names))} cannot be polarized")
        blocks = []
        for i, name in enumerate(names):
            config = given if isinstance(self.mixer, str) else given[name]
            mixer = mixers.build(
                name, self.d_model, polarization=self.polarization if mixers.polarizable(name) else None,
                **config | mixers.place(name, i, self.n_layers),
            )  # fmt: skip
            blocks.append(Block(mixer, self.norm_eps, self._mlp(i), norm_kind=self.norm, parallel=self.parallel))
        return blocks

    def _mlp(self, layer: int) -> MLP | ChannelMix | None:
        width = max(1, round(self.mlp_ratio * self.d_model))
        if self.mlp == "none":
            return None
        if self.mlp == "channel_mix":
            return ChannelMix(self.d_model, width, layer, self.n_layers)
        return MLP(self.d_model, self.mlp, width, self.n_residuals, self.mlp_bias)


# What transformers itself writes into a config.json; anything else that is not a field of Architecture is an error.
_TRANSFORMERS_KEYS = set(PreTrainedConfig().to_dict()) | {
    "architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "use_cache", "name_or_path", "_name_or_path",
    "attn_implementation", "return_dict", "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


class LanguageModelConfig(PreTrainedConfig):
    """transformers' envelope around `Architecture`, whose fields are its attributes. Unknown keys raise UserError."""

    model_type = "ssmlens"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}  # noqa: RUF012

    def __init__(self, **fields: Any) -> None:
        theirs = {k: fields.pop(k) for k in list(fields) if k in _TRANSFORMERS_KEYS - set(Architecture.model_fields)}
        theirs.pop("model_type", None)
        architecture = Architecture.of(fields, "model configuration")
        for name, value in architecture.model_dump(mode="json").items():
            setattr(self, name, value)
        self.mixer_config = architecture.complete()
        super().__init__(**theirs)

    @property
    def architecture(self) -> Architecture:
        return Architecture.of({name: getattr(self, name) for name in Architecture.model_fields}, "model configuration")

    def to_dict(self) -> dict[str, Any]:
        theirs = ("architectures", "dtype", "model_type", "transformers_version", *Architecture.model_fields)
        return {k: v for k, v in super().to_dict().items() if k in theirs}

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything of ours is saved, defaults too: a checkpoint must not change when a default does."""
        return self.to_dict()


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


class LanguageModel(PreTrainedModel, GenerationMixin):
    config_class = LanguageModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012
    _is_stateful = True  # the cache cannot be rolled back: no assisted decoding
    supports_gradient_checkpointing = False

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        architecture = config.architecture
        self.backbone = Backbone(
            architecture.vocab_size, architecture.build_blocks(), architecture.norm_eps, norm_kind=architecture.norm,
            embedding_scale=architecture.embedding_scale, embedding_norm=architecture.embedding_norm,
        )  # fmt: skip
        self.lm_head = nn.Linear(architecture.d_model, architecture.vocab_size, bias=False)
        self.post_init()

    def initialize_weights(self) -> None:
        """Module by module, each as a whole. transformers' own walk asks whether a module's direct parameters came from the checkpoint, and
        so would leave a missing linear layer inside a mixer as memory happened to be."""
        for module in self.modules():
            self._init_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each module initialises itself; transformers' own scheme would overwrite what a mixer sets up, biases first of all.
        What a checkpoint has already filled stays."""
        if (
            not isinstance(module, Mixer | MLP | ChannelMix | RMSNorm | nn.LayerNorm | Embedding)
            and module is not self.lm_head
        ):
            return
        own = [*module.parameters(), *module.buffers()]
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) == len(own):
            return
        module.reset_parameters()
        for p, value in loaded:
            p.copy_(value)
        for p in own:
            p._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark, so that a second call leaves it alone

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

    def parameter_groups(
        self, weight_decay: float, variant: Literal["corrected", "released"] = "corrected"
    ) -> list[dict[str, Any]]:
        """AdamW's groups. "corrected" exempts what the mixers declare (Mamba: A_log, D) and every vector (biases, norms);
        "released" decays everything, as the paper's released code does."""
        exempt = {
            id(module.get_parameter(name))
            for module in self.modules()
            if isinstance(module, Mixer)
            for name in module.no_weight_decay()
        }
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for p in self.parameters():
            if p.requires_grad:
                free = variant == "corrected" and (id(p) in exempt or p.dim() < 2)
                (rest if free else decay).append(p)
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return [g for g in groups if g["params"]]


AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel)
