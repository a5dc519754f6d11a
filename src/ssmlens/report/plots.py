"""A figure of a record, drawn: `save` to PNG or SVG, `svg` for the page. One drawing code for both.

Drawn with `matplotlib.figure.Figure` alone: no pyplot, no state left behind; the caller's rcParams do not
matter and do not change. Equal figures give equal bytes (with one version of matplotlib).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.report import curves, data, heat, layout, text, ticks
from ssmlens.report import svg as svg_text
from ssmlens.report.canvas import LINE, SMALL, TITLE, WIDE, Format, Sheet, own_style
from ssmlens.report.canvas import png as as_png
from ssmlens.report.canvas import svg as as_svg
from ssmlens.report.theme import LIGHT
from ssmlens.results import Figure, Map, Record

MOST_POINTS = 600  # drawn per series; CSV has all


def group_order(figures: Iterable[Figure]) -> list[str]:
    """The groups of series by first appearance; given this list, every figure has group i in colour i."""
    return list(dict.fromkeys(s.group for f in figures for s in f.series if s.group))


def save(figure: Figure | Map, path: str | os.PathLike[str], *, groups: Sequence[str] | None = None) -> Path:
    """Write a figure or heat map with its title as .png (200 dots per inch) or .svg, by the path's ending, atomically.

    groups: from `group_order(record.figures)`, so that a model has one colour in all pictures of a record.
    Raises UserError for another ending or an unwritable place."""
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".png", ".svg"):
        raise UserError(f"cannot save a picture as {path.name!r}; give it the ending .png or .svg")
    kinds = (ending[1:],)
    if isinstance(figure, Map):
        png, svg_file = heat.picture(figure, groups=groups or [], kinds=kinds)
    else:
        png, svg_file = picture(figure, groups=groups, kinds=kinds)
    return files.write(path, png or svg_file)


def save_all(record: Record, directory: str | os.PathLike[str], ending: str = ".png") -> list[Path]:
    """Every figure and heat map of a record as a file named after its id, in colours that agree."""
    known = group_order(record.figures)
    names: dict[str, int] = {}
    paths = []
    everything: list[Figure | Map] = [*record.figures, *record.maps]
    for f in everything:
        name = text.file_name(f.id)
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        paths.append(save(f, Path(directory) / f"{unique}{ending}", groups=known))
    return paths


def picture(
    figure: Figure,
    *,
    groups: Sequence[str] | None = None,
    points: int = MOST_POINTS,
    kinds: Sequence[str] = ("png", "svg"),
    png_bytes: int | None = None,
) -> tuple[bytes, str]:
    """(PNG, SVG) of the figure with its title, light, to stand alone; empty where not among `kinds`.

    png_bytes: a larger PNG is drawn again with fewer dots and colours."""
    with own_style():
        canvas = draw(figure, WIDE, groups=groups, points=points, title=True)
        png = as_png(canvas, png_bytes) if "png" in kinds else b""
        raw = as_svg(canvas) if "svg" in kinds else ""
    return png, svg_text.standalone(raw) if raw else ""


def svg(
    figure: Figure,
    *,
    groups: Sequence[str] | None = None,
    form: Format = WIDE,
    prefix: str = "",
    points: int = MOST_POINTS,
) -> str:
    """`figure` without its title as inline SVG for the page.

    Its colours are CSS variables (theme.py), its ids begin with `prefix`."""
    with own_style():
        raw = as_svg(draw(figure, form, groups=groups, points=points, title=False))
    return svg_text.inline(raw, prefix=prefix, label=describe(figure))


def describe(figure: Figure) -> str:
    """The picture in words, for those who do not see it."""
    said = [f"{text.clean(figure.title)}. {text.clean(figure.y_label)} against {text.clean(figure.x_label)}."]
    for s in figure.series:
        y = np.asarray(s.y, dtype=float)
        y = y[np.isfinite(y)]
        if len(y):
            ends = f"first {text.number(y[0])}, last {text.number(y[-1])}, " if len(y) > 1 else ""
            said.append(f"{text.clean(s.name)}: {ends}least {text.number(y.min())}, most {text.number(y.max())}.")
        else:
            said.append(f"{text.clean(s.name)}: no values.")
    return " ".join(said)


def draw(figure: Figure, form: Format, *, groups: Sequence[str] | None, points: int, title: bool) -> Canvas:
    """Draw and lay out; call inside `own_style`."""
    canvas = Canvas(figsize=(form.width / 72, 2 * form.axes_height / 72), dpi=144, facecolor=LIGHT["surface"])
    ruler = layout.Ruler(FigureCanvasAgg(canvas))
    axes = canvas.add_axes((0.12, 0.12, 0.86, 0.4))
    shown = curves.prepare(figure, groups if groups is not None else group_order([figure]), points)
    _axes_style(axes)
    axes.set_autoscale_on(False)
    low, high = curves.limits(figure, shown)
    _scales(axes, figure, shown, low, high, form, ruler)
    curves.add(axes, figure, shown, bottom=low)
    if not any(c.drawable for c in shown):
        words = axes.text(0.5, 0.5, "no values to draw", transform=axes.transAxes, ha="center", va="center", size=SMALL)
        words.set_color(LIGHT["muted"])
    _lay_out(canvas, axes, figure, shown, form, ruler, title)
    return canvas


def _axes_style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=LIGHT["rule"], linewidth=0.8)
    axes.tick_params(which="both", color=LIGHT["rule"], labelcolor=LIGHT["muted"], labelsize=SMALL, width=0.8)
    axes.tick_params(which="major", length=3.5)
    axes.tick_params(which="minor", length=2, width=0.6)
    axes.yaxis.grid(True, color=LIGHT["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.get_offset_text().set(size=SMALL, color=LIGHT["muted"])
    axes.xaxis.get_offset_text().set(size=SMALL, color=LIGHT["muted"])


def _scales(
    axes: Axes,
    figure: Figure,
    shown: list[curves.Curve],
    low: float,
    high: float,
    form: Format,
    ruler: layout.Ruler,
) -> None:
    if curves.log_y(figure, shown):
        axes.set_yscale("log")
        ticks.logarithmic(axes.yaxis, low, high)
    else:
        ticks.linear(axes.yaxis)
    axes.set_ylim(low, high)
    if data.is_category(figure):
        names = data.category_names(figure)
        axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))
        _category_labels(axes, names, form, ruler)
        return
    left, right = curves.span(figure, shown)
    if curves.log_x(figure, shown):
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        ticks.logarithmic(axes.xaxis, left, right, most=form.most_ticks)
    else:
        axes.set_xlim(left, right)
        ticks.linear(axes.xaxis, most=form.most_ticks)


def _category_labels(axes: Axes, names: list[str], form: Format, ruler: layout.Ruler) -> None:
    """Level where the words fit, in up to three lines; else slanted and shortened; of many, every k-th."""
    slot = (form.width - 50) / max(1, len(names))
    words = [w for n in names for w in text.clean(n, 400).split(" ")]
    if not names:
        axes.set_xticks([])
        return
    if max(ruler.width(w, SMALL) for w in words) <= slot - 6:
        ticks.named(axes.xaxis, ["\n".join(ruler.wrap(n, SMALL, slot - 6, 3)) for n in names])
    else:
        every = max(1, math.ceil(13 / slot))
        ticks.named(
            axes.xaxis,
            [ruler.wrap(n, SMALL, 140, 1)[0] if i % every == 0 else "" for i, n in enumerate(names)],
        )
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="right", va="top", rotation_mode="anchor")
    for label in axes.get_xticklabels():
        layout.literal(label)
    axes.tick_params(axis="x", length=0, pad=5)


def _lay_out(
    canvas: Canvas,
    axes: Axes,
    figure: Figure,
    shown: list[curves.Curve],
    form: Format,
    ruler: layout.Ruler,
    title: bool,
) -> None:
    """From the top: title, legend, what y is, the axes, what x is. The figure grows with what it holds."""
    edge = 10.0 if title else 1.0  # a picture of its own needs a margin; in the page it ends where the text ends
    room = form.width - 2 * edge
    heads = ruler.wrap(figure.title, TITLE, room, 3, "bold") if title and figure.title else []
    says_y = ruler.wrap(figure.y_label, SMALL, room, 3)
    says_x = ruler.wrap(figure.x_label, SMALL, room - 40, 3)
    legend, legend_height = _legend(canvas, figure, shown, room, ruler)
    line = SMALL * LINE
    box = axes.get_window_extent(ruler.renderer)
    around = axes.get_tightbbox(ruler.renderer) or box
    left = edge + (box.x0 - around.x0) * ruler.scale
    below = (box.y0 - around.y0) * ruler.scale
    above = max(6.0, (around.y1 - box.y1) * ruler.scale + 3)
    right = max(edge, (around.x1 - box.x1) * ruler.scale + edge)
    head_height = len(heads) * TITLE * LINE + (6 if heads else 0)
    brim = max(edge, 3.0)  # the topmost line of text is higher in some fonts
    top = brim + head_height + (legend_height + 9 if legend else 0) + len(says_y) * line + above
    bottom = brim + below + 4 + len(says_x) * line
    height = top + form.axes_height + bottom
    sheet = Sheet(canvas, form.width, height)
    axes.set_position(
        (
            left / form.width,
            bottom / height,
            (form.width - left - right) / form.width,
            form.axes_height / height,
        )
    )
    y = sheet.lines(heads, edge, brim, TITLE, "bold") + (6 if heads else 0)
    if legend:
        legend.set_bbox_to_anchor((edge / form.width, 1 - y / height), transform=canvas.transFigure)
        y += legend_height + 9
    sheet.lines(says_y, edge, y, SMALL)
    sheet.lines(says_x, (left + form.width - right) / 2, height - brim - len(says_x) * line, SMALL, ha="center")


def _legend(
    canvas: Canvas, figure: Figure, shown: list[curves.Curve], room: float, ruler: layout.Ruler
) -> tuple[matplotlib.legend.Legend | None, float]:
    entries = [(c.handle(), c.name) for c in shown if c.name.strip()]
    if curves.floor_in_view(figure, shown):
        noise = Line2D([], [], color=LIGHT["muted"], linewidth=1.0, dashes=(3, 2.5))
        entries.append((noise, "floating-point noise below"))
    if not entries:
        return None, 0.0
    handle = 3.0 * SMALL
    names = ["\n".join(ruler.wrap(name, SMALL, room - handle, 2)) for _, name in entries]
    widths = [max(ruler.width(part, SMALL) for part in name.split("\n")) for name in names]
    legend = canvas.legend(
        [h for h, _ in entries],
        [str(i) for i in range(len(entries))],  # the names come below: a leading "_" would hide an entry
        ncols=layout.legend_columns(widths, room, handle, 2 * SMALL),
        loc="upper left",
        fontsize=SMALL,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=2.3,
        handletextpad=0.7,
        columnspacing=2.0,
        labelspacing=0.45,
    )
    for words, name in zip(legend.get_texts(), names, strict=True):
        layout.literal(words).set(text=name, color=LIGHT["ink"])
    return legend, legend.get_window_extent(ruler.renderer).height * ruler.scale
