"""Whole models: blocks, backbone, heads; other people's checkpoints are in `ssmlens.models.pretrained`."""

from ssmlens.models.backbone import Backbone, Block
from ssmlens.models.language_model import (
    Architecture,
    LanguageModel,
    LanguageModelConfig,
    LanguageModelOutput,
    StateCache,
)
from ssmlens.models.parts import RMSNorm

__all__ = [
    "Architecture", "Backbone", "Block", "LanguageModel", "LanguageModelConfig", "LanguageModelOutput", "RMSNorm", "StateCache",
]  # fmt: skip
