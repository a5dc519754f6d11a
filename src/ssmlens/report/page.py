"""report.html: one file that opens offline, without scripts, in light and dark, on a phone and on paper.

A `Record` becomes views (what the template shows, already in words), views become HTML. Everything that came
from a record is escaped by jinja2; only pictures are inserted as markup, and `picture` alone makes them.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jinja2
from markupsafe import Markup

from ssmlens import files
from ssmlens.report import curves, data, plots, tables, text, theme
from ssmlens.results import Figure, Record

# Bytes and points that keep the page under 3 MB with 12 figures of 6 long series with bands (tested).
DRAWN_POINTS = 30_000
NARROW_POINTS = 200
CSV_BYTES = 400_000
PNG_BYTES = 700_000  # before base64


@dataclass(frozen=True)
class FigureView:
    key: str
    title: str
    meaning: str
    method: str
    uncertainty: str
    remarks: list[str]
    picture: Markup
    downloads: list[data.Download]
    grids: list[data.Grid]


@dataclass(frozen=True)
class RecordView:
    record: Record
    title: str
    verdict: list[str]
    notes: list[str]
    summary: tables.TableView | None
    figures: list[FigureView]
    tables: list[tables.TableView]

    @cached_property
    def contents(self) -> list[tuple[str, str]]:
        """(key, title) of what the list at the top leads to."""
        return [(f.key, f.title) for f in self.figures] + [(t.key, t.title) for t in self.tables]

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
    stock = _Stock([f for r in several for f in r.figures])
    views = [_view(record, f"r{i}", stock) for i, record in enumerate(several, 1)]
    heading = text.clean(title if title is not None else views[0].title if len(views) == 1 else "ssmlens report")
    return _template().render(
        title=heading,
        views=views,
        light=Markup(theme.css(theme.LIGHT)),
        dark=Markup(theme.css(theme.DARK)),
    )


def picture(figure: Figure, key: str, groups: Sequence[str], points: int) -> Markup:
    """One figure as HTML: a wide and a narrow drawing, of which the style sheet shows the one that fits.

    The seam for interactive figures: only this function knows how a figure becomes markup."""
    wide = plots.svg(figure, groups=groups, prefix=f"{key}w-", points=points)
    narrow = plots.svg(figure, groups=groups, prefix=f"{key}n-", points=min(points, NARROW_POINTS), form=plots.NARROW)
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


@dataclass
class _Stock:
    """What all figures of a page share: the room for points and for CSV."""

    figures: list[Figure]
    _csv: dict[int, data.Download] = field(default_factory=dict)

    @cached_property
    def points(self) -> int:
        """Drawn per series; a band is two more lines."""
        lines = sum(1 + 2 * (s.stderr is not None or s.low is not None) for f in self.figures for s in f.series)
        return min(plots.MOST_POINTS, max(60, DRAWN_POINTS // max(1, lines)))

    def csv(self, figure: Figure) -> data.Download:
        """All points where there is room, plain or compressed; else fewer, and the label says so."""
        if not self._csv:
            room = CSV_BYTES
            for done, f in enumerate(sorted(self.figures, key=data.count)):
                made = self._fit(f, room // (len(self.figures) - done))
                room -= len(made.href)
                self._csv[id(f)] = made
        return self._csv[id(figure)]

    def _fit(self, figure: Figure, share: int) -> data.Download:
        name = text.file_name(figure.id)
        if data.count(figure) * 4 < share:  # a compressed number takes four bytes at the least
            content = data.to_csv(figure)
            plain = data.uri("text/csv;charset=utf-8", content)
            if len(plain) <= share:
                return data.Download("CSV", plain, f"{name}.csv")
            packed = data.uri("application/gzip", data.packed(content))
            if len(packed) <= share:
                return data.Download("CSV (gzip)", packed, f"{name}.csv.gz")
        log = figure.x_scale == "log" and not data.is_category(figure)
        limit = min(self.points, max(60, share // (60 * max(1, len(figure.series)))))
        drawn = {
            j: data.thin(data.positions(figure, s), data.floats(s.y), limit, log) for j, s in enumerate(figure.series)
        }
        thinned = data.uri("application/gzip", data.packed(data.to_csv(figure, drawn)))
        return data.Download("CSV (thinned, gzip; results.json has every point)", thinned, f"{name}.csv.gz")


def _view(record: Record, key: str, stock: _Stock) -> RecordView:
    groups = plots.group_order(record.figures)
    shown = [tables.view(t, f"{key}-t{i}") for i, t in enumerate(record.tables, 1)]
    return RecordView(
        record=record,
        title=text.clean(record.title) or "Untitled",
        verdict=[text.clean(v) for v in record.verdict],
        notes=[text.clean(n) for n in record.notes],
        summary=shown[0] if shown else None,
        figures=[_figure(f, f"{key}-f{i}", groups, stock) for i, f in enumerate(record.figures, 1)],
        tables=shown[1:],
    )


def _figure(figure: Figure, key: str, groups: Sequence[str], stock: _Stock) -> FigureView:
    png, svg = plots.picture(figure, groups=groups, points=stock.points, png_bytes=PNG_BYTES // len(stock.figures))
    name = text.file_name(figure.id)
    remarks = data.left_out(figure)
    if figure.y_floor is not None:
        remarks.append(f"Values below {text.number(figure.y_floor)} are floating-point noise.")
    if any(len(s.y) > stock.points for s in figure.series):
        remarks.append(f"Long curves are drawn with about {stock.points} points, extremes kept.")
    return FigureView(
        key=key,
        title=text.clean(figure.title),
        meaning=text.clean(figure.meaning),
        method=text.clean(figure.method),
        uncertainty=curves.uncertainty_words(figure),
        remarks=remarks,
        picture=picture(figure, key, groups, stock.points),
        downloads=[
            data.Download("PNG", data.uri("image/png", png), f"{name}.png"),
            data.Download("SVG", data.uri("image/svg+xml;charset=utf-8", svg), f"{name}.svg"),
            stock.csv(figure),
        ],
        grids=data.grids(figure),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
