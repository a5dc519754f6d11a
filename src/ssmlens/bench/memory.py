"""How much memory a call needs beyond what its arguments take: measured in a process of its own, by the operating system, so that
what C++ allocates counts too."""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (the most so far) of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _measure(prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...], threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    small = prepare(*arguments)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    result = small()
    peak = resident("VmHWM")
    del result
    return max(0, peak - before)


def extra(prepare: Callable[..., Callable[[], object]], *arguments: object, threads: int) -> int | None:
    """Bytes that prepare(*arguments)() needs at its peak beyond what stood before it. `prepare` must be importable: it runs in
    a new process. None where the system does not tell (not Linux)."""
    if sys.platform != "linux":
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, arguments, threads).result()
