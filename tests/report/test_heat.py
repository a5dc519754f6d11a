import csv
import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssmlens.report import canvas, cells, heat, live, plots, theme
from ssmlens.results import Figure, Map, Panel, Series

NAN = math.nan


def made(*values, **more):
    rows, columns = (len(values[0]), len(values[0][0]) if values[0] else 0) if values else (0, 0)
    fields = {
        "id": "m", "title": "A map", "x_label": "source (token)", "y_label": "target (token)", "unit": "weight (no unit)",
        "x": [float(i) for i in range(columns)], "y": [float(i) for i in range(rows)],
        "panels": [Panel(name=f"panel {k}", values=v) for k, v in enumerate(values)],
    }  # fmt: skip
    return Map(**{**fields, **more})


def rgba(hexes):
    return [int(hexes[i : i + 2], 16) for i in (1, 3, 5)]


def test_panels_share_one_scale():
    colours = heat.scale(made([[0.0, 1.0]], [[5.0, NAN]]))
    assert (colours.kind, colours.low, colours.high) == ("linear", 0.0, 5.0)
    np.testing.assert_allclose(colours.place(np.array([0.0, 2.5, 9.0])), [0, 0.5, 1])


def test_a_logarithmic_scale_leaves_zero_blank_and_says_so():
    m = made([[0.0, 1e-4, 1e-2, 1.0]], scale="log")
    colours = heat.scale(m)
    np.testing.assert_allclose(colours.place(cells.values(m.panels[0]))[0], [NAN, 0, 0.5, 1])
    assert heat.image(m, 0, colours)[0, :, 3].tolist() == [0, 255, 255, 255]
    assert cells.left_out(m) == [
        "1 of 4 values of “panel 0” are zero or negative, without a place on a logarithmic scale: left blank."
    ]


def test_values_of_both_signs_are_symmetric_about_zero():
    colours = heat.scale(made([[-1.0, 3.0]]))
    assert (colours.kind, colours.low, colours.high) == ("diverging", -3.0, 3.0)
    middle = heat.palette("diverging")[theme.STEPS // 2]
    assert np.ptp(middle[:3].astype(int)) <= 3  # grey


def test_given_ends_are_kept_and_what_lies_beyond_is_said():
    m = made([[0.5, 120.0]], low=0.0, high=100.0)
    colours = heat.scale(m)
    assert (colours.low, colours.high, colours.beyond) == (0.0, 100.0, (False, True))
    assert "values above the ends have their colour" in plain(heat.svg(m, groups=[], form=canvas.WIDE, prefix=""))


def plain(svg):
    import re

    return " ".join(re.sub(r"<[^>]+>", " ", svg).split())


@pytest.mark.parametrize("kind", ["linear", "diverging"])
def test_palettes_are_even_in_lightness(kind):
    c = heat.palette(kind)[:, :3].astype(float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cone = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    light = cone @ [0.2104542553, 0.7936177850, -0.0040720468]
    steps = np.abs(np.diff(light))
    assert len(np.unique(heat.palette(kind), axis=0)) > 230
    assert steps.mean() > 0.002
    assert steps.max() < 3.5 * steps.mean()
    if kind == "linear":
        assert (np.diff(light) > -1e-3).all()
    else:
        half = theme.STEPS // 2
        assert (np.diff(light[:half]) > 0).all()
        assert (np.diff(light[half + 1 :]) < 0).all()


def test_blank_cells_are_transparent_and_others_have_the_colours_of_their_values():
    m = made([[0.0, NAN], [1.0, 2.0]])
    image = heat.image(m, 0, heat.scale(m))
    assert image[0, 1, 3] == 0
    assert image[0, 0].tolist() == heat.palette("linear")[0].tolist()
    assert image[1, 1].tolist() == heat.palette("linear")[-1].tolist()


def test_files_are_written_and_boxes_are_where_the_cells_are(tmp_path):
    m = made([[0.0, 1.0], [2.0, 3.0]], [[3.0, 2.0], [1.0, 0.0]])
    assert plots.save(m, tmp_path / "a.svg").read_bytes() == plots.save(m, tmp_path / "b.svg").read_bytes()
    svg = heat.svg(m, groups=[], form=canvas.WIDE, prefix="k-")
    width, height = (float(v) for v in svg.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    with canvas.own_style():
        drawing, boxes = heat.draw(m, canvas.WIDE, groups=[], title=False)
        png = canvas.png(drawing, colours=256)
    assert len(boxes) == 2
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    dots = pixels.shape[1] / width
    for panel, (x, y, w, h) in zip(m.panels, boxes, strict=True):
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        for i, row in enumerate(panel.values):
            for j, value in enumerate(row):
                seen = pixels[int((y + (i + 0.2) * h / 2) * dots), int((x + (j + 0.2) * w / 2) * dots)]
                wanted = heat.palette("linear")[round(value / 3 * 254), :3].astype(int)
                assert np.abs(seen - wanted).max() < 24, (i, j)


def test_small_maps_say_their_values_and_large_ones_do_not():
    words = plain(heat.svg(made([[12.3, 45.6], [7.0, NAN]]), groups=[], form=canvas.WIDE, prefix=""))
    assert "12.3" in words
    assert "45.6" in words
    rng = np.random.default_rng(0)
    large = rng.uniform(12, 45, (40, 40)).round(1)
    assert f"{large[3, 4]:g}" not in plain(heat.svg(made(large.tolist()), groups=[], form=canvas.WIDE, prefix=""))


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("form", [canvas.WIDE, canvas.NARROW])
def test_nothing_single_and_undefined_maps_are_drawn_or_said(scale, form):
    for m in (
        made(scale=scale),
        made([[NAN]], scale=scale),
        made([[math.inf, -math.inf]], scale=scale),
        made([[2.0]], scale=scale),
        made([[1e300, 1.0]], scale=scale, low=-math.inf, high=NAN),
    ):
        svg = heat.svg(m, groups=[], form=form, prefix="")
        assert ("no values to draw" in svg) is (heat.scale(m) is None)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.floats(), min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from(["linear", "log"])
)
def test_no_value_breaks_a_map(values, scale):
    m = made(values, scale=scale, low=values[0][0])
    heat.svg(m, groups=[], form=canvas.NARROW, prefix="")
    cells.grids(m)
    cells.to_csv(m)
    heat.describe(m)


def test_round_positions_are_labelled():
    assert [960 + i for i in cells.some([float(i) for i in range(960, 1024)], 8)] == [
        960,
        970,
        980,
        990,
        1000,
        1010,
        1020,
    ]
    assert cells.some([1.0, 2.0, 4.0, 8.0], 8) == [0, 1, 2, 3]
    assert cells.some([f"n{i}" for i in range(10)], 4) == [0, 3, 6, 9]


def test_csv_has_every_value_and_no_formula():
    m = made(
        [[0.1, NAN], [1 / 3, -1e-30]], x=["=A1", "b"], panels=[Panel(name="@p", values=[[0.1, NAN], [1 / 3, -1e-30]])]
    )
    assert list(csv.reader(io.StringIO(cells.to_csv(m)))) == [
        ["panel", "y", "x", "value"], ["'@p", "0", "'=A1", "0.1"], ["'@p", "1", "'=A1", "0.333333333"], ["'@p", "1", "b", "-1e-30"],
    ]  # fmt: skip


def test_standard_errors_go_into_tables_csv_and_readout():
    p = Panel(name="p", values=[[50.0, NAN], [20.0, 30.0]], stderr=[[7.0, NAN], [0.0, 2.5]])
    m = made(p.values, panels=[p, Panel(name="q", values=p.values)])
    first, second = cells.grids(m)
    assert first.rows == [["0", "50.0 ± 7.0", ""], ["1", "20 ± 0", "30.0 ± 2.5"]]
    assert second.rows[0] == ["0", "50", ""]
    rows = list(csv.reader(io.StringIO(cells.to_csv(m))))
    assert rows[0][-1] == "stderr"
    assert rows[1] == ["p", "0", "0", "50", "7"]
    assert rows[4] == ["q", "0", "0", "50", ""]
    errors = [each["error"] for each in heat.spec(m, [])["panels"]]
    assert errors[0] is not None
    assert errors[1] is None
    with pytest.raises(ValueError, match="not of shape"):
        made(p.values, panels=[Panel(name="p", values=p.values, stderr=[[1.0]])])


def test_tables_have_the_values_or_say_what_is_in_them():
    (grid,) = cells.grids(made([[0.5, NAN], [2.0, 3.0]]))
    assert grid.head == ["target (token) ↓, source (token) →", "0", "1"]
    assert grid.rows == [["0", "0.5", ""], ["1", "2", "3"]]
    large = np.arange(900.0).reshape(30, 30)
    large[0, 0] = NAN
    (grid,) = cells.grids(made(large.tolist()))
    assert grid.rows == [
        [
            "panel 0",
            "1 at source (token) 1, target (token) 0",
            "450",
            "899 at source (token) 29, target (token) 29",
            "1",
        ]
    ]


def test_coarser_maps_are_means_of_named_blocks():
    m = made([[1.0, 3.0, 5.0], [NAN, 3.0, NAN], [9.0, 9.0, NAN]])
    small = cells.coarse(m, 2)
    assert small.x == ["0 to 1", "2"]
    np.testing.assert_allclose(small.panels[0].values, [[7 / 3, 5.0], [9.0, NAN]])
    assert cells.coarse(m, 3) is m


def test_a_repacked_image_is_the_same_image():
    import base64
    import re

    m = made(np.random.default_rng(1).standard_normal((20, 30)).tolist())
    svg = heat.svg(m, groups=[], form=canvas.WIDE, prefix="")
    images = [Image.open(io.BytesIO(base64.b64decode(b))) for b in re.findall(r'base64,([^"]*)', svg)]
    panel = next(i for i in images if i.size == (30, 20))
    assert panel.mode == "P"
    seen = np.asarray(panel.convert("RGBA"))
    wanted = heat.image(m, 0, heat.scale(m))
    assert any(np.array_equal(seen[::step], wanted) for step in (1, -1))


def test_a_panel_has_the_marker_of_its_groups_curves():
    groups = ["the paper", *(f"g{i}" for i in range(8))]
    m = made([[0.0, 1.0]])
    m = m.model_copy(update={"panels": [Panel(name=g, values=[[0.0, 1.0]], group=g) for g in [*groups, ""]]})
    panels = heat.spec(m, groups)["panels"]
    drawn = Figure(
        id="f",
        title="f",
        x_label="x",
        y_label="y",
        series=[Series(name=g, x=[0.0, 1.0], y=[0.0, 1.0], group=g) for g in groups],
    )
    looks = live.spec(drawn, groups, 600)["series"]
    assert [(p["colour"], p["marker"], p["hollow"]) for p in panels[1:-1]] == [
        (c["colour"], c["marker"], c["hollow"]) for c in looks[1:]
    ]
    assert len({(p["colour"], p["marker"]) for p in panels[1:-1]}) == 8
    assert "colour" not in panels[0]
    assert "colour" not in panels[-1]
    key = live.key([drawn, drawn], groups)
    assert [(k["marker"], k["hollow"], k["dashes"]) for k in key] == [
        (c["marker"], c["hollow"], c["dashes"]) for c in looks[1:]
    ]
