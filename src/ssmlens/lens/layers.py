"""One layer by itself: which ones to look at, and a copy of one to compute with."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens.subject import Subject


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


def large(subject: Subject, length: int) -> bool:
    """Whether the states of one recurrent layer over so many tokens are more than 2**22 numbers: then defaults are chosen so that seconds stay seconds."""
    return state_size(subject) * length > 2**22


def state_size(subject: Subject) -> int:
    """Numbers in the largest state of its recurrent layers; 0 where none says."""
    mixers: list[Any] = [subject.mixers[i] for i in subject.recurrent]
    return max((mixer.state_size() for mixer in mixers if hasattr(mixer, "state_size")), default=0)


def in_double(mixer: nn.Module) -> nn.Module:
    """A float64 copy of a mixer without the hooks that may be on it; on the CPU where its device has no float64."""
    twin = copy.deepcopy(mixer)
    twin._forward_hooks = OrderedDict()
    if any(p.device.type == "mps" for p in twin.parameters()):
        twin = twin.cpu()
    return twin.double().requires_grad_(False)
