"""The numbers of heat maps: as arrays, in words, as tables, as CSV, and coarser where there are too many."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence

import numpy as np

from ssmlens.report import data, text
from ssmlens.results import Map, Panel

TABLE_ROWS, TABLE_COLUMNS = 24, 12  # larger maps are summarised


def values(panel: Panel) -> data.Array:
    """(rows, columns), NaN where there is nothing or nothing that an axis shows."""
    rows = len(panel.values)
    return data.floats(np.asarray(panel.values, dtype=float).reshape(rows, -1))  # type: ignore[arg-type]


def count(heat: Map) -> int:
    return sum(len(heat.x) * len(heat.y) for _ in heat.panels)


def labels(axis: Sequence[float] | Sequence[str]) -> list[str]:
    return [data.x_text(v) for v in axis]


def some(axis: Sequence[float] | Sequence[str], most: int) -> list[int]:
    """Indices of at most about `most` positions to label: round numbers where there are any, else every k-th."""
    n = len(axis)
    if n <= most:
        return list(range(n))
    if not any(isinstance(v, str) for v in axis):
        at = np.asarray(axis, dtype=float)
        steps = np.diff(at)
        if np.isfinite(at).all() and steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6):
            ten = 10.0 ** math.floor(math.log10(steps[0]))
            for step in (ten * m * k for k in 10.0 ** np.arange(12) for m in (1, 2, 2.5, 5)):
                found = np.flatnonzero(np.abs(at / step - np.round(at / step)) < 1e-6)
                if 2 <= len(found) <= most:
                    return found.tolist()
    return list(range(0, n, -(-n // most)))


def extremes(heat: Map, panel: Panel) -> tuple[str, str] | None:
    """The least and the greatest value in words, with their places; None where there is none."""
    held = values(panel)
    if not np.isfinite(held).any():
        return None

    def said(flat: np.intp) -> str:
        i, j = np.unravel_index(flat, held.shape)
        x, y = data.x_text(heat.x[j]), data.x_text(heat.y[i])
        return f"{text.number(held[i, j])} at {text.clean(heat.x_label, 60)} {x}, {text.clean(heat.y_label, 60)} {y}"

    return said(np.nanargmin(held)), said(np.nanargmax(held))


def grids(heat: Map) -> list[data.Grid]:
    """Every panel as a table; of maps too large to read, one table of what is in them."""
    if len(heat.y) <= TABLE_ROWS and len(heat.x) <= TABLE_COLUMNS:
        corner = f"{text.clean(heat.y_label)} ↓, {text.clean(heat.x_label)} →"
        return [
            data.Grid(
                [corner, *labels(heat.x)],
                [[name, *("" if math.isnan(v) else text.number(v, errors[j] if errors else None) for j, v in enumerate(row))]
                 for name, row, errors in zip(labels(heat.y), p.values, p.stderr or [[]] * len(heat.y), strict=True)],
                len(heat.y),
                text.clean(p.name),
            )
            for p in heat.panels
        ]  # fmt: skip
    rows = []
    for p in heat.panels:
        held = values(p)
        there = held[np.isfinite(held)]
        found = extremes(heat, p) or (text.NOT_MEASURED, text.NOT_MEASURED)
        middle = text.number(float(np.median(there))) if len(there) else text.NOT_MEASURED
        rows.append([text.clean(p.name), found[0], middle, found[1], str(held.size - len(there))])
    return [data.Grid(["panel", "least", "median", "most", "blank cells"], rows, len(rows), numbers=False)]


def left_out(heat: Map) -> list[str]:
    """What the picture does not show."""
    said = []
    for p in heat.panels:
        raw, held = np.asarray(p.values, dtype=float), values(p)
        odd = int((~np.isfinite(held) & ~np.isnan(raw)).sum())
        hidden = int((held <= 0).sum()) if heat.scale == "log" else 0
        name = f"of {raw.size} values of “{text.clean(p.name, 60)}”"
        if odd:
            said.append(f"{odd} {name} are infinite or beyond reason: left blank.")
        if hidden:
            said.append(f"{hidden} {name} are zero or negative, without a place on a logarithmic scale: left blank.")
    return said


def to_csv(heat: Map) -> str:
    """Tidy CSV: panel, y, x, value, and stderr where there are any; every cell that has a value. Nine significant digits."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    known = any(p.stderr for p in heat.panels)
    rows.writerow(["panel", "y", "x", "value", *(["stderr"] if known else [])])

    def name(v: float | str) -> str:
        return data.inert(v) if isinstance(v, str) else data.digits(v)

    x, y = [name(v) for v in heat.x], [name(v) for v in heat.y]
    for p in heat.panels:
        for i, row in enumerate(p.values):
            for j, v in enumerate(row):
                if not math.isnan(v):
                    error = [data.digits(p.stderr[i][j]) if p.stderr else ""] if known else []
                    rows.writerow([data.inert(p.name), y[i], x[j], data.digits(v), *error])
    return out.getvalue()


def coarse(heat: Map, most: int) -> Map:
    """The map with at most `most` rows and columns: means of blocks, each named after its ends."""
    down, along = -(-len(heat.y) // most), -(-len(heat.x) // most)
    if max(down, along) <= 1:
        return heat

    def ends(axis: Sequence[float] | Sequence[str], k: int) -> list[float] | list[str]:
        if k <= 1:
            return list(axis)  # type: ignore[return-value]
        blocks = [axis[i : i + k] for i in range(0, len(axis), k)]
        return [data.x_text(b[0]) if len(b) == 1 else f"{data.x_text(b[0])} to {data.x_text(b[-1])}" for b in blocks]

    def means(panel: Panel) -> list[list[float]]:
        held = values(panel)
        rows, columns = -(-held.shape[0] // down), -(-held.shape[1] // along)
        padded = np.full((rows * down, columns * along), np.nan)
        padded[: held.shape[0], : held.shape[1]] = held
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # blocks without a value
            return np.nanmean(padded.reshape(rows, down, columns, along), axis=(1, 3)).tolist()

    return heat.model_copy(
        update={
            "x": ends(heat.x, along),
            "y": ends(heat.y, down),
            "panels": [p.model_copy(update={"values": means(p), "stderr": None}) for p in heat.panels],
        }
    )
