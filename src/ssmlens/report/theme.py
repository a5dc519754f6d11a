"""Colours. One list for pictures and page, in a light and a dark form; colour i is a record's i-th group's.

The six colours keep at least 3:1 contrast to the background and differ in lightness as well as hue, so that
they stay apart under protanopia, deuteranopia and tritanopia (least OKLab distance of a pair, simulated:
0.08) and in grey print; the shape of the markers tells groups apart a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SERIES_LIGHT = ("#1878cc", "#d4720c", "#0d5c46", "#bd4b8b", "#77691a", "#33257a")
SERIES_DARK = ("#7cc0f0", "#ee8030", "#b8f0d0", "#c878ad", "#f0c418", "#8486f2")
MARKERS = ("o", "s", "^", "D", "v", "P")

# Drawn pictures use the light colours; in the page each becomes the CSS variable of the same name (svg.py).
LIGHT = {
    "surface": "#ffffff",
    "ink": "#1c2127",
    "muted": "#59626c",
    "rule": "#9aa3ad",
    "grid": "#e4e8ec",
    "noise": "#f3f4f6",
    **{f"s{i}": c for i, c in enumerate(SERIES_LIGHT)},
}
DARK = {
    "surface": "#15181c",
    "ink": "#e8ebee",
    "muted": "#a3acb6",
    "rule": "#6b747e",
    "grid": "#2a3037",
    "noise": "#1d2126",
    **{f"s{i}": c for i, c in enumerate(SERIES_DARK)},
}


def css(colours: dict[str, str]) -> str:
    """The colours as declarations of CSS custom properties."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STEPS = 255  # colours of a heat map; with transparency a palette of 256


def diverging() -> NDArray[np.uint8]:
    """(255, 4) RGBA from blue through grey to orange, of a lightness that falls evenly from the middle (in OKLab)."""
    import numpy as np

    t = np.linspace(-1.0, 1.0, STEPS)
    light = 0.90 - 0.50 * np.abs(t)
    chroma = 0.115 * np.minimum(1.0, 1.8 * np.abs(t))
    hue = np.radians(np.where(t < 0, 255.0, 52.0))
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cone = np.stack(
        [
            light + 0.3963377774 * a + 0.2158037573 * b,
            light - 0.1055613458 * a - 0.0638541728 * b,
            light - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ cone**3, 0.0, 1.0)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.concatenate([np.round(rgb.T * 255), np.full((STEPS, 1), 255.0)], axis=1).astype(np.uint8)
