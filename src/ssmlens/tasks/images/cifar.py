"""CIFAR-10 as its authors published it (Krizhevsky 2009): six batches of images, as Python pickles or as plain bytes.

    binary    data_batch_1..5.bin, test_batch.bin: per image its label (1 byte), then red, green and blue, 1,024 bytes each, row by row
    Python    data_batch_1..5, test_batch: pickled {data: (n, 3072) uint8 in the same order, labels: [n]}

Pickles are read without running anything: what they may build is dicts, lists, numbers, strings, and arrays of bytes.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ssmlens.errors import UserError
from ssmlens.tasks.images.base import ImageSet, Split, assembled

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, PLANES = 32, 3
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
NAMES = {*BATCHES, *(f"{name}.bin" for name in BATCHES)}
_PIXELS = PLANES * SIDE * SIDE


def read(name: str, files: Mapping[str, bytes]) -> ImageSet:
    """files: the content of the six batches by their file name, with or without .bin.

    Raises UserError for batches that are missing, damaged, of different sizes, or with labels beyond 9."""
    binary = any(file.endswith(".bin") for file in files)
    found: list[Split] = []
    for batch in BATCHES:
        file = f"{batch}.bin" if binary else batch
        if file not in files:
            raise UserError(f"{name} has no {file}: CIFAR-10 consists of {', '.join(BATCHES)}")
        where = f"{name}: {file}"
        pixels, labels = (_binary if binary else _pickled)(files[file], where)
        if len(labels) and labels.max() >= len(CLASSES):
            raise UserError(f"{where} has the label {labels.max()}; those of CIFAR-10 are 0..9")
        if found and len(labels) != len(found[0]):
            raise UserError(f"{where} holds {len(labels):,} images, {BATCHES[0]} {len(found[0]):,}: one of them is cut")
        found.append(Split(_by_pixel(pixels), labels.astype(np.int64)))
    train = Split(*(np.concatenate([getattr(s, part) for s in found[:-1]]) for part in ("pixels", "labels")))
    return assembled(name, CLASSES, (SIDE, SIDE, PLANES), train, found[-1])


def _by_pixel(planes: UInt8[np.ndarray, "n 3072"]) -> UInt8[np.ndarray, "n 1024 3"]:
    return np.ascontiguousarray(planes.reshape(-1, PLANES, SIDE * SIDE).transpose(0, 2, 1))


def _binary(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (1 + _PIXELS):
        raise UserError(
            f"{where} has {len(content):,} bytes, which is not a number of whole images ({1 + _PIXELS} each)"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], rows[:, 0]


def _pickled(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _Plain(io.BytesIO(content), encoding="bytes").load()
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except Exception as e:  # a damaged pickle can fail anywhere
        raise UserError(
            f"{where} is damaged or no pickle ({' '.join(str(e).split())[:80] or type(e).__name__})"
        ) from None
    if not isinstance(batch, dict):
        raise UserError(f"{where} holds no batch of CIFAR-10: a dict with data and labels")
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in batch.items()}
    data, labels = named.get("data"), named.get("labels")
    if isinstance(data, _Array):
        data = data.array
    if isinstance(labels, _Array):
        labels = labels.array.tolist() if labels.array is not None else None
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _PIXELS or not isinstance(labels, list):
        raise UserError(f"{where} holds no batch of CIFAR-10: data of shape (n, {_PIXELS}) and a list of labels")
    if len(labels) != len(data) or not all(type(x) is int and 0 <= x < 1 << 31 for x in labels):
        raise UserError(f"{where} holds {len(data)} images and {len(labels)} labels, or labels that are no numbers")
    return data, np.array(labels, np.int64)


class _Array:
    """What a pickled array leaves here: only whole arrays of bytes become one."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_column, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "<u1", "|u1") or not isinstance(content, bytes):
            raise UserError("an array of something else than bytes")
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_column else "C")


class _Dtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        pass


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into an old pickle."""
    return str(text).encode("latin1")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.__setstate__((1, shape, dtype, order == "F", bytes(content)))
    return made


class _Plain(pickle.Unpickler):
    """Nothing of a name in the file is imported; the few names of an array of numpy stand for the things above."""

    def find_class(self, module: str, name: str) -> Any:
        stands_for = {
            ("multiarray", "_reconstruct"): lambda *_: _Array(), ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype,
            ("numeric", "_frombuffer"): _from_buffer, ("_codecs", "encode"): _encoded,
        }  # fmt: skip
        place = module.rpartition(".")[2] if module.startswith(("numpy.core.", "numpy._core.")) else module
        if (place, name) not in stands_for:
            raise UserError(f"it asks for {module}.{name}, which is not part of CIFAR-10: not run")
        return stands_for[place, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to something outside of the file")
