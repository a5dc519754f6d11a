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
    record = chosen.run(
        Request(
            scale=scale, out=where, variants=tuple(variants) if variants else None, seeds=seeds, resume=resume,
            processes=len(os.sched_getaffinity(0)) if processes is None else processes, progress=not json,
        )
    )  # fmt: skip
    finish(record, where, json)
