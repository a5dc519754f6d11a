"""A transformer of the same size as a model, at initialisation: what over-smoothing is to be compared with (SPEC §3, the paper's Figure 5).

    layers · (attention: 4 d_model² + MLP: 2 · ratio · d_model²) = parameters of the model's blocks

The same width and vocabulary; as many layers as come nearest with ratio 4, and then the ratio that meets the number of parameters.
"""

from typing import Any

import torch
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens.subject import Subject

_HEAD = 64


def transformer_like(subject: Subject, seed: int) -> Subject:
    """Named "transformer (at initialisation)". Raises UserError where the model does not say how wide it is."""
    from ssmlens.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig

    config: Any = getattr(subject.model, "config", None)
    width, vocab_size = getattr(config, "hidden_size", None), getattr(config, "vocab_size", None)
    classifier = isinstance(subject.model, Classifier)
    if not isinstance(width, int) or not (isinstance(vocab_size, int) or classifier) or not subject.blocks:
        raise UserError(
            f"{subject.name} does not say its width and vocabulary: a transformer of its size cannot be built"
        )
    wanted = sum(p.numel() for block in subject.blocks for p in block.parameters())
    layers = max(1, round(wanted / (12 * width**2)))
    ratio = max(0.5, (wanted / (layers * width**2) - 4) / 2)
    heads = max(1, width // _HEAD)
    while width % heads:
        heads -= 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stack = {
            "d_model": width,
            "n_layers": layers,
            "mixer": "attention",
            "mixer_config": {"n_heads": heads},
            "mlp": "gelu",
            "mlp_ratio": ratio,
        }
        if classifier:
            same = {k: getattr(config, k) for k in ("d_input", "n_classes", "pooling", "mean", "std")}
            model: nn.Module = Classifier(ClassifierConfig(**same, **stack))
        else:
            model = LanguageModel(LanguageModelConfig(vocab_size=vocab_size, **stack))
    made = Subject("transformer (at initialisation)", model.to(subject.device, subject.dtype))
    return made.shares_vectors_of(subject)
