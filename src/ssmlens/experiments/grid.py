"""`reproduce table2-grid`: runs the grid of `grid_design.py`; `grid_record.py` makes the record of it."""

from dataclasses import replace

from ssmlens.experiments.base import Item, Request, Stopped, choose
from ssmlens.experiments.grid_design import in_order, parts
from ssmlens.experiments.grid_record import record
from ssmlens.experiments.recall import SCALES
from ssmlens.experiments.recall_gain import trained
from ssmlens.results import Record
from ssmlens.training import sweep_provenance


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    grid = parts(request.scale)
    if request.seeds:
        grid = {name: replace(part, seeds=request.seeds) for name, part in grid.items()}
    jobs = [cell.job(request.scale, seed) for cell, seed in in_order(grid)]
    results = trained(jobs, request, f"table2-grid, {request.scale}")
    made = record(request.scale, grid, results, sweep_provenance(request.out, results))
    if not made.complete:
        raise Stopped(made)
    return made


ITEM = Item(
    name="table2-grid",
    title="where the gain in associative recall comes from: one factor at a time, half-lives, lengths, rates",
    source="Tables 2 and 5",
    scales=tuple(SCALES),
    variants=(),
    run=run,
    group="table2",
)
