"""A figure's numbers: thinned for drawing, as tables for reading, as CSV for other programs."""

import base64
import csv
import gzip
import io
import math
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ssmlens.report import text
from ssmlens.results import Figure, Series

Array = NDArray[np.float64]
MOST = 1e100


HUGE = 1e300  # from here on a sum or the range of an axis may overflow: like infinity, no axis shows it


def floats(values: list[float]) -> Array:
    numbers = np.asarray(values, dtype=float)
    return np.where(np.abs(numbers) < HUGE, numbers, np.nan)


def count(figure: Figure) -> int:
    """How many numbers it holds."""
    return sum(len(c) for s in figure.series for c in (s.x, s.y, s.stderr, s.low, s.high) if c is not None)


def category_names(figure: Figure) -> list[str]:
    """The positions of a category axis: every x in the order of its first appearance."""
    return list(dict.fromkeys(str(x) for s in figure.series for x in s.x))


def is_category(figure: Figure) -> bool:
    """Names on the x axis make it a category axis, whatever x_scale says."""
    return figure.x_scale == "category" or any(isinstance(x, str) for s in figure.series for x in s.x)


def positions(figure: Figure, series: Series) -> Array:
    """x as numbers: on a category axis the index of each name."""
    if not is_category(figure):
        return np.asarray(series.x, dtype=float)
    index = {name: i for i, name in enumerate(category_names(figure))}
    return np.asarray([index[str(x)] for x in series.x], dtype=float)


def thin(x: Array, y: Array, limit: int, log: bool = False) -> NDArray[np.intp]:
    """Indices of at most about `limit` points that look like all of them.

    The range of x is cut into equal parts (equal in log x where `log`). Of each part the lowest and the
    highest point stay, and so do the ends and one point of every gap of NaN: no spike and no hole is lost."""
    n = len(x)
    if n <= limit or limit < 4:
        return np.arange(n)
    usable = np.isfinite(x) & (x > 0 if log else True)
    place = np.log(np.where(usable, x, 1.0)) if log else np.where(usable, x, 0.0)
    low, high = place[usable].min(initial=math.inf), place[usable].max(initial=-math.inf)
    if not high > low:
        return np.unique(np.linspace(0, n - 1, limit).astype(np.intp))
    part = np.minimum(((place - low) / (high - low) * (limit // 2)).astype(np.int64), limit // 2 - 1)
    keep = {0, n - 1}
    finite = usable & np.isfinite(y)
    rank = np.lexsort((y, part))  # by part, then by height
    rank = rank[finite[rank]]
    edges = np.flatnonzero(np.diff(part[rank])) if len(rank) else np.empty(0, np.intp)
    keep.update(rank[np.concatenate(([0], edges + 1))].tolist() if len(rank) else [])
    keep.update(rank[np.concatenate((edges, [len(rank) - 1]))].tolist() if len(rank) else [])
    gaps = np.flatnonzero(~finite[1:] & finite[:-1]) + 1
    keep.update(gaps[: limit // 2].tolist())
    return np.asarray(sorted(keep), dtype=np.intp)


def drawable(values: Array, log: bool) -> NDArray[np.bool_]:
    """Which values have a place on an axis: finite, not beyond reason, positive on a log axis."""
    usable = np.abs(values) < MOST  # NaN is not
    return usable & (values > 1 / MOST) if log else usable


def left_out(figure: Figure) -> list[str]:
    """Sentences about values that the picture does not show: the reader must not take a gap for a measurement."""
    said = []
    log_x = figure.x_scale == "log" and not is_category(figure)
    for s in figure.series:
        x, y = positions(figure, s), floats(s.y)
        finite = drawable(x, False) & drawable(y, False)
        shown = drawable(x, log_x) & drawable(y, figure.y_scale == "log")
        name = f"of {len(y)} values of “{text.clean(s.name, 60)}”"
        bad, hidden = int((~finite).sum()), int((finite & ~shown).sum())
        if bad:
            said.append(f"{bad} {name} are infinite, undefined or beyond {text.power_of_ten(100)}: not drawn.")
        if hidden:
            said.append(f"{hidden} {name} are zero, negative or too small for a logarithmic axis.")
    return said


@dataclass(frozen=True)
class Download:
    label: str
    href: str
    name: str


@dataclass(frozen=True)
class Grid:
    """Series that share their x, as one table of text. `shown` of `total` rows."""

    head: list[str]
    rows: list[list[str]]
    total: int
    name: str = ""
    numbers: bool = True  # the cells: words, where not


def grids(figure: Figure, limit: int = 24) -> list[Grid]:
    """The figure as tables of at most `limit` rows each, one per distinct x."""
    by_x: dict[tuple[str | float, ...], list[Series]] = {}
    for s in figure.series:
        by_x.setdefault(tuple(s.x), []).append(s)
    found = []
    for members in by_x.values():
        x = positions(figure, members[0])
        log = figure.x_scale == "log" and not is_category(figure)
        rows = _spread(x, limit, log)
        body = [[x_text(members[0].x[i]), *(_y(s, int(i)) for s in members)] for i in rows]
        found.append(Grid([text.clean(figure.x_label), *(text.clean(s.name) for s in members)], body, len(x)))
    return found


def _spread(x: Array, limit: int, log: bool) -> list[int]:
    n = len(x)
    if n <= limit:
        return list(range(n))
    if log:
        goals = np.unique(np.round(np.geomspace(1, n, limit)).astype(int)) - 1
    else:
        goals = np.unique(np.round(np.linspace(0, n - 1, limit)).astype(int))
    return [int(i) for i in goals]


def x_text(x: float | str) -> str:
    return text.clean(x) if isinstance(x, str) else text.number(x)


def _y(s: Series, i: int) -> str:
    shown = text.number(s.y[i], s.stderr[i] if s.stderr else None)
    if s.low and s.high:
        shown += f" [{text.number(s.low[i])}, {text.number(s.high[i])}]"
    return shown


def to_csv(figure: Figure, indices: dict[int, NDArray[np.intp]] | None = None) -> str:
    """Tidy CSV: series, x, y, stderr, low, high; every point, or of series j the points indices[j].

    Nine significant digits, which give every float32 back."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["series", "x", "y", "stderr", "low", "high"])
    for j, s in enumerate(figure.series):
        for i in range(len(s.y)) if indices is None else indices[j]:
            extras = [digits(c[i]) if c else "" for c in (s.stderr, s.low, s.high)]
            x = s.x[i]
            rows.writerow([inert(s.name), inert(x) if isinstance(x, str) else digits(x), digits(s.y[i]), *extras])
    return out.getvalue()


def packed(content: str) -> bytes:
    """gzip without a time stamp: equal content gives equal bytes."""
    return gzip.compress(content.encode(), mtime=0)


def uri(kind: str, content: str | bytes) -> str:
    """A data: URI. Text stays legible but for the characters that a URI or an attribute cannot hold."""
    if isinstance(content, bytes):
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f"data:{kind},{quote(content, safe=' <>=/:;,.()!*-_~+?@$[]{}|^')}"


def digits(value: float) -> str:
    if not math.isfinite(value):
        return repr(value)
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else f"{value:.9g}"


def inert(name: str) -> str:
    """A name that a spreadsheet would run as a formula gets an apostrophe, which makes it text there."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name
