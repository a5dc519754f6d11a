"""One Mamba layer and one training step: ours and transformers' on the same weights, and their matrix products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmlens.bench import scan

OURS, THEIRS, PRODUCTS = "ssmlens", "transformers", "its matrix products alone"
POLARIZED = "ssmlens, polarized"


@dataclass(frozen=True)
class Size:
    batch: int
    length: int
    d_model: int
    layers: int = 1
    vocab_size: int = 256

    def __str__(self) -> str:
        return f"{self.batch} × {self.length:,} tokens, d_model {self.d_model}, {self.layers} layer{'s' * (self.layers != 1)}"


def _theirs(size: Size) -> nn.Module:
    """transformers' Mamba with random weights; its CPU path in pure torch (`use_mambapy` off, its default)."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=size.d_model, num_hidden_layers=size.layers, vocab_size=size.vocab_size, state_size=16, use_cache=False
    )  # fmt: skip
    return MambaForCausalLM(config).train()


def layers(size: Size) -> dict[str, Callable[[Tensor], Tensor]]:
    """The mixer of a one-layer model, theirs and ours with its weights: (batch, length, d_model) → the same."""
    from ssmlens.models.pretrained import convert

    theirs: Any = _theirs(size)
    ours: Any = convert(theirs).backbone.blocks[0].mixer
    mixer = theirs.backbone.layers[0].mixer
    return {OURS: lambda x: ours(x)[0], THEIRS: lambda x: mixer(x)}


def products(size: Size) -> list[tuple[Tensor, Tensor]]:
    """(input, weight) of the four matrix products of a layer: in, x, dt and out projections."""
    d, inner, rank = size.d_model, 2 * size.d_model, -(-size.d_model // 16)
    rows, g = size.batch * size.length, torch.Generator().manual_seed(0)
    widths = [(d, 2 * inner), (inner, rank + 32), (rank, inner), (inner, d)]
    return [(torch.randn(rows, i, generator=g), torch.randn(o, i, generator=g)) for i, o in widths]


def multiply(pairs: list[tuple[Tensor, Tensor]], backward: bool) -> Callable[[], object]:
    """The products alone; with `backward` also the two products that each one's gradients are."""
    outs = [x @ w.T for x, w in pairs]

    def run() -> object:
        for (x, w), dy in zip(pairs, outs, strict=True):
            F.linear(x, w)
            if backward:
                torch.mm(dy, w)
                torch.mm(dy.T, x)
        return None

    return run


def expected(size: Size, backward: bool) -> float:
    """Seconds that transformers takes for one pass through its layers, roughly, on two cores with AVX2: its scan's."""
    return size.layers * scan.expected(
        scan.TRANSFORMERS, scan.Shape(size.batch, size.length, 2 * size.d_model, 16), backward
    )


def layer_calls(size: Size, backward: bool) -> dict[str, Callable[[], object]]:
    x = torch.randn(size.batch, size.length, size.d_model, generator=torch.Generator().manual_seed(1))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def call(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return layer(x)

        def both() -> object:
            leaf = x.detach().requires_grad_()
            layer(leaf).backward(dy)
            return leaf.grad

        return both if backward else forward

    calls = {name: call(layer) for name, layer in layers(size).items()}
    return {**calls, PRODUCTS: multiply(products(size), backward)}


# ---- a training step ----


def steps(size: Size) -> dict[str, Callable[[], object]]:
    """One step of AdamW on next-token prediction: our polarized Mamba, transformers' Mamba of the same size."""
    from ssmlens.models import LanguageModel, LanguageModelConfig

    torch.manual_seed(0)
    ours = LanguageModel(
        LanguageModelConfig(
            vocab_size=size.vocab_size, d_model=size.d_model, n_layers=size.layers, mixer="mamba", polarization={"ones": 1, "zeros": 1},
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    tokens = torch.randint(size.vocab_size, (size.batch, size.length), generator=torch.Generator().manual_seed(3))
    return {POLARIZED: training(ours, tokens), THEIRS: training(_theirs(size), tokens)}


def training(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """One step of AdamW on next-token prediction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> object:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return None

    return step
