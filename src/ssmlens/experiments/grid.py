"""`reproduce table2-grid`: runs the grid of `grid_design.py`; `grid_record.py` makes the record of it."""

from dataclasses import replace

from ssmlens.experiments.base import Item, Request, choose
from ssmlens.experiments.grid_design import parts
from ssmlens.experiments.grid_record import record
from ssmlens.experiments.recall import SCALES, work
from ssmlens.results import Record
from ssmlens.training import sweep, sweep_provenance


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    grid = parts(request.scale)
    if request.seeds:
        grid = {name: replace(part, seeds=min(part.seeds, request.seeds)) for name, part in grid.items()}
    jobs = dict(
        cell.job(request.scale, seed)
        for seed in range(max(part.seeds for part in grid.values()))
        for part in grid.values()
        if seed < part.seeds
        for cell in part.cells
    )
    results = sweep(
        list(jobs.items()), request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"table2-grid, {request.scale}",
    )  # fmt: skip
    return record(request.scale, grid, results, sweep_provenance(request.out, results))


ITEM = Item(
    name="table2-grid",
    title="where the gain in associative recall comes from: one factor at a time, half-lives, lengths, rates",
    source="Tables 2 and 5",
    scales=tuple(SCALES),
    variants=(),
    run=run,
    group="table2",
)
