"""What our models have in common: the configuration of a stack of blocks, transformers' envelope around it, initialisation, and AdamW's groups.

stack = n_layers × block;   a model = what makes vectors of its inputs + stack + head
"""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ssmlens import mixers
from ssmlens.configuration import Config
from ssmlens.errors import UserError
from ssmlens.mixers import Mixer
from ssmlens.models.backbone import Block, NormPosition
from ssmlens.models.parts import MLP, ChannelMix, Embedding, MLPKind, PixelEmbedding, RMSNorm
from ssmlens.polarization import Polarization

_SELF_INITIALISING = (Mixer, MLP, ChannelMix, RMSNorm, nn.LayerNorm, Embedding, PixelEmbedding)


class StackConfig(Config):
    """mixer: a name of `ssmlens.mixers.names()`, or a list of names that is repeated until every layer has
    one (a hybrid). mixer_config: the keys of the mixer's configuration; in a hybrid, these by name: {"attention": {"heads": 4}}.
    polarization: of every mixer that can be polarized. mlp: after each mixer, of hidden width mlp_ratio · d_model; parallel: beside it."""

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

    @model_validator(mode="after")
    def _has_mixers(self) -> Self:
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

    def build_blocks(self, *, norm_position: NormPosition = "pre", dropout: float = 0.0) -> list[Block]:
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
            block = Block(
                mixer, self.norm_eps, self._mlp(i), norm_kind=self.norm, parallel=self.parallel, position=norm_position, dropout=dropout
            )  # fmt: skip
            blocks.append(block)
        return blocks

    def _mlp(self, layer: int) -> MLP | ChannelMix | None:
        width = max(1, round(self.mlp_ratio * self.d_model))
        if self.mlp == "none":
            return None
        if self.mlp == "channel_mix":
            return ChannelMix(self.d_model, width, layer, self.n_layers)
        return MLP(self.d_model, self.mlp, width, self.n_residuals, self.mlp_bias)


# What transformers itself writes into a config.json; anything else that is not a field of ours is an error.
_TRANSFORMERS_KEYS = set(PreTrainedConfig().to_dict()) | {
    "architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "use_cache", "name_or_path", "_name_or_path",
    "attn_implementation", "return_dict", "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


class Envelope(PreTrainedConfig):
    """transformers' envelope around a StackConfig of the class `wraps`, whose fields are its attributes. Unknown keys raise UserError."""

    wraps = StackConfig
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}  # noqa: RUF012

    def __init__(self, **fields: Any) -> None:
        theirs = {k: fields.pop(k) for k in list(fields) if k in _TRANSFORMERS_KEYS - set(self.wraps.model_fields)}
        theirs.pop("model_type", None)
        architecture = self.wraps.of(fields, "model configuration")
        for name, value in architecture.model_dump(mode="json").items():
            setattr(self, name, value)
        self.mixer_config = architecture.complete()
        super().__init__(**theirs)

    def _unwrapped(self) -> Any:
        return self.wraps.of({name: getattr(self, name) for name in self.wraps.model_fields}, "model configuration")

    def to_dict(self) -> dict[str, Any]:
        theirs = ("architectures", "dtype", "model_type", "transformers_version", *self.wraps.model_fields)
        return {k: v for k, v in super().to_dict().items() if k in theirs}

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything of ours is saved, defaults too: a checkpoint must not change when a default does."""
        return self.to_dict()


class StackModel(PreTrainedModel):
    """A transformers model whose modules initialise themselves. Its head is what `get_output_embeddings` returns."""

    _no_split_modules = ["Block"]  # noqa: RUF012
    supports_gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Module by module, each as a whole. transformers' own walk asks whether a module's direct parameters came from the checkpoint, and
        so would leave a missing linear layer inside a mixer as memory happened to be."""
        for module in self.modules():
            self._init_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each module initialises itself; transformers' own scheme would overwrite what a mixer sets up, biases first of all.
        What a checkpoint has already filled stays."""
        if not isinstance(module, _SELF_INITIALISING) and module is not self.get_output_embeddings():
            return
        own = [*module.parameters(), *module.buffers()]
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) == len(own):
            return
        module.reset_parameters()
        for p, value in loaded:
            p.copy_(value)
        for p in own:
            p._is_hf_initialized = True  # transformers' mark, so that a second call leaves it alone

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
