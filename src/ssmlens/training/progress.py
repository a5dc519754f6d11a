"""What a person sees while it runs. Drawn on stderr: stdout belongs to results."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from ssmlens.progress import bars


class Display(Protocol):
    """Where the loop tells how far it is."""

    def step(self, step: int) -> None:
        """Called after every step; must cost next to nothing."""
        ...

    def row(self, row: dict[str, Any]) -> None:
        """Called for every new row of the history."""
        ...

    def log(self, message: str) -> None: ...
    def close(self) -> None: ...


class Quiet:
    """No bar. Says the fraction that is done to `report`, at most twice a second."""

    def __init__(self, steps: int, report: Callable[[float], None] | None) -> None:
        self.steps, self.report, self.last = steps, report, 0.0

    def step(self, step: int) -> None:
        if self.report is not None and ((now := time.monotonic()) > self.last + 0.5 or step == self.steps):
            self.last = now
            self.report(step / self.steps)

    def row(self, row: dict[str, Any]) -> None:
        pass

    def log(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """Loss, accuracy, tokens per second, time left."""

    def __init__(self, title: str, steps: int, done: int) -> None:
        self.progress = bars("{task.completed:.0f}/{task.total:.0f} {task.fields[numbers]}", elapsed=False)
        self.task = self.progress.add_task(title, total=steps, completed=done, numbers="")
        self.last, self.said = 0.0, time.monotonic()
        self.progress.start()

    def step(self, step: int) -> None:
        if (now := time.monotonic()) > self.last + 0.2 or step == self.progress.tasks[0].total:
            self.last = now
            self.progress.update(self.task, completed=step)

    def row(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            speed = si(row["tokens_per_second"])
            text = f"loss {row['loss']:.3f} acc {row['accuracy']:.1%} {speed} tok/s"
            self.progress.update(self.task, numbers=text)
            if not self.progress.console.is_terminal and (now := time.monotonic()) > self.said + 30:
                self.said = now  # a log file gets a line now and then instead of a bar
                self.log(f"step {row['step']}: {text}")
        else:
            values = "  ".join(f"{name} {value:.4g}" for name, value in row["evaluation"].items())
            self.log(f"step {row['step']}: {values}")

    def log(self, message: str) -> None:
        self.progress.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def display(progress: bool | Callable[[float], None], title: str, steps: int, done: int) -> Display:
    """A bar, or a function that is told the share that is done, or nothing."""
    if progress is True:
        return Bar(title, steps, done)
    return Quiet(steps, progress or None)


def si(number: float) -> str:
    """12345 → 12.3k."""
    for suffix in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{suffix}"
        number /= 1000
    return f"{number:.3g}G"
