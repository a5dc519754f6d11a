"""Heat maps, drawn: panels on the same two axes and one colour scale, one cell for each value.

    low .. high  ->  0 .. 254, an index into a palette     linear, logarithmic, or symmetric about zero where both signs occur

Row 0 is at the top. Cells have one size whatever their distances; their labels say where they are. NaN stays blank.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from ssmlens.report import canvas as paper
from ssmlens.report import cells, curves, layout, live, text, ticks
from ssmlens.report import svg as svg_text
from ssmlens.report.canvas import LINE, SMALL, TITLE, WIDE, Format
from ssmlens.report.theme import LIGHT, SERIES_LIGHT, STEPS, diverging
from ssmlens.results import Map

LIGHT_WORDS, DARK_WORDS = "#fefefe", "#101010"  # on cells: not the page's colours, which change with the scheme
BAR = 9.0  # points: height of the colour bar
GAP = 12.0  # between panels

Box = tuple[float, float, float, float]  # left, top, width, height in points from the top left corner


@dataclass(frozen=True)
class Scale:
    """kind "linear", "log" or "diverging"; beyond: whether values lie (below, above) the ends and are drawn like these."""

    kind: str
    low: float
    high: float
    beyond: tuple[bool, bool]

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """0 at the low end, 1 at the high one, clipped; NaN where nothing can be drawn."""
        with np.errstate(all="ignore"):  # what overflows is clipped
            u = np.log(np.where(values > 0, values, np.nan)) if self.kind == "log" else values
            a, b = (math.log(self.low), math.log(self.high)) if self.kind == "log" else (self.low, self.high)
            return np.clip((u - a) / (b - a), 0.0, 1.0)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(place, words), and a common factor as the last words where there is one."""
        if self.kind == "log":
            decades = math.log10(self.high / self.low)
            subs = (1.0,) if decades >= 2 else (1.0, 2.0, 5.0)
            found = LogLocator(subs=subs, numticks=most + 1).tick_values(self.low, self.high)
            if decades < 0.5:
                found = MaxNLocator(most).tick_values(self.low, self.high)
            formatter: ticks.Plain | ticks.Log = ticks.Log()
        else:
            found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
            formatter = ticks.Plain()
        margin = 1e-9 * (self.high - self.low)
        inside = [float(v) for v in found if self.low * (1 - 1e-9) - margin <= v <= self.high + margin]
        words = formatter.format_ticks(inside)
        factor = formatter.get_offset() if isinstance(formatter, ticks.Plain) else ""
        places = self.place(np.asarray(inside, dtype=float))
        return [(float(p), w + factor if factor and w != "0" else w) for p, w in zip(places, words, strict=True)]


def scale(heat: Map) -> Scale | None:
    """The colour scale of all panels; None where no value can be drawn."""
    log = heat.scale == "log"
    values = np.concatenate([cells.values(p).ravel() for p in heat.panels] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) if log else True)]
    if not len(values):
        return None
    least, most = float(values.min()), float(values.max())
    low = heat.low if heat.low is not None and math.isfinite(heat.low) and not (log and heat.low <= 0) else least
    high = heat.high if heat.high is not None and math.isfinite(heat.high) and not (log and heat.high <= 0) else most
    kind: str = heat.scale
    if not log and low < 0 < high and min(-low, high) > 0.02 * max(-low, high):
        kind, low, high = "diverging", -max(-low, high), max(-low, high)
    if not low < high:
        low, high = (low / 2, low * 2) if log else (low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2)
    return Scale(kind, low, high, (least < low, most > high))


def picture(
    heat: Map, *, groups: Sequence[str] = (), kinds: Sequence[str] = ("png", "svg"), png_bytes: int | None = None
) -> tuple[bytes, str]:
    """(PNG, SVG) with the title, light, to stand alone; empty where not among `kinds`."""
    with paper.own_style():
        canvas, _ = draw(heat, WIDE, groups=groups, title=True)
        png = paper.png(canvas, png_bytes, colours=256) if "png" in kinds else b""
        raw = paper.svg(canvas) if "svg" in kinds else ""
    return png, svg_text.standalone(raw) if raw else ""


def svg(heat: Map, *, groups: Sequence[str], form: Format, prefix: str) -> str:
    """Inline SVG for the page, without the title."""
    with paper.own_style():
        canvas, _ = draw(heat, form, groups=groups, title=False)
        raw = paper.svg(canvas)
    return svg_text.inline(raw, prefix=prefix, label=describe(heat))


def spec(heat: Map, groups: Sequence[str]) -> dict[str, Any]:
    """The maps for the script (templates/map.js)."""
    colours = scale(heat)
    shown = None
    if colours:
        rgb = palette(colours.kind)[:, :3].tobytes()
        shown = {
            "kind": colours.kind,
            "low": colours.low,
            "high": colours.high,
            "palette": base64.b64encode(rgb).decode(),
        }
    return {
        "unit": text.clean(heat.unit),
        "beyond": _beyond(colours),
        "x": {"label": text.clean(heat.x_label), "names": cells.labels(heat.x)},
        "y": {"label": text.clean(heat.y_label), "names": cells.labels(heat.y)},
        "scale": shown,
        "panels": [
            {
                "name": text.clean(p.name),
                "values": live.pack(cells.values(p).ravel()),
                "error": live.pack(np.asarray(p.stderr, dtype=float).ravel()) if p.stderr else None,
                **_mark(_look(p.group, groups)),
            }
            for p in heat.panels
        ],
    }


def _look(group: str, groups: Sequence[str]) -> curves.Look | None:
    """Of the marker before a panel's name: that of the group's curves in the same record."""
    known = [g for g in groups if not curves.is_reference(g)]
    return curves.Look.at(known.index(group)) if group in known else None


def _mark(look: curves.Look | None) -> dict[str, Any]:
    if look is None:
        return {}
    return {"colour": f"s{SERIES_LIGHT.index(look.colour)}", "marker": look.marker, "hollow": look.hollow}


def describe(heat: Map) -> str:
    """The maps in words, for those who do not see them."""
    said = [
        f"{text.clean(heat.title)}. {text.clean(heat.unit)} by {text.clean(heat.y_label)} (rows) and "
        f"{text.clean(heat.x_label)} (columns)."
    ]
    for panel in heat.panels:
        found = cells.extremes(heat, panel)
        said.append(
            f"{text.clean(panel.name)}: least {found[0]}, most {found[1]}."
            if found
            else f"{text.clean(panel.name)}: no values."
        )
    return " ".join(said)


def draw(heat: Map, form: Format, *, groups: Sequence[str], title: bool) -> tuple[Canvas, list[Box]]:
    """From the top: title, what y is, panels, what x is, the colour bar with its unit. Call inside `own_style`."""
    canvas = Canvas(figsize=(form.width / 72, 4), dpi=144, facecolor=LIGHT["surface"])
    ruler = layout.Ruler(FigureCanvasAgg(canvas))
    edge = 10.0 if title else 3.0
    room = form.width - 2 * edge
    colours = scale(heat)
    columns = _columns(len(heat.panels), form is WIDE)
    rows = -(-len(heat.panels) // columns)
    names_y = [text.clean(n, 24) for n in cells.labels(heat.y)]
    left = max((ruler.width(n, SMALL) for n in names_y), default=0.0) + 8
    gap = max(
        GAP, min(40.0, max((ruler.width(text.clean(n, 24), SMALL) for n in cells.labels(heat.x)), default=0.0) + 4)
    )
    width = min((room - left - gap / 2 - gap * (columns - 1)) / columns, 330.0)
    shape = len(heat.y) / max(1, len(heat.x))
    height = width * min(1.0, max(0.3, shape))
    heads = ruler.wrap(heat.title, TITLE, room, 3, "bold") if title and heat.title else []
    says_y = ruler.wrap(heat.y_label, SMALL, room, 3)
    says_x = ruler.wrap(heat.x_label, SMALL, room - left, 3)
    says_unit = ruler.wrap(heat.unit + _beyond(colours), SMALL, room - left, 3)
    named = [ruler.wrap(p.name, SMALL, width - 14, 2) for p in heat.panels]
    captions = [max(map(len, named[k : k + columns])) * SMALL * LINE + 4 for k in range(0, len(named), columns)]
    starts = [sum(captions[:r]) + r * (height + GAP) for r in range(rows + 1)]
    below, slanted = _room_below(cells.labels(heat.x), width, ruler)
    line = SMALL * LINE
    top = edge + len(heads) * TITLE * LINE + (6 if heads else 0)
    first = top + len(says_y) * line + 5
    end = first + starts[-1] - (GAP if rows else 0) + below
    total = end + len(says_x) * line + 12 + BAR + 17 + len(says_unit) * line + edge
    sheet = paper.Sheet(canvas, form.width, total)
    sheet.lines(heads, edge, edge, TITLE, "bold")
    sheet.lines(says_y, edge, top, SMALL)
    boxes: list[Box] = []
    for k, panel in enumerate(heat.panels):
        row, column = divmod(k, columns)
        x = edge + left + column * (width + gap)
        y = first + starts[row]
        look = _look(panel.group, groups)
        sheet.lines(named[k], x + (0 if look is None else 12), y, SMALL, "bold")
        if look is not None:
            at = ([(x + 4) / form.width], [1 - (y + SMALL * 0.72) / total])
            fill = LIGHT["surface"] if look.hollow else look.colour
            canvas.add_artist(
                Line2D(*at, markersize=5, linestyle="none", marker=look.marker, color=look.colour, markerfacecolor=fill)
            )
        box = (x, y + captions[row], width, height)
        last = k + columns >= len(heat.panels)
        _panel(canvas, heat, k, colours, box, total, form.width, names_y if column == 0 else [], last, slanted, ruler)
        boxes.append(box)
    across = left + columns * width + (columns - 1) * gap
    y = sheet.lines(says_x, edge + left + (across - left) / 2, end, SMALL, ha="center") + 12
    if colours:
        _bar(canvas, sheet, colours, (edge + left, y, min(across - left, 330.0), BAR), 4 if form is not WIDE else 6)
    else:
        sheet.put("no values to draw", edge + left, y + BAR, SMALL, "muted")
    sheet.lines(says_unit, edge + left, y + BAR + 17, SMALL)
    return canvas, boxes


def image(heat: Map, k: int, colours: Scale | None) -> NDArray[np.uint8]:
    """Panel k as RGBA (rows, columns, 4): at most 255 colours and transparency."""
    values = cells.values(heat.panels[k])
    made = np.zeros((*values.shape, 4), dtype=np.uint8)
    if colours is None:
        return made
    place = colours.place(values)
    there = np.isfinite(place)
    made[there] = palette(colours.kind)[np.round(place[there] * (STEPS - 1)).astype(int)]
    return made


def palette(kind: str) -> NDArray[np.uint8]:
    """(255, 4) RGBA: viridis, or blue - grey - orange about zero; both even in lightness, both told apart by everyone."""
    if kind == "diverging":
        return diverging()
    from matplotlib import colormaps

    return np.asarray(np.round(colormaps["viridis"](np.linspace(0, 1, STEPS)) * 255), dtype=np.uint8)


def _panel(
    canvas: Canvas, heat: Map, k: int, colours: Scale | None, box: Box, total: float, across: float,
    names_y: list[str], last: bool, slanted: bool, ruler: layout.Ruler,
) -> None:  # fmt: skip
    x, y, width, height = box
    axes = canvas.add_axes((x / across, 1 - (y + height) / total, width / across, height / total))
    _bare(axes)
    rows, columns = len(heat.y), len(heat.x)
    axes.set_facecolor(LIGHT["noise"])
    if rows and columns:
        made = image(heat, k, colours)
        axes.imshow(made, interpolation="none", aspect="auto", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
        _values(axes, heat, k, made, width / columns, height / rows, ruler)
    axes.set_xlim(-0.5, max(columns, 1) - 0.5)
    axes.set_ylim(max(rows, 1) - 0.5, -0.5)
    if names_y:
        at = cells.some(heat.y, max(2, int(height / (SMALL * 1.6))))
        axes.set_yticks(at, [names_y[i] for i in at])
    if last:
        names = [text.clean(n, 24) for n in cells.labels(heat.x)]
        widest = SMALL * 1.4 if slanted else max((ruler.width(n, SMALL) for n in names), default=1.0) + 8
        at = cells.some(heat.x, max(2, int(width / widest)))
        axes.set_xticks(at, [names[i] for i in at])
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=35, ha="right", va="top", rotation_mode="anchor")
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        layout.literal(label)


def _bare(axes: Axes) -> None:
    axes.set_autoscale_on(False)
    axes.spines[:].set(color=LIGHT["rule"], linewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(color=LIGHT["rule"], labelcolor=LIGHT["muted"], labelsize=SMALL, width=0.8, length=3, pad=3)


def _values(
    axes: Axes, heat: Map, k: int, made: NDArray[np.uint8], width: float, height: float, ruler: layout.Ruler
) -> None:
    """Numbers on the cells where every one of the panel fits."""
    if width < 18 or height < 12:
        return
    values = cells.values(heat.panels[k])
    words = {
        (i, j): text.number(float(f"{values[i, j]:.3g}")) for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True)
    }
    if not words or max(ruler.width(w, SMALL - 1) for w in words.values()) > width - 4:
        return
    for (i, j), word in words.items():
        bright = made[i, j, :3] @ np.array([0.299, 0.587, 0.114]) > 140 or made[i, j, 3] == 0
        colour = DARK_WORDS if bright else LIGHT_WORDS
        axes.text(j, i, word, size=SMALL - 1, ha="center", va="center", color=colour)


def _bar(canvas: Canvas, sheet: paper.Sheet, colours: Scale, box: Box, most: int) -> None:
    x, y, width, height = box
    axes = canvas.add_axes(
        (x / sheet.width, 1 - (y + height) / sheet.height, width / sheet.width, height / sheet.height)
    )
    _bare(axes)
    axes.imshow(palette(colours.kind)[None], interpolation="none", aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    found = colours.ticks(most)
    axes.set_xticks([p for p, _ in found], [w for _, w in found])


def _beyond(colours: Scale | None) -> str:
    """What lies beyond the ends of the colour scale."""
    ends = [w for w, there in zip(("below", "above"), colours.beyond if colours else (), strict=False) if there]
    return f"; values {' or '.join(ends)} the ends have their colour" if ends else ""


def _columns(panels: int, wide: bool) -> int:
    if not wide:
        return 1 if panels < 4 else 2
    return {0: 1, 1: 1, 2: 2, 3: 3, 4: 2}.get(panels, 3)


def _room_below(names: list[str], width: float, ruler: layout.Ruler) -> tuple[float, bool]:
    """Points that the labels of the columns take, and whether they must be slanted: names that do not fit level."""
    shown = [text.clean(n, 24) for n in names]
    widest = max((ruler.width(n, SMALL) for n in shown), default=0.0)
    numeric = all(n.replace("−", "").replace(".", "").isdigit() for n in shown)
    if numeric or not names or widest <= width / len(names) - 4:
        return SMALL * LINE + 7, False
    return widest * 0.58 + 16, True
