"""Polarization (the paper's Section 6): some state channels have their transition held at one, some at zero; the rest learn.

A channel at one keeps everything it was given; a channel at zero sees only the current token. For Mamba this is a matter of
appending columns to A: A ← [0, A, -inf], so that exp(Δ A) = [1, exp(Δ A), 0] at every Δ.
"""

import math
from typing import Literal

import torch
from pydantic import Field, field_serializer, field_validator, model_validator
from torch import Tensor

from ssmlens.configuration import Config
from ssmlens.errors import UserError


class Polarization(Config):
    """ones, zeros: how many units are pinned to one and to zero. What a unit is, a state channel of each inner channel (Mamba,
    S4D), a key dimension, a head or a width channel, each mixer says in its file.

    mode: "append" adds them to the state, which the paper's code does; "replace" takes the place of learned ones, so that models
    with and without are equally large.
    one, zero: the value of the continuous A that stands for them. 0 and -inf are exact. The paper prints -1000 and its released code
    runs -100, which at Δ = 0.001 hold the channel at 0.37 and 0.90 instead of 0: both are here to measure that."""

    ones: int = Field(default=1, ge=0)
    zeros: int = Field(default=1, ge=0)
    mode: Literal["append", "replace"] = "append"
    one: float = 0.0
    zero: float = -math.inf

    @field_validator("one", "zero")
    @classmethod
    def _decays(cls, value: float) -> float:
        if not value <= 0:
            raise ValueError("a value of A must be ≤ 0 (exp(Δ A) must not exceed 1)")
        return value

    @model_validator(mode="after")
    def _pins_something(self) -> "Polarization":
        if self.ones + self.zeros == 0:
            raise ValueError("ones and zeros are both 0: that is no polarization; leave it out instead")
        return self

    @field_serializer("one", "zero")
    def _json(self, value: float) -> float | str:
        return value if math.isfinite(value) else str(value)  # JSON has no infinity

    @property
    def pinned(self) -> int:
        return self.ones + self.zeros

    def learned(self, units: int) -> int:
        """How many of the configured `units` stay learned. Raises UserError where "replace" would leave none."""
        left = units if self.mode == "append" else units - self.pinned
        if left < 1:
            raise UserError(
                f"polarization would replace {self.pinned} of only {units} state channels and leave none to learn; "
                "pin fewer, use more of them, or mode 'append'"
            )
        return left

    def total(self, units: int) -> int:
        """The size of the state: pinned and learned."""
        return self.learned(units) + self.pinned

    def join(self, learned: Tensor) -> Tensor:
        """[one ..., learned, zero ...] along the last dimension. The pinned values are built here, from integers: they are neither
        parameters nor buffers, so no optimizer, initialiser or checkpoint can move them."""
        ones = learned.new_full((*learned.shape[:-1], self.ones), self.one)
        zeros = learned.new_full((*learned.shape[:-1], self.zeros), self.zero)
        return torch.cat([ones, learned, zeros], -1)

    def masks(self, units: int) -> tuple[Tensor, Tensor]:
        """Bool masks over the last dimension of `join`: which are held at one, which at zero."""
        index = torch.arange(self.total(units))
        return index < self.ones, index >= self.ones + self.learned(units)
