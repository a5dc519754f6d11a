"""`ssmlens bench`."""

import threading
import time
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError
from ssmlens.results import Record

PAGE_EVERY = 5.0  # seconds


def run(parts: list[str], scale: str, threads: int | None, out: Path | None, json: bool, resume: bool = False) -> None:
    from ssmlens import bench, report
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import choose

    for part in parts:
        choose("part", part, bench.PARTS)
    choose("scale", scale, bench.SCALES)
    chosen = [part for part in bench.PARTS if part in parts or not parts]
    where = directory(out, "-".join(["bench", *(chosen if parts else ()), scale]))

    written = [0.0]

    def keep(record: Record) -> None:
        """The page takes a second: not after every measurement of a short run. Its last state is written at the end."""
        record.write(where / "results.json")
        if time.monotonic() > written[0] + PAGE_EVERY:
            report.write([record], where / "report.html")
            written[0] = time.monotonic()

    display: Any = bench.Display() if json else _Bar(where)
    try:
        record = bench.run(chosen, scale, out=where, threads=threads, resume=resume, keep=keep, display=display)
    except KeyboardInterrupt:
        display.log(f"To measure only what is missing, repeat the command with --resume --out {where}")
        raise
    finally:
        display.close()
    finish(record, where, json)
    if failed := [note for note in record.notes if note.startswith("Failed")]:
        raise UserError(
            f"{len(failed)} measurement(s) failed: {failed[0].removeprefix('Failed: ')}. Details are in {where}/runs/*/error.txt and "
            "log.txt; the others are kept, and resuming (--resume) measures only what is missing"
        )


class _Bar:
    """The plan with its seconds, then one bar over it. A unit tells how far it is after every call; inside a call, which may take
    minutes, the bar goes on as planned."""

    def __init__(self, where: Path) -> None:
        from ssmlens.progress import bars

        self.where = where
        self.bars = bars("{task.fields[what]}", memory=900.0)
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.unit: Any = None
        self.done = self.fraction = self.since = 0.0
        self.finished = self.total = 0

    def begin(self, units: list[Any], done: set[str]) -> None:
        missing = [unit for unit in units if unit.id not in done]
        by_part: dict[str, float] = {}
        for unit in missing:
            by_part[unit.part] = by_part.get(unit.part, 0.0) + unit.seconds
        kept = f"{len(done)} of {len(units)} measurements are there already. " if done else ""
        if missing:
            said = ", ".join(f"{part} {_words(seconds)}" for part, seconds in by_part.items())
            kept += f"About {_words(sum(by_part.values()))} on two quiet cores: {said}. What is finished is kept in {self.where}"
        self.log(kept)
        self.done = sum(unit.seconds for unit in units if unit.id in done)
        self.finished, self.total = len(done), len(units)
        self.task = self.bars.add_task("bench", total=sum(unit.seconds for unit in units), what="")
        self.bars.update(self.task, completed=self.done)
        self.bars.start()
        threading.Thread(target=self._tick, daemon=True).start()

    def start(self, unit: Any) -> None:
        with self.lock:
            self.unit, self.fraction, self.since = unit, 0.0, time.monotonic()
        self.bars.update(self.task, what=f"{self.finished + 1}/{self.total} {unit}")

    def progress(self, unit: Any, fraction: float) -> None:
        with self.lock:
            self.fraction = fraction

    def end(self, unit: Any, error: str | None) -> None:
        with self.lock:
            self.unit = None
            self.done += unit.seconds
        self.finished += 1
        self.bars.update(self.task, completed=self.done)
        if error:
            self.log(f"{unit} failed: {error}")
        elif not self.bars.console.is_terminal:
            self.log(f"{unit} done ({self.finished}/{self.total})")

    def log(self, message: str) -> None:
        self.bars.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.ended.set()
        self.bars.stop()

    def _tick(self) -> None:
        while not self.ended.wait(1.0):
            with self.lock:
                if self.unit is None:
                    continue
                planned = (time.monotonic() - self.since) / self.unit.seconds
                fraction = min(0.98, max(self.fraction, planned))
                self.bars.update(self.task, completed=self.done + fraction * self.unit.seconds)


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
