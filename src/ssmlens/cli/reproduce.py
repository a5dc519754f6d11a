"""`ssmlens reproduce ITEM`, and `ssmlens reproduce all`: every item, each in a directory of its own, and one page over them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlens.errors import UserError

if TYPE_CHECKING:
    from ssmlens.experiments import Item, Request
    from ssmlens.results import Record

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
    if chosen is None and variants:
        raise UserError("--variant belongs to one item, not to all of them")
    for variant in variants or ():
        assert chosen is not None
        choose("variant", variant, chosen.variants)
    sources, trained = _of_items("data", data or [], chosen), _of_items("model", models or [], chosen)
    where = directory(out, f"{item if chosen is None else chosen.name}-{scale}")
    if processes is None:  # a smoke run is shorter than the start of a process
        processes = 0 if scale == "smoke" else _workers()
    request = Request(
        scale=scale, out=where, variants=tuple(dict.fromkeys(variants)) if variants else None, seeds=seeds, resume=resume,
        processes=processes, progress=not json,
    )  # fmt: skip

    def asked(name: str) -> Request:
        return replace(
            request, data=",".join(sources[name]) if name in sources else None, models=tuple(trained[name]) if name in trained else None
        )  # fmt: skip

    if chosen is None:
        _all(request, asked, json)
    else:
        try:
            made = chosen.run(asked(chosen.name))
        except Stopped as stopped:
            finish(stopped.record, where, json)
            raise
        finish(made, where, json)


def _of_items(option: str, given: list[str], chosen: "Item | None") -> dict[str, list[str]]:
    """What --data or --model gives, by item. Raises UserError for items that have their own."""
    from ssmlens.experiments import find

    if chosen is not None:
        if given and option not in chosen.takes:
            raise UserError(f"{chosen.name} has its own {option}: leave --{option} away")
        return {chosen.name: list(dict.fromkeys(given))} if given else {}
    found: dict[str, list[str]] = {}
    for part in given:
        name, equals, source = part.partition("=")
        if not equals:
            example = "pixels=SOURCE" if option == "data" else "pixels=CHECKPOINT"
            raise UserError(
                f"with several items --{option} says which it is for: --{option} {example}, not --{option} {part}"
            )
        of = find(name)
        if option not in of.takes:
            raise UserError(f"{of.name} has its own {option}: leave --{option} {part} away")
        if not source:
            raise UserError(f"--{option} {part} names no {'source' if option == 'data' else 'model'}")
        if source not in (there := found.setdefault(of.name, [])):
            there.append(source)
    return found


def _all(request: "Request", asked: Callable[[str], "Request"], json: bool) -> None:
    """Items that cannot run are named at the end; the others are not kept waiting by them. Raises UserError then.

    Resumed where an item's page is but its runs are not (a published copy), the page stands as it is."""
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
        if (finished := _published(request, asked(name), work, name)) is not None:
            records[name] = finished
            write(finished, request.out / name)
            continue
        try:
            records[name] = item.run(replace(asked(name), out=work, resume=resume))
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


def _published(request: "Request", asked: "Request", work: Path, name: str) -> "Record | None":
    """The finished record of an item whose runs are elsewhere, where nothing but its defaults is asked for. Raises UserError where it is damaged."""
    from ssmlens.results import Record

    path = request.out / name / "results.json"
    if (
        not request.resume
        or request.seeds
        or asked.data
        or asked.models
        or (work / "runs").exists()
        or not path.exists()
    ):
        return None
    record = Record.read(path)
    config = record.config
    return record if record.complete and (config.get("item"), config.get("scale")) == (name, request.scale) else None


def _workers() -> int:
    """One where a GPU does the work, else the cores that this process may use (not every system can tell)."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
