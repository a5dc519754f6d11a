"""Files and directories that are there whole or not at all, even after a kill or a power cut.

    .NAME.tmp-ID-PID-N    being written; becomes NAME in one rename
    .NAME.old-ID-PID-N    what NAME was, for the instant in which another directory takes its place

ID stands for the machine (or container), PID for the process. Whoever writes NAME next removes what a dead process left of
it, and puts back an old directory that was not replaced after all. Names begin with a dot, so that no glob finds them.

Every function raises UserError, with the path and what to do, where a place cannot be written or is full.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmlens.errors import UserError

if sys.platform != "win32":
    import fcntl

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<id>[0-9a-f]{8})-(?P<pid>[1-9]\d{0,8})-\d+")
_ABANDONED = 3600.0  # seconds without a change, where it cannot be asked whether the process lives
_numbers = itertools.count()


def write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file (text as UTF-8) and returns its path. Readers see the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replace(path) as temporary, open(temporary, "xb") as file:
        file.write(data)
    return Path(path)


@contextmanager
def replace(path: str | os.PathLike[str], mode: int | None = None) -> Iterator[Path]:
    """Gives the temporary path of a file to be written, which takes the place of `path` at the end of the block.

    mode: its permissions; None for those that it has (what `open` makes is as the umask says)

    If the block raises, nothing is left and `path` is as it was; an OSError becomes a UserError.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent, path.name)
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            if mode is not None:
                temporary.chmod(mode)
            _flush(temporary)
            _move(temporary, path)
        finally:
            _remove(temporary)
    except OSError as error:
        raise _refusal("write", path, error) from error


@contextmanager
def replace_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`replace` of a directory: gives an empty temporary one to fill. Its files become readable as the umask says."""
    with replace(path) as temporary:
        temporary.mkdir()
        yield temporary
        # mkdir has followed the umask; some libraries write files that only their owner can read
        readable = temporary.stat().st_mode & 0o666
        for each in temporary.rglob("*"):
            if each.is_file():
                each.chmod(readable)


def make_directory(path: str | os.PathLike[str]) -> Path:
    """The directory, made if need be; it can be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _refusal("make the directory", path, error) from error
    return path


def clean(directory: Path) -> None:
    """Removes whatever was left half written, by whomever. Only for the process that has the directory `locked`."""
    _tidy(directory)


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Keeps other processes out of the block; the system lets go when this one ends, however it ends (kill -9 too).

    what: for the others' error, as in "another process is `training` in runs/a". The file `.lock` stays.

    Does nothing where there are no such locks (Windows, some network file systems).
    """
    make_directory(directory)
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _refusal("write", directory / ".lock", error) from error
    try:
        if sys.platform != "win32":
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is {what} in {directory}: wait until it ends, or choose another directory (--out)"
                ) from None
            except OSError:
                pass
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if sys.platform != "win32" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    if path.is_dir():
        for each in path.rglob("*"):
            sync(each)
    sync(path)


def _move(temporary: Path, path: Path) -> None:
    """No system call in Python exchanges a directory for another one that is not empty: the old one steps aside."""
    if temporary.is_dir() and os.path.lexists(path):
        old = _beside(path, "old")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        sync(path.parent)
        _remove(old)
    else:
        os.replace(temporary, path)
        sync(path.parent)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{_machine()}-{os.getpid()}-{next(_numbers)}")


def _machine() -> str:
    """Eight hexadecimal digits that differ where process numbers mean other processes."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _tidy(directory: Path, name: str | None = None) -> None:
    """What dead processes left of `name`; of all names, whoever left it, for None."""
    for left in list(directory.iterdir()):
        found = _LEFT.fullmatch(left.name)
        if found is None or name not in (None, found["name"]):
            continue
        with contextlib.suppress(OSError):  # somebody else removes it at the same time
            if name is None or _is_abandoned(left, found["id"], int(found["pid"])):
                target = directory / found["name"]
                if found["kind"] == "old" and not os.path.lexists(target):
                    os.rename(left, target)
                else:
                    _remove(left)


def _is_abandoned(path: Path, machine: str, pid: int) -> bool:
    if machine == _machine() and sys.platform != "win32":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, and is somebody else's
            pass
    return time.time() - path.lstat().st_mtime > _ABANDONED


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refusal(what: str, path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    advice = "make room there" if full else "choose another place (--out)"
    return UserError(f"cannot {what} {path}: {error.strerror or error}; {advice}")
