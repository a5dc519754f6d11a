"""Checkpoints that are complete or ignored.

    DIR/step-00000500/  model.safetensors   parameters and persistent buffers, tied ones once
                        optimizer.pt        AdamW's state
                        rng.pt              random number generators, one entry per process
                        state.json          step, configuration, names of tied tensors, whatever the loop adds
                        manifest.json       size and SHA-256 of the four above; written last

All of it appears in one rename (`ssmlens.files`). A checkpoint counts only if its manifest is there and agrees with every
file. Nothing is unpickled but tensors and plain containers (weights_only).
"""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssmlens import files
from ssmlens.errors import UserError

_NAME = re.compile(r"step-(\d+)")


def save(
    directory: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: list[dict[str, Any]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of `step` and deletes all but the last `keep`. Returns its path.

    Raises UserError: when the disk is full or not writable; earlier checkpoints are untouched then.
    """
    final = directory / f"step-{step:08d}"
    with files.replace_directory(final) as temporary:  # there already: a broken one, or the same before its evaluation
        tensors, tied = _tensors(model)
        try:
            save_file(tensors, temporary / "model.safetensors")
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            torch.save(rng, temporary / "rng.pt")
        except (SafetensorError, RuntimeError) as error:  # what these two libraries make of a full disk
            raise OSError(" ".join(str(error).split())) from error
        content = {"step": step, "tied": tied, **state}
        (temporary / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        manifest = {path.name: _sum(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for old in _all(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. Broken ones are passed over."""
    return next((path for path in _all(directory) if complete(path)), None)


def newest(directory: Path) -> Path | None:
    """The checkpoint with the highest step, complete or damaged, or None."""
    return next(iter(_all(directory)), None)


def complete(path: Path) -> bool:
    """Whether every file of a checkpoint is there and is what its manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        return bool(manifest) and all(_sum(path / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[dict[str, Any]]:
    """Puts a checkpoint into the model and the optimizer, in place. Returns one RNG state per process.

    Raises UserError: when it holds other tensors than the model has.
    """
    load_model(path, model)
    if optimizer is not None:
        saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        try:
            optimizer.load_state_dict(saved)
        except ValueError as error:
            raise UserError(f"{path} was written with other optimizer groups: {error}") from None
    rng: list[dict[str, Any]] = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
    return rng


def load_model(path: Path, model: nn.Module) -> None:
    """Puts a checkpoint's parameters and buffers into the model. Raises UserError: when they do not fit."""
    saved = load_file(path / "model.safetensors")
    for name, original in read_state(path)["tied"].items():
        saved[name] = saved[original]
    try:
        model.load_state_dict(saved, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not fit the model: {reason}") from None


def get_rng() -> dict[str, Any]:
    """The state of torch's, numpy's and Python's global generators, as tensors and plain values."""
    name, key, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (it is the global one that matters)
    assert name == "MT19937"
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "numpy": {
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
    }


def set_rng(state: Mapping[str, Any]) -> None:
    """Puts the generators back to what `get_rng` found."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    numpy, python = state["numpy"], state["python"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to save, on the CPU, and name → earlier name where one tensor has several."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            # copied only if its memory holds something else too: safetensors refuses overlaps
            plain = tensor.detach().cpu().contiguous()
            own = plain.untyped_storage().nbytes() == plain.nbytes
            tensors[name] = plain if own else plain.clone()
    return tensors, tied


def _all(directory: Path) -> list[Path]:
    """All that looks like a checkpoint, the highest step first."""
    found = [(_NAME.fullmatch(path.name), path) for path in directory.glob("step-*")]
    return [path for _, path in sorted(((int(name[1]), path) for name, path in found if name), reverse=True)]


def _sum(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
