"""What a mixer must offer: the part of a block that mixes time. Everything else (the lens, polarization, training, generation)
works on any module that does."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from ssmlens.configuration import Config
from ssmlens.polarization import Polarization
from ssmlens.recurrence import Coefficients


class MixerConfig(Config):
    """What every mixer's configuration has. n_residuals: how many blocks write into the residual stream of the model; an output
    projection starts smaller by its square root. Mamba's authors do that; for most families it is our addition to theirs, so that
    depth means the same to all. A mixer by itself (1) begins as its authors' does."""

    n_residuals: int = Field(default=1, ge=1)


class PlacedConfig(MixerConfig):
    """Of a family whose authors initialise a layer by its place in the model: it is `layer` (from 0) of n_layers."""

    layer: int = Field(default=0, ge=0)
    n_layers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _inside(self) -> "PlacedConfig":
        if self.layer >= self.n_layers:
            raise ValueError(f"layer {self.layer} of {self.n_layers}: layers are counted from 0")
        return self

    @property
    def depth(self) -> float:
        """0 for the first layer, 1 for the last."""
        return self.layer / max(1, self.n_layers - 1)


def at_least_float32(x: Tensor) -> Tensor:
    """State, decay and accumulation are float32 in a half-precision model, and float64 in a float64 one."""
    return x if x.dtype == torch.float64 else x.float()


class Mixer(nn.Module, ABC):
    """A causal map (batch, length, d_model) → (batch, length, d_model) with a state of constant size.

    forward and step compute the same thing: a whole sequence, or one token with the state carried. A state is whatever
    the mixer likes (a NamedTuple of tensors whose first dimension is the batch), None at the beginning of a sequence.
    """

    config_class: ClassVar[type[MixerConfig]]
    title: ClassVar[str]  # "Mamba"
    source: ClassVar[str]  # who, when, where
    transition: ClassVar[str]  # the structure of A_t: "real diagonal, input-dependent"
    unit: ClassVar[str]  # what polarization pins: "a state channel of each inner channel"
    diagonal: ClassVar[bool] = True  # False: A_t is not diagonal (attention, DeltaNet), and `coefficients` refuses
    polarizable: ClassVar[bool] = True  # False: nothing to pin (attention)
    slower: ClassVar[str] = (
        ""  # why a training step takes over 3 times as long as the fastest of its kind, where it does
    )

    def __init__(self, d_model: int, config: MixerConfig, polarization: Polarization | None) -> None:
        super().__init__()
        self.d_model = d_model
        self.config = config
        self.polarization = polarization

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        state: Any = None,
        *,
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Any]:
        """y and the state after the last token. mask: False at left padding, which leaves no trace in y and state; no token of the
        same sequence may come before it, neither in x nor in what `state` is of.
        reset: True at the first token of each packed sequence."""

    def step(self, x: Float[Tensor, "batch d_model"], state: Any = None) -> tuple[Float[Tensor, "batch d_model"], Any]:
        """One token: what forward does at length 1."""
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state

    @abstractmethod
    def coefficients(self, x: Float[Tensor, "batch length d_model"]) -> Coefficients:
        """This layer as the recurrence on x. Raises ValueError where its transition is not diagonal."""

    @abstractmethod
    def decode(self, states: Tensor, x: Float[Tensor, "batch length d_model"]) -> Tensor:
        """y from the states (batch, length, *state_shape) and the input: c_t and whatever surrounds it, so that
        decode(coefficients(x).states(), x) equals forward(x)[0]."""

    def state_size(self) -> int:
        """How many numbers the recurrent state of one sequence has. Raises ValueError where `coefficients` does."""
        with torch.no_grad():
            x = torch.zeros(
                1, 1, self.d_model, dtype=next(self.parameters()).dtype, device=next(self.parameters()).device
            )
            return math.prod(self.coefficients(x).state_shape)

    @abstractmethod
    def reset_parameters(self) -> None:
        """The authors' initialisation, of every parameter. Called by the constructor; nobody else re-initialises a mixer."""

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that weight decay must not touch (biases and other vectors need not be named)."""
        return set()
