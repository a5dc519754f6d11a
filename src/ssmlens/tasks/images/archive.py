"""Tar archives, plain or compressed (gzip, zstd), read in memory: nothing is written to disk, and no name in them is followed.

A tar file that was cut at the border of a member looks whole to most readers: here its end must be there too.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ssmlens.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
_LARGEST = 1 << 32  # bytes, decompressed
_CHUNK = 1 << 22
_BLOCK = 512


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def members(path: Path) -> Iterator[tuple[tuple[str, ...], bytes]]:
    """(parts of the name, content) of every file in an archive, in its order.

    Raises UserError, naming archive and member, for a damaged or cut archive, absolute names, `..`, links and devices."""
    data = _decompressed(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.name.startswith(("/", "\\")) or ".." in parts or "\0" in member.name:
                    raise UserError(f"{path} names a file outside of it ({member.name[:80]!r}): not read")
                if member.isdir():
                    continue
                # of a sparse one the header alone says how large it is, however small the archive
                whole = parts and member.isreg() and not member.issparse()
                content = tar.extractfile(member) if whole else None
                if content is None:
                    raise UserError(
                        f"{path}: {member.name[:80]!r} is a link, a device or sparse, not a plain file: not read"
                    )
                found = content.read()
                if len(found) < member.size:
                    raise tarfile.ReadError(f"{member.name[:80]} is cut")
                yield parts, found
            end = data[tar.offset : tar.offset + _BLOCK]
    except (tarfile.TarError, ValueError, EOFError, OSError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} is damaged or cut ({e})") from None
    if len(end) < _BLOCK or any(end):
        raise UserError(f"{path} is damaged or cut (the mark at the end of a tar archive is missing)")


def _decompressed(path: Path) -> bytes:
    name = path.name.lower()
    try:
        with open(path, "rb") as file:
            if name.endswith((".gz", ".tgz")):
                return _whole(gzip.GzipFile(fileobj=file), path)
            return _zstd(file, path) if name.endswith(("zst",)) else _whole(file, path)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def _whole(stream: io.BufferedIOBase, path: Path) -> bytes:
    parts, size = [], 0
    while part := stream.read(_CHUNK):
        parts.append(part)
        size = _bounded(size + len(part), path)
    return b"".join(parts)


def _zstd(file: io.BufferedIOBase, path: Path) -> bytes:
    """Frame by frame: a reader of streams takes a cut frame for the end."""
    try:
        import zstandard
    except ImportError:
        try:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
        except ImportError:
            raise UserError(
                f"{path} is compressed with zstd: pip install 'ssmlens[data]' (or zstandard), or decompress it"
            ) from None
        make, failure = zstd.ZstdDecompressor, zstd.ZstdError
    else:
        make, failure = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    parts, size, frame, rest = [], 0, make(), b""
    try:
        while part := rest or file.read(1 << 16):
            if frame.eof:
                frame = make()
            parts.append(frame.decompress(part))
            size = _bounded(size + len(parts[-1]), path)
            rest = frame.unused_data if frame.eof else b""
    except failure as e:
        raise UserError(f"{path} is damaged ({e})") from None
    if not frame.eof:
        raise UserError(f"{path} is cut: it ends in the middle of its last zstd frame")
    return b"".join(parts)


def _bounded(size: int, path: Path) -> int:
    if size > _LARGEST:
        raise UserError(f"{path} holds more than {_LARGEST >> 30} GiB: unpack it and give the directory")
    return size
