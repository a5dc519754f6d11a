"""The page in a browser, as a reader meets it: phone and desktop, light and dark."""

import shutil

import pytest

from ssmlens.report import write

pytestmark = pytest.mark.browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

# Texts of a picture that overlap, or that leave it; slanted labels are left out (their boxes are larger than they are).
COLLISIONS = """() => [...document.querySelectorAll("figure svg")].filter(s => s.checkVisibility()).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const level = t => !/rotate\\(-(?!0[ )])/.test(t.getAttribute("transform") || "");
  const boxes = [...svg.querySelectorAll("text")].filter(level).map(t => [t.textContent, t.getBoundingClientRect()]);
  const bad = [];
  boxes.forEach(([a, p], i) => {
    if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.top < frame.top - 1 || p.bottom > frame.bottom + 1)
      bad.push("outside: " + a);
    for (const [b, q] of boxes.slice(i + 1))
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2.5 && q.top < p.bottom - 2.5)
        bad.push(a + " covers " + b);
  });
  return bad;
})"""


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs Chromium (chromium, chromium-browser or google-chrome on the path)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, make_record):
    make = make_record
    folder = tmp_path_factory.mktemp("page")
    record = make(complete=False)
    long = "a_very_long_model_name_without_any_space_" * 4
    renamed = [
        f.model_copy(update={"series": [s.model_copy(update={"name": s.name + long}) for s in f.series]})
        for f in (record.figures[0], record.figures[-1])
    ]
    return {
        "usual": write(record, folder / "usual.html"),
        "long": write(make(figures=renamed, title=long, verdict=[long]), folder / "long.html"),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
@pytest.mark.parametrize("kind", ["usual", "long"])
def test_the_page_is_whole(browser, pages, kind, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    troubles, requests = [], []
    tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: troubles.append(str(e)))
    tab.on("request", lambda r: requests.append(r.url))
    tab.goto(pages[kind].as_uri())
    tab.wait_for_load_state("networkidle")
    assert troubles == []
    assert [u for u in requests if not u.startswith(("file:", "data:"))] == []
    assert len([u for u in requests if u.startswith("file:")]) == 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    sizes = tab.evaluate(
        """() => [...document.querySelectorAll("figure svg")].filter(s => s.checkVisibility())
        .map(s => { const r = s.getBoundingClientRect(); return [r.width, r.height]; })"""
    )
    assert len(sizes) == (4 if kind == "usual" else 2)
    assert all(250 < w <= width and h > 150 for w, h in sizes)
    assert tab.evaluate(COLLISIONS) == []
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")
    tick = tab.evaluate("getComputedStyle([...document.querySelectorAll('figure svg text')].at(0)).fill")
    assert tick == ("rgb(89, 98, 108)" if scheme == "light" else "rgb(163, 172, 182)")
    context.close()


def test_the_keyboard_reaches_everything(browser, pages):
    context = browser.new_context(viewport={"width": 375, "height": 800})
    tab = context.new_page()
    tab.goto(pages["usual"].as_uri())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('role')") == "region"  # the table that scrolls
    tab.focus("details summary")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('details').open") is True
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    context.close()


def test_on_paper_it_is_light_and_keeps_its_pictures(browser, pages):
    context = browser.new_context(viewport={"width": 700, "height": 900}, color_scheme="dark")
    tab = context.new_page()
    tab.goto(pages["usual"].as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility()).length") == 4
    assert tab.evaluate("document.querySelector('.get').checkVisibility()") is False
    context.close()


def test_a_download_arrives(browser, pages, tmp_path):
    context = browser.new_context(accept_downloads=True)
    tab = context.new_page()
    tab.goto(pages["usual"].as_uri())
    with tab.expect_download() as waiting:
        tab.click("a[download='sharpness.csv']")
    path = tmp_path / "s.csv"
    waiting.value.save_as(path)
    assert path.read_text().startswith("series,x,y,stderr,low,high\n")
    context.close()
