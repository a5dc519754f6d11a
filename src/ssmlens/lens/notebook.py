"""What a measurement looks like in a notebook: its tables and its figures, drawn by matplotlib. The page of a record is better; this is at hand."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmlens.results import Cell, Figure, Map, Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_ROWS = 60  # of a table; a deep model has more


class Shown:
    """A measurement that shows itself as the last line of a notebook's cell."""

    def figures(self) -> list[Figure]:
        raise NotImplementedError

    def tables(self) -> list[Table]:
        raise NotImplementedError

    def maps(self) -> list[Map]:
        return []

    def plot(self) -> "Canvas":
        """Every figure and map in one matplotlib figure."""
        return draw(self.figures(), self.maps())

    def _repr_html_(self) -> str:
        return html(self.tables(), self.plot())


def draw(figures: Sequence[Figure], maps: Sequence[Map] = ()) -> "Canvas":
    from matplotlib.figure import Figure as Canvas

    panels = [(m, panel) for m in maps for panel in m.panels]
    rows = max(1, math.ceil((len(figures) + len(panels)) / 2))
    canvas = Canvas(figsize=(11, 3.4 * rows), layout="constrained")
    groups = list(dict.fromkeys(s.group for f in figures for s in f.series))
    for place, figure in enumerate(figures, start=1):
        axes = canvas.add_subplot(rows, 2, place)
        for s in figure.series:
            _line(axes, s, f"C{groups.index(s.group) % 10}")
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label, xscale=figure.x_scale, yscale=figure.y_scale)
        axes.set_title(figure.title, fontsize="medium")
        axes.legend(fontsize="x-small")
    for place, (m, panel) in enumerate(panels, start=len(figures) + 1):
        _heat(canvas, canvas.add_subplot(rows, 2, place), m, panel)
    return canvas


def _line(axes: Any, s: Any, colour: str) -> None:
    look: dict[str, Any] = {"drawstyle": "steps-mid"} if s.style == "step" else {}
    look |= {"linestyle": "--", "linewidth": 1} if s.style == "fit" else {}
    look |= {"linestyle": "", "marker": "o", "markersize": 4} if s.style == "points" else {}
    axes.plot(s.x, s.y, color=colour, label=s.name, **look)
    low, high = s.low, s.high
    if s.stderr is not None:
        low = [y - e for y, e in zip(s.y, s.stderr, strict=True)]
        high = [y + e for y, e in zip(s.y, s.stderr, strict=True)]
    if low is not None:
        axes.fill_between(s.x, low, high, color=colour, alpha=0.2, linewidth=0)


def _heat(canvas: Any, axes: Any, m: Map, panel: Any) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = np.ma.masked_invalid(np.array(panel.values, dtype=float))
    if m.scale == "log":
        values = np.ma.masked_less_equal(values, 0)
    norm = (LogNorm if m.scale == "log" else Normalize)(m.low, m.high)
    image = axes.imshow(values, norm=norm, aspect="auto", interpolation="nearest", cmap="magma")
    for axis, ticks in ((axes.xaxis, m.x), (axes.yaxis, m.y)):
        at = np.unique(np.linspace(0, len(ticks) - 1, 6).astype(int))
        axis.set_ticks(at, [f"{ticks[i]:g}" if not isinstance(ticks[i], str) else ticks[i] for i in at])
    axes.set(xlabel=m.x_label, ylabel=m.y_label)
    axes.set_title(f"{m.title}: {panel.name}", fontsize="medium")
    canvas.colorbar(image, ax=axes, label=m.unit)


def html(tables: Sequence[Table], canvas: "Canvas") -> str:
    """Tables, then the picture, as HTML that needs nothing beside it."""
    picture = io.BytesIO()
    canvas.savefig(picture, format="png", dpi=80)
    data = base64.b64encode(picture.getvalue()).decode("ascii")
    return "".join(map(_table, tables)) + f'<img alt="figures" src="data:image/png;base64,{data}"/>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th title="{escape(c.meaning)}">{escape(c.name)}{f" ({escape(c.unit)})" if c.unit else ""}</th>'
        for c in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(c))}</td>" for c in row) + "</tr>" for row in table.rows[:_ROWS]
    )
    more = f"<p>and {len(table.rows) - _ROWS} rows more</p>" if len(table.rows) > _ROWS else ""
    return f"<h4>{escape(table.title)}</h4><table><tr>{head}</tr>{rows}</table>{more}"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Value):
        return f"{cell.value:.3g}" + (f" ± {cell.stderr:.1g}" if cell.stderr is not None else "")
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return "–" if cell is None else str(cell)
