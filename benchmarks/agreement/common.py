"""What the agreement scripts share: loading one file of another project's checkout, and the printed relative error."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

PROMISED = 1e-5  # relative to the largest entry, float32


def load(checkout: Path, path: str) -> ModuleType:
    """The module in one file of a checkout, without importing the package around it (which may need a GPU)."""
    file = checkout / path
    if not file.is_file():
        sys.exit(f"no {path} in {checkout}: is this a checkout of the project named in the help?")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(mixer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The mixer with random weights: those that begin at zero or alike would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return mixer


def report(what: str, got: Tensor, want: Tensor) -> None:
    error = ((got - want).abs().max() / want.abs().max()).item()
    print(f"{what:<70} {error:.1e}{'' if error <= PROMISED else f'   above {PROMISED:.0e}'}")
