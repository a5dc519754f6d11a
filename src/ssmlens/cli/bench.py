"""`ssmlens bench`."""

from collections.abc import Callable
from pathlib import Path


def run(parts: list[str], scale: str, threads: int | None, out: Path | None, json: bool) -> None:
    from ssmlens import bench
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import choose
    from ssmlens.progress import bars

    for part in parts:
        choose("part", part, bench.PARTS)
    choose("scale", scale, bench.SCALES)
    chosen = list(dict.fromkeys(parts)) or list(bench.PARTS)
    where = directory(out, "bench")
    if json:
        finish(bench.run(chosen, scale, threads=threads), where, json)
        return
    with bars("{task.fields[what]}") as progress:
        task = progress.add_task("measuring", total=None, what="")
        before: Callable[[str], None] = lambda what: progress.update(task, what=what)  # noqa: E731
        record = bench.run(chosen, scale, threads=threads, before=before)
    finish(record, where, json)
