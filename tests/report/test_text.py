import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmlens.report import text
from ssmlens.results import Value


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (81.4, 1.31, "81.4 ± 1.3"),
        (81.4, None, "81.4"),
        (12345.0, 678.0, "12345 ± 678"),
        (-0.0041, 0.00052, "−0.00410 ± 0.00052"),
        (3.14159e-7, 2e-8, "(3.14 ± 0.20)×10⁻⁷"),
        (2.5e9, 1e8, "(2.50 ± 0.10)×10⁹"),
        (0.0, 0.0, "0 ± 0"),
        (-0.001, 0.5, "0.00 ± 0.50"),
        (9.99, 0.0996, "9.99 ± 0.10"),
        (1024.0, None, "1024"),
        (2.0 / 3, None, "0.6667"),
        (5e-324, None, "4.941×10⁻³²⁴"),
        (math.inf, 1.0, "∞"),
        (-math.inf, None, "−∞"),
        (math.nan, None, "undefined"),
        (1.5, math.inf, "1.5 ± ∞"),
        (1.5, math.nan, "1.5 ± undefined"),
    ],
)
def test_numbers_read_as_one_writes_them(value, stderr, shown):
    assert text.number(value, stderr) == shown


@given(st.floats(), st.one_of(st.none(), st.floats(min_value=0)))
def test_every_number_has_words(value, stderr):
    shown = text.number(value, stderr)
    assert shown
    assert "e" not in shown.replace("undefined", "")
    assert len(shown) < 60


def test_a_cell_shows_its_own_unit_and_says_what_is_missing():
    assert text.cell(Value(value=32.7, stderr=0.84, unit="tokens")) == "32.70 ± 0.84 tokens"
    assert text.cell(None) == "–"
    assert text.cell(-3) == "−3"


def test_names_lose_what_could_mislead_and_keep_the_rest():
    assert text.clean("a\x00b\nc\u202ed  e") == "a\ufffdb cd e"
    assert text.clean("Δ ≥ 0 — 模型") == "Δ ≥ 0 — 模型"
    assert text.clean("abcdefghij", 5) == "ab…ij"
    assert text.file_name("../../etc/pass wd") == "etc-pass-wd"
    assert text.file_name("///") == "unnamed"
