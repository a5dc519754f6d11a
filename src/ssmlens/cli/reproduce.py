"""`ssmlens reproduce ITEM`, and `ssmlens reproduce all`: every item, each in a directory of its own, and one page over them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlens.errors import UserError

if TYPE_CHECKING:
    from ssmlens.experiments import Item, Request

ALL = "all"


def run(
    item: str, scale: str, variants: list[str] | None, seeds: int | None, processes: int | None, resume: bool, out: Path | None,
    json: bool, data: list[str] | None = None, models: list[str] | None = None,
) -> None:  # fmt: skip
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import SCALES, Request, choose, find
    from ssmlens.experiments.base import Stopped

    chosen = None if item == ALL else find(item)
    choose("scale", scale, SCALES if chosen is None else chosen.scales)
    if chosen is None and (variants or models):
        raise UserError(f"--{'variant' if variants else 'model'} belongs to one item, not to all of them")
    for variant in variants or ():
        assert chosen is not None
        choose("variant", variant, chosen.variants)
    sources = _sources(data or [], chosen)
    if models and chosen is not None and "model" not in chosen.takes:
        raise UserError(f"{chosen.name} has its own model: leave --model away")
    where = directory(out, f"{item if chosen is None else chosen.name}-{scale}")
    if processes is None:  # a smoke run is shorter than the start of a process
        processes = 0 if scale == "smoke" else _workers()
    request = Request(
        scale=scale, out=where, variants=tuple(dict.fromkeys(variants)) if variants else None, seeds=seeds, resume=resume,
        processes=processes, progress=not json, models=tuple(dict.fromkeys(models)) if models else None,
    )  # fmt: skip
    if chosen is None:
        _all(request, sources, json)
    else:
        try:
            made = chosen.run(replace(request, data=sources.get(chosen.name)))
        except Stopped as stopped:
            finish(stopped.record, where, json)
            raise
        finish(made, where, json)


def _sources(given: list[str], chosen: "Item | None") -> dict[str, str]:
    """--data by item. Raises UserError for items that have their own."""
    from ssmlens.experiments import find

    if chosen is not None:
        if given and "data" not in chosen.takes:
            raise UserError(f"{chosen.name} has its own data: leave --data away")
        return {chosen.name: ",".join(given)} if given else {}
    sources: dict[str, str] = {}
    for part in given:
        name, found, source = part.partition("=")
        if not found:
            raise UserError(f"with several items --data says which it is for: --data pixels=SOURCE, not --data {part}")
        of = find(name)
        if "data" not in of.takes:
            raise UserError(f"{of.name} has its own data: leave --data {part} away")
        if not source:
            raise UserError(f"--data {part} names no source")
        sources[of.name] = f"{sources[of.name]},{source}" if of.name in sources else source
    return sources


def _all(request: "Request", sources: dict[str, str], json: bool) -> None:
    """Items that cannot run are named at the end; the others are not kept waiting by them. Raises UserError then."""
    from ssmlens.cli.output import finish, write
    from ssmlens.experiments import ITEMS, overview
    from ssmlens.experiments.base import Stopped

    records, missing = {}, {}
    for name, item in ITEMS.items():
        if request.scale not in item.scales:
            missing[name] = f"it has no {request.scale} scale"
            continue
        # items of one group share runs: what is there from the one is not trained again for the other
        work = request.out / (item.group or name)
        resume = request.resume or (item.group is not None and item.group in records)
        try:
            records[name] = item.run(replace(request, out=work, data=sources.get(name), resume=resume))
            write(records[name], request.out / name)
        except Stopped as stopped:
            write(stopped.record, request.out / name)
            raise
        except UserError as error:
            missing[name] = str(error)
    finish(overview.record(request.scale, records, missing), request.out, json)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(ITEMS)} items could not be run: "
            + "; ".join(f"{name}: {why}" for name, why in missing.items())
        )


def _workers() -> int:
    """One where a GPU does the work, else the cores that this process may use (not every system can tell)."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
