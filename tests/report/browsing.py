"""What the tests in a browser share: the page in a tab, places on it, and what it says."""

import shutil
from contextlib import contextmanager

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOSTILE = "</script><!--<script>alert(1)</script>\"'&{{7*7}}<img src=x onerror=alert(2)>\u2028"

PICTURES = """[...document.querySelectorAll("figure .plot > svg:first-of-type, figure .drawn svg")].filter(s => s.checkVisibility())"""

# Texts of a picture that overlap, or that leave it; slanted labels are left out (their boxes are larger than they are).
COLLISIONS = """() => PICTURES.flatMap(svg => {
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
})""".replace("PICTURES", PICTURES)


@contextmanager
def opened(browser, path, width=1280, quiet=True, **context):
    """A tab with the page, which must load nothing else and complain of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **context)
    tab = context.new_page()
    tab.troubles, requests = [], []
    tab.on("console", lambda m: tab.troubles.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: tab.troubles.append(str(e)))
    tab.on("dialog", lambda d: (tab.troubles.append(d.message), d.dismiss()))
    tab.on("request", lambda r: requests.append(r.url))
    tab.goto(path.as_uri())
    tab.wait_for_load_state("networkidle")
    yield tab
    assert not quiet or tab.troubles == []
    assert [u for u in requests if not u.startswith(("file:", "data:"))] == []
    assert len([u for u in requests if u.startswith("file:")]) == 1
    context.close()


def point(tab, selector, fx, fy):
    """The place in the page at these fractions of an element, scrolled into view."""
    tab.locator(selector).scroll_into_view_if_needed()
    box = tab.locator(selector).bounding_box()
    return box["x"] + fx * box["width"], box["y"] + fy * box["height"]


def labels(tab, figure):
    settle(tab)
    return tab.locator(f"{figure} .plot > svg text").all_text_contents()


def settle(tab):
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(tab, condition):
    """Wait for it; not `wait_for_function`, which the page's policy forbids."""
    for _ in range(200):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(25)
    raise AssertionError(f"never: {condition}")


def drag(tab, start, end, *, keys=()):
    for key in keys:
        tab.keyboard.down(key)
    tab.mouse.move(*start)
    tab.mouse.down()
    tab.mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    tab.mouse.move(*end)
    tab.mouse.up()
    for key in keys:
        tab.keyboard.up(key)


def inner(tab, figure):
    tab.locator(f"{figure} .plot").scroll_into_view_if_needed()
    return tab.locator(f"{figure} .plot > svg .cells").first.evaluate(
        "e => { const r = e.parentNode.getBoundingClientRect(); return {x: r.x, y: r.y, width: r.width, height: r.height}; }"
    )
