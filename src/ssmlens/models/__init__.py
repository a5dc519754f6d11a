"""Whole models: blocks, backbone, heads; other people's checkpoints are in `ssmlens.models.pretrained`."""

from ssmlens.models.backbone import Backbone, Block, Stack
from ssmlens.models.classifier import Classifier, ClassifierArchitecture, ClassifierConfig, ClassifierOutput
from ssmlens.models.language_model import (
    Architecture,
    LanguageModel,
    LanguageModelConfig,
    LanguageModelOutput,
    StateCache,
)
from ssmlens.models.parts import RMSNorm

__all__ = [
    "Architecture", "Backbone", "Block", "Classifier", "ClassifierArchitecture", "ClassifierConfig", "ClassifierOutput", "LanguageModel",
    "LanguageModelConfig", "LanguageModelOutput", "RMSNorm", "Stack", "StateCache",
]  # fmt: skip
