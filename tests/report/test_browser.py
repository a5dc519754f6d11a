"""The page in a browser, as a reader meets it: phone and desktop, light and dark, with and without scripts, on paper."""

import pytest

from report.browsing import COLLISIONS, PICTURES, opened, point

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    ("width", "scripts", "scheme"),
    [(320, True, "light"), (375, True, "dark"), (375, False, "light"), (1280, True, "light"), (1280, False, "dark")],
)
@pytest.mark.parametrize("kind", ["usual", "long"])
def test_the_page_is_whole(browser, pages, kind, width, scripts, scheme):
    with opened(browser, pages[kind], width, color_scheme=scheme, java_script_enabled=scripts) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        sizes = tab.evaluate(
            f"{PICTURES}.map(s => {{ const r = s.getBoundingClientRect(); return [r.width, r.height]; }})"
        )
        assert len(sizes) == (6 if kind == "usual" else 3)
        assert all(250 < w <= width and h > 150 for w, h in sizes)
        assert tab.locator(".live").count() == (0 if not scripts else len(sizes))
        assert tab.evaluate(COLLISIONS) == []
        back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")
        tick = tab.evaluate(f"getComputedStyle({PICTURES}[0].querySelector('text')).fill")
        assert tick == ("rgb(89, 98, 108)" if scheme == "light" else "rgb(163, 172, 182)")


def test_the_keyboard_reaches_everything(browser, pages):
    with opened(browser, pages["usual"], 375) as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.getAttribute('role')") == "region"  # the table that scrolls
        tab.focus("#r1-f2 .legend button >> nth=1")
        seen = []
        for _ in range(9):
            tab.keyboard.press("Tab")
            seen.append(
                tab.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.tagName")
            )
        assert seen[:5] == ["Zoom out", "Zoom in", "Move left", "Move right", "Reset the view"]
        assert seen[5].startswith("How far apart tokens stay")  # the plot, then its downloads
        assert [s.rpartition(" ")[2] for s in seen[6:]] == ["PNG", "SVG", "CSV"]
        tab.focus("details summary")
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.querySelector('details').open") is True
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375
        unnamed = "[...document.querySelectorAll('button,[role=application],[role=group],[role=toolbar]')]"
        assert tab.evaluate(f"{unnamed}.filter(e => !(e.ariaLabel || e.textContent.trim())).length") == 0


def test_hostile_names_are_text(browser, pages):
    with opened(browser, pages["hostile"]) as tab:
        assert tab.locator(".live").count() == 2
        assert tab.locator("img").count() == 0
        assert "</script><!--<script>alert(1)</script>" in tab.inner_text(".key button >> nth=0")
        tab.mouse.move(*point(tab, "#r1-f1 .plot", 0.5, 0.4))
        assert tab.locator("#r1-f1 .readout dt").count() == 4
        assert "onerror=alert(2)>" in tab.inner_text("#r1-f1 .readout")
        tab.focus("#r1-f1 .plot")
        tab.keyboard.press("ArrowRight")
        assert "<img src=x" in tab.inner_text("[role=status]")


def test_a_figure_that_fails_keeps_its_drawing(browser, pages, tmp_path):
    html = pages["usual"].read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace('"arrays":[', '"arrays":["t?",', 1), encoding="utf-8")
    with opened(browser, broken, quiet=False) as tab:
        assert len(tab.troubles) == 1
        assert tab.locator("#r1-f1 .live").count() == 0
        assert tab.locator("#r1-f1 .wide").is_visible()
        assert tab.locator("#r1-f2 .plot").is_visible()


def test_another_script_does_not_run(browser, pages, tmp_path):
    html = pages["usual"].read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(html.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")
    with opened(browser, changed, quiet=False) as tab:
        assert tab.title() != "taken"
        assert "Content Security Policy" in tab.troubles[0]
        assert tab.locator(".live").count() == 6


def test_nothing_moves_by_itself(browser, pages):
    with opened(browser, pages["usual"], reduced_motion="reduce") as tab:
        moving = "e => { const s = getComputedStyle(e); return s.animationName !== 'none' || parseFloat(s.transitionDuration); }"
        assert tab.evaluate(f"[...document.querySelectorAll('*')].filter({moving}).length") == 0


def test_on_paper_it_is_light_and_keeps_its_pictures(browser, pages):
    with opened(browser, pages["usual"], 700, color_scheme="dark") as tab:
        tab.mouse.move(*point(tab, "#r1-f2 .plot", 0.5, 0.4))
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.evaluate(f"{PICTURES}.length") == 6
        assert tab.evaluate(f"{PICTURES}.every(s => s.closest('.drawn'))")
        for control in (".get", ".live", ".key", ".howto", ".readout", ".skip"):
            assert not tab.locator(control).first.is_visible(), control
        assert tab.evaluate(
            "[...document.querySelectorAll('.drawn')].every(d => getComputedStyle(d).breakInside === 'avoid')"
        )


def test_a_download_arrives(browser, pages, tmp_path):
    with opened(browser, pages["usual"], accept_downloads=True) as tab:
        for name, head in (("sharpness.csv", "series,x,y,stderr,low,high\n"), ("grid.csv", "panel,y,x,value\n")):
            with tab.expect_download() as waiting:
                tab.click(f"a[download='{name}']")
            path = tmp_path / name
            waiting.value.save_as(path)
            assert path.read_text().startswith(head)
