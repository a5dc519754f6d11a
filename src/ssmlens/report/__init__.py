"""Turns a record of measurements into a page, pictures and a terminal summary. Reads only `ssmlens.results`.

    write(record, "report.html")              one self-contained page            (page.py)
    plots.save(figure, "figure.png")          one picture, PNG or SVG            (plots.py; heat maps: heat.py)
    terminal.show(record, console)            verdict and tables in a terminal   (terminal.py)

The page's one script (templates/*.js) makes its figures answer to mouse, fingers and keys; it draws on the numbers of
live.py and heat.py. Without it, and in print, the page shows the same figures as drawn by matplotlib.

Importing this package imports neither matplotlib nor jinja2: both wait until something is drawn or written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmlens.results import Record

__all__ = ["write"]


def write(records: Record | Sequence[Record], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Write one self-contained, offline HTML page about one record or several, atomically.

    title: the page's heading; by default the title of the only record, or "ssmlens report".
    Raises UserError where `path` cannot be written."""
    from ssmlens.report.page import write as write_page

    return write_page(records, path, title=title)
