"""Where a training step spends its time: torch.profiler's self time of every operator, by groups.

The whole step stands in one region of its own, whose self time is what no operator takes: Python, autograd's bookkeeping and the
profiler itself. So the shares add up to the step, and that of everything that is not arithmetic is rather too large than too small."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ssmlens.bench.timing import Report

PRODUCTS, SCAN, OUTSIDE = "matrix products", "scan", "no operator (Python, autograd, the profiler)"
STEP = "ssmlens bench: step"

# The first group with a word that occurs in an operator's name has it.
GROUPS: dict[str, tuple[str, ...]] = {
    OUTSIDE: (STEP, "autograd::", "Backward", "profiler"),
    "optimizer": ("adam", "Optimizer"),
    SCAN: ("scan",),
    "short convolution": ("conv",),
    PRODUCTS: ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "embedding": ("embedding", "index"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "norm": ("norm",),
    "copies and fills": ("copy", "cat", "clone", "fill", "zero", "ones", "empty", "contiguous", "full"),
    "element-wise and sums": (
        "aten::sum", "aten::mean", "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::exp", "aten::pow", "sqrt", "sigmoid", "silu", "gelu",
        "tanh", "softplus", "threshold", "aten::log",
    ),
    "shapes and dispatch": (
        "view", "aten::t", "aten::select", "aten::slice", "aten::narrow", "aten::as_strided", "reshape", "expand", "squeeze", "permute",
        "detach", "split", "chunk", "alias", "aten::linear", "aten::matmul", "result_type", "aten::resize",
    ),
}  # fmt: skip
REST = "everything else"
PRETTY = {STEP: "Python between operators"}


def group(operator: str) -> str:
    return next((name for name, words in GROUPS.items() if any(w in operator for w in words)), REST)


def measure(step: Callable[[], object], repeats: int, report: Report = lambda _: None) -> dict[str, list[list[float]]]:
    """{operator: [[calls, seconds] of each of `repeats` steps]}, after one step that is not counted."""
    from torch.profiler import ProfilerActivity, profile, record_function

    step()
    found: dict[str, list[list[float]]] = defaultdict(lambda: [[0, 0.0] for _ in range(repeats)])
    for i in range(repeats):
        with _without_its_log(), profile(activities=[ProfilerActivity.CPU]) as record, record_function(STEP):
            step()
        for event in record.key_averages():
            found[event.key][i] = [event.count, event.self_cpu_time_total * 1e-6]
        report((i + 1) / repeats)
    return dict(found)


@contextmanager
def _without_its_log() -> Iterator[None]:
    """Some builds of the profiler write lines to stderr from C++."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def shares(measured: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """Of every group that occurs, its share of each step (0 to 1), the largest first."""
    steps = range(len(next(iter(measured.values()))))
    totals = [sum(each[i][1] for each in measured.values()) for i in steps]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0 for _ in steps])
    for operator, each in measured.items():
        for i in steps:
            found[group(operator)][i] += each[i][1] / totals[i]
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


def largest(measured: dict[str, list[list[float]]], of: str, most: int = 3) -> str:
    """The operators of a group that take most, with their number of calls a step."""
    mine = sorted(
        ((sum(s for _, s in each), each[0][0], op) for op, each in measured.items() if group(op) == of), reverse=True
    )
    total = sum(s for each in measured.values() for _, s in each)
    return ", ".join(
        f"{PRETTY.get(op, op.removeprefix('aten::'))} ({calls:.0f}×)"
        for s, calls, op in mine[:most]
        if s > 0.002 * total
    )
