"""A single pickled file (.pth, .pt, .ckpt) as a model. Its tensors' names say what it is; nothing else in it is used, and nothing is run.

{names: tensors}                      RWKV-LM
{"model": {...}, "acc", "epoch"}      the example of state-spaces/s4
{"state_dict": {...}, ...}            Lightning: CryptoMamba
"""

from pathlib import Path

from torch import nn

from ssmlens.errors import UserError
from ssmlens.models.pretrained import originals
from ssmlens.models.pretrained.cryptomamba import is_cryptomamba, load_cryptomamba
from ssmlens.models.pretrained.s4d import is_s4d, load_s4d

SUFFIXES = (".pth", ".pt", ".ckpt")
_WITHIN = ("model", "state_dict")


def load_pickled(file: Path) -> nn.Module:
    """Raises UserError, naming the file, for one that is damaged, incomplete or of a kind that is not known."""
    found = originals.unpickled(file)
    within = next((k for k in _WITHIN if isinstance(found, dict) and isinstance(found.get(k), dict)), None)
    if within is None:
        return originals.load_rwkv(file)
    state = originals.tensors(file, found[within])
    with originals.sound(str(file)):
        state = originals.as_float32(state)
        state = {name.removeprefix("module."): value for name, value in state.items()}  # trained on several devices
        if is_s4d(state):
            return load_s4d(state)
        if is_cryptomamba(state):
            return load_cryptomamba(state)
    raise UserError(
        f"cannot load {file}: its {within} ({', '.join(sorted(state)[:3])} ...) is neither that of state-spaces/s4's example nor CryptoMamba's"
    )
