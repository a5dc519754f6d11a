"""Noise in place of a region: tables, figures and sentences (the paper's Tables 1 and 3)."""

from collections.abc import Mapping, Sequence
from typing import Any

from ssmlens.experiments.base import holm
from ssmlens.experiments.pixels_claims import PAPER, Sides, allowed, corrected, paper_model, words
from ssmlens.experiments.pixels_models import PAPER_REGIONS, Model
from ssmlens.experiments.pixels_runs import OVER, Found, Runs, between, comparable, crossed
from ssmlens.experiments.recall import PAPER_LENGTH
from ssmlens.results import Column, Figure, Map, Panel, Series, Table
from ssmlens.tasks.pixels import Region


def corruption_table(found: Found, regions: Sequence[Region], length: int, beside: bool) -> Table:
    """Accuracy clean and under noise. beside: with the paper's rows."""
    there: Mapping[Region, str] = (
        {Region.parse(text, PAPER_LENGTH).scaled(length, PAPER_LENGTH): text for text in PAPER_REGIONS}
        if beside
        else {}
    )
    rows: list[list[Any]] = []
    for name, runs in found.items():
        rows.append(
            [runs.name, crossed(100 * runs.clean(), "%"), *(crossed(100 * runs.noise(r), "%") for r in regions)]
        )
        row = PAPER.get(paper_model(name) or "") if beside else None
        if row:
            numbers = (round(100 * row[there[r]], 1) if r in there else None for r in regions)
            rows.append([f"{runs.name}, in the paper", round(100 * row["clean"], 1), *numbers])
    columns = [Column(name="model"), Column(name="clean", unit="%")]
    columns += [
        Column(name=str(r), unit="%", meaning=f"the paper's [{there[r]}]" if r in there else "") for r in regions
    ]
    return Table(
        id="corruption", title="Accuracy with noise in a region", columns=columns, rows=rows,
        meaning=f"Noise takes the place of the pixels of a region of the {length}; those on the right are read last."
        + (f" In the paper the regions are the same shares of {PAPER_LENGTH:,} pixels, one run a model." if beside else ""),
        method=f"Noise N(0, 1) in all channels, images in [0, 1]; mean over draws. {OVER}",
    )  # fmt: skip


def corruption_map(found: Found, regions: Sequence[Region]) -> Map:
    lost = [[runs.lost(r) for r in regions] for runs in found.values()]
    values, errors = [[v.value for v in row] for row in lost], [[v.stderr or 0.0 for v in row] for row in lost]
    return Map(
        id="lost", title="Accuracy lost to noise, by region", x_label="region (right: read last)", y_label="model", unit="points lost",
        x=[str(r) for r in regions], y=[runs.name for runs in found.values()], panels=[Panel(name="noise", values=values, stderr=errors)],
        meaning="A model that weighs all pixels alike has the same colour at both ends of its row, width for width.",
        method=f"Accuracy on clean images minus that with noise in the region. {OVER}",
    )  # fmt: skip


def asymmetry_table(found: Found, sides: Sequence[Sides], beside: bool) -> Table:
    """Trailing minus leading, width by width. beside: with the paper's difference."""
    values = {(name, s.width): runs.asymmetry(s.trailing, s.leading) for name, runs in found.items() for s in sides}
    adjusted = holm({f"{name} {w}": p for (name, w), v in values.items() if (p := v.p_value()) is not None})
    rows: list[list[Any]] = []
    for name, runs in found.items():
        for s in sides:
            there = s.asymmetry_in_paper(name)
            rows.append([
                runs.name, s.width, runs.lost(s.leading), runs.lost(s.trailing), values[name, s.width], adjusted.get(f"{name} {s.width}"),
                *([None if there is None else round(there, 1)] if beside else []),
            ])  # fmt: skip
    columns = [
        Column(name="model"), Column(name="pixels"), Column(name="lost to leading noise", unit="points"),
        Column(name="lost to trailing noise", unit="points"), Column(name="trailing minus leading", unit="points"),
        Column(name="p (Holm)", meaning="of no difference, corrected for all rows of this table together"),
    ]  # fmt: skip
    if beside:
        columns.append(
            Column(
                name="paper: trailing minus leading",
                unit="points",
                meaning=f"at the same share of {PAPER_LENGTH:,} pixels",
            )
        )
    return Table(
        id="asymmetry-table", title="Trailing against leading noise, in numbers", columns=columns, rows=rows,
        meaning="Above zero: the pixels that are read last matter more. They are also the bottom rows of the images, the leading ones the top rows: what is "
        "in the picture there and when it is read go together. A model with mean pooling, and attention, tell them apart: they read the same pictures "
        "without recency.", method=f"Points of accuracy. {OVER}",
    )  # fmt: skip


def asymmetry_figure(found: Found, sides: Sequence[Sides]) -> Figure:
    sides = sorted(sides, key=lambda s: s.width)
    series = []
    for runs in found.values():
        values = [runs.asymmetry(s.trailing, s.leading) for s in sides]
        series.append(Series(
            name=runs.name, x=[float(s.width) for s in sides], y=[v.value for v in values], stderr=[v.stderr or 0.0 for v in values], group=runs.name,
        ))  # fmt: skip
    return Figure(
        id="asymmetry", title="Trailing against leading noise", x_label=f"pixels of {sides[0].length} replaced by noise",
        y_label="lost to trailing minus lost to leading (points)", x_scale="log", series=series,
        meaning="Zero: both ends matter alike. Above: what is read last matters more, which is recency as accuracy.",
        method=f"Difference of the accuracies lost. {OVER}",
    )  # fmt: skip


def changes(found: Found) -> list[tuple[str, Runs, Runs]]:
    """(name, a model that is polarized or has mean pooling, the plain one of the same mixer)."""
    return [
        (n, r, found[Model.of(n).mixer])
        for n, r in found.items()
        if Model.of(n).name != Model.of(n).mixer and Model.of(n).mixer in found
    ]


def change_table(found: Found, sides: Sequence[Sides]) -> Table:
    """What polarization changes, and mean pooling."""
    rows: list[list[Any]] = []
    for _, runs, plain in changes(found):
        row: list[Any] = [runs.name, plain.name, between(100 * runs.clean(), 100 * plain.clean())]
        for s in sides:
            row += [
                between(*(100 * (r.clean() - r.noise(s.trailing)) for r in (runs, plain))),
                between(*(100 * (r.noise(s.leading) - r.noise(s.trailing)) for r in (runs, plain))),
            ]
        rows.append(row)
    columns = [Column(name="model"), Column(name="against"), Column(name="clean accuracy", unit="points")]
    for s in sides:
        columns += [
            Column(name=f"lost to trailing {s.width}", unit="points", meaning="below zero: better defended"),
            Column(name=f"trailing minus leading {s.width}", unit="points", meaning="below zero: less recency"),
        ]
    return Table(
        id="change", title="What polarization or mean pooling changes", columns=columns, rows=rows,
        meaning="Differences to the plain model with a class token: same batches, same images. Initial weights have nothing in common, though seeds have "
        "the same numbers.", method=f"Points of accuracy. {OVER}",
    )  # fmt: skip


def sentences(found: Found, s: Sides, classes: int) -> list[str]:
    """Whether noise in the trailing pixels costs more than in as many leading ones: of the first model, then what polarization or mean pooling changes,
    then of the others."""
    values = {name: runs.asymmetry(s.trailing, s.leading) for name, runs in found.items() if comparable(runs, classes)}
    may = corrected(values)
    out = []
    for name, runs in found.items():
        if name not in values:
            out.append(
                f"{runs.name} is not shown to beat chance on clean images: there is nothing that noise could take."
            )
            continue
        there = s.asymmetry_in_paper(name)
        paper = f"; the paper's, at length {PAPER_LENGTH:,}: {there:+.1f}" if there is not None else ""
        ends = ("trailing", "leading") if values[name].value > 0 else ("leading", "trailing")
        more = f"more to noise in its {ends[0]} {s.width} of {s.length} pixels than in the {ends[1]} ones"
        says = {
            "sure": f"loses {more}",
            "alone": f"seems to lose {more} (alone it would count, among {len(values)} models it may be chance)",
            "no": f"shows no difference between noise in the trailing and in the leading {s.width} of {s.length} pixels "
            f"that could be told ({allowed(values[name])})",
        }[may[name]]
        lost = [f"{runs.lost(region).value:.1f}" for region in (s.trailing, s.leading)]
        out.append(
            f"{runs.name} {says}: {lost[0]} points trailing, {lost[1]} leading, of {100 * runs.clean().mean():.1f} % clean; "
            f"difference {words(values[name])}{paper}."
        )
    pairs = {
        name: (runs, plain, between(*(100 * (r.noise(s.leading) - r.noise(s.trailing)) for r in (runs, plain))))
        for name, runs, plain in changes({name: found[name] for name in values})
    }
    may, changed = corrected({name: change for name, (*_, change) in pairs.items()}), []
    for name, (runs, plain, change) in pairs.items():
        less = f"{'more' if change.value > 0 else 'less'} recency"
        says = {
            "sure": less,
            "alone": f"{less}, it seems (alone it would count, among {len(pairs)} changes it may be chance)",
            "no": "no change that can be told",
        }[may[name]]
        changed.append(f"{runs.name}, against {plain.name}: trailing minus leading changes by {words(change)}: {says}.")
    return out[:1] + changed + out[1:]


def worst(found: Found, regions: Sequence[Region]) -> list[str]:
    """For each model, where noise costs most."""
    out = []
    for runs in found.values():
        region = max(regions, key=lambda r: runs.lost(r).value)
        out.append(
            f"{runs.name} ({100 * runs.clean().mean():.1f} % clean) loses most to noise in {region}: {words(runs.lost(region))}."
        )
    return out
