"""A training step of every mixer, at equal parameters: a model of blocks, mixer and GELU MLP, the MLP as wide as it takes to fill each
block up to the same number of parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssmlens import mixers
from ssmlens.bench import layer
from ssmlens.bench.layer import Size

# By what computes it: mixers of one kind can be compared, those of two kinds differ by more than their code.
KINDS: dict[str, tuple[str, ...]] = {
    "scan": ("mamba", "griffin", "mingru", "minlstm", "rwkv4"),
    "matrix products": ("linear_attention", "retnet", "gla", "mamba2", "rwkv5", "rwkv6", "hgrn2"),
    "convolution": ("s4d", "s4", "h3"),
    "attention": ("attention",),
}
MEANINGS = {
    "scan": "token by token, in the C++ kernels",
    "matrix products": "chunks of tokens as matrix products, states in between",
    "convolution": "constant transitions: on a CPU the C++ scan (s4d, h3) or chunks as matrix products (s4), elsewhere an FFT",
    "attention": "every token looks at every earlier one",
    "other": "registered by somebody else",
}


@dataclass(frozen=True)
class Entry:
    """step: one call is a training step."""

    name: str
    parameters: int
    step: Callable[[], object]


def kinds() -> dict[str, list[str]]:
    """The registered mixers by kind."""
    known = mixers.names()
    found = {kind: [name for name in names if name in known] for kind, names in KINDS.items()}
    found["other"] = [name for name in known if all(name not in names for names in KINDS.values())]
    return {kind: names for kind, names in found.items() if names}


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def entries(size: Size, names: list[str]) -> list[Entry]:
    """These mixers with their authors' settings at this width; all registered ones decide how many parameters a block has."""
    from ssmlens.models import LanguageModel, LanguageModelConfig

    counts = {name: _count(mixers.build(name, size.d_model)) for name in mixers.names()}
    target = max(counts.values()) + 2 * size.d_model**2  # leaves every block an MLP of some width
    tokens = torch.randint(size.vocab_size, (size.batch, size.length), generator=torch.Generator().manual_seed(3))
    made = []
    for name in names:
        hidden = round((target - counts[name]) / (2 * size.d_model))
        torch.manual_seed(0)
        config = LanguageModelConfig(
            vocab_size=size.vocab_size, d_model=size.d_model, n_layers=size.layers, mixer=name, mlp="gelu", mlp_ratio=hidden / size.d_model,
        )  # fmt: skip
        model = LanguageModel(config)
        made.append(Entry(name, _count(model), layer.training(model, tokens)))
    return made
