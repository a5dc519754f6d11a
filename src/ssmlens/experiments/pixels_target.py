"""The target attack: tables, figures and sentences (the paper's Figures 3 and 10)."""

from collections.abc import Sequence
from typing import Any

from ssmlens.experiments.pixels_claims import Sides, advantage, allowed, corrected, words
from ssmlens.experiments.pixels_runs import OVER, Found, comparable
from ssmlens.results import Column, Figure, Map, Panel, Series, Table
from ssmlens.tasks.pixels import Region

Named = dict[Region, str]
_PAIRS = f"{OVER} Over images: over those attacked and those whose pixels they get (clustered both ways)."


def table(
    identity: str, title: str, found: Found, regions: Named, sides: Sequence[Sides], targets: Sequence[int]
) -> Table:
    """Success rates by region, and trailing minus leading for each of `sides`."""
    columns = [
        Column(name="model"),
        Column(
            name="not attacked", unit="%", meaning="images of other classes that are classified as the target anyway"
        ),
    ]
    columns += [Column(name=name, unit="%", meaning=str(region)) for region, name in regions.items()]
    columns += [Column(name=f"trailing minus leading {s.width}", unit="points") for s in sides]
    rows: list[list[Any]] = [
        [
            runs.name,
            *(runs.success_rate(r, targets) for r in (None, *regions)),
            *(advantage(runs, s, targets) for s in sides),
        ]
        for runs in found.values()
    ]
    return Table(
        id=f"{identity}-table", title=f"{title}, in numbers", columns=columns, rows=rows,
        meaning="How often an image of another class is classified as the target class when these of its pixels come from an image of that class.",
        method=f"A random image of the target class for each image attacked, the same for every region and model, each serving equally often. {_PAIRS}",
    )  # fmt: skip


def figure(identity: str, title: str, found: Found, regions: Named, targets: Sequence[int]) -> Figure:
    names = [runs.name for runs in found.values()]
    series = []
    for region, name in regions.items():
        values = [runs.success_rate(region, targets) for runs in found.values()]
        series.append(
            Series(name=name, x=names, y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], style="bar", group=name)
        )  # fmt: skip
    base = [100 * float(runs.success(None, targets).mean()) for runs in found.values()]
    series.append(Series(name="not attacked", x=names, y=base, style="points", group="paper"))
    return Figure(
        id=identity, title=title, x_label="model", y_label="classified as the target (%)", x_scale="category", series=series,
        meaning="Trailing bars above leading ones: the last pixels decide, and are a way in.", method=f"Success rate over images of other classes. {_PAIRS}",
    )  # fmt: skip


def by_class(found: Found, s: Sides, targets: Sequence[int], classes: Sequence[str]) -> Map:
    """Trailing minus leading success for each target class."""
    values = [[advantage(runs, s, [t]) for t in targets] for runs in found.values()]
    rows, errors = [[v.value for v in row] for row in values], [[v.stderr or 0.0 for v in row] for row in values]
    return Map(
        id="by-class", title=f"Target attack by class, {s.width} of {s.length} pixels", x_label="target class", y_label="model",
        unit="trailing minus leading (points)", x=[classes[t] for t in targets], y=[runs.name for runs in found.values()],
        panels=[Panel(name="success, trailing minus leading", values=rows, stderr=errors)],
        meaning="Above zero: pixels of this class count for more where they are read last.", method=_PAIRS,
    )  # fmt: skip


def sentences(found: Found, s: Sides, targets: Sequence[int], title: str, classes: int) -> list[str]:
    values = {name: advantage(runs, s, targets) for name, runs in found.items() if comparable(runs, classes)}
    may = corrected(values)
    out = []
    for name, value in values.items():
        runs, more = found[name], "more" if value.value > 0 else "less"
        last, first, none = (100 * runs.success(r, targets).mean() for r in (s.trailing, s.leading, None))
        says = {
            "sure": f"trailing pixels succeed {more} often",
            "alone": f"trailing pixels seem to succeed {more} often (alone it would count, among {len(values)} models it may be chance)",
            "no": f"no difference that could be told ({allowed(value)})",
        }[may[name]]
        out.append(
            f"Target attack ({title}) on {runs.name}: {s.width} of {s.length} pixels from the target class succeed on {last:.1f} % where they are trailing, "
            f"{first:.1f} % leading, {none:.1f} % without attack; trailing minus leading {words(value)}: {says}."
        )
    return out
