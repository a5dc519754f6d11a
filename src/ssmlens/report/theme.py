"""Colours. One list for pictures and page, in a light and a dark form; colour i is a record's i-th group's.

The six colours keep at least 3:1 contrast to the background and differ in lightness as well as hue, so that
they stay apart under protanopia, deuteranopia and tritanopia (least OKLab distance of a pair, simulated:
0.08) and in grey print; the shape of the markers tells groups apart a second time.
"""

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
