import base64
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmlens.report import live
from ssmlens.results import Figure, Series


def figure(*series, **more):
    return Figure(
        **{"id": "f", "title": "t", "x_label": "x (tokens)", "y_label": "y (no unit)", "series": list(series), **more}
    )


def unpacked(packed):
    raw = base64.b64decode(packed[1:])
    if packed[0] == "d":
        return np.frombuffer(raw, "<f8")
    upper = np.frombuffer(raw, np.uint8).reshape(-1, 3)
    return np.pad(upper, ((0, 0), (1, 0))).reshape(-1).view("<f4").astype(float)


def arrays(spec, j=0):
    s = spec["series"][j]
    return {n: unpacked(spec["arrays"][s[n]]) for n in ("x", "y", "error", "low", "high") if s[n] is not None}


@given(st.text(), st.text())
def test_embedded_json_neither_ends_a_script_nor_changes(a, b):
    made = live.embedded({"name": a + "</script><!--" + b, b: [a]})
    assert not set("<>&\u2028\u2029") & set(made)
    assert json.loads(made) == {"name": a + "</script><!--" + b, b: [a]}


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False), max_size=20))
def test_packed_numbers_come_back_as_exact_as_they_are_shown(values):
    given_ = np.asarray(values, dtype=float)
    np.testing.assert_allclose(unpacked(live.pack(given_)), given_, rtol=1.6e-5)


def test_large_counts_and_small_errors_keep_their_digits():
    counts = np.array([0.0, 1.0, 12345.0, 65535.0])
    assert unpacked(live.pack(counts)).tolist() == counts.tolist()
    assert live.pack(counts)[0] == "t"
    assert unpacked(live.pack(np.array([2.0**24 + 1])))[0] == 2**24 + 1
    s = Series(name="s", x=[1.0, 2.0], y=[1.00000012, 3.0], stderr=[1e-7, 0.1])
    assert arrays(live.spec(figure(s), [], 600))["y"][0] == 1.00000012
    short = Series(name="s", x=[1.0, 2.0], y=[0.1, 0.2], stderr=[0.01, 0.02])
    assert {a[0] for a in live.spec(figure(short), [], 600)["arrays"]} == {"t"}


def test_series_on_one_x_share_it_and_bands_stay_what_they_were():
    x = [1.0, 2.0, 3.0]
    spec = live.spec(
        figure(
            Series(name="a", x=x, y=[1.0, math.nan, 3.0], stderr=[0.1] * 3),
            Series(name="b", x=x, y=[2.0, 2.5, 4.0], low=[1.0] * 3, high=[5.0] * 3),
        ),
        [],
        600,
    )
    assert spec["series"][0]["x"] == spec["series"][1]["x"]
    assert set(arrays(spec, 0)) == {"x", "y", "error"}
    assert set(arrays(spec, 1)) == {"x", "y", "low", "high"}
    assert math.isnan(arrays(spec)["y"][1])


def test_bars_beside_each_other_keep_the_x_they_belong_to():
    names = ["one", "two"]
    spec = live.spec(
        figure(*(Series(name=n, x=names, y=[1.0, 2.0], style="bar") for n in "ab"), x_scale="category"), [], 600
    )
    assert spec["x"]["names"] == names
    assert list(arrays(spec, 0)["x"]) == [0, 1]
    assert spec["series"][0]["shift"] == -spec["series"][1]["shift"] < 0


def test_a_fit_stays_straight_on_its_own_scale_only():
    fit = Series(name="fit", x=[0.0, 100.0], y=[1.0, 1e-4], style="fit")
    found = arrays(live.spec(figure(fit, y_scale="log"), [], 600))
    assert len(found["x"]) == live.FIT_POINTS
    np.testing.assert_allclose(found["y"], 10 ** (-4 * found["x"] / 100), rtol=1e-4)
    banded = Series(name="fit", x=[0.0, 100.0], y=[1.0, 2.0], stderr=[0.1, 0.1], style="fit")
    assert len(arrays(live.spec(figure(banded), [], 600))["x"]) == 2


@pytest.mark.parametrize(
    ("y", "style", "scale", "switch"),
    [
        ([1.0, 100.0], "line", "linear", True),
        ([1.0, 2.0], "line", "linear", False),  # less than a decade
        ([0.0, 100.0], "line", "linear", False),  # zero has no place on a logarithmic axis
        ([1.0, 100.0], "bar", "linear", False),
        ([1.0, 2.0], "line", "log", True),
        ([-1.0, math.nan], "line", "log", False),
    ],
)
def test_the_logarithm_is_offered_where_it_hides_nothing(y, style, scale, switch):
    spec = live.spec(figure(Series(name="s", x=[1.0, 2.0], y=y, style=style), y_scale=scale), [], 600)
    assert (spec["y"]["log_view"] is not None) is switch
    assert spec["y"]["linear_view"][0] < spec["y"]["linear_view"][1]
    live.embedded(spec)


def test_the_key_names_groups_of_several_figures_and_legends_name_the_rest_once():
    def of(*names):
        return figure(*(Series(name=n, x=[1.0, 2.0], y=[1.0, 2.0], group=n.partition(":")[0]) for n in names))

    one = of("a: measured", "b: measured", "a: fitted", "b: fitted", "c")
    two = of("a", "b", "a: half-life 3", "b: half-life 9")
    key = live.key([one, two], ["a", "b", "c"])
    assert [k["name"] for k in key] == ["a", "b"]
    assert len({k["colour"] for k in key}) == len({k["marker"] for k in key}) == 2
    legend = live.spec(one, ["a", "b", "c"], 600, ["a", "b"])["legend"]
    assert [(e["name"], e["of"], e["common"]) for e in legend] == [
        ("measured", [0, 1], True), ("fitted", [2, 3], True), ("c", [4], False),
    ]  # fmt: skip
    legend = live.spec(two, ["a", "b"], 600, ["a", "b"])["legend"]
    assert [(e["name"], e["of"]) for e in legend] == [("a: half-life 3", [2]), ("b: half-life 9", [3])]
    assert live.key([one], ["a", "b", "c"]) == []
    assert [e["name"] for e in live.spec(one, ["a", "b", "c"], 600)["legend"]] == [s.name for s in one.series]


@given(
    st.lists(st.floats(), min_size=1, max_size=5),
    st.sampled_from(["linear", "log"]),
    st.sampled_from(["line", "fit", "bar"]),
)
def test_no_value_breaks_the_numbers(y, scale, style):
    s = Series(name="s", x=[float(i) for i in range(len(y))], y=y, style=style)
    live.embedded(live.spec(figure(s, x_scale=scale, y_scale=scale, y_floor=y[0]), [], 600))
