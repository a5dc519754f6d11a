"""Many runs with one command: finished ones are kept, the others continue, failures are counted.

    DIR/runs/ID/      config.json, result.json or error.txt (schedulers.py), and whatever the worker writes
    DIR/runs.jsonl    where asked for: every finished run on a line (kept.py)

What a run is and how it resumes is the worker's affair; usually it calls `train` with resume=True.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.progress import bars
from ssmlens.training import kept
from ssmlens.training.identity import differences, fingerprint
from ssmlens.training.schedulers import Event, InThisProcess, LocalProcesses, Scheduler, Task, Worker

Job = tuple[str, Mapping[str, Any]]
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,-]*")


class SweepError(UserError):
    """Some runs failed. `failures`: id → one line; the results of the others are on disk and in `results`."""

    def __init__(self, failures: dict[str, str], results: dict[str, Any], out_dir: Path) -> None:
        self.failures, self.results = failures, results
        listed = "; ".join(f"{id_}: {line}" for id_, line in list(failures.items())[:3])
        listed += f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        total = len(failures) + len(results)
        super().__init__(
            f"{len(failures)} of {total} runs failed ({listed}). Details are in {out_dir}/runs/*/error.txt and log.txt; "
            "the others are kept, and resuming (--resume) runs only what is missing"
        )


def sweep(
    jobs: Sequence[Job],
    out_dir: str | Path,
    worker: Worker,
    *,
    processes: int = 1,
    threads_per_process: int = 1,
    resume: bool = False,
    progress: bool = True,
    title: str = "runs",
    scheduler: Scheduler | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Runs worker(config, directory, report) for every job and returns id → result, in the order of the jobs.

    jobs: (id, JSON-able config); the id names the directory
    worker: a top-level function of an importable module; its result is JSON-able; it may call report(fraction)
    processes: how many at a time, each with `threads_per_process` torch threads; 0: here, one after the other
    scheduler: another place to run them (`schedulers.py`)
    resume: keep finished runs, call the worker for the others: what is in the directory already it may continue itself
    keep: note finished runs in DIR/runs.jsonl too, from which a copy without DIR/runs resumes; for workers whose result is all
        that is read of a run

    Raises
        SweepError: at the end, when runs failed
        UserError: before anything runs, when out_dir holds runs and resume is False, or runs of another configuration,
            or another process runs there
        KeyboardInterrupt: on Ctrl-C, once the workers are stopped (they get SIGTERM and time to write a checkpoint)
    """
    tasks = _tasks(jobs, Path(out_dir))
    if scheduler is None:
        scheduler = LocalProcesses(processes, threads_per_process) if processes else InThisProcess(threads_per_process)
    with files.locked(Path(out_dir), "running"):
        try:
            failures = _run(tasks, Path(out_dir), worker, scheduler, resume, progress, title)
        finally:
            if keep:
                kept.pack(Path(out_dir))
    results = {task.id: _result(task)["result"] for task in tasks if task.id not in failures}
    if failures:
        raise SweepError(failures, results, Path(out_dir))
    return results


def sweep_provenance(out_dir: str | Path, ids: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """Which commit, versions, device and threads finished each run: id → the fields of `ssmlens.results.Provenance`.

    None for a run that is not finished, or was by a version that did not note it.
    """
    paths = {id_: Path(out_dir) / "runs" / id_ / "result.json" for id_ in ids}
    return {id_: _json(path).get("provenance") if path.exists() else None for id_, path in paths.items()}


def _run(
    tasks: list[Task], out_dir: Path, worker: Worker, scheduler: Scheduler, resume: bool, progress: bool, title: str
) -> dict[str, str]:
    """Runs what is missing and returns the failures: id → one line."""
    done = _finished(tasks, out_dir, resume)
    todo = [task for task in tasks if task.id not in done]
    for task in todo:
        files.make_directory(task.directory)
        (task.directory / "error.txt").unlink(missing_ok=True)
        files.write(task.directory / "config.json", json.dumps(task.config, indent=1) + "\n")

    failures: dict[str, str] = {}
    display = _Display(title, len(tasks), len(done), progress)
    events = scheduler.run(todo, worker)
    try:
        for event in events:
            if event.kind == "ended":
                error = event.error or _missing(tasks, event.id)
                if error:
                    failures[event.id] = error
                    _note(tasks, event.id, error)
            display.show(event, failures)
    finally:
        getattr(events, "close", lambda: None)()  # stops what still runs, now and not when memory is tidied up
        display.close()
    return failures


def _tasks(jobs: Sequence[Job], out_dir: Path) -> list[Task]:
    tasks = [Task(id_, json.loads(json.dumps(config)), out_dir / "runs" / id_) for id_, config in jobs]
    ids = [task.id for task in tasks]
    for id_ in ids:
        if not _SAFE.fullmatch(id_):
            raise ValueError(f"{id_!r} cannot name a directory")
    if len({id_.lower() for id_ in ids}) < len(ids):
        raise ValueError("two jobs have the same id")
    return tasks


def _finished(tasks: list[Task], out_dir: Path, resume: bool) -> set[str]:
    """The ids whose result is there. Raises UserError: see `sweep`."""
    runs = files.make_directory(out_dir / "runs")
    if resume:
        kept.unpack(out_dir, {task.id for task in tasks})
    known = [task for task in tasks if (task.directory / "config.json").exists()]
    if not resume and (known or (out_dir / kept.NAME).exists()):
        raise UserError(
            f"{runs if known else out_dir} holds runs already: resume them (--resume) or choose another directory"
        )
    done = set()
    for task in known:
        old = _json(task.directory / "config.json")
        if changed := differences(old, task.config):
            raise UserError(
                f"{task.directory} holds a run with another configuration: {'; '.join(changed)}. "
                "Use the same one or choose another directory"
            )
        if (task.directory / "result.json").exists():
            if _result(task)["fingerprint"] != fingerprint(task.config):
                raise UserError(
                    f"{task.directory}/result.json belongs to another configuration; delete it to run again"
                )
            done.add(task.id)
    return done


def _result(task: Task) -> dict[str, Any]:
    path = task.directory / "result.json"
    record: dict[str, Any] = _json(path)
    if not isinstance(record, dict) or not {"fingerprint", "result"} <= set(record) or not record["result"]:
        raise UserError(f"{path} is damaged; delete its directory to run it again")
    return record


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete its directory to run it again") from None


def _missing(tasks: list[Task], id_: str) -> str | None:
    """A run that claims success must have left a result."""
    task = next(task for task in tasks if task.id == id_)
    return None if (task.directory / "result.json").exists() else "ended without a result"


def _note(tasks: list[Task], id_: str, error: str) -> None:
    """A process that was killed could not write its own error.txt."""
    path = next(task for task in tasks if task.id == id_).directory / "error.txt"
    if not path.exists():
        files.write(path, error + "\n")


class _Display:
    """One bar over all runs; a part of a run counts as that part."""

    def __init__(self, title: str, total: int, done: int, show: bool) -> None:
        self.fractions: dict[str, float] = {}
        self.done, self.total = done, total
        self.progress: Any = None
        if show:
            self.progress = bars("{task.fields[numbers]}", memory=900.0)
            self.task = self.progress.add_task(title, total=total, completed=done, numbers=f"{done}/{total}")
            self.progress.start()

    def show(self, event: Event, failures: dict[str, str]) -> None:
        if event.kind == "ended":
            self.fractions.pop(event.id, None)
            self.done += 1
        else:
            self.fractions[event.id] = event.fraction
        if self.progress is None:
            return
        if event.kind == "ended" and event.id in failures:
            self.say(f"{event.id} failed: {failures[event.id]}")
        elif event.kind == "ended" and not self.progress.console.is_terminal:
            self.say(f"{event.id} done ({self.done}/{self.total})")
        running = ", ".join(f"{id_} {fraction:.0%}" for id_, fraction in self.fractions.items())
        numbers = f"{self.done}/{self.total}" + (f", {len(failures)} failed" if failures else "")
        numbers += f" ({running})" if running else ""
        self.progress.update(self.task, completed=self.done + sum(self.fractions.values()), numbers=numbers)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
