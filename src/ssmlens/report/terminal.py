"""A record in a terminal: the verdict, its short tables in as many blocks as the width asks for, what else the page has."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from ssmlens.report import tables, text
from ssmlens.results import Map, Record, Table

MOST_ROWS, MOST_LETTERS = 10, 60  # tables that are longer, or hold whole sentences, are for the page
NAME_WIDTH = 24  # longest first column, in cells; longer names fold


def show(record: Record, console: Console | None = None) -> None:
    """Print title, verdict, tables and notes. Names are never read as markup."""
    (console or Console()).print(render(record, (console or Console()).width))


def render(record: Record, width: int = 80) -> Group:
    """The same as something rich can print, for a terminal `width` cells wide."""
    parts: list[RenderableType] = [Text(text.clean(record.title), style="bold")]
    if not record.complete:
        parts.append(Text("Incomplete: this run was interrupted; what it had finished is shown.", style="yellow"))
    parts += [_bullet(sentence) for sentence in record.verdict]
    short = [table for table in record.tables if len(table.rows) <= MOST_ROWS and _longest(table) <= MOST_LETTERS]
    for table in short:
        parts += [Text(""), *_table(table, width)]
    left = [text.clean(table.title) for table in record.tables if table not in short]
    if count := len(record.figures):
        left.append(f"{count} figure{'s' * (count > 1)}")
    left += [f"{text.clean(heat.title)} ({_panels(heat)})" for heat in record.maps]
    if left:
        parts += [Text(""), Text(f"On the page: {'; '.join(left)}.", style="dim")]
    if record.notes:
        parts += [Text(""), *(_bullet(f"Note: {note}") for note in record.notes)]
    return Group(*parts)


def _longest(table: Table) -> int:
    return max((len(cell) for row in table.rows for cell in row if isinstance(cell, str)), default=0)


def _panels(heat: Map) -> str:
    n = len(heat.panels)
    return "heat map" if n == 1 else f"{n} heat maps"


def _bullet(sentence: str) -> RenderableType:
    line = Grid.grid(padding=(0, 1, 0, 0))
    line.add_column(width=1)
    line.add_column(overflow="fold")
    line.add_row("•", Text(text.clean(sentence)))
    return Padding(line, (0, 0, 0, 1))


def _table(table: Table, width: int) -> list[RenderableType]:
    view = tables.view(table, "")
    parts: list[RenderableType] = [Text(view.title, style="bold")]
    if not view.heads:
        return parts
    heads = [_head(h) for h in view.heads]
    columns = [[row[j] for row in view.rows] for j in range(len(heads))]
    # rich measures too, but would fold "81.4 ± 1.3" rather than begin a new block.
    widths = [
        max([*(len(part) for part in head.split("\n")), *(len(_words(c)) for c in column)])
        for head, column in zip(heads, columns, strict=True)
    ]
    names = _names(view.rows)
    widths[0] = min(widths[0], NAME_WIDTH)
    blocks: list[list[int]] = [[]]
    room = width - 2 - sum(widths[j] + 2 for j in range(names))
    for j in range(names, len(heads)):
        if blocks[-1] and sum(widths[k] + 2 for k in blocks[-1]) + widths[j] + 2 > room:
            blocks.append([])
        blocks[-1].append(j)
    for i, block in enumerate(blocks):
        shown = [*range(names), *block]
        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
        for j in shown:
            number = j > 0 and bool(columns[j]) and columns[j][0].number
            most = widths[0] if j == 0 else max(8, room - 2)
            grid.add_column(
                Text(heads[j]), justify="right" if number else "left", overflow="fold", vertical="bottom",
                max_width=most,
            )  # fmt: skip
        for row in view.rows:
            grid.add_row(*(Text(_words(row[j])) for j in shown))
        parts.append(Padding(grid, (1 if i else 0, 0, 0, 1)))
    said = [view.meaning, *view.remarks]
    return [*parts, Padding(Text(" ".join(s for s in said if s), style="dim"), (0, 0, 0, 1))] if any(said) else parts


def _names(rows: list[list[tables.Shown]]) -> int:
    """How many leading columns name a row: those it takes to tell rows apart, if that is at most three."""
    for k in (1, 2, 3):
        if rows and k < len(rows[0]) and len({tuple(c.words for c in row[:k]) for row in rows}) == len(rows):
            return k
    return 1


def _head(head: tables.Head) -> str:
    unit = f"({head.unit})" if head.unit else ""
    count = "" if head.n is None else f"n = {head.n}"
    below = " ".join(s for s in (unit, count) if s)
    return f"{head.name}\n{below}" if below else head.name


def _words(shown: tables.Shown) -> str:
    return shown.words if shown.n is None else f"{shown.words} (n = {shown.n})"
