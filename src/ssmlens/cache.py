"""Where results of work that can be done again are kept between runs: compiled kernels, decoded images."""

import functools
import os
import tempfile
from pathlib import Path


@functools.cache
def directory() -> Path:
    """The user's cache (XDG_CACHE_HOME or ~/.cache), or a private directory that goes with this process where that cannot be
    written."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        path = (Path(root) if root else Path.home() / ".cache") / "ssmlens"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        pass
    return Path(_private_directory().name)


@functools.cache
def _private_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ssmlens-")  # mode 0700, removed at exit
