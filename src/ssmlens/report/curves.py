"""Series as curves on axes: their colour, marker and dash, their uncertainty, and what of them is in view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from ssmlens.report import data, text
from ssmlens.report.theme import LIGHT, MARKERS, SERIES_LIGHT
from ssmlens.results import Figure, Series

FEW = 32  # points: up to here they get markers and error bars, beyond a line and a band
DASHES: tuple[tuple[float, ...], ...] = ((), (1.2, 1.4), (6, 1.6, 1.2, 1.6), (3, 1.4))
FIT_DASHES = (4.5, 2.2)


@dataclass(frozen=True)
class Curve:
    """One series as drawn: thinned, with its look.

    x, y, low, high: (points,)   at: their places in the series   shift: how far bars and scattered points stand beside
    their x   log: are x, y on log axes"""

    name: str
    style: str
    x: data.Array
    y: data.Array
    low: data.Array | None
    high: data.Array | None
    at: NDArray[np.intp]
    shift: float
    colour: str
    marker: str
    dashes: tuple[float, ...]
    hollow: bool
    pale: bool
    bar_width: float
    log: tuple[bool, bool]

    @cached_property
    def drawable_at(self) -> NDArray[np.bool_]:
        return data.drawable(self.x, self.log[0]) & data.drawable(self.y, self.log[1])

    @property
    def drawable(self) -> bool:
        return bool(self.drawable_at.any())

    @property
    def barred(self) -> bool:
        """Its uncertainty is drawn as error bars, not as a band."""
        return self.style in ("bar", "points") or (self.style == "line" and self.few)

    @property
    def few(self) -> bool:
        """Markers rather than a bare line."""
        return self.style == "points" or len(self.x) <= FEW

    @property
    def alone(self) -> NDArray[np.bool_]:
        """Points between gaps, which a bare line would not show."""
        there = self.drawable_at
        return there & ~np.r_[False, there[:-1]] & ~np.r_[there[1:], False]

    def handle(self) -> Artist:
        """Its entry in the legend."""
        if self.style == "bar":
            return Patch(facecolor=self.colour, alpha=0.45 if self.hollow else 0.9, linewidth=0)
        marked = self.style == "points" or (self.style == "line" and self.few)
        return Line2D([], [], **self.line(marked))

    def line(self, marked: bool) -> dict[str, Any]:
        look: dict[str, Any] = {
            "color": self.colour,
            "linewidth": 1.4 if self.style == "fit" else 1.7,
            "alpha": 0.45 if self.pale else 1.0,
            "dash_capstyle": "butt",
            "solid_joinstyle": "round",
        }
        if self.style == "points":
            look["linestyle"] = "none"
        elif self.dashes:
            look["dashes"] = self.dashes
        if marked:
            small = len(self.x) > FEW
            look |= {
                "marker": self.marker,
                "markersize": 3.0 if small else 4.6,
                "markeredgewidth": 1.1 if self.hollow else 0.0,
                "markeredgecolor": self.colour,
                "markerfacecolor": LIGHT["surface"] if self.hollow else self.colour,
            }
        return look


def group_of(series: Series) -> str:
    """What has one colour in a figure: the series' group or, without one, the series itself."""
    return series.group or series.name


def is_reference(group: str) -> bool:
    """Numbers of the paper, for comparison: grey, so that colour is left to what was measured here."""
    return group.lower() in ("paper", "the paper")


class Look(NamedTuple):
    """Of a group. again: how often all colours were given before; dashes change then, and markers are hollow every second time."""

    colour: str
    marker: str
    again: int

    @property
    def hollow(self) -> bool:
        return self.again % 2 == 1

    @classmethod
    def at(cls, place: int) -> Look:
        """Of the group at this place among all of a record."""
        again = place // len(SERIES_LIGHT)
        return cls(SERIES_LIGHT[place % len(SERIES_LIGHT)], MARKERS[(place + again) % len(MARKERS)], again)


def colour_order(figure: Figure, groups: Sequence[str]) -> dict[str, int]:
    """The index of the colour of each group in the figure.

    A group has its place in `groups`, so one colour in every figure of a record. Series without a group are known in
    this figure alone: they get the colours after those or, where these run out, ones that the figure leaves free."""
    order = {g: i for i, g in enumerate(g for g in groups if not is_reference(g))}
    here = [g for g in dict.fromkeys(group_of(s) for s in figure.series) if not is_reference(g)]
    new = [g for g in here if g not in order]
    if len(order) + len(new) <= len(SERIES_LIGHT):
        return order | {g: i for i, g in enumerate(new, len(order))}
    used = {order[g] for g in here if g in order}
    free = [i for i in range(len(here)) if i not in used]
    return order | dict(zip(new, free, strict=False))


def log_x(figure: Figure, curves: list[Curve]) -> bool:
    """A log axis needs a positive value; without one the (empty) axes are linear."""
    return figure.x_scale == "log" and not data.is_category(figure) and any(c.drawable for c in curves)


def log_y(figure: Figure, curves: list[Curve]) -> bool:
    return figure.y_scale == "log" and any(c.drawable for c in curves)


def prepare(figure: Figure, groups: Sequence[str], points: int) -> list[Curve]:
    """The figure's series in the order they are given, each with at most about `points` points."""
    order = colour_order(figure, groups)
    log = (figure.x_scale == "log" and not data.is_category(figure), figure.y_scale == "log")
    fitted = {group_of(s) for s in figure.series if s.style == "fit"}
    bars = [j for j, s in enumerate(figure.series) if s.style == "bar"]
    scattered = [j for j, s in enumerate(figure.series) if s.style == "points"]
    seen: dict[str, int] = {}
    curves = []
    for j, s in enumerate(figure.series):
        group = order.get(group_of(s), 0)
        grey = is_reference(group_of(s))
        variant = 0 if s.style == "fit" else seen.get(group_of(s), 0)
        if s.style != "fit":
            seen[group_of(s)] = variant + 1
        x = data.positions(figure, s)
        y = data.floats(s.y)
        at = data.thin(x, y, points, log[0])
        width = _spacing(x) * (0.8 if data.is_category(figure) else 0.92) / max(1, len(bars))
        shift = 0.0
        if s.style == "bar":
            shift = (bars.index(j) - (len(bars) - 1) / 2) * width
        elif s.style == "points" and data.is_category(figure):
            shift = (scattered.index(j) - (len(scattered) - 1) / 2) * min(0.14, 0.6 / len(scattered))
        low, high = _band(s)
        colour, marker, again = Look.at(group)
        curves.append(
            Curve(
                name=text.clean(s.name),
                style=s.style,
                x=x[at] + shift,
                y=y[at],
                low=None if low is None else low[at],
                high=None if high is None else high[at],
                at=at,
                shift=shift,
                colour=LIGHT["rule"] if grey else colour,
                marker="X" if grey else marker,
                dashes=FIT_DASHES if s.style == "fit" else DASHES[(variant + again) % len(DASHES)],
                hollow=(variant + again) % 2 == 1,
                pale=s.style in ("line", "step") and group_of(s) in fitted,
                bar_width=width,
                log=log,
            )
        )
    return curves


def limits(figure: Figure, curves: list[Curve]) -> tuple[float, float]:
    """The range of y in view. On a log axis a band that reaches (nearly) to zero does not stretch it."""
    log = log_y(figure, curves)
    y = np.concatenate([c.y[c.drawable_at] for c in curves] or [np.empty(0)])
    if not len(y):
        return 0.0, 1.0
    ends = [e[np.isfinite(e)] for c in curves for e in (c.low, c.high) if e is not None]
    extra = np.concatenate(ends or [np.empty(0)])
    if log:
        low, high = float(y.min()), float(y.max())
        extra = extra[(extra >= low / 10) & (extra <= high * 10)]
        low, high = min(low, low, *extra, *_floor(figure, low, high)), max(high, high, *extra)
        room = max(math.log10(high) - math.log10(low), 0.3) * 0.05
        return low / 10**room, high * 10**room
    span = float(y.max() - y.min()) or abs(float(y.max())) or 1.0
    extra = extra[(extra >= y.min() - 3 * span) & (extra <= y.max() + 3 * span)]
    low, high = float(min(y.min(), *extra, y.min())), float(max(y.max(), *extra, y.max()))
    if any(c.style == "bar" for c in curves):
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        low, high = low - span / 2, high + span / 2
    room = 0.05 * (high - low)
    flush = low >= 0 and any(c.style in ("bar", "step") for c in curves) and low < room
    return (0.0 if flush else low - room), high + room


def span(figure: Figure, curves: list[Curve]) -> tuple[float, float]:
    """The range of a numeric x in view."""
    x = np.concatenate([c.x[c.drawable_at] for c in curves] or [np.empty(0)])
    if not len(x):
        return 0.0, 1.0
    low, high = float(x.min()), float(x.max())
    if log_x(figure, curves):
        room = (math.log10(high) - math.log10(low)) * 0.025 or 0.5
        return low / 10**room, high * 10**room
    half = max((c.bar_width / 2 for c in curves if c.style == "bar"), default=0.0)
    room = (high - low) * 0.025 or abs(high) * 0.1 or 1.0
    return low - half - room, high + half + room


def floor_in_view(figure: Figure, curves: list[Curve]) -> bool:
    low, high = limits(figure, curves)
    return figure.y_floor is not None and low <= figure.y_floor <= high


def add(axes: Axes, figure: Figure, curves: list[Curve], bottom: float) -> None:
    """Draw bands, then fits, then data."""
    if floor_in_view(figure, curves) and figure.y_floor is not None:
        axes.axhspan(bottom, figure.y_floor, color=LIGHT["noise"], linewidth=0, zorder=0)
        axes.axhline(figure.y_floor, color=LIGHT["muted"], linewidth=1.0, dashes=(3, 2.5), zorder=1.5)
    for c in curves:
        if not c.drawable:
            continue
        x, y = np.where(c.drawable_at, c.x, math.nan), np.where(c.drawable_at, c.y, math.nan)
        if c.style == "bar":
            kind: dict[str, Any] = {"alpha": 0.45 if c.hollow else 0.9, "linewidth": 0, "zorder": 2}
            axes.bar(x, y, c.bar_width * 0.94, color=c.colour, **kind)
        elif c.style == "step":
            axes.plot(x, y, drawstyle="steps-post", zorder=3, **c.line(marked=False))
        else:
            if not c.few and c.alone.any():
                at = c.alone
                axes.plot(x[at], y[at], linestyle="none", marker=".", markersize=3.5, color=c.colour, zorder=3)
            marked = c.few and c.style in ("points", "line")
            axes.plot(x, y, zorder=2.5 if c.style == "fit" else 3, **c.line(marked))
        _uncertainty(axes, c, x, y, bottom)


def _uncertainty(axes: Axes, c: Curve, x: data.Array, y: data.Array, bottom: float) -> None:
    if c.low is None or c.high is None:
        return
    low = np.where(c.low > bottom, c.low, bottom) if c.log[1] else c.low  # NaN becomes the bottom, and is dropped next
    known = np.isfinite(c.low) & np.isfinite(c.high) & np.isfinite(x + y)
    if not known.any():
        return
    if c.barred:
        length = np.maximum(0.0, np.stack([y - low, c.high - y]))[:, known]
        colour = LIGHT["ink"] if c.style == "bar" else c.colour
        at = (x[known], y[known])
        if c.style == "bar":  # a rim that keeps the line visible on bars of any colour
            axes.errorbar(*at, yerr=length, fmt="none", ecolor=LIGHT["surface"], elinewidth=2.6, zorder=3.1)
        thin: dict[str, Any] = {"elinewidth": 1.1, "capsize": 2.2, "capthick": 1.1, "zorder": 3.2}
        axes.errorbar(*at, yerr=length, fmt="none", ecolor=colour, **thin)
    else:
        step: Literal["post"] | None = "post" if c.style == "step" else None
        axes.fill_between(x, low, c.high, where=known, step=step, color=c.colour, alpha=0.18, linewidth=0, zorder=1)


def _band(s: Series) -> tuple[data.Array | None, data.Array | None]:
    if s.low is not None and s.high is not None:
        return data.floats(s.low), data.floats(s.high)
    if s.stderr is not None:
        y, e = data.floats(s.y), data.floats(s.stderr)
        return y - e, y + e
    return None, None


def _spacing(x: data.Array) -> float:
    steps = np.diff(np.unique(x[np.isfinite(x)]))
    return float(steps.min()) if len(steps) else 1.0


def _floor(figure: Figure, low: float, high: float) -> list[float]:
    """The noise floor belongs into the picture when data come within two decades of it."""
    floor = figure.y_floor
    return [floor / 2] if floor is not None and low / 100 <= floor <= high and floor > 0 else []


def uncertainty_words(figure: Figure) -> str:
    """What bars and bands in this picture stand for, and for which curves nothing was estimated."""
    curves = list(zip(figure.series, prepare(figure, [], 600), strict=True))
    said = []
    for known, meaning in (
        ([c for s, c in curves if s.stderr is not None and s.low is None], "± one standard error"),
        ([c for s, c in curves if s.low is not None and s.high is not None], "confidence intervals"),
    ):
        kinds = ["error bars"] * any(c.barred for c in known) + ["shaded bands"] * any(not c.barred for c in known)
        if kinds:
            said.append(f"{' and '.join(kinds).capitalize()} are {meaning}.")
    measured = [s for s in figure.series if s.style != "fit"]
    without = [s for s in measured if s.stderr is None and s.low is None]
    if without and len(without) == len(measured):
        said.append("No uncertainty was estimated for the values in this figure.")
    elif without:
        names = ", ".join(f"“{text.clean(s.name, 60)}”" for s in without)
        said.append(f"No uncertainty was estimated for {names}.")
    return " ".join(said)
