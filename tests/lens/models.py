"""A small language model with random weights, and text for it."""

import numpy as np
import torch

from ssmlens.mixers import Mixer, MixerConfig
from ssmlens.models import LanguageModel, LanguageModelConfig


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return LanguageModel(LanguageModelConfig(**{"vocab_size": 32, "d_model": 16, "n_layers": 2, **changes}))


def tokens(n, length, vocab=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (n, length)))


class Average(Mixer):
    """Each token becomes the mean of those up to it: a mixer without a diagonal transition, as attention is."""

    config_class = MixerConfig
    diagonal = False

    def __init__(self, d_model):
        super().__init__(d_model, MixerConfig(), None)

    def forward(self, x, state=None, *, mask=None, reset=None):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None], None

    def step(self, x, state=None):
        raise NotImplementedError

    def coefficients(self, x):
        raise ValueError("not a diagonal transition")

    def decode(self, states, x):
        raise NotImplementedError

    def reset_parameters(self):
        pass

    def no_weight_decay(self):
        return set()


def hybrid(*averages, n_layers=3, seed=0):
    """A Mamba whose blocks `averages` (indices) average instead."""
    made = model(seed, n_layers=n_layers)
    for index in averages:
        made.backbone.blocks[index].mixer = Average(made.config.d_model)
    return made
