"""The record of the grid: what each factor does to the gain by polarization, and when polarization begins to pay.

gain = accuracy of the polarized model - that of the default one, averaged over the numbers of pairs, in points, seed by seed
"""

from dataclasses import asdict
from typing import Any

from ssmlens.experiments.base import claims_config
from ssmlens.experiments.grid_design import Part, in_order
from ssmlens.experiments.grid_factors import factors_part
from ssmlens.experiments.grid_found import Found
from ssmlens.experiments.grid_parts import half_lives, lengths, modes, rates
from ssmlens.experiments.recall import SCALES, VARIANTS, Scale, guessing, training
from ssmlens.experiments.recall_gain import CEILING, MARGIN, unfinished
from ssmlens.results import Column, Figure, Record, Series, Table, provenance


def record(scale_name: str, grid: dict[str, Part], results: dict[str, Any], made_by: dict[str, Any]) -> Record:
    scale = SCALES[scale_name]
    found = Found(scale, grid, results)
    parts = [factors_part(scale, found)]
    made_of = {"half-life": half_lives, "length": lengths, "mode": modes, "rates": rates}
    parts += [part(scale, grid, found) for name, part in made_of.items() if name in grid]
    said = [list(part.sentences) for part in parts]
    short = said[0][:1]  # which factors; then from which half-life on, which is shorter than one factor after the other
    verdict = short + [sentence for part in [*said[1:2], said[0][1:], *said[2:]] for sentence in part]
    if scale_name == "smoke":
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
    missing = unfinished((f"{cell.id}-seed{seed}" for cell, seed in in_order(grid)), results)
    return Record(
        kind="reproduce",
        title=f"Table 2 as a grid: where the gain comes from ({scale_name} scale)",
        verdict=verdict,
        tables=[*(table for part in parts for table in part.tables), _design_table(grid, results)],
        figures=[*(figure for part in parts for figure in part.figures), _every_run(scale, grid, found)],
        notes=[*missing, *_notes(scale, grid, results, made_by)],
        config={
            "item": "table2-grid", "scale": scale_name, "sizes": asdict(scale), "claims": claims_config([]),
            "design": {name: {"seeds": part.seeds, "cells": [cell.id for cell in part.cells]} for name, part in grid.items()},
        },
        seeds=list(range(max(part.seeds for part in grid.values()))),
        complete=not missing,
        provenance=provenance(),
    )  # fmt: skip


def _notes(scale: Scale, grid: dict[str, Part], results: dict[str, Any], made_by: dict[str, Any]) -> list[str]:
    seconds = sum(r["seconds"] for r in results.values())
    commits = sorted({p["commit"] or p["ssmlens"] for p in made_by.values() if p})
    notes = [
        f"{len(results)} runs, {seconds / 3600:.2f} core-hours of training in all"
        + (f", made by {', '.join(commits)}." if commits else "."),
        "The design is fractional: one factor at a time, from both ends. It does not show how two factors act together elsewhere.",
        f"What is said of several numbers of a part holds for all of them together (Holm, 5 %), and of at least {MARGIN:g} point. Nothing is said of a gain "
        "where in both arms fewer than half of the runs found the association (nor of a difference of gains where one of the two is such), nor "
        f"where both arms are above {CEILING:g} % on average. Gains of one variant share their default runs, so they are not independent.",
        "The standard errors are over training seeds, differences are taken seed by seed. Accuracies near guessing and near 100 % in "
        "one cell make Student's intervals rough: the last figure shows every run.",
        f"Every run first sees short sequences, for at most {scale.finding} steps, until it has found the association; then all train as long."
        if scale.finding
        else "A run that found the association late has a low accuracy, whatever it could hold: both are one number here.",
        "Nothing here is held against a number of the paper: `reproduce table2` does that, with the same runs.",
    ]
    few, many = (grid[part].seeds if part in grid else 0 for part in ("half-life", "more seeds"))
    if many > few:
        notes.append(
            f"Default and both have {many} seeds in the corrected variant at every half-life; those beyond {few} were added to the design when the first "
            f"{few} had been seen."
        )
    if scale.steps is None:
        precision = training(scale, VARIANTS["corrected"], 2, 0, 1).precision
        notes.append(f"Matrix products in {precision} while training; parameters, Δ and the recurrence in float32.")
    return notes


def _design_table(grid: dict[str, Part], results: dict[str, Any]) -> Table:
    rows: list[list[Any]] = []
    for name, part in grid.items():
        names = [f"{cell.id}-seed{seed}" for cell in part.cells for seed in range(part.seeds)]
        seconds = [results[n]["seconds"] for n in names if n in results]
        rows.append([name, len(part.cells), part.seeds, len(names), len(seconds), sum(seconds) / 3600])
    return Table(
        id="design", title="What was run", columns=[*(Column(name=n) for n in ("part", "cells", "seeds", "runs", "finished")), Column(name="training", unit="core-hours")], rows=rows,
        meaning="A cell is a variant, a configuration, a length and a learning rate. Parts use each other's cells where they are the same.",
        method="Corners and factors run first, seed by seed. `--seeds` sets the seeds of every part.",
    )  # fmt: skip


def _every_run(scale: Scale, grid: dict[str, Part], found: Found) -> Figure:
    """Every run: a mean would hide that some have found the association and some have not."""
    cells = list(dict.fromkeys(cell for name in ("corners", "factors") for cell in grid[name].cells))
    arms = {f"{c.variant}, {c.configuration}": arm for c in cells if (arm := found.arm(c)).runs}
    series = [Series(  # first: its x are the order of all
        name="guessing among the values in the sequence", x=list(arms), y=[100 * guessing(scale)] * len(arms), style="fit", group="paper",
    )]  # fmt: skip
    for kind in ("default", "polarized"):
        points = [
            (n, y) for n, arm in arms.items() if (", default-" in n) == (kind == "default") for y in arm.scores.values()
        ]
        if points:
            series.append(Series(name=kind, x=[n for n, _ in points], y=[y for _, y in points], style="points"))
    return Figure(
        id="every-run", title="Every run of the corners and factors", x_label="variant, configuration", y_label="average accuracy (%)",
        x_scale="category", series=series,
        meaning="One point a run. Runs at the line know which values occur in the sequence, not which belongs to the key.",
        method="Average over the three numbers of pairs.",
    )  # fmt: skip
