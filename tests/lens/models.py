"""A small language model with random weights, and text for it."""

import numpy as np
import torch

from ssmlens.models import LanguageModel, LanguageModelConfig


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return LanguageModel(LanguageModelConfig(**{"vocab_size": 32, "d_model": 16, "n_layers": 2, **changes}))


def tokens(n, length, vocab=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (n, length)))
