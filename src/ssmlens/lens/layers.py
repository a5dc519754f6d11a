"""One layer by itself: which ones to look at, and a copy of one to compute with."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from torch import nn

from ssmlens.errors import UserError


def choose(layers: int | Sequence[int] | None, known: list[int]) -> list[int]:
    """Indices among `known` (from 0): all for None, that many spread evenly, or those of the given numbers (from 1). Raises UserError."""
    if layers is None:
        return known
    if isinstance(layers, int) and layers >= 1:
        return sorted({known[round(i)] for i in np.linspace(0, len(known) - 1, min(layers, len(known)))})
    if isinstance(layers, int) or not layers or any(number - 1 not in known for number in layers):
        numbers = ", ".join(str(i + 1) for i in known)
        raise UserError(f"layers are a number of them or among {numbers}, not {layers}")
    return sorted({number - 1 for number in layers})


def in_double(mixer: nn.Module) -> nn.Module:
    """A float64 copy of a mixer without the hooks that may be on it; on the CPU where its device has no float64."""
    twin = copy.deepcopy(mixer)
    twin._forward_hooks = OrderedDict()
    if any(p.device.type == "mps" for p in twin.parameters()):
        twin = twin.cpu()
    return twin.double().requires_grad_(False)
