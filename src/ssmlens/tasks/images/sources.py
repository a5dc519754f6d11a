"""What a source of images is, and how it is read.

    digits                      scikit-learn's digits, 8 × 8 grey
    datasets:OWNER/NAME         the hub, by the package `datasets`
    a directory or an archive (.tar, .tar.gz, .tgz, .tar.zst) with CIFAR-10's batches (Python or binary), or SPLIT/CLASS/NAME.png|jpg
    a directory of parquet files

SPLIT is train or test. Whatever was decoded is kept (`store`), the digits aside.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssmlens import cache as cached
from ssmlens.errors import UserError
from ssmlens.tasks.images import archive, cifar, decoding, parquet, store
from ssmlens.tasks.images.base import SPLITS, ImageSet, Split, assembled

DIGITS = "digits"


def read(source: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None) -> ImageSet:
    """The images of a source (see the head of this file), memory-mapped.

    cache: directory for what was decoded; None: the user's cache directory.
    Raises UserError, naming the file, for a source that is missing, damaged, cut or incomplete."""
    name = os.fspath(source)
    if name == DIGITS:
        return digits()
    path = Path(name)
    if not name.startswith("datasets:") and not path.exists():
        raise UserError(
            f"no images at {name}: give a directory, an archive ({', '.join(archive.SUFFIXES)}), datasets:OWNER/NAME or {DIGITS}"
        )
    place = (Path(cache) if cache is not None else cached.directory() / "images") / f"{store.key(name)}.images"
    found = store.read(place)
    if found is None:
        store.write(place, _decoded(name, path))
        found = store.read(place)
    if found is None:
        raise UserError(f"{place} was written but cannot be read: choose another cache directory")
    return found


def digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, 8 × 8, of 17 levels of grey, spread over 0..255. The last fifth, by other writers than most of the rest, is for
    testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.data * (255 / 16)).astype(np.uint8)[..., None]
    labels = found.target.astype(np.int64)
    cut = len(labels) - len(labels) // 5
    classes = tuple(str(i) for i in range(10))
    train, test = Split(pixels[:cut], labels[:cut]), Split(pixels[cut:], labels[cut:])
    return assembled(DIGITS, classes, (8, 8, 1), train, test)


def _decoded(name: str, path: Path) -> ImageSet:
    if name.startswith("datasets:"):
        return parquet.from_hub(name.removeprefix("datasets:"))
    if not path.is_dir():
        if not archive.is_archive(path):
            raise UserError(f"{path} is no archive of images: give one that ends in {', '.join(archive.SUFFIXES)}")
        return _packed(path)
    inside = [
        path,
        *sorted(p for p in path.iterdir() if p.is_dir()),
    ]  # an unpacked archive of CIFAR-10 has a directory in it
    for directory in inside:
        batches = {p.name: p for p in directory.iterdir() if p.name in cifar.NAMES}
        if batches:
            return cifar.read(path.name, {name: _content(p) for name, p in batches.items()})
    if any((path / split).is_dir() and not list((path / split).glob("*.parquet")) for split in SPLITS):
        return _folder(path)
    if parquet.holds_parquet(path):
        return parquet.from_directory(path)
    raise UserError(
        f"{path} holds no images that are known: neither {'/, '.join(SPLITS)}/ with a directory for every class, nor CIFAR-10's batches, "
        "nor parquet files"
    )


def _packed(path: Path) -> ImageSet:
    batches: dict[str, bytes] = {}
    gathered = decoding.Gathered(path.name)
    for parts, content in archive.members(path):
        if parts[-1] in cifar.NAMES:
            batches[parts[-1]] = content
        else:
            _add(gathered, path.name, parts, content)
    return cifar.read(path.name, batches) if batches else gathered.finish()


def _folder(path: Path) -> ImageSet:
    gathered = decoding.Gathered(path.name)
    for file in _walk(path):
        parts = file.relative_to(path).parts
        if file.suffix.lower() in decoding.SUFFIXES:
            _add(gathered, path.name, parts, _content(file), deepest=3)
    classes = sorted(
        {d.name for split in SPLITS if (path / split).is_dir() for d in (path / split).iterdir() if d.is_dir()}
    )
    return gathered.finish(tuple(name for name in classes if not name.startswith(".")))


def _walk(path: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(path):
        inside.sort()
        yield from (Path(folder) / name for name in sorted(names))


def _add(
    gathered: decoding.Gathered, name: str, parts: tuple[str, ...], content: bytes, deepest: int | None = None
) -> None:
    """An image SPLIT/CLASS/NAME, whatever stands before (nothing, where `deepest` is 3); hidden files and others than images are passed by."""
    hidden = any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)
    if hidden or not parts[-1].lower().endswith(decoding.SUFFIXES):
        return
    if not 3 <= len(parts) <= (deepest or len(parts)) or parts[-3] not in SPLITS:
        raise UserError(f"{name}: {'/'.join(parts)[:120]} does not lie in train/CLASS or test/CLASS")
    gathered.add(parts[-3], parts[-2], parts[-1], content)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}") from None
