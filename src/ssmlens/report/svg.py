"""matplotlib's SVG made small and, for the page, themed: colours as CSS variables, unique ids, its fonts."""

from __future__ import annotations

import base64
import io
import re
from xml.sax.saxutils import quoteattr

from ssmlens.report.theme import LIGHT

_VARIABLE = {colour: name for name, colour in LIGHT.items()}
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def standalone(raw: str) -> str:
    """A file of its own: light colours, fonts that every machine can replace."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + _font(_small(raw, ""), f"font-family: {_FONTS}; ") + "\n"


def inline(raw: str, *, prefix: str, label: str) -> str:
    """An element for an HTML page. label: its description."""
    made = _font(_small(raw, prefix), "")
    made = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_VARIABLE[m[0]]})" if m[0] in _VARIABLE else m[0], made)
    made = made.replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]*)"', made)
    width, height = (float(v) for v in box[1].split()[2:]) if box else (1.0, 1.0)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label={quoteattr(label)}>'
    return re.sub(r"<svg[^>]*>", lambda _: start, made, count=1)


def _small(raw: str, prefix: str) -> str:
    """From `<svg` on, without metadata, ids that nothing refers to, or more decimals than a screen has."""
    made = raw[raw.index("<svg") :].strip()
    made = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", made, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', made))
    made = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", made)
    if prefix:
        made = re.sub(r'(url\(#|href="#)', lambda m: m[1] + prefix, made)
    # Within attributes of geometry only: a name such as "rate 0.12345" is text.
    made = re.sub(r' (d|x|y|transform|width|height|points)="([^"]*)"', _rounded, made)
    made = re.sub(r'data:image/png;base64,([^"]*)', lambda m: f"data:image/png;base64,{_repacked(m[1])}", made)
    made = re.sub(r">\s+<", "><", made)
    return re.sub(r"<g>(?:\s*)</g>|<defs/>", "", made)


def _repacked(content: str) -> str:
    """An image of at most 256 colours, transparent ones among them, as one with a palette: a quarter of the bytes."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        pixels = np.asarray(image.convert("RGBA"))
    colours, index = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256:
        return content
    small = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), "P")
    small.putpalette(colours[:, :3].tobytes())
    out = io.BytesIO()
    small.save(out, "png", optimize=True, transparency=colours[:, 3].tobytes())
    return base64.b64encode(out.getvalue()).decode()


def _rounded(match: re.Match[str]) -> str:
    places = 1 if len(match[2]) > 2000 else 2  # a tenth of a point is enough for a long curve, not for a marker

    def short(number: re.Match[str]) -> str:
        return f"{float(number[0]):.{places}f}".rstrip("0").rstrip(".").replace("-0.", "-.") or "0"

    value = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", short, match[2])
    value = " ".join(value.split())
    if match[1] == "d":
        value = re.sub(r" ?([MLQCZz]) ?", r"\1", value)
    return f' {match[1]}="{value}"'


def _font(made: str, family: str) -> str:
    """matplotlib names its own fonts in every text; the page's text has the reader's."""
    return re.sub(
        r'(<(?:text|tspan)[^>]*style="[^"]*?)font-family:[^;"]*;? ?',
        lambda m: m[1] + family,
        _long_hand(made),
    )


def _long_hand(made: str) -> str:
    """`font: 700 9px 'DejaVu Sans', ...` as font-weight, font-size and font-family."""

    def spelled(match: re.Match[str]) -> str:
        weight = f"font-weight: {match[1]}; " if match[1] else ""
        return f"{weight}font-size: {match[2]}px; font-family: x;"

    return re.sub(r"font: (?:normal )*(\d+|bold)? ?([\d.]+)px [^;\"]*;?", spelled, made)
