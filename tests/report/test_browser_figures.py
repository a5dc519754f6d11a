"""Figures in a browser: mouse, wheel, keys and fingers; what they show, say and enlarge."""

import re

import pytest

from report.browsing import drag, inner, labels, opened, point, settle, until
from ssmlens.report import page, text, write
from ssmlens.results import Series

pytestmark = pytest.mark.browser


def test_the_script_writes_numbers_as_the_tables_do(browser):
    values = [
        0.0,
        1.0,
        -2.5,
        94.7,
        123456.0,
        1234567.0,
        1e6,
        0.00012345,
        3.1e-7,
        -4e-12,
        5e300,
        99.996,
        0.1,
        1 / 3,
        1e-320,
    ]
    errors = [None, 0.0, 0.02, 1.3, 1e-9, 2e5, 3e-13, float("inf"), 12345.6]
    pairs = [(v, e) for v in values for e in errors] + [(v, None) for v in (float("inf"), -float("inf"), float("nan"))]
    script = (page.TEMPLATES / "common.js").read_text(encoding="utf-8")
    context = browser.new_context()
    seen = context.new_page().evaluate(
        f"(pairs) => {{ {script}\n return pairs.map(([v, e]) => number(v, e)); }}", pairs
    )
    context.close()
    assert seen == [text.number(v, e) for v, e in pairs]


def test_pointing_shows_the_values_of_every_curve_with_their_errors(browser, pages, record):
    with opened(browser, pages["usual"]) as tab:
        tab.mouse.move(*point(tab, "#r1-f2 .plot", 0.5, 0.4))
        rows = tab.locator("#r1-f2 .readout dl div").all_inner_texts()
        head = tab.locator("#r1-f2 .readout b").inner_text()
        depth = int(head.removeprefix("depth (layer): "))
        assert depth in (4, 5)
        series = record.figures[1].series
        wanted = [text.number(s.y[depth - 1], s.stderr[depth - 1]) for s in series]
        assert [" ".join(r.split()).endswith(w) for r, w in zip(rows, wanted, strict=True)] == [True] * 4
        assert tab.locator("#r1-f2 .over circle").count() == 4
        tab.mouse.move(5, 5)
        assert not tab.locator("#r1-f2 .readout").is_visible()
        # long curves: the reading goes by the pointed x, and the fit is read between its points
        tab.mouse.move(*point(tab, "#r1-f1 .plot", 0.2, 0.4))
        assert tab.locator("#r1-f1 .readout dl div").count() == 4
        # intervals
        tab.mouse.move(*point(tab, "#r1-f3 .plot", 0.5, 0.4))
        assert re.search(r"\d \[\d+\.?\d*, \d+\.?\d*\]", tab.locator("#r1-f3 .readout").inner_text())
        # categories, where not every curve has an error
        tab.mouse.move(*point(tab, "#r1-f4 .plot", 0.4, 0.4))
        words = " ".join(tab.locator("#r1-f4 .readout").inner_text().split())
        assert words == "one channel at 1 measured here 72.4 ± 1.7 the paper 56.39"


def test_zoom_changes_the_axes_and_reset_brings_them_back(browser, pages):
    with opened(browser, pages["usual"]) as tab:
        whole = labels(tab, "#r1-f1")
        back = "#r1-f1 button[aria-label='Reset the view']"
        assert tab.get_attribute(back, "aria-disabled") == "true"

        drag(tab, point(tab, "#r1-f1 .plot", 0.3, 0.2), point(tab, "#r1-f1 .plot", 0.5, 0.6))
        part = labels(tab, "#r1-f1")
        assert part != whole
        assert "1000" in whole
        assert "1000" not in part
        assert tab.get_attribute(back, "aria-disabled") == "false"
        drag(tab, point(tab, "#r1-f1 .plot", 0.5, 0.5), point(tab, "#r1-f1 .plot", 0.7, 0.5), keys=["Shift"])
        moved = labels(tab, "#r1-f1")
        assert moved not in (part, whole)
        tab.click(back)
        assert labels(tab, "#r1-f1") == whole

        drag(tab, point(tab, "#r1-f1 .plot", 0.3, 0.4), point(tab, "#r1-f1 .plot", 0.5, 0.41))  # x alone
        assert [w for w in labels(tab, "#r1-f1") if w.startswith("10")] == [
            w for w in whole if w.startswith("10") and w != "1000"
        ]
        tab.mouse.dblclick(*point(tab, "#r1-f1 .plot", 0.5, 0.5))
        assert labels(tab, "#r1-f1") == whole

        tab.mouse.move(*point(tab, "#r1-f1 .plot", 0.5, 0.5))
        tab.keyboard.down("Control")
        tab.mouse.wheel(0, -400)
        tab.keyboard.up("Control")
        until(tab, "document.querySelector('#r1-f1 button[aria-label=\"Zoom out\"]').ariaDisabled === 'false'")
        assert labels(tab, "#r1-f1") != whole
        for _ in range(6):
            tab.click("#r1-f1 button[aria-label='Zoom out']", force=True)
        assert labels(tab, "#r1-f1") == whole  # never wider than the whole

        before = tab.evaluate("scrollY")
        tab.mouse.move(*point(tab, "#r1-f1 .plot", 0.5, 0.5))
        tab.mouse.wheel(0, 300)
        until(tab, f"scrollY > {before}")  # without Ctrl the page scrolls
        assert labels(tab, "#r1-f1") == whole


def test_the_vertical_axis_changes_its_scale(browser, pages):
    with opened(browser, pages["usual"]) as tab:
        switch = "#r1-f1 button[aria-label='Logarithmic vertical axis']"
        whole = labels(tab, "#r1-f1")
        assert tab.get_attribute(switch, "aria-pressed") == "true"
        tab.click(switch)
        assert tab.get_attribute(switch, "aria-pressed") == "false"
        assert any("⁻" in w for w in whole)
        assert not any("⁻" in w for w in labels(tab, "#r1-f1"))
        tab.click(switch)
        assert labels(tab, "#r1-f1") == whole
        assert tab.locator("#r1-f4 button[aria-label='Logarithmic vertical axis']").count() == 0  # bars begin at zero


def test_legends_switch_curves(browser, pages):
    with opened(browser, pages["usual"]) as tab:
        curves = "#r1-f2 .curve"
        assert tab.locator(curves).count() == 4
        assert tab.locator("#r1-f2 .legend button").all_inner_texts() == ["inputs to memory, b", "memory, h"]
        tab.click("#r1-f2 .legend button >> nth=0")
        assert tab.get_attribute("#r1-f2 .legend button >> nth=0", "aria-pressed") == "false"
        settle(tab)
        assert tab.locator(curves).count() == 2
        tab.mouse.move(*point(tab, "#r1-f2 .plot", 0.5, 0.4))
        assert tab.locator("#r1-f2 .readout dl div").count() == 2
        assert tab.locator(".key button").all_inner_texts() == ["default", "polarized"]
        tab.click(".key button >> nth=1")
        settle(tab)
        assert tab.locator(curves).count() == 1
        assert tab.locator("#r1-f1 .curve").count() == 2
        tab.click(".key button >> nth=0")
        settle(tab)
        assert "every curve is switched off" in labels(tab, "#r1-f2")
        for button in (".key button >> nth=0", ".key button >> nth=1", "#r1-f2 .legend button >> nth=0"):
            tab.click(button)
        settle(tab)
        assert tab.locator(curves).count() == 4


def test_the_keyboard_reads_zooms_and_is_heard(browser, pages, record):
    with opened(browser, pages["usual"]) as tab:
        said = "[role=status]"
        tab.focus("#r1-f2 .plot")
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "auto" or tab.evaluate(
            "parseFloat(getComputedStyle(document.activeElement).outlineWidth)"
        )
        tab.keyboard.press("ArrowRight")
        first = [text.number(s.y[0], s.stderr[0]) for s in record.figures[1].series]
        heard = tab.inner_text(said)
        assert heard.startswith("depth (layer): 1. default: inputs to memory, b: ")
        assert all(w in heard for w in first)
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text(said).startswith("depth (layer): 2.")
        tab.keyboard.press("End")
        assert tab.inner_text(said).startswith("depth (layer): 8.")
        tab.keyboard.press("Home")
        whole = labels(tab, "#r1-f2")
        tab.keyboard.press("+")
        assert tab.inner_text(said).startswith("Zoomed: depth (layer) ")
        assert labels(tab, "#r1-f2") != whole
        tab.keyboard.press("Shift+ArrowRight")
        tab.keyboard.press("0")
        assert tab.inner_text(said).startswith("Whole figure")
        assert labels(tab, "#r1-f2") == whole
        tab.keyboard.press("Escape")
        assert not tab.locator("#r1-f2 .readout").is_visible()
        tab.focus("#r1-f1 .plot")
        for key in ("Home", *["PageDown"] * 4, *"+++"):
            tab.keyboard.press(key)
        settle(tab)
        assert tab.locator("#r1-f1 .over circle").count() == 4  # what is read stays in view
        assert tab.get_attribute("#r1-f2 .plot", "role") == "application"
        assert "least" in tab.get_attribute("#r1-f2 .plot", "aria-label")


def test_fingers_read_and_pinch(browser, pages):
    with opened(browser, pages["usual"], 375, has_touch=True, is_mobile=True) as tab:
        x, y = point(tab, "#r1-f2 .plot", 0.5, 0.3)
        tab.touchscreen.tap(x, y)
        assert tab.locator("#r1-f2 .readout dl div").count() == 4
        assert tab.locator("#r1-f2 .readout").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        whole = labels(tab, "#r1-f2")
        touch = tab.context.new_cdp_session(tab)
        x, y = point(tab, "#r1-f2 .plot", 0.5, 0.3)

        def fingers(kind, *apart):
            points = [{"x": x + d, "y": y + d / 4, "id": i} for i, d in enumerate(apart)]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        fingers("touchStart", -20)
        fingers("touchStart", -20, 20)
        for d in (30, 45, 60, 80):
            fingers("touchMove", -d, d)
        fingers("touchEnd")
        assert labels(tab, "#r1-f2") != whole
        assert tab.get_attribute("#r1-f2 button[aria-label='Zoom out']", "aria-disabled") == "false"
        tab.tap("#r1-f2 button[aria-label='Reset the view']")
        assert labels(tab, "#r1-f2") == whole


def test_heat_maps_answer_in_every_panel(browser, pages, record):
    with opened(browser, pages["usual"]) as tab:
        heat = record.maps[0]
        tab.focus("#r1-m1 .plot")
        for key in ("End", "ArrowDown", "Home", "ArrowDown", "ArrowRight"):
            tab.keyboard.press(key)
        i, j = (int(n) - 1000 for n in re.findall(r"\(tokens\): (\d+)", tab.inner_text("#r1-m1 .readout b")))
        assert (i, j) == (2, 1)
        rows = [" ".join(r.split()) for r in tab.locator("#r1-m1 .readout dl div").all_inner_texts()]
        assert rows == [f"{p.name} {text.number(p.values[i][j])}" for p in heat.panels]
        assert tab.inner_text("[role=status]").endswith(f"polarized: {text.number(heat.panels[1].values[i][j])}.")
        assert tab.locator("#r1-m1 .spot").count() == 2 * 2
        tab.keyboard.press("ArrowUp")
        tab.keyboard.press("End")
        assert "default: blank." in tab.inner_text("[role=status]")
        tab.keyboard.press("Escape")
        assert tab.locator("#r1-m1 .spot").count() == 0
        # the last row and column, pointed at in the other map, whose cells say their values
        box = inner(tab, "#r1-m2")
        tab.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] - 4)
        assert tab.inner_text("#r1-m2 .readout b").startswith(
            "place of the needle: end, length of the text (tokens): 8192"
        )
        last = text.number(record.maps[1].panels[0].values[-1][-1])
        assert tab.inner_text("#r1-m2 .readout dd") == last
        assert labels(tab, "#r1-m2").count(last) >= 1
        assert {"start", "end", "1024", "8192", "default"} <= set(labels(tab, "#r1-m2"))


def test_heat_maps_are_enlarged_with_their_labels(browser, pages, record):
    with opened(browser, pages["usual"]) as tab:
        whole = labels(tab, "#r1-m1")
        assert "1000" in whole
        box = inner(tab, "#r1-m1")
        # the lower left quarter of the first panel, in both panels
        drag(
            tab,
            (box["x"] + 1, box["y"] + box["height"] / 2),
            (box["x"] + box["width"] / 2, box["y"] + box["height"] - 1),
        )
        assert labels(tab, "#r1-m1") != whole
        parts = tab.locator("#r1-m1 .plot > svg svg").evaluate_all("all => all.map(e => e.getAttribute('viewBox'))")
        assert len(set(parts)) == 1
        x, y, width, height = (float(v) for v in parts[0].split())
        assert (x, y) == (pytest.approx(0, abs=0.3), pytest.approx(12, abs=0.3))
        assert (width, height) == (pytest.approx(12, abs=0.3), pytest.approx(12, abs=0.3))
        # what is pointed at is what is drawn there
        tab.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] * 0.01)
        assert tab.inner_text("#r1-m1 .readout b").startswith(
            "position of the output (tokens): 1012, position of the token (tokens): 1011"
        )
        # the keyboard brings a cell from outside into view
        tab.focus("#r1-m1 .plot")
        tab.keyboard.press("Home")
        tab.keyboard.press("End")
        moved = tab.locator("#r1-m1 .plot > svg svg").first.get_attribute("viewBox").split()
        assert float(moved[0]) == pytest.approx(12, abs=0.3)
        assert tab.locator("#r1-m1 .spot").count() == 2 * 2
        tab.click("#r1-m1 button[aria-label='Reset the view']")
        assert labels(tab, "#r1-m1") == whole


def test_six_models_side_by_side(browser, make_record, tmp_path):
    """Every series of six stays apart: by colour, and by marker or dash."""
    x = [float(i) for i in range(1, 9)]
    names = [f"model {c}" for c in "abcdef"]
    figures = [
        make_record()
        .figures[1]
        .model_copy(
            update={
                "id": f"f{k}",
                "series": [
                    Series(name=f"{n}: {w}", x=x, y=[1 + i + j / 3 for _ in x], stderr=[0.1] * 8, group=n)
                    for i, n in enumerate(names)
                    for j, w in enumerate(("inputs", "memory"))
                ],
            }
        )
        for k in range(2)
    ]
    path = write(make_record(figures=figures, maps=[]), tmp_path / "six.html")
    with opened(browser, path, 375) as tab:
        assert tab.locator(".key button").all_inner_texts() == names
        assert tab.locator("#r1-f1 .legend button").all_inner_texts() == ["inputs", "memory"]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        looks = tab.evaluate(
            """[...document.querySelectorAll("#r1-f1 .curve")].map(g => {
            const marker = g.querySelector(".filled, .hollow"), line = g.querySelector(".line");
            return [g.style.color, marker.getAttribute("class"), marker.getAttribute("d").replace(/[\\d.,\\s-]+/g, " "),
              line.getAttribute("stroke-dasharray")].join("|"); })"""
        )
        assert len(looks) == len(set(looks)) == 12
        assert len({look.partition("|")[0] for look in looks}) == 6
