"""Compiles the kernels for this machine on first use and loads them.

The library lies in the user's cache (XDG_CACHE_HOME or ~/.cache, else a private temporary directory) under a name that
hashes whatever it depends on: sources, flags, compiler, PyTorch, processor. It is compiled under a temporary name and
renamed, so several processes at once, or a killed one, leave either nothing or a whole file. It ends in a checksum of
itself; one that is damaged, or cannot be loaded, is built again, once. Without a compiler nothing is raised: `available()` is False, `why_unavailable()` says why, and
one warning says how to get the fast path.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

from ssmlens import files
from ssmlens.cache import directory as cache_directory
from ssmlens.errors import UserError

_HERE = Path(__file__).parent
_SOURCES = [_HERE / "scan.cpp", _HERE / "attention.cpp"]  # as many at a time as there are
# -O2: the loops that matter are vectors, written out; -O3 takes longer to compile and runs no faster. No -ffast-math: it turns exp(NaN) into 0. Without -fno-trapping-math the selects inside exp are not vectorised.
_FLAGS = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-psabi"]

_CHECKSUM = hashlib.sha256().digest_size

_lock = threading.Lock()
_state: dict[str, str | None] = {}  # {"failure": None once loaded, else why not}; empty before the first try


class BuildError(Exception):
    """Why the kernels could not be compiled or loaded, in one sentence."""


def available() -> bool:
    """Whether the kernels are there; the first call compiles and loads them (seconds, or milliseconds from the cache)."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """None when the kernels are there, else the reason they are not."""
    if "failure" not in _state:
        with _lock:
            if "failure" not in _state:
                _state["failure"] = _try_to_load()
    return _state["failure"]


# What torch.compiler.assume_constant_result does, without importing all of dynamo: tracing calls these, and keeps the answer.
for _function in (available, why_unavailable):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def _try_to_load() -> str | None:
    try:
        load()
    except (BuildError, OSError) as error:
        reason = str(error)
        warnings.warn(
            f"ssmlens runs without its CPU kernels, several times slower: {reason}. To get them, install a C++ compiler "
            "(g++ or clang++, e.g. `apt install g++` or `xcode-select --install`), or name one in $CXX, and start again.",
            RuntimeWarning,
            stacklevel=4,
        )
        return reason
    return None


def load() -> Path:
    """Loads the library into PyTorch, compiling it if need be; returns its path. Raises BuildError or OSError."""
    if sys.platform == "win32":
        raise BuildError("they are not built on Windows (use WSL)")
    compiler = find_compiler()
    path = cache_directory() / f"{cache_key(compiler)}.so"
    if _is_intact(path):
        try:
            torch.ops.load_library(path)
            return path
        except OSError:
            pass  # a damaged file: build it again
    build(compiler, path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(f"the compiled library cannot be loaded ({error.__cause__ or error})") from error
    return path


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else the first of g++, c++, clang++ on the path."""
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]:
        if command and shutil.which(command[0]):
            return command
    raise BuildError(
        f"the compiler named by $CXX, {named!r}, is not there"
        if named
        else "no C++ compiler (g++, c++, clang++) was found"
    )


def flags() -> list[str]:
    """Compiler flags for this machine."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [*_FLAGS, native, "-isystem", str(Path(torch.__file__).parent / "include")]


def libraries() -> list[str]:
    """What the library is linked with."""
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", *undefined]


def cache_key(compiler: list[str]) -> str:
    """A hash of whatever the compiled library depends on."""
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {shlex.join(compiler)!r} does not run ({error})") from error
    digest = hashlib.sha256()
    for source in [*_SOURCES, *sorted(_HERE.glob("*.h"))]:
        digest.update(source.read_bytes())
    for part in (version, torch.__version__, shlex.join([*compiler, *flags(), *libraries()]), processor()):
        digest.update(b"\0" + part.encode())
    return f"cpu-{digest.hexdigest()[:24]}"


@functools.cache
def processor() -> str:
    """The processor's model and instruction sets: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kept = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")]
        return "\n".join(kept) or platform.processor()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _is_intact(path: Path) -> bool:
    """A file of ours, ending in its own checksum: loading a truncated one would end the process, not raise."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.getuid(), 0):
        return False
    return content[-_CHECKSUM:] == hashlib.sha256(content[:-_CHECKSUM]).digest()


def build(compiler: list[str], path: Path) -> None:
    """Compiles the kernels to `path`; a reader of `path` sees the old file or the whole new one. Raises BuildError."""
    try:
        with files.replace(path, mode=0o700) as temporary:
            _compile(compiler, temporary)
            with open(temporary, "r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
    except UserError as error:
        raise BuildError(str(error)) from error


def _compile(compiler: list[str], output: Path) -> None:
    """Every source by itself, all at the same time, then one library of them."""
    with tempfile.TemporaryDirectory() as directory:
        objects = [Path(directory) / f"{source.stem}.o" for source in _SOURCES]
        compiling = [
            _start([*compiler, "-c", str(source), "-o", str(made), *flags()])
            for source, made in zip(_SOURCES, objects, strict=True)
        ]
        try:
            for process in compiling:
                _finish(compiler, process)
        finally:
            for process in compiling:
                process.terminate()  # a compiler that is told to end removes what it had begun
                process.wait()
        _finish(compiler, _start([*compiler, *map(str, objects), "-o", str(output), "-shared", *libraries()]))


def _start(command: list[str]) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise BuildError(f"the compiler {command[0]!r} does not run ({error})") from error


def _finish(compiler: list[str], process: "subprocess.Popen[str]") -> None:
    try:
        _, said = process.communicate(timeout=600)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise BuildError(f"{shlex.join(compiler)} took more than ten minutes") from error
    if process.returncode != 0:
        errors = [line for line in said.splitlines() if "error" in line] or said.splitlines()
        raise BuildError(f"{shlex.join(compiler)} failed ({errors[0].strip() if errors else 'no message'})")
