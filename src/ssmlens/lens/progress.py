"""How a measurement says how far it is. A measurement calls begin() once and step() often; what shows it is up to the caller."""

from types import TracebackType
from typing import Any, Protocol, Self

from ssmlens.progress import bars


class Progress(Protocol):
    def begin(self, what: str, steps: int) -> None:
        """A measurement of `steps` equal steps starts."""

    def step(self, n: int = 1) -> None:
        """n of them are done."""

    def say(self, what: str) -> None:
        """One line, before a measurement that may take long."""


class Silent:
    def begin(self, what: str, steps: int) -> None:
        pass

    def step(self, n: int = 1) -> None:
        pass

    def say(self, what: str) -> None:
        pass


class Bars:
    """One bar per measurement with its time left, on stderr (stdout is the record's where --json asks for it)."""

    def __init__(self) -> None:
        self._bars = bars("{task.percentage:>3.0f}%")
        self._task: Any = None

    def begin(self, what: str, steps: int) -> None:
        self._task = self._bars.add_task(what, total=steps)

    def step(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)

    def say(self, what: str) -> None:
        self._bars.console.print(what, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
