"""Files that are there completely or not at all, even after a kill or a power cut."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError


def make_directory(path: Path) -> Path:
    """The directory, made if need be. Raises UserError: when it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"no permission to write in {path}")
    return path


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file in one move: readers see the old content or the new, never a part."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON. Floats survive to the last bit; infinities and NaN are written as Python writes them."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def remove(path: Path) -> None:
    """Deletes a directory that may be half deleted already."""
    shutil.rmtree(path, ignore_errors=True)
