"""A training step of every mixer, at equal parameters: a model of blocks, mixer and GELU MLP, the MLP as wide as it takes to fill each
block up to the same number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssmlens import mixers
from ssmlens.bench import layer
from ssmlens.bench.layer import Size

KINDS = {1: "a number per channel", 2: "a vector per channel", 3: "a matrix per head"}


@dataclass(frozen=True)
class Entry:
    """step: one call is a training step. kind: what the state is, by which mixers are compared."""

    name: str
    kind: str
    parameters: int
    step: Callable[[], object]


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _kind(mixer: mixers.Mixer, d_model: int) -> str:
    try:
        shape = mixer.coefficients(torch.zeros(1, 1, d_model)).state_shape
    except ValueError:
        return "every token, or not diagonal"
    return KINDS[min(3, len(shape))]


def entries(size: Size) -> list[Entry]:
    """Every registered mixer with its authors' settings at this width."""
    from ssmlens.models import LanguageModel, LanguageModelConfig

    built = {name: mixers.build(name, size.d_model) for name in mixers.names()}
    target = max(map(_count, built.values())) + 2 * size.d_model**2  # leaves every block an MLP of some width
    tokens = torch.randint(size.vocab_size, (size.batch, size.length), generator=torch.Generator().manual_seed(3))
    made = []
    for name, mixer in built.items():
        hidden = round((target - _count(mixer)) / (2 * size.d_model))
        torch.manual_seed(0)
        config = LanguageModelConfig(
            vocab_size=size.vocab_size, d_model=size.d_model, n_layers=size.layers, mixer=name, mlp="gelu", mlp_ratio=hidden / size.d_model,
        )  # fmt: skip
        model = LanguageModel(config)
        made.append(Entry(name, _kind(mixer, size.d_model), _count(model), layer.training(model, tokens)))
    return made
