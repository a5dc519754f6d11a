"""ssmlens: shows what a state space model forgets, and fixes it.

The top level resolves its names lazily: importing it costs milliseconds, and transformers is imported only by what needs it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Polarization": "ssmlens.polarization",
    "Coefficients": "ssmlens.recurrence",
    "LanguageModel": "ssmlens.models",
    "LanguageModelConfig": "ssmlens.models",
    "Classifier": "ssmlens.models",
    "ClassifierConfig": "ssmlens.models",
    "load": "ssmlens.models.pretrained",
    "polarize": "ssmlens.models.retrofit",
    "diagnose": "ssmlens.lens",
    "Diagnosis": "ssmlens.lens",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ssmlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
