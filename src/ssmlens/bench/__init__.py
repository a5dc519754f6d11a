"""`ssmlens bench`: how fast we are, beside others and beside what is possible, measured in one run on this machine.

A part (scan, length, layer, ...) is made of units, each measured in a process of its own and kept when it is finished:

    DIR/runs/PART-UNIT/    what `ssmlens.training.sweep` keeps of a run; the raw seconds are in result.json
    DIR/results.json       the record of what is finished so far, written after every unit
    DIR/report.html        its page

A unit is the smallest thing that is lost when a run is stopped: contenders that are compared take turns inside one."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssmlens.bench.parts import PARTS, expectations
from ssmlens.bench.scales import SCALES
from ssmlens.results import Record, provenance
from ssmlens.training import sweep, sweep_provenance
from ssmlens.training.schedulers import Event, InThisProcess, LocalProcesses, Report, Scheduler, Task, Worker
from ssmlens.training.sweep import SweepError

__all__ = ["PARTS", "SCALES", "Display", "Unit", "plan", "run"]

START = 3.0  # seconds that a process of its own takes to begin
AT_LEAST = 0.5  # something is always loaded for the first time


@dataclass(frozen=True)
class Unit:
    """seconds: expected on two cores with AVX2."""

    part: str
    name: str
    seconds: float

    @property
    def id(self) -> str:
        return f"{self.part}-{self.name}"

    def __str__(self) -> str:
        return f"{self.part}, {self.name.replace('-', ' ')}"


def plan(parts: Sequence[str], scale: str, threads: int = 2) -> list[Unit]:
    """What will be measured, in this order."""
    s = SCALES[scale]
    start, slower = (START if s.apart else 0.0), (2.0 if threads == 1 else 1.0)
    return [
        Unit(part, name, max(AT_LEAST, start + slower * seconds))
        for part in parts
        for name, seconds in PARTS[part].units(s).items()
    ]


class Display:
    """What is told about a run while it goes on; this one says nothing.

    begin: before the first unit, all of them, and the ids of those that an earlier run has finished."""

    def begin(self, units: list[Unit], done: set[str]) -> None: ...

    def start(self, unit: Unit) -> None: ...
    def progress(self, unit: Unit, fraction: float) -> None: ...
    def end(self, unit: Unit, error: str | None) -> None: ...
    def log(self, message: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class Run:
    """The state of a run, from which its record can be made at any time."""

    parts: list[str]
    scale: str
    threads: int
    out: Path
    units: list[Unit]
    results: dict[str, Any] = field(default_factory=dict)  # by id
    failures: dict[str, str] = field(default_factory=dict)

    def record(self) -> Record:
        found = [
            PARTS[part].found(SCALES[self.scale], {u.name: self.results[u.id] for u in self.units if u.part == part and u.id in self.results})
            for part in self.parts
        ]  # fmt: skip
        expected = [e for f in found for e in f.expectations]
        smoke = self.scale == "smoke"
        verdict = [sentence for f in found for sentence in f.verdict]
        if smoke:
            verdict = [
                "Smoke scale: this shows that every part runs. Sizes are too small for the times to mean anything."
            ]
        missing = [str(u) for u in self.units if u.id not in self.results and u.id not in self.failures]
        notes = [note for f in found for note in f.notes]
        notes += [f"Failed: {id_}: {line}" for id_, line in self.failures.items()]
        notes += [f"Not measured yet: {', '.join(missing)}."] if missing else []
        return Record(
            kind="bench",
            title=f"Speed ({self.scale} scale, {self.threads} thread{'s' * (self.threads != 1)})",
            verdict=verdict,
            tables=[*([expectations(expected)] if expected and not smoke else []), *(t for f in found for t in f.tables)],
            figures=[g for f in found for g in f.figures],
            notes=[*notes, *self._origin()],
            config={"parts": self.parts, "scale": self.scale, "threads": self.threads, "sizes": asdict(SCALES[self.scale])},
            seeds=[0],
            complete=not missing and not self.failures,
            provenance=provenance().model_copy(update={"threads": self.threads}),
        )  # fmt: skip

    def _origin(self) -> list[str]:
        """Units may be older than the record that gathers them: say so where different code measured them."""
        made_by = sweep_provenance(self.out, self.results)
        commits = sorted({p["commit"] or f"version {p['ssmlens']}" for p in made_by.values() if p})
        return [f"Measured by different versions of the code: {', '.join(commits)}."] if len(commits) > 1 else []


def run(
    parts: Sequence[str],
    scale: str,
    *,
    out: Path,
    threads: int | None = None,
    resume: bool = False,
    keep: Callable[[Record], None] = lambda _: None,
    display: Display | None = None,
) -> Record:
    """Measure `parts` (names of PARTS) at `scale` (a name of SCALES) with `threads` threads (None: as PyTorch is set).

    out: units are kept there as they finish. resume: measure only those that are missing.
    keep(record) is called with the record of what is there, whenever a unit has finished.

    Raises UserError where `out` holds a run and resume is False, or one of another configuration, machine or PyTorch."""
    threads = threads or torch.get_num_threads()
    these = plan(parts, scale, threads)
    state = Run(list(parts), scale, threads, out, these)
    same = {
        "scale": scale, "sizes": json.loads(json.dumps(asdict(SCALES[scale]))), "threads": threads,
        "processor": provenance().processor, "system": platform.system(), "torch": str(torch.__version__),
    }  # fmt: skip
    jobs = [(u.id, {"item": "bench", "part": u.part, "unit": u.name, **same}) for u in these]
    inner = LocalProcesses(1, threads) if SCALES[scale].apart else InThisProcess(threads)
    watched = _Watched(inner, state, display or Display(), keep)
    try:
        sweep(jobs, out, work, resume=resume, progress=False, scheduler=watched)
    except SweepError as error:
        state.failures |= error.failures
    return state.record()


def work(config: dict[str, Any], directory: Path, report: Report) -> Any:
    """One unit, wherever it is run."""
    return PARTS[config["part"]].measure(config["unit"], SCALES[config["scale"]], report)


@dataclass
class _Watched:
    """A scheduler that passes the news on, and keeps what is finished."""

    inner: Scheduler
    state: Run
    display: Display
    keep: Callable[[Record], None]

    def run(self, tasks: Sequence[Task], worker: Worker) -> Iterator[Event]:
        units = {unit.id: unit for unit in self.state.units}
        done = set(units) - {task.id for task in tasks}
        for id_ in done:
            self._read(id_)
        self.display.begin(self.state.units, done)
        self.keep(self.state.record())
        with closing(self.inner.run(tasks, worker)) as events:  # type: ignore[type-var]
            for event in events:
                unit = units[event.id]
                if event.kind == "started":
                    self.display.start(unit)
                elif event.kind == "progress":
                    self.display.progress(unit, event.fraction)
                else:
                    if event.error:
                        self.state.failures[event.id] = event.error
                    else:
                        self._read(event.id)
                    self.keep(self.state.record())
                    self.display.end(unit, event.error)
                yield event

    def _read(self, id_: str) -> None:
        path = self.state.out / "runs" / id_ / "result.json"
        self.state.results[id_] = json.loads(path.read_text(encoding="utf-8"))["result"]
