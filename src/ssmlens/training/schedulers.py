"""Where the runs of a sweep are executed: here or in local processes. Another place (Ray, a cluster) is one more class.

A worker is a top-level function worker(config, directory, report) -> JSON-able result; it may call report(fraction).
What a task leaves in its directory:

    result.json   {"id", "fingerprint", "config", "result", "seconds", "provenance"}: written last, in one move, so finished
                  means done. provenance: `ssmlens.results.Provenance` of the process that finished it
    error.txt     why it failed, with the traceback                     log.txt   what it printed (local processes)
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, Protocol

from ssmlens import files, results
from ssmlens.errors import UserError
from ssmlens.training.identity import fingerprint
from ssmlens.training.stops import Stops

Report = Callable[[float], None]
Worker = Callable[[dict[str, Any], Path, Report], Any]


@dataclass(frozen=True)
class Task:
    """One run: its name, its JSON-able configuration, its own directory."""

    id: str
    config: dict[str, Any]
    directory: Path


@dataclass(frozen=True)
class Event:
    """News of a task. `error` is None unless it ended badly."""

    id: str
    kind: str  # "started", "progress", "ended"
    fraction: float = 0.0
    error: str | None = None


@dataclass
class _Running:
    process: Any
    pipe: connection.Connection
    pipe_open: bool = True  # a closed one is always "ready": waiting for it would be a busy loop
    error: str | None = None

    def read(self) -> Iterator[float]:
        """Fractions that the process reported since the last call. Notes its error."""
        try:
            while self.pipe_open and self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "progress":
                    yield value
                else:
                    self.error = value
        except (EOFError, OSError):  # closed at the other end, perhaps in the middle of a message
            self.pipe.close()
            self.pipe_open = False


class Scheduler(Protocol):
    """Executes every task and yields the news. Closing the iterator, or an exception in it, stops what still runs."""

    def run(self, tasks: Sequence[Task], worker: Worker) -> Iterator[Event]: ...


def execute(task: Task, worker: Worker, report: Report) -> str | None:
    """Runs one task in this process and writes its result or its error. Returns one line about the error, or
    None.

    KeyboardInterrupt and SystemExit pass through: stopped is not failed.
    """
    began = time.perf_counter()
    try:
        origin = results.provenance()  # asked first: the checkout may change while the code that is loaded runs
        result = worker(task.config, task.directory, report)
        record = {
            "id": task.id,
            "fingerprint": fingerprint(task.config),
            "config": task.config,
            "result": result,
            "seconds": round(time.perf_counter() - began, 3),
            "provenance": {**origin.model_dump(mode="json"), "device": _device()},
        }
        files.write(task.directory / "result.json", json.dumps(record, indent=1) + "\n")
    except Exception as error:
        with contextlib.suppress(UserError):  # the disk may be full: the line below says so then
            files.write(task.directory / "error.txt", traceback.format_exc())
        line = " ".join(str(error).split())
        return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"
    return None


def _device() -> str:
    """Where this process trained, "cpu" if it did not train: only a training starts accelerate."""
    state = sys.modules.get("accelerate.state")
    return str(state.PartialState().device) if state is not None and state.is_initialized() else "cpu"


class InThisProcess:
    """One after the other, here: no start-up time, for small runs and tests. An exception is still kept apart."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def run(self, tasks: Sequence[Task], worker: Worker) -> Iterator[Event]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for task in tasks:
                yield Event(task.id, "started")
                error = execute(task, worker, lambda fraction: None)
                yield Event(task.id, "ended", 1.0, error)
        finally:
            torch.set_num_threads(before)


class LocalProcesses:
    """A fresh process per task, `processes` at a time, each with its own threads. A killed one takes no other
    with it.
    """

    def __init__(self, processes: int, threads: int, grace: float = 30.0) -> None:
        self.processes, self.threads = processes, threads
        self.grace = grace  # seconds to write a checkpoint in when stopped
        self._context = multiprocessing.get_context("spawn")

    def run(self, tasks: Sequence[Task], worker: Worker) -> Iterator[Event]:
        running: dict[str, _Running] = {}
        with Stops() as stops, stops.at_once():  # SIGTERM, too, must not leave children behind
            try:
                yield from self._run(list(tasks), worker, running)
            finally:
                self._stop([each.process for each in running.values()])

    def _run(self, waiting: list[Task], worker: Worker, running: dict[str, _Running]) -> Iterator[Event]:
        while waiting or running:
            while waiting and len(running) < self.processes:
                task = waiting.pop(0)
                running[task.id] = self._start(task, worker)
                yield Event(task.id, "started")
            doors = [each.pipe for each in running.values() if each.pipe_open]
            connection.wait([*doors, *(each.process.sentinel for each in running.values())], timeout=1.0)
            for id_, each in list(running.items()):
                ended = not each.process.is_alive()  # asked first: what it said last is then in the pipe
                for fraction in each.read():
                    yield Event(id_, "progress", fraction)
                if ended:
                    del running[id_]
                    yield Event(id_, "ended", 1.0, each.error or _verdict(each.process.exitcode))

    def _start(self, task: Task, worker: Worker) -> _Running:
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(task, worker, self.threads, send), name=task.id)
        # Ctrl-C reaches every process of the terminal. The children are born with it blocked: it is for the
        # parent to tell them (SIGTERM), so that none dies in the middle of its imports with a traceback.
        resource_tracker.ensure_running()  # starting it unblocks signals, so not in between
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        send.close()
        return _Running(process, receive)

    def _stop(self, processes: list[Any]) -> None:
        """SIGTERM, time for a checkpoint, SIGKILL. A second Ctrl-C cuts the time short."""
        try:
            for process in processes:
                process.terminate()
            end = time.monotonic() + self.grace
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _verdict(exitcode: int | None) -> str | None:
    """What an exit code means for a process that said nothing about an error."""
    if exitcode == 0:
        return None
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"ended with exit code {exitcode}"


def _child(task: Task, worker: Worker, threads: int, pipe: connection.Connection) -> None:
    """The life of one process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    log = os.open(task.directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    import torch

    torch.set_num_threads(threads)

    def report(fraction: float) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, and we with it in a moment
            pipe.send(("progress", fraction))

    error = execute(task, worker, report)
    if error is not None:
        pipe.send(("error", error))
        sys.exit(1)


def _die_with(parent: Any) -> None:
    """No run goes on unseen when the sweep itself was killed."""
    parent.join()
    os._exit(1)
