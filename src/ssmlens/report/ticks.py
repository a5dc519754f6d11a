"""Tick labels without mathematical markup (plain Unicode), so that they are text in SVG, of any font."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axis import Axis
from matplotlib.ticker import (
    FixedLocator,
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from ssmlens.report import text


class Plain(Formatter):
    """Decimals, as many as the steps need; a common factor of very large or small ticks reads ×10⁻⁵."""

    def __init__(self) -> None:
        self.order = 0

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        most = max((abs(v) for v in values), default=0.0)
        self.order = 0 if most == 0 or 0.99e-3 <= most < 1e5 else math.floor(math.log10(most) + 1e-9)
        scaled = [v / 10.0**self.order for v in values]
        step = min((b - a for a, b in pairwise(scaled)), default=0.0) or max(map(abs, scaled), default=0.0)
        places = next((p for p in range(9) if all(abs(v - round(v, p)) <= 1e-3 * step for v in scaled)), 9)
        return [text.fixed(v, places) for v in scaled]

    def get_offset(self) -> str:
        return f"×{text.power_of_ten(self.order)}" if self.order else ""


class Log(Formatter):
    """0.01, 0.1, 1, 10 where every tick is of everyday size; powers of ten elsewhere."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        positive = [v for v in values if v > 0]
        everyday = bool(positive) and min(positive) >= 0.9e-3 and max(positive) < 1.1e5
        return ["" if v <= 0 else f"{v:.6g}" if everyday else self._power(v) for v in values]

    def _power(self, value: float) -> str:
        exponent = math.floor(math.log10(value) + 1e-9)
        mantissa = value / 10.0**exponent
        power = text.power_of_ten(exponent)
        return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}×{power}"


def linear(axis: Axis, most: int = 6) -> None:
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(Plain())


def logarithmic(axis: Axis, low: float, high: float, most: int = 8) -> None:
    """Decades; with fewer than two of them in view also 2 and 5; with half a decade, even steps."""
    decades = math.log10(high / low)
    if decades < 0.5:
        axis.set_major_locator(MaxNLocator(5))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades >= 2 else (1.0, 2.0, 5.0), numticks=most))
    axis.set_major_formatter(Log())
    axis.set_minor_locator(
        NullLocator() if decades < 0.5 or decades > 4 else LogLocator(subs=range(2, 10), numticks=50)
    )
    axis.set_minor_formatter(NullFormatter())


def named(axis: Axis, names: list[str]) -> None:
    axis.set_major_locator(FixedLocator(list(range(len(names)))))
    axis.set_ticklabels(names)
