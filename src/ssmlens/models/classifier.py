"""A classifier of sequences of vectors (pixels, for example) over any mixer, as a transformers PreTrainedModel.

    inputs (batch, length, d_input) → (x - mean) / std → linear (+ class token, last; + positions) → blocks → norm → pooling → head → logits

pooling: class_token    the hidden state of a learned token behind the last input (the paper's image experiments)
         mean, last     the mean over the hidden states, or the last of them
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.modeling_outputs import ModelOutput

from ssmlens.models.architecture import Envelope, StackConfig, StackModel
from ssmlens.models.backbone import NormPosition, Stack
from ssmlens.models.parts import PixelEmbedding


class ClassifierArchitecture(StackConfig):
    """What a classifier is: a stack (see StackConfig) between a linear map of its inputs and a linear head.

    norm_position "post": norm(x + mixer(x)), and no norm at the end. mean, std: of the inputs, for each of them or one for all; they are part of the
    model, so that whatever changes inputs does so in their own units. positions: learned positions for so many tokens, the class
    token included; None: no positions. dropout: of what mixers and MLPs add."""

    d_input: int = Field(default=3, ge=1)
    n_classes: int = Field(default=10, ge=1)
    pooling: Literal["class_token", "mean", "last"] = "class_token"
    norm_position: NormPosition = "pre"
    positions: int | None = Field(default=None, ge=1)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _normalises(self) -> "ClassifierArchitecture":
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 1, self.d_input):
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers; give {self.d_input} (d_input) or one")
        if any(not s > 0 for s in self.std):
            raise ValueError(f"std must be above zero, not {self.std}")
        return self


class ClassifierConfig(Envelope):
    """transformers' envelope around `ClassifierArchitecture`."""

    model_type = "ssmlens_classifier"
    wraps = ClassifierArchitecture

    def __init__(self, **fields: Any) -> None:  # without one, transformers would write another
        super().__init__(**fields)

    @property
    def architecture(self) -> ClassifierArchitecture:
        found: ClassifierArchitecture = self._unwrapped()
        return found


@dataclass
class ClassifierOutput(ModelOutput):
    """logits: (batch, n_classes). loss: mean cross-entropy, in nats. last_hidden_state: (batch, tokens, d_model), the class token's last.
    hidden_states: the residual stream before each block, then last_hidden_state."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    n_targets: Tensor | None = None
    n_correct: Tensor | None = None


class Classifier(StackModel):
    config_class = ClassifierConfig
    base_model_prefix = "backbone"
    main_input_name = "inputs"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        a = config.architecture
        self.embedding = PixelEmbedding(
            a.d_input, a.d_model, class_token=a.pooling == "class_token", positions=a.positions, mean=a.mean, std=a.std
        )  # fmt: skip
        blocks = a.build_blocks(norm_position=a.norm_position, dropout=a.dropout)
        self.backbone = Stack(blocks, a.norm_eps, norm_kind=a.norm)
        self.head = nn.Linear(a.d_model, a.n_classes)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        inputs: Float[Tensor, "batch length d_input"] | None = None,
        targets: Int[Tensor, "batch"] | None = None,
        inputs_embeds: Float[Tensor, "batch tokens d_model"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ClassifierOutput:
        """inputs: in the units of the data (pixels in [0, 1]); the model normalises them. inputs_embeds: what `embed` returned, instead.
        return_dict is transformers' and changes nothing.

        Raises ValueError for both or neither of inputs and inputs_embeds, and inputs of another shape."""
        if (inputs is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of inputs and inputs_embeds")
        x = self.embed(inputs) if inputs is not None else inputs_embeds
        hidden, _, kept = self.backbone(x, keep=bool(output_hidden_states))
        logits = self.head(self.pool(hidden))
        output = ClassifierOutput(logits=logits, last_hidden_state=hidden, hidden_states=kept)
        if targets is not None:
            output.loss = F.cross_entropy(logits.float(), targets)
            output.n_targets = torch.tensor(targets.numel())
            output.n_correct = (logits.argmax(-1) == targets).sum()
        return output

    def embed(self, inputs: Float[Tensor, "batch length d_input"]) -> Float[Tensor, "batch tokens d_model"]:
        """What enters the first block: a vector for every input, and the class token's."""
        if inputs.dim() != 3 or inputs.shape[2] != self.config.d_input:
            raise ValueError(
                f"inputs must have shape (batch, length, {self.config.d_input}), got {tuple(inputs.shape)}"
            )
        return self.embedding(inputs)

    def pool(self, hidden: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch d_model"]:
        """What the head reads."""
        return hidden.mean(1) if self.config.pooling == "mean" else hidden[:, -1]


AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig)
