"""Records as the verbs will write them, with the awkward parts of real ones."""

import math

import numpy as np
import pytest

from report.browsing import ARGUMENTS, BROWSER, HOSTILE
from ssmlens.report import write
from ssmlens.results import Column, Figure, Map, Panel, Provenance, Record, Series, Table, Value

PROVENANCE = Provenance(
    ssmlens="0.1.0",
    python="3.12.4",
    platform="Linux x86_64",
    processor="A processor of some make @ 2.60GHz",
    device="cpu",
    threads=2,
    versions={"torch": "2.10.0", "transformers": "5.1.0", "numpy": "2.3.1"},
    commit="0123456789ab",
    command=["ssmlens", "diagnose", "default", "polarized", "--length", "1024"],
    created="2026-01-02T03:04:05+00:00",
)
MODELS = {"default": 0.0212, "polarized": 0.0049}


def influence() -> Figure:
    rng = np.random.default_rng(0)
    distance = np.arange(1.0, 1024.0)
    series = []
    for model, rate in MODELS.items():
        noise = np.exp(0.18 * rng.standard_normal(len(distance)))
        y = 0.9 * np.exp(-rate * distance) * noise + 2e-7 * rng.uniform(0.5, 1.5, len(distance))
        error = 0.15 * y + 1e-8
        series.append(Series(name=f"{model}, measured", x=list(distance), y=list(y), stderr=list(error), group=model))
        to = min(1023, int(15 / rate))
        x = list(np.linspace(1, to, 60))
        fitted = [0.9 * math.exp(-rate * d) for d in x]
        series.append(Series(name=f"{model}, fitted decay", x=x, y=fitted, style="fit", group=model))
    return Figure(
        id="influence",
        title="How much a token still moves the output, by distance",
        x_label="distance between token and output (tokens)",
        y_label="influence ‖∂y_t/∂x_s‖, Frobenius norm (output units per input unit)",
        y_scale="log",
        y_floor=2e-7,
        series=series,
        meaning="A straight line on this axis is exponential forgetting: every further token of distance costs the same "
        "factor. The polarized model forgets four times more slowly.",
        method="8 random probes, 2 sequences of 1,024 bytes of held-out text; score is the root mean square over "
        "sequences and probes; standard errors by bootstrap over sequences.",
    )


def sharpness() -> Figure:
    rng = np.random.default_rng(1)
    depth = [float(d) for d in range(1, 9)]
    series = []
    for model, fall in (("default", 0.88), ("polarized", 0.95)):
        for measure, start in (("inputs to memory, b", 1.31), ("memory, h", 1.02)):
            y = start * fall ** np.arange(8) + 0.01 * rng.standard_normal(8)
            series.append(Series(name=f"{model}: {measure}", x=depth, y=list(y), stderr=[0.02] * 8, group=model))
    return Figure(
        id="sharpness",
        title="How far apart tokens stay, layer by layer",
        x_label="depth (layer)",
        y_label="sharpness: mean distance of two tokens ÷ mean norm (no unit)",
        series=series,
        meaning="Where the curve falls, tokens become alike: the layer blurs.",
        method="20,000 sampled pairs of positions per sequence; error bars are one standard error over pairs.",
    )


def ranges() -> Figure:
    threshold = [i / 50 for i in range(51)]
    return Figure(
        id="ranges",
        title="How much the transitions vary within a sequence",
        x_label="range A_max − A_min of a state channel (no unit)",
        y_label="state channels whose range is below (%)",
        series=[
            Series(
                name=model, x=threshold, y=[100 * t**p for t in threshold], style="step", group=model,
                low=[max(0.0, 100 * t**p - 3) for t in threshold], high=[min(100, 100 * t**p + 3) for t in threshold],
            )
            for model, p in (("default", 0.6), ("polarized", 0.85))
        ],
        meaning="High on the left: most channels hardly react to the input.",
        method="Over all tokens of two sequences, every layer.",
    )  # fmt: skip


def accuracy_figure() -> Figure:
    names = ["default", "one channel at 1", "one channel at 0", "both"]
    return Figure(
        id="accuracy",
        title="Recall by configuration, 16 pairs",
        x_label="configuration, 2 layers",
        y_label="accuracy (%)",
        x_scale="category",
        series=[
            Series(name="measured here", x=names, y=[67.2, 72.4, 66.9, 78.1], stderr=[2.1, 1.7, 2.4, 1.2], style="bar"),
            Series(name="the paper", x=names, y=[36.0, 56.39, 36.55, 54.74], style="bar"),
        ],
        meaning="Pinning a channel at one is what helps.",
        method="5 seeds; the paper has one.",
    )  # fmt: skip


def attention_map() -> Map:
    rng = np.random.default_rng(2)
    at = [float(i) for i in range(1000, 1024)]
    later = np.subtract.outer(np.arange(24), np.arange(24))
    panels = []
    for model, rate in MODELS.items():
        weight = np.exp(-10 * rate * later + 0.3 * rng.standard_normal((24, 24)))
        panels.append(Panel(name=model, values=np.where(later >= 0, weight, np.nan).tolist(), group=model))
    return Map(
        id="attention",
        title="What the state still holds of each token",
        x_label="position of the token (tokens)",
        y_label="position of the output (tokens)",
        unit="hidden attention weight |α| (no unit)",
        x=at,
        y=at,
        panels=panels,
        scale="log",
        meaning="A bright corner at the lower left is memory of the beginning of the window.",
        method="The first inner channel of layer 2, one sequence.",
    )


def grid_map() -> Map:
    depth = ["start", "a quarter", "half", "three quarters", "end"]
    found = [[float(min(100, 30 + 15 * i + 5 * (3 - j))) for j in range(4)] for i in range(5)]
    return Map(
        id="grid",
        title="Needles found",
        x_label="length of the text (tokens)",
        y_label="place of the needle",
        unit="right answers (%)",
        x=[1024.0, 2048.0, 4096.0, 8192.0],
        y=depth,
        panels=[Panel(name="default", values=found, group="default")],
        low=0.0,
        high=100.0,
        meaning="What stands near the end is found.",
        method="20 needles in every cell.",
    )


def accuracy_table() -> Table:
    pairs = (4, 8, 16)
    columns = [Column(name="configuration"), Column(name="layers")]
    for p in pairs:
        columns += [
            Column(name=f"{p} pairs", unit="%", meaning="mean over seeds ± standard error" if p == 4 else ""),
            Column(name=f"{16 * p}, paper", unit="%"),
        ]
    rows = []
    for name, layers, ours, theirs in (
        ("default Mamba", 2, (99.42, 93.1, 67.2), (98.38, 81.81, 36.0)),
        ("default Mamba", 4, (99.61, 94.9, 70.3), (99.23, 82.08, 33.52)),
        ("one channel at 1", 2, (99.71, 95.3, 72.4), (99.81, 94.70, 56.39)),
        ("one channel at 1", 4, (99.85, 97.0, 80.3), None),
        ("one channel at 0", 2, (99.38, 92.8, 66.9), (98.41, 81.35, 36.55)),
        ("both", 4, (99.90, 98.7, 88.6), (99.94, 98.80, 81.56)),
    ):
        row = [name, layers]
        for i, value in enumerate(ours):
            row += [Value(value=value, stderr=(0.11, 0.93, 2.13)[i], n=5), theirs[i] if theirs else None]
        rows.append(row)
    return Table(
        id="accuracy",
        title="Accuracy beside the paper's",
        columns=columns,
        rows=rows,
        meaning="With 16 pairs the default model recalls two of three; with both channels pinned nine of ten.",
        method="Every number is the mean of five runs that differ in their seed alone.",
    )


def summary_table() -> Table:
    return Table(
        id="summary",
        title="In numbers",
        columns=[
            Column(name="model"),
            Column(name="parameters"),
            Column(
                name="half-life",
                unit="tokens",
                meaning="the distance over which influence falls to half, from the fitted decay",
            ),
            Column(name="fit R²"),
            Column(name="noise floor"),
            Column(name="horizon"),
        ],
        rows=[
            ["default", 412160, Value(value=32.71, stderr=0.84, n=2), 0.9931, Value(value=2.04e-7, stderr=3e-9), 141.0],
            ["polarized", 420352, Value(value=141.4, stderr=6.3, n=2), 0.981, Value(value=1.9e-7, stderr=2e-9), math.inf],
        ],
        meaning="The polarized model remembers four times as far.",
    )  # fmt: skip


def make(**changes: object) -> Record:
    fields: dict[str, object] = {
        "kind": "diagnose",
        "title": "What two small Mambas forget",
        "verdict": [
            "The default model forgets: each 33 tokens of distance halve what a token still contributes.",
            "Holding one state channel at one stretches that to 141 tokens.",
            "Both blur with depth; the polarized model about half as fast.",
        ],
        "tables": [summary_table(), accuracy_table()],
        "figures": [influence(), sharpness(), ranges(), accuracy_figure()],
        "maps": [attention_map(), grid_map()],
        "notes": ["Text: the language reference of Python 3.12, SHA-256 3f1c…; other versions differ a little."],
        "config": {"length": 1024, "probes": 8, "sequences": 2, "models": ["default", "polarized"]},
        "seeds": [0, 1],
        "provenance": PROVENANCE,
    }
    return Record(**{**fields, **changes})


@pytest.fixture(scope="session")
def record() -> Record:
    return make()


@pytest.fixture(scope="session")
def make_record():
    return make


@pytest.fixture(scope="session")
def written(record, tmp_path_factory):
    """The page of the record above, on disk."""
    return write(record, tmp_path_factory.mktemp("written") / "new" / "report.html")


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("needs Chromium (chromium, chromium-browser or google-chrome on the path)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory, make_record):
    make = make_record
    folder = tmp_path_factory.mktemp("page")
    record = make(complete=False)
    long = "a_very_long_model_name_without_any_space_" * 4
    renamed = [
        f.model_copy(update={"series": [s.model_copy(update={"name": s.name + long}) for s in f.series]})
        for f in (record.figures[0], record.figures[-1])
    ]
    named = [
        m.model_copy(update={"panels": [p.model_copy(update={"name": long}) for p in m.panels], "x_label": long})
        for m in record.maps[:1]
    ]
    sharp = record.figures[1]
    hostile = sharp.model_copy(
        update={
            "id": HOSTILE, "title": HOSTILE, "x_label": HOSTILE, "y_label": HOSTILE,
            "series": [s.model_copy(update={"name": HOSTILE + s.name, "group": HOSTILE + s.group}) for s in sharp.series],
        }
    )  # fmt: skip
    return {
        "usual": write(record, folder / "usual.html"),
        "long": write(make(figures=renamed, maps=named, title=long, verdict=[long]), folder / "long.html"),
        "hostile": write(
            make(figures=[hostile, hostile], maps=[], title=HOSTILE, verdict=[HOSTILE]), folder / "h.html"
        ),
    }
