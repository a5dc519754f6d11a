"""How much memory a call needs beyond what its arguments take, as the operating system sees it: what C++ allocates counts too.

Only the first measurement of a process counts: memory that earlier calls gave back may still be the process's own."""

import sys
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int | None:
    """Bytes: VmRSS (now) or VmHWM (the most so far) of this process. None where the system does not tell (not Linux)."""
    if sys.platform != "linux":
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def extra(call: Callable[[], object]) -> int | None:
    """Bytes that call() needs at its peak beyond what stood before it. None where the system does not tell."""
    before = resident("VmRSS")
    if before is None:
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    except OSError:  # some containers forbid it
        return None
    result = call()
    peak = resident("VmHWM")
    del result
    return None if peak is None else max(0, peak - before)
