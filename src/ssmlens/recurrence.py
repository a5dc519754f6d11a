"""The one equation, per layer and per inner channel (the paper's Eq. 1):

    h_t = a_t h_{t-1} + u_t,   u_t = Δ_t b_t(x_t),   y_t = c_t(h_t),   h_0 = 0

`Coefficients` holds one layer's a_t and u_t on one input: what a mixer *is*, once its parameters and its input are known.
Nothing here is learned, and nothing is expanded before it is asked for: a_t alone has d_state numbers for every inner channel and
token, so ask for a block of tokens (`a_at`) where the input is long.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALL = slice(None)


def run(a: Tensor, u: Tensor, h: Tensor) -> list[Tensor]:
    """The states h_1 .. h_T of the recurrence, entry by entry; a, u: (batch, length, *state), h: (batch, *state) = h_0."""
    states = []
    for t in range(u.shape[1]):
        h = a[:, t] * h + u[:, t]
        states.append(h)
    return states


@dataclass(frozen=True)
class Coefficients:
    """One layer's view as the recurrence on one input of shape (batch, length).

    a_at(tokens) → a_t, u_at(tokens) → u_t, b_at(tokens) → b_t, each (batch, tokens, *state_shape) for a slice of tokens.
    b_at gives None where the family has no separate b_t; dt: (batch, length, ...) broadcasting from the left to the state, or None.
    ones, zeros: bool masks over state_shape: the state channels that polarization holds at one and at zero.
    decay: what is held there, where that is not a_t itself (RWKV-4's e^{-w}, which a_t contains normalised); broadcasts to a_t.
    """

    batch: int
    length: int
    state_shape: tuple[int, ...]
    a_at: Callable[[slice], Tensor]
    u_at: Callable[[slice], Tensor]
    b_at: Callable[[slice], Tensor | None]
    dt: Tensor | None
    ones: Tensor
    zeros: Tensor
    decay: Tensor | None = None

    @classmethod
    def of(cls, a: Tensor, u: Tensor, ones: Tensor | None = None, zeros: Tensor | None = None) -> "Coefficients":
        """From a_t and u_t as they are: u (batch, length, *state_shape), a broadcasting to it; no separate b_t and Δ_t."""
        a, shape = a.expand_as(u), u.shape[2:]
        none = torch.zeros(shape, dtype=torch.bool)
        return cls(
            batch=u.shape[0], length=u.shape[1], state_shape=tuple(shape), a_at=lambda t: a[:, t], u_at=lambda t: u[:, t], b_at=lambda t: None,
            dt=None, ones=none if ones is None else ones, zeros=none if zeros is None else zeros,
        )  # fmt: skip

    @property
    def a(self) -> Tensor:
        """a_t, (batch, length, *state_shape)."""
        return self.a_at(ALL)

    @property
    def u(self) -> Tensor:
        """u_t = Δ_t b_t(x_t), (batch, length, *state_shape)."""
        return self.u_at(ALL)

    @property
    def b(self) -> Tensor | None:
        """b_t(x_t), (batch, length, *state_shape), or None where the family does not separate it from Δ_t."""
        return self.b_at(ALL)

    def states(self) -> Tensor:
        """h_1 .. h_T by the definition, (batch, length, *state_shape)."""
        a, u = self.a, self.u
        return torch.stack(run(a, u, torch.zeros_like(u[:, 0])), 1)
