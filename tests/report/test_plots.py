import io
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssmlens.errors import UserError
from ssmlens.report import curves, layout, plots, theme
from ssmlens.results import Figure, Series


def figure(*series, **more):
    return Figure(
        **{"id": "f", "title": "t", "x_label": "x (tokens)", "y_label": "y (no unit)", "series": list(series), **more}
    )


def colours(svg):
    return {name for name in theme.LIGHT if f"var(--{name})" in svg}


def test_importing_the_package_does_not_import_what_draws():
    code = "import ssmlens.report, sys; print([m for m in ('matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_png_and_svg_are_written_and_equal_figures_give_equal_bytes(record, tmp_path):
    f = record.figures[0]
    for name in ("a.png", "a.svg"):
        first = plots.save(f, tmp_path / name).read_bytes()
        assert plots.save(f.model_copy(), tmp_path / name).read_bytes() == first
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1500
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    svg = (tmp_path / "a.svg").read_text()
    assert f.title in svg
    assert "var(--" not in svg
    assert "<metadata" not in svg


def test_neither_rcparams_nor_pyplot_are_touched_or_heeded(record, tmp_path):
    f = record.figures[1]
    usual = plots.svg(f)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 40, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert plots.svg(f) == usual
        assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, ssmlens.results as r, ssmlens.report.plots as p;"
        "p.svg(r.Figure(id='f', title='', x_label='', y_label='', series=[]));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_all_figures_of_a_record_get_files_of_their_own(make_record, tmp_path):
    one = figure(Series(name="a", x=[1.0], y=[1.0]), id="../x")
    paths = plots.save_all(make_record(figures=[one, one], maps=[]), tmp_path)
    assert [p.name for p in paths] == ["x.png", "x-2.png"]
    assert all(p.parent == tmp_path for p in paths)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        plots.save(figure(), tmp_path / "a.jpg")


def test_a_group_has_one_colour_in_every_figure():
    a, b = (Series(name=g, x=[1.0, 2.0], y=[1.0, 2.0], group=g) for g in "ab")
    groups = plots.group_order([figure(a, b), figure(b)])
    assert groups == ["a", "b"]
    assert "s1" in colours(plots.svg(figure(b), groups=groups))
    assert "s0" not in colours(plots.svg(figure(b), groups=groups))
    free = Series(name="c", x=[1.0], y=[1.0])
    assert curves.colour_order(figure(free, b), groups) == {"a": 0, "b": 1, "c": 2}
    many = [Series(name=f"n{i}", x=[1.0], y=[1.0]) for i in range(5)]
    assert curves.colour_order(figure(b, *many), groups)["n0"] == 0


def test_the_papers_numbers_are_grey():
    paper = Series(name="the paper", x=["a"], y=[1.0], style="bar", group="paper")
    assert not {c for c in colours(plots.svg(figure(paper))) if c[0] == "s" and c[1:].isdigit()}


def test_every_colour_of_a_drawing_is_themed(record):
    for f in record.figures:
        assert "#" not in plots.svg(f).replace("url(#", "").replace('href="#', "")


@pytest.mark.parametrize(("palette", "back"), [(theme.LIGHT, "#ffffff"), (theme.DARK, "#15181c")])
def test_colours_can_be_seen(palette, back):
    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert palette["surface"] == back
    assert all(contrast(palette[f"s{i}"], back) >= 3 for i in range(6))
    assert all(contrast(palette[name], back) >= 4.5 for name in ("ink", "muted", "s0"))
    assert set(theme.LIGHT) == set(theme.DARK)


def test_hostile_names_stay_names():
    name = '_<script>alert(1)</script> $x_1$ \x00 "&'
    svg = plots.svg(figure(Series(name=name, x=[1.0, 2.0], y=[1.0, 2.0]), title=name, x_label=name))
    assert "<script" not in svg
    assert "$x_1$" in svg  # not read as mathematics, and the leading _ does not hide it
    assert svg.count("_&lt;script&gt;") >= 3
    from xml.etree import ElementTree

    _, alone = plots.picture(figure(Series(name=name, x=[1.0], y=[1.0]), title=name), kinds=("svg",))
    ElementTree.fromstring(alone)


@pytest.mark.parametrize("y_scale", ["linear", "log"])
@pytest.mark.parametrize("x_scale", ["linear", "log", "category"])
def test_empty_undefined_and_single_values_are_drawn_or_said(x_scale, y_scale):
    for series in (
        [],
        [Series(name="none", x=[], y=[])],
        [Series(name="nan", x=[1.0, 2.0], y=[math.nan, math.inf], stderr=[math.nan, 1.0])],
        [Series(name="not positive", x=[-1.0, 0.0], y=[0.0, -2.0])],
        [Series(name="one", x=[3.0], y=[0.5], stderr=[0.7])],
        [Series(name="one bar", x=[3.0], y=[0.5], style="bar", low=[-1.0], high=[9.0])],
    ):
        f = figure(*series, x_scale=x_scale, y_scale=y_scale, y_floor=0.0)
        svg = plots.svg(f)
        drawable = any(c.drawable for c in curves.prepare(f, [], 600))
        assert ("no values to draw" in svg) is not drawable


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=4), st.sampled_from(["linear", "log"]), st.booleans())
def test_no_value_breaks_a_picture(y, scale, band):
    x = [float(i) for i in range(len(y))]
    s = Series(name="s", x=x, y=y, **({"low": y[::-1], "high": y} if band else {"stderr": [abs(v) for v in y]}))
    plots.svg(figure(s, x_scale=scale, y_scale=scale, y_floor=y[0]))


@pytest.mark.parametrize("huge", [8.98846567431158e307, -1.7e308])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_values_near_the_largest_float_do_not_overflow(huge, scale):
    s = Series(name="s", x=[0.0, 1.0], y=[huge, 1.0], stderr=[abs(huge), 1.0])
    assert "no values to draw" not in plots.svg(figure(s, x_scale=scale, y_scale=scale, y_floor=huge))


def test_the_noise_floor_is_drawn_where_data_come_near_it():
    s = Series(name="s", x=[1.0, 2.0], y=[1.0, 1e-6])
    assert "floating-point noise below" in plots.svg(figure(s, y_scale="log", y_floor=1e-7))
    assert "floating-point noise below" not in plots.svg(figure(s, y_scale="log", y_floor=1e-12))


def test_a_hole_in_a_line_stays_a_hole_and_a_lone_point_is_marked():
    y = [1.0] * 100
    y[40:60] = [math.nan] * 20
    y[50] = 1.0
    c = curves.prepare(figure(Series(name="s", x=[float(i) for i in range(100)], y=y)), [], 600)[0]
    assert list(np.flatnonzero(c.alone)) == [50]
    assert not c.drawable_at[40]


def test_uncertainty_is_named_for_what_it_is():
    few = Series(name="few", x=[1.0], y=[1.0], stderr=[0.1])
    x = [float(i) for i in range(100)]
    long = Series(name="long", x=x, y=x, low=x, high=x)
    none = Series(name="none", x=[1.0], y=[1.0])
    assert curves.uncertainty_words(figure(few)) == "Error bars are ± one standard error."
    assert curves.uncertainty_words(figure(long)) == "Shaded bands are confidence intervals."
    assert "No uncertainty was estimated for “none”." in curves.uncertainty_words(figure(few, none))
    assert "for the values in this figure" in curves.uncertainty_words(figure(none))
    assert curves.uncertainty_words(figure()) == ""


def test_words_are_wrapped_to_their_room():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    ruler = layout.Ruler(FigureCanvasAgg(matplotlib.figure.Figure()))
    lines = ruler.wrap("one two three " + "x" * 60 + " four " * 30, 9, 80, 3)
    assert len(lines) == 3
    assert all(ruler.width(line, 9) <= 80 for line in lines)
    assert "…" in lines[-1]
    assert ruler.wrap("", 9, 80, 3) == [""]


def test_a_picture_is_described_in_words():
    words = plots.describe(figure(Series(name="s", x=[1.0, 2.0], y=[3.0, math.nan])))
    assert words == "t. y (no unit) against x (tokens). s: least 3, most 3."


def test_a_small_png_is_smaller(record):
    full, _ = plots.picture(record.figures[0], kinds=("png",))
    less, _ = plots.picture(record.figures[0], kinds=("png",), png_bytes=1)
    assert len(less) < len(full)
    with Image.open(io.BytesIO(less)) as image:
        assert image.width == 562
