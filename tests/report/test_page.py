import gzip
import hashlib
import math
import re
from base64 import b64decode, b64encode
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.report import page, write
from ssmlens.results import Column, Figure, Map, Panel, Record, Series, Table, Value

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}</style><!--<script><img src=x onerror=alert(2)>\u2028"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, ids and links, and checks that elements nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.open, self.words = [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[k] for k in ("href", "src", "xlink:href") if k in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_says_everything_the_record_says(record, written):
    html = written.read_text(encoding="utf-8")
    words = " ".join(" ".join(Page(html).words).split())
    said = [record.title, *record.verdict, *record.notes]
    for part in (*record.figures, *record.tables):
        said += [part.title, part.meaning, part.method]
    said += ["99.42 ± 0.11", "0123456789ab", "ssmlens diagnose default polarized --length 1024", "seeds", "0, 1"]
    said += ["(2.040 ± 0.030)×10⁻⁷", "∞", "Values below 2×10⁻⁷ are floating-point noise.", "(tokens)", "n = 5"]
    for sentence in said:
        assert sentence in words, sentence
    assert "Incomplete" not in words
    assert written.stat().st_size < 1_500_000


def test_structure_links_and_ids_hold_together(make_record):
    figures = [f for f in make_record().figures if f.id in ("sharpness", "accuracy")]
    html = page.html([make_record(figures=figures, maps=[]), make_record(figures=figures, maps=[], title="Another")])
    parsed = Page(html)
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        assert link.startswith(("data:", "#")), link
        assert not link.startswith("#") or link[1:] in parsed.ids
    assert set(re.findall(r"url\(#([^)]+)\)", html.rpartition("<script>")[0])) <= set(parsed.ids)
    names = [t for t, _ in parsed.tags]
    assert names.count("main") == names.count("h1") == 1
    for single in (html, page.html(make_record(figures=figures))):
        levels = [int(t[1]) for t, _ in Page(single).tags if re.fullmatch("h[1-6]", t)]
        assert levels[0] == 1
        assert all(b <= a + 1 for a, b in pairwise(levels))
    pictures = [a for t, a in parsed.tags if t == "svg"]
    assert len(pictures) == 2 * 2 * 2
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in pictures)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", html)


def test_equal_records_give_equal_bytes(record, written, tmp_path):
    again = Record.from_json(record.to_json())
    assert write([again], tmp_path / "b").read_bytes() == written.read_bytes()


def test_every_name_is_escaped(make_record):
    figure = Figure(
        id=HOSTILE, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE, meaning=HOSTILE, method=HOSTILE,
        series=[Series(name=HOSTILE, x=[HOSTILE], y=[1.0], group=HOSTILE), Series(name=HOSTILE, x=["b"], y=[math.nan])],
    )  # fmt: skip
    table = Table(
        id=HOSTILE, title=HOSTILE, meaning=HOSTILE, method=HOSTILE,
        columns=[Column(name=HOSTILE, unit=HOSTILE, meaning=HOSTILE)],
        rows=[[HOSTILE], [Value(value=1.0, unit=HOSTILE)]],
    )  # fmt: skip
    heat = Map(
        id=HOSTILE, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE, unit=HOSTILE, meaning=HOSTILE, method=HOSTILE,
        x=[HOSTILE], y=[HOSTILE], panels=[Panel(name=HOSTILE, group=HOSTILE, values=[[1.0]])],
    )  # fmt: skip
    html = page.html(
        make_record(
            kind=HOSTILE, title=HOSTILE, verdict=[HOSTILE], notes=[HOSTILE], config={HOSTILE: HOSTILE},
            figures=[figure, figure.model_copy(update={"id": "../../" + HOSTILE})], tables=[table, table], maps=[heat],
        )
    )  # fmt: skip
    parsed = Page(html)
    tags = [t for t, _ in parsed.tags]
    scripts = [attrs for t, attrs in parsed.tags if t == "script"]
    assert "img" not in tags
    assert scripts == [{"type": "application/json"}] * 3 + [{}]
    names = [attrs["download"] for t, attrs in parsed.tags if "download" in attrs]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.(png|svg|csv(\.gz)?)", n) for n in names)
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on")]
    assert "49" not in parsed.words
    assert sum("<script>alert(1)</script>" in w for w in parsed.words) > 10


def test_one_script_may_run_and_nothing_else(written):
    html = written.read_text(encoding="utf-8")
    *data, script = re.findall(r"<script([^>]*)>(.*?)</script>", html, flags=re.S)
    assert {kind for kind, _ in data} == {' type="application/json"'}
    policy = next(a["content"] for t, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|\bFunction\(|fetch\(|XMLHttp", script[1])


def test_an_interrupted_run_says_so(make_record):
    html = page.html(make_record(complete=False, figures=[], tables=[], verdict=[]))
    assert 'class="banner"' in html
    assert "This run was interrupted" in html
    assert "No verdict was recorded" in html


def test_what_is_long_waits_behind_a_click(make_record):
    def folded(verdict, rows):
        table = Table(id="t", title="T", columns=[Column(name="row")], rows=[[i] for i in range(rows)])
        return page.html(make_record(verdict=verdict, figures=[], maps=[], tables=[table]))

    assert 'class="more"' not in folded([f"Finding {i}." for i in range(9)], 12)
    html = folded([f"Finding {i}." for i in range(12)], 13)
    assert "<summary>4 more findings</summary>" in html
    assert "<summary>The table: 13 rows</summary>" in html
    assert html.index("Finding 7.") < html.index("4 more findings") < html.index("Finding 11.")


def test_a_large_drawing_is_there_once_and_compressed_for_download(make_record, monkeypatch):
    record = make_record()
    page_of_both = Page(page.html(record))
    monkeypatch.setattr(page, "SVG_BYTES", 0)
    html = page.html(record)
    assert 'class="narrow"' not in html
    assert html.count("<svg") < sum(tag == "svg" for tag, *_ in page_of_both.tags)
    packed = re.search(r'download="[^"]+\.svg\.gz" href="data:application/gzip;base64,([^"]+)"', html)
    assert packed
    assert gzip.decompress(b64decode(packed[1])).decode().lstrip().startswith("<?xml")


def test_what_is_undefined_or_missing_has_words(make_record):
    nothing = Figure(id="n", title="Nothing", x_label="x (s)", y_label="y (s)", series=[])
    undefined = Figure(
        id="u", title="Undefined", x_label="x (s)", y_label="y (s)",
        series=[Series(name="a", x=[1.0], y=[math.nan])],
    )  # fmt: skip
    table = Table(
        id="t", title="T", columns=[Column(name="a"), Column(name="b")],
        rows=[[math.nan, None], [Value(value=math.inf, stderr=math.nan)]],
    )  # fmt: skip
    html = page.html(
        make_record(figures=[nothing, undefined], tables=[table, Table(id="e", title="E", columns=[], rows=[])])
    )
    assert html.count("no values to draw") == 2 * 3  # wide, narrow, the SVG to download
    assert "1 of 1 values of “a” are infinite, undefined" in html
    assert 'aria-label="not measured"' in html
    assert "undefined" in html


def test_downloads_hold_what_they_promise(record, written):
    html = written.read_text(encoding="utf-8")
    found = {a["download"]: a["href"] for t, a in Page(html).tags if t == "a" and "download" in a}
    assert b64decode(found["influence.png"].partition(",")[2])[:4] == b"\x89PNG"
    svg = unquote(found["influence.svg"].partition(",")[2])
    assert svg.startswith("<?xml")
    assert "How much a token still moves" in svg
    csv = unquote(found["sharpness.csv"].partition(",")[2])
    assert csv.count("\n") == 1 + 4 * 8
    packed = [h for n, h in found.items() if n == "influence.csv.gz"] or [found["influence.csv"]]
    raw = packed[0].partition(",")[2]
    full = gzip.decompress(b64decode(raw)).decode() if ";base64," in packed[0] else unquote(raw)
    assert full.count("\n") == 1 + sum(len(s.x) for s in record.figures[0].series)
    assert "67.2,2.13,36" in unquote(found["accuracy.csv"].partition(",")[2]) or "accuracy.csv" in found


def test_a_place_that_cannot_be_written_is_named(make_record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write(make_record(figures=[]), tmp_path / "file" / "report.html")
    with pytest.raises(ValueError, match="at least one record"):
        page.html([])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.integers(100, 50_000))
def test_short_curves_leave_their_room_to_long_ones(lengths, room):
    x = [[float(i) for i in range(n)] for n in lengths]
    f = Figure(id="f", title="t", x_label="x", y_label="y", series=[Series(name="s", x=v, y=v) for v in x])
    limit = page._limit([f], room, 50, 4096, lambda s: 2)
    assert 50 <= limit <= 4096
    used = sum(2 * min(n, limit) for n in lengths)
    assert used <= room or limit == 50
    assert limit == 4096 or sum(2 * min(n, limit + 1) for n in lengths) > room


@pytest.mark.slow
def test_twelve_figures_of_six_long_series_and_four_maps_stay_under_three_megabytes(make_record):
    rng = np.random.default_rng(0)
    x = [float(i) for i in range(1, 8193)]

    def figure(i):
        series = []
        for m in range(6):
            y = np.exp(-np.asarray(x) * (m + 1) / 3000 + 0.4 * rng.standard_normal(8192))
            series.append(
                Series(name=f"a model of some name, {m}", x=x, y=list(y), stderr=list(0.2 * y), group=f"m{m}")
            )
        kinds = {"x_scale": "log" if i % 2 else "linear", "y_scale": "log"}
        return Figure(id=f"f{i}", title="A title", x_label="distance (tokens)", y_label="influence (no unit)",
                      series=series, meaning="word " * 60, method="word " * 60, **kinds)  # fmt: skip

    def heat(i):
        axis = [float(t) for t in range(960, 1024)]
        noise = np.where(np.tri(64, dtype=bool), np.abs(rng.standard_normal((6, 64, 64))), np.nan)
        panels = [Panel(name=f"a model of some name, {m}", group=f"m{m}", values=noise[m].tolist()) for m in range(6)]
        return Map(id=f"m{i}", title="A title", x_label="source (token)", y_label="target (token)",
                   unit="weight (no unit)", x=axis, y=axis, panels=panels)  # fmt: skip

    html = page.html(make_record(figures=[figure(i) for i in range(12)], maps=[heat(i) for i in range(4)]))
    assert len(html.encode()) < 3_000_000
    assert "results.json has every value" in html
