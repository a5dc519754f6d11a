"""A record's table in words: value ± standard error, units in the head, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, replace

from ssmlens.report import data, text
from ssmlens.results import Cell, Table, Value


@dataclass(frozen=True)
class Head:
    name: str
    unit: str
    n: int | None  # where all values of the column share it


@dataclass(frozen=True)
class Shown:
    words: str
    number: bool
    n: int | None  # where the head does not say it
    missing: bool


@dataclass(frozen=True)
class TableView:
    key: str
    title: str
    meaning: str
    method: str
    heads: list[Head]
    rows: list[list[Shown]]
    columns: list[tuple[str, str]]  # (name, meaning) of the columns that explain themselves
    remarks: list[str]
    download: data.Download


def view(table: Table, key: str) -> TableView:
    width = len(table.columns)
    rows = [[*row[:width], *[None] * (width - len(row))] for row in table.rows]
    heads = []
    for j, column in enumerate(table.columns):
        counts = {c.n for row in rows if isinstance(c := row[j], Value)}
        common = counts.pop() if len(counts) == 1 else None
        heads.append(Head(text.clean(column.name), text.clean(column.unit), common))
    cells = [[_shown(c, h) for c, h in zip(row, heads, strict=True)] for row in rows]
    _align(cells, rows)
    values = [c for row in rows for c in row if isinstance(c, Value)]
    remarks = []
    if any(v.stderr is not None for v in values):
        remarks.append("± is one standard error.")
    if any(v.n is not None for v in values):
        remarks.append("n is the number of independent samples behind a value.")
    if any(c is None for row in rows for c in row):
        remarks.append(f"{text.NOT_MEASURED} means not measured.")
    return TableView(
        key=key,
        title=text.clean(table.title),
        meaning=text.clean(table.meaning),
        method=text.clean(table.method),
        heads=heads,
        rows=cells,
        columns=[(text.clean(c.name), text.clean(c.meaning)) for c in table.columns if c.meaning],
        remarks=remarks,
        download=data.Download(
            "CSV", data.uri("text/csv;charset=utf-8", to_csv(table)), f"{text.file_name(table.id)}.csv"
        ),
    )


def to_csv(table: Table) -> str:
    """The table with full digits; a column with standard errors is followed by one that holds them."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    errors = [
        any(isinstance(row[j], Value) and row[j].stderr is not None for row in table.rows if j < len(row))  # type: ignore[union-attr]
        for j in range(len(table.columns))
    ]
    head = []
    for column, has_error in zip(table.columns, errors, strict=True):
        name = f"{column.name} ({column.unit})" if column.unit else column.name
        head += [data.inert(name), data.inert(f"{name} standard error")] if has_error else [data.inert(name)]
    rows.writerow(head)
    for row in table.rows:
        line = []
        for cell, has_error in zip(row, errors, strict=False):
            line.append(_plain(cell))
            if has_error:
                known = isinstance(cell, Value) and cell.stderr is not None
                line.append(data.digits(cell.stderr) if known else "")  # type: ignore[union-attr, arg-type]
        rows.writerow(line)
    return out.getvalue()


def _shown(cell: Cell, head: Head) -> Shown:
    n = None
    if isinstance(cell, Value):
        n = cell.n if head.n is None else None
        if text.clean(cell.unit) == head.unit:
            cell = cell.model_copy(update={"unit": ""})
    return Shown(text.cell(cell), not isinstance(cell, str), n, cell is None)


def _align(cells: list[list[Shown]], rows: list[list[Cell]]) -> None:
    """Decimal fractions of a column get equally many decimals: 94.70 under 98.38. Integers stay."""
    for j in range(len(cells[0]) if cells else 0):
        plain = [
            shown
            for shown, row in zip(cells, rows, strict=True)
            if not isinstance(row[j], int) and shown[j].number and re.fullmatch(r"−?\d+(\.\d+)?", shown[j].words)
        ]
        decimals = [len(shown[j].words.partition(".")[2]) for shown in plain]
        for shown, has in zip(plain, decimals, strict=True):
            point = "." if has == 0 < max(decimals) else ""
            words = shown[j].words + point + "0" * min(2, max(decimals) - has)
            shown[j] = replace(shown[j], words=words)


def _plain(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return data.inert(cell)
    return data.digits(cell.value if isinstance(cell, Value) else cell)
