"""The record of a run: what was measured, how, from what, and how sure we are of it.

A `Record` is plain data: tables and figures whose every number carries its standard error, with the configuration, seeds and
provenance (versions, commit, device) that produced it. It is written atomically as JSON. JSON has no infinities and no NaN:
they are written as null, and `nonfinite` maps the place (a JSON pointer) to "inf", "-inf" or "nan", so that nothing is lost.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmlens import files
from ssmlens.errors import UserError

_CELL = re.compile(r"/maps/\d+/panels/\d+/(values|stderr)/")

SCHEMA_VERSION = 3
READS = (1, 2, 3)  # 2 added maps, 3 links; an older file is a record without any


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Value(_Part):
    """A number with its standard error (None: not estimated) and the count of independent samples behind it."""

    value: float
    stderr: float | None = None
    n: int | None = None
    unit: str = ""

    @classmethod
    def mean(cls, samples: Iterable[float], unit: str = "") -> "Value":
        """The mean of independent samples with its standard error (None for a single one: nothing is known of the spread)."""
        values = [float(x) for x in samples]
        n = len(values)
        centre = math.fsum(values) / n
        if n < 2:
            return cls(value=centre, n=n, unit=unit)
        spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
        return cls(value=centre, stderr=spread / math.sqrt(n), n=n, unit=unit)

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Student's t confidence interval of a mean of n samples; None where there is no standard error."""
        if self.stderr is None or self.n is None or self.n < 2:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.5 + level / 2, self.n - 1)) * self.stderr
        return self.value - half, self.value + half

    def p_value(self) -> float | None:
        """Two-sided p of "the mean is 0" (Student's t); None where there is no standard error."""
        if self.stderr is None or self.n is None or self.n < 2:
            return None
        if self.stderr == 0:
            return 1.0 if self.value == 0 else 0.0
        from scipy.stats import t

        return float(2 * t.sf(abs(self.value) / self.stderr, self.n - 1))


Cell = Value | float | int | str | None


class Column(_Part):
    name: str
    unit: str = ""
    meaning: str = ""


class Table(_Part):
    """rows[i][j] belongs to columns[j]. `meaning` and `method` are sentences for the reader."""

    id: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    meaning: str = ""
    method: str = ""


class Series(_Part):
    """One curve. y, stderr, low, high have the length of x; low/high is a confidence band, stderr a standard error.
    style "fit" is a fitted or theoretical line, drawn thinner; `group` ties the colours of series of one model together."""

    name: str
    x: list[float] | list[str]
    y: list[float]
    stderr: list[float] | None = None
    low: list[float] | None = None
    high: list[float] | None = None
    style: Literal["line", "points", "fit", "step", "bar"] = "line"
    group: str = ""

    @model_validator(mode="after")
    def _lengths_agree(self) -> "Series":
        for name in ("y", "stderr", "low", "high"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.x):
                raise ValueError(f"{name} has {len(column)} values, x has {len(self.x)}")
        if (self.low is None) != (self.high is None):
            raise ValueError("a band needs both low and high")
        return self


class Figure(_Part):
    """A picture as data. `y_floor`: below it values are numerical noise (drawn as a line where given)."""

    id: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    x_scale: Literal["linear", "log", "category"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    y_floor: float | None = None
    meaning: str = ""
    method: str = ""


class Panel(_Part):
    """One heat map: values[i][j] at y[i], x[j] of its `Map`, with their standard errors. NaN: nothing there (left blank, as above a
    diagonal)."""

    name: str
    values: list[list[float]]
    stderr: list[list[float]] | None = None
    group: str = ""

    @field_validator("values", "stderr", mode="before")
    @classmethod
    def _null_is_nan(cls, grid: Any) -> Any:
        """Blank cells are many, and the file has null for each."""
        if not isinstance(grid, list):
            return grid
        return [[math.nan if v is None else v for v in row] if isinstance(row, list) else row for row in grid]


class Map(_Part):
    """Heat maps on the same two axes and one colour scale. x, y: positions of columns and rows, numbers or names;
    `unit`: what the colours mean; low, high: the ends of the colour scale (None: those of the values)."""

    id: str
    title: str
    x_label: str
    y_label: str
    unit: str
    x: list[float] | list[str]
    y: list[float] | list[str]
    panels: list[Panel]
    scale: Literal["linear", "log"] = "linear"
    low: float | None = None
    high: float | None = None
    meaning: str = ""
    method: str = ""

    @model_validator(mode="after")
    def _shapes_agree(self) -> "Map":
        for panel in self.panels:
            for grid in (panel.values, panel.stderr):
                if grid is not None and (len(grid) != len(self.y) or any(len(row) != len(self.x) for row in grid)):
                    raise ValueError(f"panel {panel.name!r} is not of shape ({len(self.y)}, {len(self.x)})")
        return self


class Link(_Part):
    """Another page of the same run. href: where it lies, relative to this record."""

    title: str
    href: str

    @field_validator("href")
    @classmethod
    def _beside(cls, href: str) -> str:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", href):
            raise ValueError(f"{href!r} is not a relative path")
        return href


class Provenance(_Part):
    ssmlens: str
    python: str
    platform: str
    processor: str
    device: str
    threads: int | None
    versions: dict[str, str]
    commit: str | None
    command: list[str]
    created: str


class Record(_Part):
    """What a measuring verb writes as results.json.

    verdict: sentences in plain words, the most important first. complete: False where a run was interrupted and this is what
    was finished. seeds: every seed that randomness came from. config: what would reproduce it."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    title: str
    verdict: list[str] = Field(default_factory=list)
    tables: list[Table] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    maps: list[Map] = Field(default_factory=list)
    links: list[Link] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    complete: bool = True
    provenance: Provenance

    def to_json(self) -> str:
        """The record as JSON text, with `nonfinite` beside its fields."""
        nonfinite: dict[str, str] = {}
        tree = _without_nonfinite(self.model_dump(mode="python"), "", nonfinite)
        return json.dumps({**tree, "nonfinite": nonfinite}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write to `path` atomically: a reader, or a kill, sees the old file or the new one, never a part."""
        return files.write(path, self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Raises UserError for text that is not a record of a schema this version reads."""
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"not a results file: {e}") from e
        if not isinstance(tree, dict) or "schema_version" not in tree:
            raise UserError("not a results file: it has no schema_version")
        if tree["schema_version"] not in READS:
            raise UserError(
                f"results file has schema version {tree['schema_version']}, this ssmlens reads "
                f"{READS[0]} to {READS[-1]}; use the ssmlens that wrote it"
            )
        nonfinite = tree.pop("nonfinite", None) or {}
        if not isinstance(nonfinite, dict) or any(name not in ("inf", "-inf", "nan") for name in nonfinite.values()):
            raise UserError("not a results file: `nonfinite` must map places to inf, -inf or nan")
        for pointer, name in nonfinite.items():
            _put(tree, pointer, float(name))
        try:
            return cls.model_validate(tree)
        except ValidationError as e:
            first = e.errors()[0]
            where = "/".join(map(str, first["loc"]))
            raise UserError(f"not a results file: {where}: {first['msg']}") from e

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Record":
        """Raises UserError, naming the path, where there is no readable record."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {path}: {e}") from e
        try:
            return cls.from_json(text)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e


def provenance(device: str = "cpu") -> Provenance:
    """Where a result comes from: versions, commit, machine, command. Host names and paths stay out of it."""
    names = ("torch", "transformers", "safetensors", "accelerate", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    try:
        own = metadata.version("ssmlens")
    except metadata.PackageNotFoundError:
        own = "unknown"
    return Provenance(
        ssmlens=own,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        device=device,
        threads=torch.get_num_threads() if torch else None,
        versions=versions,
        commit=_commit(),
        command=[
            "ssmlens" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name,
            *(_placeless(a) for a in sys.argv[1:]),
        ],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _placeless(argument: str) -> str:
    """With the names alone of its absolute paths: one, several with commas between, or behind a name: `pixels=/data/cifar.tar`."""
    if os.path.isabs(argument) and "," not in argument:
        return Path(argument).name
    return re.sub(r"(?<![^,=:])/(?!/)[^,]*", lambda found: Path(found[0]).name, argument)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file belongs to ("-dirty" where it has changes); None for an installed package."""
    here = Path(__file__).resolve().parent
    root = here.parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _without_nonfinite(node: Any, pointer: str, found: dict[str, str]) -> Any:
    if isinstance(node, float) and not math.isfinite(node):
        if not (math.isnan(node) and _CELL.match(pointer)):  # there null says as much
            found[pointer] = repr(node)
        return None
    if isinstance(node, dict):
        escaped = {k: str(k).replace("~", "~0").replace("/", "~1") for k in node}
        return {str(k): _without_nonfinite(v, f"{pointer}/{escaped[k]}", found) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_without_nonfinite(v, f"{pointer}/{i}", found) for i, v in enumerate(node)]
    return node


def _put(tree: Any, pointer: str, value: float) -> None:
    try:
        *parents, last = (p.replace("~1", "/").replace("~0", "~") for p in pointer.split("/")[1:])
        for part in parents:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        tree[int(last) if isinstance(tree, list) else last] = value
    except (KeyError, IndexError, ValueError, TypeError) as e:
        raise UserError(f"not a results file: `nonfinite` names {pointer}, which is not there") from e
