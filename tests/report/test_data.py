import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmlens.report import data
from ssmlens.results import Figure, Series


def figure(*series, **kinds):
    return Figure(id="f", title="t", x_label="x (tokens)", y_label="y (no unit)", series=list(series), **kinds)


@given(st.integers(0, 3000), st.integers(4, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_thinning_keeps_ends_extremes_and_the_limit(n, limit, log, seed):
    rng = np.random.default_rng(seed)
    x, y = np.arange(n) + 1.0, rng.standard_normal(n)
    at = data.thin(x, y, limit, log)
    assert (np.diff(at) > 0).all()
    if n <= limit:
        assert len(at) == n
        return
    assert len(at) <= limit + 2
    assert at[0] == 0
    assert at[-1] == n - 1
    assert {y.argmin(), y.argmax()} <= set(at)


def test_thinning_keeps_a_gap():
    y = np.ones(1000)
    y[500] = math.nan
    at = data.thin(np.arange(1000.0), y, 50)
    assert 500 in at
    assert np.isnan(y[at]).sum() == 1


def test_csv_has_every_number_and_no_formula():
    f = figure(
        Series(name="=SUM(A1)", x=[1.0, 2.0], y=[0.1, math.nan], stderr=[0.25, math.inf]),
        Series(name='a,"b"\nc', x=["@x", "y"], y=[1 / 3, -1e-30], low=[0.0, 0.0], high=[1.0, 1.0]),
    )
    rows = list(csv.reader(io.StringIO(data.to_csv(f))))
    assert rows == [
        ["series", "x", "y", "stderr", "low", "high"],
        ["'=SUM(A1)", "1", "0.1", "0.25", "", ""],
        ["'=SUM(A1)", "2", "nan", "inf", "", ""],
        ['a,"b"\nc', "'@x", "0.333333333", "", "0", "1"],
        ['a,"b"\nc', "y", "-1e-30", "", "0", "1"],
    ]


@given(st.floats(width=32))
def test_csv_gives_a_float32_back(value):
    np.testing.assert_array_equal(np.float32(float(data.digits(value))), np.float32(value))


def test_the_table_under_a_figure_puts_series_on_one_x_side_by_side():
    x = [float(i) for i in range(100)]
    f = figure(
        Series(name="a", x=x, y=x, stderr=[0.5] * 100),
        Series(name="b", x=x, y=x, low=[-1.0] * 100, high=[200.0] * 100),
        Series(name="fit", x=[0.0, 99.0], y=[0.0, 99.0], style="fit"),
    )
    both, fit = data.grids(f, limit=10)
    assert both.head == ["x (tokens)", "a", "b"]
    assert len(both.rows) == 10
    assert both.total == 100
    assert both.rows[0] == ["0", "0.00 ± 0.50", "0 [−1, 200]"]
    assert both.rows[-1][0] == "99"
    assert fit.head == ["x (tokens)", "fit"]


def test_what_a_picture_cannot_show_is_said():
    f = figure(Series(name="s", x=[0.0, 1.0, 2.0, 3.0], y=[1.0, math.inf, -1.0, 1.0]), x_scale="log", y_scale="log")
    said = data.left_out(f)
    assert said[0].startswith("1 of 4 values of “s” are infinite")
    assert said[1].startswith("2 of 4 values of “s” are zero, negative")
    assert not data.left_out(figure(Series(name="s", x=[0.0], y=[-1.0])))


@pytest.mark.parametrize("words", ['<&">#%?+ é ✓\n', "a,b;c=d"])
def test_data_uris_can_stand_in_an_attribute_and_come_back(words):
    from urllib.parse import unquote

    uri = data.uri("text/csv;charset=utf-8", words)
    assert not set('"&#%') & set(uri.partition(",")[2].replace("%", "", 0)) - {"%"}
    assert unquote(uri.partition(",")[2]) == words
