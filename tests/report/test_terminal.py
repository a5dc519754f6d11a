import io

from rich.console import Console

from ssmlens.report import terminal
from ssmlens.results import Column, Table


def shown(record, width=80):
    out = io.StringIO()
    terminal.show(record, Console(file=out, width=width))
    return out.getvalue()


def test_verdict_and_tables_fit_eighty_columns(record):
    words = shown(record)
    assert max(map(len, words.splitlines())) <= 80
    for part in ("32.71 ± 0.84", "88.6 ± 2.1", "33.52", "(tokens)", "±", "each 33 tokens", "Note:"):
        assert part in words
    assert "Incomplete" not in words


def test_a_wide_table_is_continued_with_its_row_names(record):
    words = shown(record)
    assert words.count("one channel at 1") == 2 * 2
    assert shown(record, width=160).count("one channel at 1") == 2


def test_names_are_not_markup_and_long_ones_fold(make_record):
    name = "[red]x[/red]" + "y" * 200
    table = Table(id="t", title=name, columns=[Column(name=name), Column(name="b")], rows=[[name, 1.0]])
    words = shown(make_record(title="[bold]", complete=False, verdict=[], tables=[table], notes=[name]))
    assert "[red]x[/red]" in words
    assert "[bold]" in words
    assert "Incomplete" in words
    assert max(map(len, words.splitlines())) <= 80


def test_an_empty_record_has_a_title(make_record):
    table = Table(id="t", title="Nothing", columns=[], rows=[])
    assert "What two small" in shown(make_record(verdict=[], tables=[table], notes=[]))


def test_what_only_the_page_shows_is_named(record, make_record):
    words = " ".join(shown(record).split())
    assert (
        "On the page: 4 figures; What the state still holds of each token (2 heat maps); Needles found (heat map)."
        in words
    )
    assert "On the page" not in shown(make_record(figures=[], maps=[]))
