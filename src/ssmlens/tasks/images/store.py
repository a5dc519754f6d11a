"""Decoded images, kept in one memory-mapped file for every source: decoding 60,000 of them takes a quarter of a minute.

    KEY.images    safetensors: train.pixels, train.labels, test.pixels, test.labels; the rest of the ImageSet in its metadata

KEY hashes what the source is: the content of an archive; names, sizes and times of the files of a directory. The file appears in one
rename, so that several processes at once, or a killed one, leave either nothing or a whole one; what is not whole is made again.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.tasks.images.base import SPLITS, ImageSet, Split

VERSION = 1  # of the decoding: another one is another key
_HEADER = struct.Struct("<Q")
_DTYPES = {"U8": np.uint8, "I64": np.int64}


def key(source: str) -> str:
    """Of a path, or of the name of a hub's data set. Raises UserError for a path that cannot be read."""
    found = hashlib.sha256(f"{VERSION} ".encode())
    path = Path(source)
    try:
        if source.startswith("datasets:"):
            found.update(source.encode())
        elif path.is_dir():
            found.update(str(path.resolve()).encode())
            for name, status in _listed(path):
                found.update(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
        else:
            with open(path, "rb") as file:
                found.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    except OSError as e:
        raise UserError(f"cannot read {source}: {e.strerror or e}") from None
    return found.hexdigest()[:32]


def _listed(directory: Path) -> list[tuple[str, os.stat_result]]:
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            found.append((os.path.relpath(path, directory), os.stat(path)))
    return sorted(found, key=lambda pair: pair[0])


def write(path: Path, images: ImageSet) -> None:
    """Raises UserError where the place cannot be written or is full."""
    from safetensors.numpy import save_file

    described = {k: getattr(images, k) for k in ("name", "sha256", "classes", "height", "width", "channels")}
    arrays = {}
    for split in SPLITS:
        part: Split = getattr(images, split)
        arrays[f"{split}.pixels"], arrays[f"{split}.labels"] = np.ascontiguousarray(part.pixels), part.labels
    with files.replace(path) as temporary:
        save_file(arrays, temporary, metadata={"images": json.dumps(described)})


def read(path: Path) -> ImageSet | None:
    """The images, memory-mapped; None where there is no such file or it is not whole."""
    try:
        with open(path, "rb") as file:
            (size,) = _HEADER.unpack(file.read(_HEADER.size))
            header: dict[str, Any] = json.loads(file.read(min(size, 1 << 20)))
            about = json.loads(header.pop("__metadata__")["images"])
            end = _HEADER.size + size + max(entry["data_offsets"][1] for entry in header.values())
            if os.fstat(file.fileno()).st_size != end:
                return None
        arrays = {
            name: np.memmap(path, _DTYPES[entry["dtype"]], "r", _HEADER.size + size + entry["data_offsets"][0], tuple(entry["shape"]))
            for name, entry in header.items()
        }  # fmt: skip
        train, test = (Split(arrays[f"{s}.pixels"], np.array(arrays[f"{s}.labels"])) for s in SPLITS)
        return ImageSet(
            about["name"], about["sha256"], tuple(about["classes"]), about["height"], about["width"], about["channels"], train, test
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError, RecursionError):
        return None
