"""A figure's numbers for the script of the page (templates/figure.js): compact, exact, harmless inside HTML.

    figure -> {"x", "y": axes; "arrays": base64 of floats (`pack`); "series": looks and indices of arrays; "legend"}

The script draws from this alone; where it does not run, the page shows matplotlib's drawing of the same figure.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssmlens.report import curves, data, text
from ssmlens.report.theme import LIGHT
from ssmlens.results import Figure

FIT_POINTS = 64  # a fit may come as two points; on the other scale of y its line is none
_SHARED_PART = re.compile(r"^[\s,;:–—·(-]+|[\s)]+$")


def embedded(spec: dict[str, Any]) -> str:
    """JSON that can stand inside a <script> element whatever names it holds."""
    made = json.dumps(spec, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        made = made.replace(character, f"\\u{ord(character):04x}")
    return made


def key(figures: Iterable[Figure], groups: Sequence[str]) -> list[dict[str, Any]]:
    """What the groups of a record look like, for one legend: those in two figures or more, if there are two or more."""
    figures = list(figures)
    places = Counter(g for f in figures for g in {s.group for s in f.series if s.group})
    shared = [g for g in groups if places[g] > 1 and not curves.is_reference(g)]
    looks = {}
    for f in figures:
        for s, c in zip(f.series, curves.prepare(f, groups, 4), strict=True):
            if s.group not in looks and s.style != "fit":
                looks[s.group] = {
                    "name": text.clean(s.group), "style": "bar" if s.style == "bar" else "line", "colour": _variable(c.colour), "marker": c.marker, "dashes": list(c.dashes), "hollow": c.hollow,
                }  # fmt: skip
    return [{**looks[g], "group": g} for g in shared if g in looks] if len(shared) > 1 else []


def spec(figure: Figure, groups: Sequence[str], points: int, keyed: Sequence[str] = ()) -> dict[str, Any]:
    """The figure for the script, with at most about `points` points a series. keyed: groups that the record's legend names."""
    shown = curves.prepare(figure, groups, points)
    arrays = _Arrays()
    category = data.is_category(figure)
    names = [text.clean(n) for n in data.category_names(figure)] if category else None
    left, right = (-0.6, max(len(names or ()) - 0.4, 0.6)) if category else curves.span(figure, shown)
    floor = figure.y_floor if figure.y_floor is not None and curves.floor_in_view(figure, shown) else None
    return {
        "x": {
            "label": text.clean(figure.x_label),
            "log": curves.log_x(figure, shown),
            "names": names,
            "view": [left, right],
        },
        "y": {"label": text.clean(figure.y_label), "log": curves.log_y(figure, shown), **_views(figure, shown)},
        "floor": floor,
        "series": [_series(figure, j, c, arrays, keyed) for j, c in enumerate(shown)],
        "legend": _legend(figure, keyed),
        "arrays": arrays.packed,
    }


def _series(figure: Figure, j: int, c: curves.Curve, arrays: _Arrays, keyed: Sequence[str]) -> dict[str, Any]:
    s = figure.series[j]
    x, y = c.x - c.shift, c.y
    error = None if s.stderr is None else data.floats(s.stderr)[c.at]
    low, high = (None, None) if s.low is None else (c.low, c.high)
    if c.style == "fit" and error is None and low is None:
        x, y = _dense(x, y, c.log)
    fine = any(e is not None and bool((np.abs(e) < 1e-5 * np.abs(y)).any()) for e in (error, low, high))
    return {
        "name": c.name,
        "part": text.clean(_part(s.name, s.group) or "") if s.group in keyed else "",
        "group": keyed.index(s.group) if s.group in keyed else None,
        "style": c.style,
        "colour": _variable(c.colour),
        "marker": c.marker,
        "dashes": list(c.dashes),
        "hollow": c.hollow,
        "pale": c.pale,
        "marked": c.few and c.style in ("points", "line"),
        "barred": c.barred,
        "width": c.bar_width,
        "shift": c.shift,
        **{
            name: None if values is None else arrays.add(values, fine and name != "x")
            for name, values in (("x", x), ("y", y), ("error", error), ("low", low), ("high", high))
        },
    }


class _Arrays:
    """Each array once."""

    def __init__(self) -> None:
        self.packed: list[str] = []
        self._place: dict[str, int] = {}

    def add(self, values: data.Array, fine: bool) -> int:
        made = pack(values, fine)
        if made not in self._place:
            self._place[made] = len(self.packed)
            self.packed.append(made)
        return self._place[made]


def pack(values: data.Array, fine: bool = False) -> str:
    """Base64 after a letter. t: the upper three bytes of each float32 (five digits: one more than is shown; whole numbers to
    65536); d: float64, where that is too coarse or the numbers are beyond float32."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    whole = size[size == np.round(size)]
    if fine or not ((size > 1e-36) & (size < 1e36)).all() or (whole >= 2**16).any():
        return "d" + base64.b64encode(values.astype("<f8").tobytes()).decode()
    bits = np.where(np.isfinite(values), values, np.nan).astype("<f4").view("<u4")
    upper = ((bits.astype(np.uint64) + 128) >> 8).astype("<u4")  # rounded; NaN stays one
    return "t" + base64.b64encode(upper.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()).decode()


def _variable(colour: str) -> str:
    return next((name for name, c in LIGHT.items() if c == colour), "ink")


def _views(figure: Figure, shown: list[curves.Curve]) -> dict[str, list[float] | None]:
    """The range of y on either scale; None for one that would show nothing, or hide something."""
    found: dict[str, list[float] | None] = {}
    for name in ("linear", "log"):
        there = figure.model_copy(update={"y_scale": name})
        found[f"{name}_view"] = list(
            curves.limits(there, [replace(c, log=(c.log[0], name == "log")) for c in shown])
        )  # fmt: skip
    y = np.concatenate([c.y[data.drawable(c.y, False)] for c in shown] or [np.empty(0)])
    drawable = any(c.drawable for c in shown)
    positive = bool(len(y)) and bool((y > 0).all())
    spread = positive and float(y.max()) > 10 * float(y.min()) and not any(c.style == "bar" for c in shown)
    if not drawable or not (figure.y_scale == "log" or spread):
        found["log_view"] = None
    return found


def _dense(x: data.Array, y: data.Array, log: tuple[bool, bool]) -> tuple[data.Array, data.Array]:
    """The straight lines between a fit's points, straight on the figure's own scales, as many points."""
    usable = data.drawable(x, log[0]) & data.drawable(y, log[1])
    if not 2 <= usable.sum() < FIT_POINTS or not usable.all() or (np.diff(x) <= 0).any():
        return x, y
    u, v = (np.log(x) if log[0] else x), (np.log(y) if log[1] else y)
    at = np.union1d(np.linspace(u[0], u[-1], FIT_POINTS), u)
    between = np.interp(at, u, v)
    return (np.exp(at) if log[0] else at), (np.exp(between) if log[1] else between)


def _legend(figure: Figure, keyed: Sequence[str]) -> list[dict[str, Any]]:
    """Entries as {name, of: indices of series, common: whether the entry stands for one kind of curve of several groups}.

    What a series is called after its group ("model: fitted") is named once; a series called like its group not at all."""
    parts = [_part(s.name, s.group) if s.group in keyed else None for s in figure.series]
    known = Counter(p for p in parts if p)
    made: dict[tuple[str, int], dict[str, Any]] = {}
    for j, (s, part) in enumerate(zip(figure.series, parts, strict=True)):
        if part == "" or not s.name.strip():
            continue
        common = part is not None and known[part] > 1
        entry = made.setdefault(
            (part or "", -1) if common else ("", j),
            {"name": text.clean(part or "") if common else text.clean(s.name), "of": [], "common": common},
        )
        entry["of"].append(j)
    return list(made.values())


def _part(name: str, group: str) -> str | None:
    """What `name` adds to `group`: "" where they are equal, None where it does not begin with it."""
    if not name.startswith(group):
        return None
    rest = name[len(group) :]
    if rest and not re.match(r"[\s,;:–—·(]", rest):
        return None
    return _SHARED_PART.sub("", rest) if rest else ""
