"""Ctrl-C and SIGTERM, taken when it suits the training: a step half done would be worth nothing."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stops:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; a second one strikes at once.

    In any thread but the main one it does nothing (Python delivers signals to the main thread only).
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):  # others have their reasons: leave them
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self.requested is not None and kind is None:  # it came when all was done: not to be swallowed
            raise self.error()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = number
        if self._at_once or again:
            raise self.error()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For stretches that may be cut anywhere, such as an evaluation."""
        if self.requested is not None:
            raise self.error()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def error(self) -> BaseException:
        """What to raise for the signal that came: KeyboardInterrupt, or SystemExit(143) for SIGTERM."""
        if self.requested == signal.SIGTERM:
            return SystemExit(128 + signal.SIGTERM)
        return KeyboardInterrupt()
