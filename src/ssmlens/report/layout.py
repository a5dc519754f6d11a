"""Room for words: text is measured before it is placed, so that nothing is clipped or covered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmlens.report import text

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

POINTS_PER_INCH = 72.0


class Ruler:
    """Widths in points of text in the font that will be drawn, with 3 % to spare for a browser's own font."""

    def __init__(self, canvas: FigureCanvasAgg) -> None:
        self.renderer = canvas.get_renderer()
        self.scale = POINTS_PER_INCH / canvas.figure.dpi
        self._seen: dict[tuple[str, float, str], float] = {}

    def width(self, words: str, size: float, weight: str = "normal") -> float:
        from matplotlib.font_manager import FontProperties

        key = (words, size, weight)
        if key not in self._seen:
            font = FontProperties(size=size, weight=weight)
            self._seen[key] = self.renderer.get_text_width_height_descent(words, font, False)[0] * self.scale * 1.03
        return self._seen[key]

    def wrap(self, words: str, size: float, room: float, lines: int, weight: str = "normal") -> list[str]:
        """`words` in at most `lines` lines of at most `room` points.

        What does not fit becomes an ellipsis amid the last line. A word wider than a line is broken."""
        pieces = text.clean(words, 400).split(" ")
        done: list[str] = []
        line = ""
        while pieces:
            word = pieces.pop(0)
            longer = f"{line} {word}" if line else word
            if self.width(longer, size, weight) <= room:
                line = longer
            elif len(done) == lines - 1:
                return [*done, self._shorten(" ".join([longer, *pieces]), size, room, weight)]
            elif line:
                done.append(line)
                line = ""
                pieces.insert(0, word)
            else:
                cut = max(
                    1,
                    next((i for i in range(len(word), 0, -1) if self.width(word[:i], size, weight) <= room), 1),
                )
                done.append(word[:cut])
                if word[cut:]:
                    pieces.insert(0, word[cut:])
        return [*done, line] if line or not done else done

    def _shorten(self, words: str, size: float, room: float, weight: str) -> str:
        for length in range(len(words), 2, -1):
            shorter = text.clean(words, length)
            if self.width(shorter, size, weight) <= room:
                return shorter
        return "…"


def legend_columns(widths: list[float], room: float, handle: float, gap: float, most: int = 4) -> int:
    """How many columns fit: entries fill column by column, each column as wide as its widest entry."""
    n = len(widths)
    for columns in range(min(most, n), 1, -1):
        rows = -(-n // columns)
        # matplotlib fills columns evenly: the first n % columns of them get one more.
        starts, filled = [], 0
        for c in range(columns):
            starts.append(filled)
            filled += n // columns + (c < n % columns)
        total = sum(max(widths[a:b]) + handle for a, b in zip(starts, [*starts[1:], n], strict=True)) + gap * (
            columns - 1
        )
        if total <= room and rows * columns - n < rows:
            return columns
    return 1


def literal(words: Text) -> Text:
    """A name is never read as mathematics: "$" is a dollar."""
    words.set_parse_math(False)
    return words
