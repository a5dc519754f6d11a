"""Finished measurements on disk, so that an interrupted diagnosis goes on where it was.

DIR/measured/identity.json         what was measured how: another configuration is refused
DIR/measured/MEASURE-MODEL.npz     one measurement of one model (counted from 1): its arrays, and the rest as JSON. Nothing in it is code.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

import ssmlens
from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.lens import (
    bounds,
    context,
    cost,
    decay,
    filters,
    floor,
    hidden_attention,
    influence,
    reading,
    smoothing,
    theorems,
    transitions,
)

_KNOWN = {
    f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}": cls
    for cls in (
        bounds.Layer, bounds.Bounds, context.Context, cost.Cost, decay.Fit, filters.Invariant, filters.Response, filters.Filters, floor.Floor,
        hidden_attention.HiddenAttention, influence.Influence, reading.Reading, smoothing.Smoothing, theorems.Inequality, theorems.Products, transitions.Layer,
        transitions.Transitions,
    )
}  # fmt: skip


class Store:
    """resume: keep what is there, if it is of the same `identity` (measures may differ); otherwise begin anew.

    Raises UserError naming what differs."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.directory = files.make_directory(directory / "measured")
        self.identity = json.loads(json.dumps({**identity, "ssmlens": ssmlens.__version__}, default=str))
        place = self.directory / "identity.json"
        if resume and place.is_file():
            self._compare(place, directory)
        else:
            for old in self.directory.glob("*.npz"):
                old.unlink()
        files.write(place, json.dumps(self.identity, indent=1))

    def _compare(self, place: Path, directory: Path) -> None:
        try:
            before = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{place} cannot be read ({e}); start without --resume") from None
        for name in sorted({*before, *self.identity}):
            if before.get(name) != self.identity.get(name):
                raise UserError(
                    f"cannot resume in {directory}: {name} was {_short(before.get(name))}, now it is {_short(self.identity.get(name))}; "
                    "give what was given before, or start without --resume"
                )

    def load(self, measure: str, number: int) -> Any | None:
        """A finished measurement of model `number`; None where there is none."""
        place = self._place(measure, number)
        if not place.is_file():
            return None
        try:
            return unpack(place.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as e:
            raise UserError(f"{place} cannot be read ({e}); remove it, or start without --resume") from e

    def save(self, measure: str, number: int, found: Any) -> None:
        files.write(self._place(measure, number), pack(found))

    def _place(self, measure: str, number: int) -> Path:
        return self.directory / f"{measure}-{number}.npz"


def fingerprint(model: nn.Module) -> str:
    """Of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(of_tensor(value).encode())
    return digest.hexdigest()[:16]


def of_tensor(x: Tensor) -> str:
    flat = x.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16] if flat.numel() else "empty"


def pack(found: Any) -> bytes:
    arrays: dict[str, np.ndarray] = {}

    def tree(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            name = f"a{len(arrays)}"
            arrays[name] = x
            return {"array": name}
        if is_dataclass(x):
            kind = f"{type(x).__module__.rsplit('.', 1)[-1]}.{type(x).__name__}"
            assert _KNOWN[kind] is type(x)
            return {"is": kind, "of": {f.name: tree(getattr(x, f.name)) for f in fields(x)}}
        if isinstance(x, dict):
            return {"pairs": [[tree(k), tree(v)] for k, v in x.items()]}
        if isinstance(x, tuple):
            return {"tuple": [tree(v) for v in x]}
        if isinstance(x, list):
            return [tree(v) for v in x]
        return x.item() if isinstance(x, np.generic) else x

    text = json.dumps(tree(found))
    file = io.BytesIO()
    np.savez(file, tree=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def unpack(data: bytes) -> Any:
    """Raises ValueError, KeyError, TypeError or BadZipFile for anything that `pack` did not make."""
    with np.load(io.BytesIO(data), allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}

    def made(x: Any) -> Any:
        if isinstance(x, list):
            return [made(v) for v in x]
        if not isinstance(x, dict):
            return x
        if "array" in x:
            return arrays[x["array"]]
        if "tuple" in x:
            return tuple(made(v) for v in x["tuple"])
        if "pairs" in x:
            return {made(k): made(v) for k, v in x["pairs"]}
        return _KNOWN[x["is"]](**{name: made(v) for name, v in x["of"].items()})

    return made(json.loads(arrays["tree"].tobytes().decode()))


def _short(x: Any) -> str:
    text = json.dumps(x)
    return text if len(text) <= 60 else text[:57] + "..."
