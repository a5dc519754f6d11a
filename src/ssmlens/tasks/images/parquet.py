"""The hub's parquet, through the package `datasets`: a data set by name, or a directory of parquet files.

The image column holds the bytes of PNG or JPEG files, which are decoded here, so that a damaged one is named.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError
from ssmlens.tasks.images.base import SPLITS, ImageSet
from ssmlens.tasks.images.decoding import Gathered

_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w.-]+)?")
_SAFE = 4  # from this version on the package runs no code of a data set


def from_hub(name: str) -> ImageSet:
    """name: OWNER/NAME, or OWNER/NAME@REVISION. Raises UserError for one that cannot be loaded or has no images with classes."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"datasets:{name[:80]} is no data set of the hub: datasets:OWNER/NAME, or datasets:OWNER/NAME@REVISION"
        )
    repository, _, revision = name.partition("@")
    return _gathered(f"datasets:{name}", _load("datasets:" + name, path=repository, revision=revision or None))


def from_directory(directory: Path) -> ImageSet:
    """Parquet files whose names, or whose directory's, begin with train and test. Raises UserError."""
    found = {split: [str(p) for p in _files(directory) if split in _split_of(p)] for split in SPLITS}
    for split, files in found.items():
        if not files:
            raise UserError(f"{directory} has no parquet file for {split}: {split}*.parquet or {split}/*.parquet")
    with tempfile.TemporaryDirectory(prefix="ssmlens-") as temporary:  # datasets would keep a second copy
        loaded = _load(str(directory), path="parquet", data_files=found, cache_dir=temporary)
        return _gathered(directory.name, loaded)


def holds_parquet(directory: Path) -> bool:
    return bool(_files(directory))


def _files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.parquet"), *directory.glob("*/*.parquet")])


def _split_of(file: Path) -> list[str]:
    return [split for split in SPLITS if file.name.startswith(split) or file.parent.name == split]


def _load(name: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} is read by the package datasets: pip install 'ssmlens[data]' (or datasets)") from None
    if int(datasets.__version__.split(".")[0]) < _SAFE:
        raise UserError(
            f"{name}: the package datasets {datasets.__version__} can run code of a data set; install {_SAFE} or later"
        )
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**options)
    except Exception as e:  # pyarrow, the hub and datasets raise dozens of kinds
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"cannot load {name}: {reason}") from None


def _gathered(name: str, loaded: Any) -> ImageSet:
    import datasets

    for split in SPLITS:
        if split not in loaded:
            raise UserError(f"{name} has no split {split} (it has {', '.join(loaded)})")
    features = loaded["train"].features
    image = next((k for k, f in features.items() if isinstance(f, datasets.Image) or _is_file(f)), None)
    label = next((k for k, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    label = label or next((k for k in ("label", "labels") if k in features), None)
    if image is None or label is None:
        raise UserError(f"{name} has no column of images, or none of labels (it has {', '.join(features)})")
    known = getattr(features[label], "names", None)
    gathered = Gathered(name)
    for split in SPLITS:
        table = loaded[split].select_columns([image, label])
        if isinstance(features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        for i, row in enumerate(table):
            content, number = (row[image] or {}).get("bytes"), row[label]
            if not isinstance(content, bytes) or not isinstance(number, int) or number < 0:
                raise UserError(f"{name}: row {i} of {split} has no image or no class")
            if known is not None and number >= len(known):
                raise UserError(f"{name}: row {i} of {split} has the class {number}, there are {len(known)}")
            gathered.add(split, known[number] if known else f"{number:04d}", f"{i:08d}", content)
    return gathered.finish(tuple(known) if known else None)


def _is_file(feature: Any) -> bool:
    return isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
