"""`ssmlens reproduce ITEM`."""

import os
from pathlib import Path


def run(
    item: str, scale: str, variants: list[str] | None, seeds: int | None, processes: int | None, resume: bool, out: Path | None,
    json: bool,
) -> None:  # fmt: skip
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import ITEMS, Request, choose

    choose("item", item, ITEMS)
    chosen = ITEMS[item]
    choose("scale", scale, chosen.scales)
    for variant in variants or ():
        choose("variant", variant, chosen.variants)
    where = directory(out, f"{item}-{scale}")
    if processes is None:  # a smoke run is shorter than the start of a process
        processes = 0 if scale == "smoke" else _workers()
    record = chosen.run(
        Request(
            scale=scale, out=where, variants=tuple(dict.fromkeys(variants)) if variants else None, seeds=seeds, resume=resume,
            processes=processes, progress=not json,
        )
    )  # fmt: skip
    finish(record, where, json)


def _workers() -> int:
    """One where a GPU does the work, else the cores that this process may use (not every system can tell)."""
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
