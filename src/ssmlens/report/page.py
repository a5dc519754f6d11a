"""report.html: one file that opens offline, in light and dark, on a phone and on paper; its figures answer.

A `Record` becomes views (what the template shows, already in words), views become HTML. Everything that came
from a record is escaped by jinja2; only pictures and their numbers are inserted as markup (`picture`, `live.embedded`).
Without scripts, and in print, the page shows matplotlib's drawings; its one script puts live ones in their place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jinja2
from markupsafe import Markup

from ssmlens import files
from ssmlens.report import canvas, cells, curves, data, heat, live, plots, tables, text, theme
from ssmlens.results import Figure, Map, Record, Series

# Bytes and points that keep the page under 3 MB with 12 figures of 6 long series with bands (tested).
DRAWN_POINTS = 12_000
NARROW_POINTS = 200
CSV_BYTES = 400_000
PNG_BYTES = 500_000  # before base64
SVG_BYTES = 400_000  # a larger drawing has no second form for phones without scripts, and is compressed for download
LIVE_NUMBERS = 70_000  # for the script; each takes four bytes or more
MOST_LIVE = 4096  # points of a series
LIVE_CELLS = 100_000
SPOKEN = 8  # sentences of a verdict; the others wait behind a click
MOST_CELLS = 128  # in a row or column: more are narrower than a pixel or two
TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("common.js", "axes.js", "view.js", "drawing.js", "figure.js", "map.js", "start.js")


@dataclass(frozen=True)
class FigureView:
    key: str
    title: str
    meaning: str
    method: str
    uncertainty: str
    remarks: list[str]
    picture: Markup
    numbers: Markup
    kind: str  # what the script makes of it: "chart" or "map"
    downloads: list[data.Download]
    grids: list[data.Grid]


@dataclass(frozen=True)
class RecordView:
    record: Record
    title: str
    legend: Markup | None
    verdict: list[str]
    notes: list[str]
    summary: tables.TableView | None
    figures: list[FigureView]  # with the heat maps after the curves
    tables: list[tables.TableView]

    @cached_property
    def contents(self) -> list[tuple[str, str]]:
        """(key, title) of what the list at the top leads to."""
        return [(f.key, f.title) for f in self.figures] + [(t.key, t.title) for t in self.tables]

    @property
    def spoken(self) -> int:
        """How many sentences of the verdict are shown at once: one alone is not worth a click."""
        return SPOKEN if len(self.verdict) > SPOKEN + 1 else len(self.verdict)

    @property
    def about(self) -> str:
        """The line under the title."""
        p = self.record.provenance
        return " · ".join([text.clean(self.record.kind), p.created[:10], f"ssmlens {p.ssmlens}", p.device])

    @property
    def command(self) -> list[str]:
        """The words of the command line, each quoted as a shell needs it."""
        return [shlex.quote(word) for word in self.record.provenance.command]

    @property
    def config(self) -> str:
        tree = json.loads(self.record.to_json())["config"]
        return json.dumps(tree, indent=2, ensure_ascii=False) if tree else ""

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Provenance as (name, value)."""
        p = self.record.provenance
        versions = ", ".join(f"{k} {v}" for k, v in sorted(p.versions.items()))
        facts = [
            ("made", p.created),
            ("ssmlens", p.ssmlens),
            ("commit", p.commit or "unknown (installed package)"),
            ("seeds", ", ".join(map(str, self.record.seeds)) or "none"),
            ("device", p.device),
            ("processor", p.processor),
            ("threads", "unknown" if p.threads is None else str(p.threads)),
            ("platform", p.platform),
            ("python", p.python),
            ("libraries", versions),
        ]
        return [(name, text.clean(value)) for name, value in facts if value]


def write(records: Record | Sequence[Record], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write the page about one record or several, atomically. See `ssmlens.report.write`."""
    return files.write(path, html(records, title=title))


def html(records: Record | Sequence[Record], *, title: str | None = None) -> str:
    """The page as text; equal records give equal text."""
    several = [records] if isinstance(records, Record) else list(records)
    if not several:
        raise ValueError("a page needs at least one record")
    stock = _Stock([f for r in several for f in r.figures], [m for r in several for m in r.maps])
    views = [_view(record, f"r{i}", stock) for i, record in enumerate(several, 1)]
    heading = text.clean(title if title is not None else views[0].title if len(views) == 1 else "ssmlens report")
    script = _script()
    return _template().render(
        title=heading,
        views=views,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        light=Markup(theme.css(theme.LIGHT)),
        dark=Markup(theme.css(theme.DARK)),
    )


def picture(figure: Figure, key: str, groups: Sequence[str], points: int, most: int = SVG_BYTES) -> Markup:
    """One figure as HTML: a wide and a narrow drawing, of which the style sheet shows the one that fits; above `most` bytes the wide one alone."""
    wide = plots.svg(figure, groups=groups, prefix=f"{key}w-", points=points)
    if len(wide) > most:
        return _drawn(wide, "")
    narrow = plots.svg(figure, groups=groups, prefix=f"{key}n-", points=min(points, NARROW_POINTS), form=canvas.NARROW)
    return _drawn(wide, narrow)


def _drawn(wide: str, narrow: str) -> Markup:
    if not narrow:
        return Markup(f'<div class="drawn">{wide}</div>')
    return Markup(f'<div class="drawn"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></div>')


def _script() -> str:
    """The page's one script. Its hash in the page's policy is all that may run."""
    parts = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


@dataclass
class _Stock:
    """What all figures of a page share: the room for points and for CSV."""

    figures: list[Figure]
    maps: list[Map]
    _csv: dict[int, data.Download] = field(default_factory=dict)

    @property
    def png_bytes(self) -> int:
        return PNG_BYTES // (len(self.figures) + len(self.maps))

    @property
    def svg_bytes(self) -> int:
        return SVG_BYTES // (len(self.figures) + len(self.maps))

    def svg(self, name: str, content: str) -> data.Download:
        plain = data.uri("image/svg+xml;charset=utf-8", content)
        if len(plain) <= self.svg_bytes:
            return data.Download("SVG", plain, f"{name}.svg")
        return data.Download("SVG (gzip)", data.uri("application/gzip", data.packed(content)), f"{name}.svg.gz")

    @cached_property
    def cells(self) -> int:
        """Rows, or columns, of a drawn heat map."""
        panels = sum(len(m.panels) for m in self.maps)
        return max(16, min(MOST_CELLS, math.isqrt(LIVE_CELLS // max(1, panels))))

    @cached_property
    def points(self) -> int:
        """Drawn per series; a band is two more lines."""
        return _limit(self.figures, DRAWN_POINTS, 50, plots.MOST_POINTS, lambda s: 1 + 2 * _banded(s))

    @cached_property
    def live_points(self) -> int:
        """Points of a series for the script."""
        return _limit(
            self.figures,
            LIVE_NUMBERS,
            50,
            MOST_LIVE,
            lambda s: 2 + sum(c is not None for c in (s.stderr, s.low, s.high)),
        )

    def csv(self, figure: Figure | Map) -> data.Download:
        """All points where there is room, plain or compressed; else fewer, and the label says so."""
        if not self._csv:
            room = CSV_BYTES
            everything: list[Figure | Map] = [*self.figures, *self.maps]
            for done, f in enumerate(sorted(everything, key=_count)):
                made = self._fit(f, room // (len(everything) - done))
                room -= len(made.href)
                self._csv[id(f)] = made
        return self._csv[id(figure)]

    def _fit(self, figure: Figure | Map, share: int) -> data.Download:
        name = text.file_name(figure.id)
        bytes_each = 1 if isinstance(figure, Map) else 4  # that a compressed number takes at the least
        if _count(figure) * bytes_each < share:
            content = cells.to_csv(figure) if isinstance(figure, Map) else data.to_csv(figure)
            plain = data.uri("text/csv;charset=utf-8", content)
            if len(plain) <= share:
                return data.Download("CSV", plain, f"{name}.csv")
            packed = data.uri("application/gzip", data.packed(content))
            if len(packed) <= share:
                return data.Download("CSV (gzip)", packed, f"{name}.csv.gz")
        if isinstance(figure, Map):
            panels = max(1, len(figure.panels))
            fewer = cells.coarse(figure, max(8, math.isqrt(share // (8 * panels))))
            return _thinned(cells.to_csv(fewer), name, "means of blocks")
        log = figure.x_scale == "log" and not data.is_category(figure)
        limit = min(self.points, max(60, share // (60 * max(1, len(figure.series)))))
        drawn = {
            j: data.thin(data.positions(figure, s), data.floats(s.y), limit, log) for j, s in enumerate(figure.series)
        }
        return _thinned(data.to_csv(figure, drawn), name, "thinned")


def _banded(s: Series) -> bool:
    return s.stderr is not None or s.low is not None


def _limit(figures: Sequence[Figure], room: int, least: int, most: int, each: Callable[[Series], int]) -> int:
    """The most points, between `least` and `most`, that every series may have for all together to fit into `room`.

    each: numbers that a point of a series takes. Short series leave their room to the long ones."""
    loads = [(len(s.y), each(s)) for f in figures for s in f.series]
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(n, middle) * k for n, k in loads) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _count(figure: Figure | Map) -> int:
    return cells.count(figure) if isinstance(figure, Map) else data.count(figure)


def _thinned(content: str, name: str, how: str) -> data.Download:
    packed = data.uri("application/gzip", data.packed(content))
    return data.Download(f"CSV ({how}, gzip; results.json has every value)", packed, f"{name}.csv.gz")


def _view(record: Record, key: str, stock: _Stock) -> RecordView:
    groups = plots.group_order(record.figures)
    shown = [tables.view(t, f"{key}-t{i}") for i, t in enumerate(record.tables, 1)]
    legend = live.key(record.figures, groups)
    keyed = [entry["group"] for entry in legend]
    return RecordView(
        record=record,
        title=text.clean(record.title) or "Untitled",
        legend=Markup(live.embedded({"legend": legend})) if legend else None,
        verdict=[text.clean(v) for v in record.verdict],
        notes=[text.clean(n) for n in record.notes],
        summary=shown[0] if shown else None,
        figures=[
            *(_figure(f, f"{key}-f{i}", groups, keyed, stock) for i, f in enumerate(record.figures, 1)),
            *(_map(m, f"{key}-m{i}", groups, stock) for i, m in enumerate(record.maps, 1)),
        ],
        tables=shown[1:],
    )


def _figure(figure: Figure, key: str, groups: Sequence[str], keyed: Sequence[str], stock: _Stock) -> FigureView:
    png, svg = plots.picture(figure, groups=groups, points=stock.points, png_bytes=stock.png_bytes)
    name = text.file_name(figure.id)
    remarks = data.left_out(figure)
    if figure.y_floor is not None:
        remarks.append(f"Values below {text.number(figure.y_floor)} are floating-point noise.")
    longest = max((len(s.y) for s in figure.series), default=0)
    if longest > stock.live_points:
        remarks.append(
            f"Long curves are drawn with about {stock.live_points} points, {stock.points} in print, extremes kept."
        )
    elif longest > stock.points:
        remarks.append(f"In print, long curves are drawn with about {stock.points} points, extremes kept.")
    return FigureView(
        key=key,
        title=text.clean(figure.title),
        meaning=text.clean(figure.meaning),
        method=text.clean(figure.method),
        uncertainty=curves.uncertainty_words(figure),
        remarks=remarks,
        picture=picture(figure, key, groups, stock.points, stock.svg_bytes),
        numbers=Markup(live.embedded(live.spec(figure, groups, stock.live_points, keyed))),
        kind="chart",
        downloads=[
            data.Download("PNG", data.uri("image/png", png), f"{name}.png"),
            stock.svg(name, svg),
            stock.csv(figure),
        ],
        grids=data.grids(figure),
    )


def _map(heat_map: Map, key: str, groups: Sequence[str], stock: _Stock) -> FigureView:
    shown = cells.coarse(heat_map, stock.cells)
    png, svg = heat.picture(shown, groups=groups, png_bytes=stock.png_bytes)
    wide = heat.svg(shown, groups=groups, form=canvas.WIDE, prefix=f"{key}w-")
    small = len(wide) <= stock.svg_bytes
    narrow = heat.svg(shown, groups=groups, form=canvas.NARROW, prefix=f"{key}n-") if small else ""
    name = text.file_name(heat_map.id)
    remarks = cells.left_out(heat_map)
    if shown is not heat_map:
        remarks.append(
            f"Drawn with {len(shown.y)} × {len(shown.x)} of {len(heat_map.y)} × {len(heat_map.x)} cells: each is the mean of its block."
        )
    known = [p for p in shown.panels if p.stderr]
    if shown.panels and not known:
        remarks.append("No uncertainty was recorded for the values in this figure.")
    return FigureView(
        key=key,
        title=text.clean(heat_map.title),
        meaning=text.clean(heat_map.meaning),
        method=text.clean(heat_map.method),
        uncertainty="The values under the pointer and in the table carry ± one standard error." if known else "",
        remarks=remarks,
        picture=_drawn(wide, narrow),
        numbers=Markup(live.embedded(heat.spec(shown, groups))),
        kind="map",
        downloads=[
            data.Download("PNG", data.uri("image/png", png), f"{name}.png"),
            stock.svg(name, svg),
            stock.csv(heat_map),
        ],
        grids=cells.grids(heat_map),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
