"""What curves and heat maps are drawn on: sizes, matplotlib's own style, bytes of PNG and SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cycler import cycler
from matplotlib.figure import Figure as Canvas

from ssmlens.report import layout
from ssmlens.report.theme import LIGHT

SMALL = 9.0  # points: ticks, legend, labels
TITLE = 12.0
LINE = 1.3  # heights of text from line to line


@dataclass(frozen=True)
class Format:
    """Sizes in points. The page shows a point as 1.33 px: `WIDE` fills a desktop column, `NARROW` a phone."""

    width: float
    axes_height: float
    most_ticks: int


WIDE = Format(width=540, axes_height=250, most_ticks=8)
NARROW = Format(width=258, axes_height=190, most_ticks=4)


class Sheet:
    """Puts words on a canvas of `width` x `height` points, measured from its top left corner."""

    def __init__(self, canvas: Canvas, width: float, height: float) -> None:
        self.canvas, self.width, self.height = canvas, width, height
        canvas.set_size_inches(width / 72, height / 72)

    def put(
        self, words: str, x: float, y: float, size: float, colour: str, weight: str = "normal", ha: str = "left"
    ) -> None:
        placed = self.canvas.text(
            x / self.width, 1 - y / self.height, words, size=size, weight=weight, ha=ha, va="baseline"
        )
        layout.literal(placed).set_color(LIGHT[colour])

    def lines(
        self, lines: list[str], x: float, y: float, size: float, weight: str = "normal", ha: str = "left"
    ) -> float:
        """`lines` from `y` downwards; returns where they end."""
        for words in lines:
            y += size * LINE
            self.put(words, x, y - size * 0.3, size, "ink", weight, ha)
        return y


def svg(canvas: Canvas) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", dpi=72, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return out.getvalue()


def png(canvas: Canvas, most: int | None = None, colours: int = 128) -> bytes:
    """A picture of few colours takes a third of the bytes and looks the same; above `most` bytes, of fewer and coarser."""
    from PIL import Image

    found = b""
    for dots, few in ((200, colours), (120, colours // 3), (75, colours // 6)):
        out, small = io.BytesIO(), io.BytesIO()
        canvas.savefig(out, format="png", dpi=dots, pil_kwargs={"compress_level": 1})
        with Image.open(out) as image:
            reduced = image.convert("RGB").quantize(few, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        reduced.save(small, "png", optimize=True, dpi=(dots, dots))
        found = small.getvalue()
        if most is None or len(found) <= most:
            break
    return found


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's own defaults and the few settings that only rcParams reach; all is put back afterwards."""
    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context("default"):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the page's text has the reader's fonts
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ssmlens", "text.usetex": False})
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=[LIGHT["ink"]])
        yield
