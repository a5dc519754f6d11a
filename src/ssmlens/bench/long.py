"""One sequence of very many tokens through a whole model: loss and hidden states of every token, without gradients, in one call."""

import time

import torch

from ssmlens.bench.layer import Size


def measure(size: Size) -> float:
    """Seconds of the one call. Raises RuntimeError where its loss is not a number."""
    from ssmlens.models import LanguageModel, LanguageModelConfig

    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=size.vocab_size, d_model=size.d_model, n_layers=size.layers, mixer="mamba", polarization={"ones": 1, "zeros": 1},
        )
    ).eval()  # fmt: skip
    tokens = torch.randint(size.vocab_size, (1, size.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=tokens[:, :16], labels=tokens[:, :16])  # what is loaded once is not timed
        begin = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        seconds = time.perf_counter() - begin
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss over {size.length} tokens is {loss.item()}")
    return seconds
