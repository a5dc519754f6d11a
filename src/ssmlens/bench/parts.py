"""What `ssmlens bench` can measure, a function each: sizes in, tables, figures and sentences out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ssmlens.bench import every, layer, long, memory, scan
from ssmlens.bench.layer import Size
from ssmlens.bench.scan import Shape
from ssmlens.bench.timing import Contender, Times, in_turns, median, quartiles, ratios
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Before = Callable[[str], None]  # told what is about to be measured


@dataclass(frozen=True)
class Scale:
    """Sizes, rounds, and after how many seconds a slow contender sits out. peak: measure memory too (a process for each)."""

    scan: Shape
    layer: Size
    step: Size
    mixers: Size
    long: Size
    lengths: tuple[int, ...]
    width: tuple[int, int]  # d_inner, d_state of the sweep over lengths
    rounds: int
    budget: float
    peak: bool


SCALES = {
    "smoke": Scale(
        scan=Shape(1, 24, 8, 4), layer=Size(1, 16, 16), step=Size(1, 16, 16, layers=1), mixers=Size(1, 16, 64, layers=1), long=Size(1, 300, 16, layers=1),
        lengths=(10, 100), width=(8, 4), rounds=2, budget=1.0, peak=False,
    ),
    "laptop": Scale(
        scan=Shape(8, 1024, 256, 16), layer=Size(8, 1024, 128), step=Size(8, 1024, 128, layers=4), mixers=Size(2, 1024, 128, layers=2),
        long=Size(1, 1_000_000, 128, layers=4), lengths=(100, 1000, 10_000, 100_000, 1_000_000), width=(64, 16), rounds=9,
        budget=8.0, peak=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)


def _contenders(calls: dict[str, Callable[[], object]]) -> list[Contender]:
    return [Contender(name, run) for name, run in calls.items()]


def _spread(times: Times, of: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of a ratio taken round by round."""
    r = ratios(times, of, to)
    low, high = quartiles(r)
    return median(r).value, low, high


def _times(ratio: tuple[float, float, float]) -> str:
    digits = 0 if ratio[0] >= 20 else 1 if ratio[0] >= 2 else 2
    return f"{ratio[0]:.{digits}f} times (quartiles {ratio[1]:.{digits}f} to {ratio[2]:.{digits}f})"


METHOD = (
    "Contenders take turns in one process, {rounds} rounds; medians over rounds with robust standard errors, ratios taken within a "
    "round. One that has used {budget:g} seconds sits out the rest. {threads} thread(s), float32, CPU."
)


def _method(s: Scale) -> str:
    return METHOD.format(rounds=s.rounds, budget=s.budget, threads=torch.get_num_threads())


# ---- the scan ----


def scans(s: Scale, before: Before) -> Found:
    names = list(scan.scans())
    own = names[0]
    forward = _contenders({n: scan.forward(n, s.scan) for n in names})
    floors: dict[str, Callable[[], object]] = {TORCH_EXP: scan.torch_exp(s.scan)}
    if own == scan.OURS:
        floors[FLOOR] = scan.exponentials(s.scan)
    forward_times = in_turns([*forward, *_contenders(floors)], rounds=s.rounds, budget=s.budget, before=before)
    both_times = in_turns(
        _contenders({n: scan.both(n, s.scan) for n in names}), rounds=s.rounds, budget=s.budget, before=before
    )
    peaks: dict[str, int | None] = dict.fromkeys(names)
    if s.peak:
        for name in names:
            before(f"memory of {name}")
            peaks[name] = memory.extra(scan.both_warm, name, s.scan, threads=torch.get_num_threads())
    per_element = 1e9 / s.scan.elements
    rows: list[list[Cell]] = []
    for n in names:
        f, b = _spread(forward_times, n, own), _spread(both_times, n, own)
        peak = peaks[n]
        rows.append([
            n, median(forward_times[n], "ns", per_element), median(both_times[n], "ns", per_element), round(f[0], 2), round(b[0], 2),
            f"{b[1]:.3g} to {b[2]:.3g}", None if peak is None else round(peak / 2**20),
        ])  # fmt: skip
    for n in floors:
        f = _spread(forward_times, n, own)
        rows.append([n, median(forward_times[n], "ns", per_element), None, round(f[0], 2), None, None, None])
    table = Table(
        id="scan", title=f"Selective scan, {s.scan} (batch × length × d_inner × d_state)",
        columns=[
            Column(name="contender"), Column(name="forward", unit="ns per element"),
            Column(name="forward + backward", unit="ns per element"), Column(name=f"forward, relative to {own}"),
            Column(name=f"forward + backward, relative to {own}"), Column(name="its quartiles"),
            Column(name="extra memory", unit="MiB", meaning="peak of forward + backward beyond the arguments"),
        ],
        rows=rows, method=_method(s) + " Memory: the operating system's peak in a fresh process.",
        meaning="One function, h = exp(dt A) h + dt B x, y = C h + D x, by every contender. The last rows are not scans: as many "
        "exponentials alone, by this kernel's own code on data in cache, and by torch.exp on as many numbers in memory.",
    )  # fmt: skip
    verdict = []
    for n in (scan.MAMBAPY, scan.LOOP, scan.TRANSFORMERS):
        if n in names:
            verdict.append(
                f"Forward and backward of the scan: {n} takes {_times(_spread(both_times, n, own))} as long as {own}."
            )
    if own == scan.OURS:
        verdict.append(
            f"The forward scan takes {_times(_spread(forward_times, own, FLOOR))} as long as its exponentials alone, and "
            f"{_times(_spread(forward_times, own, TORCH_EXP))} as long as one torch.exp over as many numbers."
        )
    else:
        verdict.append("The C++ kernels are not available here, so these are the times of the pure torch path.")
    return Found([table], [], verdict)


FLOOR, TORCH_EXP = "floor: the kernel's exponentials", "torch.exp"


# ---- over lengths ----


def _next(points: list[tuple[int, Value]]) -> float:
    """Seconds to expect at ten times the length. Some grow with its square (a token loop whose backward pass makes a gradient as
    long as the sequence for every token), which shows only late: growth is assumed to grow, and to be bad where nothing is known."""
    last = points[-1][1].value
    grown = last / points[-2][1].value if len(points) > 1 else 30.0
    return last * max(10.0, grown**2 / 10)


def _at_length(before: Before, length: int, name: str) -> None:
    before(f"{name}, length {length:,}")


def lengths(s: Scale, before: Before) -> Found:
    """Seconds of forward + backward, batch 1. A contender that would be over budget is not asked for the next length."""
    d_inner, d_state = s.width
    points: dict[str, list[tuple[int, Value]]] = {n: [] for n in scan.scans()}
    skipped: set[str] = set()
    for length in s.lengths:
        shape = Shape(1, length, d_inner, d_state)
        names = [n for n in points if n not in skipped]
        calls = _contenders({n: scan.both(n, shape) for n in names})
        say: Before = partial(_at_length, before, length)
        times = in_turns(calls, rounds=3, budget=s.budget / 3, before=say)
        for n in names:
            points[n].append((length, median(times[n], "s")))
            if _next(points[n]) > s.budget:
                skipped.add(n)
    series = [
        Series(name=n, x=[float(x) for x, _ in p], y=[v.value for _, v in p], stderr=[v.stderr or 0.0 for _, v in p])
        for n, p in points.items()
    ]
    figure = Figure(
        id="length", title=f"Time over length, batch 1, d_inner {d_inner}, d_state {d_state}", x_label="length (tokens)",
        y_label="forward + backward (s)", x_scale="log", y_scale="log", series=series,
        meaning="A line that rises by a factor of ten for every factor of ten in length is linear growth.", method=_method(s),
    )  # fmt: skip
    own = next(iter(points))
    (short, fast), (far, slow) = points[own][-2], points[own][-1]
    per_token = slow.value / far / (fast.value / short)
    return Found(
        [], [figure],
        [f"{own} grows linearly: a token of {far:,} costs {per_token:.2f} times what a token of {short:,} costs."
         if 0.5 < per_token < 1.5 else
         f"{own} does not grow linearly here: a token of {far:,} costs {per_token:.2f} times what a token of {short:,} costs."],
    )  # fmt: skip


# ---- a layer ----


def layers(s: Scale, before: Before) -> Found:
    rows: list[list[Cell]] = []
    verdict = []
    for what, backward in (("forward", False), ("forward + backward", True)):
        times = in_turns(
            _contenders(layer.layer_calls(s.layer, backward)), rounds=s.rounds, budget=s.budget, before=before
        )
        for name in times:
            r = _spread(times, name, "ssmlens")
            rows.append([what, name, median(times[name], "ms", 1e3), round(r[0], 2), f"{r[1]:.3g} to {r[2]:.3g}"])
        verdict.append(
            f"A Mamba layer, {what}: transformers takes {_times(_spread(times, 'transformers', 'ssmlens'))} as long, on the same weights."
        )
    table = Table(
        id="layer", title=f"One Mamba layer, {s.layer}",
        columns=[Column(name="pass"), Column(name="contender"), Column(name="time", unit="ms"), Column(name="relative to ssmlens"),
                 Column(name="its quartiles")],
        rows=rows, method=_method(s),
        meaning="The same random weights in transformers' layer (its CPU path, pure torch) and in ours; the layer's four matrix products alone.",
    )  # fmt: skip
    return Found([table], [], verdict)


# ---- a training step ----


def steps(s: Scale, before: Before) -> Found:
    calls = layer.steps(s.step)
    times = in_turns(_contenders(calls), rounds=max(2, s.rounds // 2), budget=2 * s.budget, before=before)
    tokens = s.step.batch * s.step.length
    ours, theirs = calls
    rows: list[list[Cell]] = []
    for name in times:
        r = _spread(times, name, ours)
        seconds = median(times[name], "ms", 1e3)
        rows.append([name, seconds, round(tokens / seconds.value * 1e3), round(r[0], 2), f"{r[1]:.3g} to {r[2]:.3g}"])
    table = Table(
        id="step", title=f"A training step, {s.step.layers} layers, {s.step}",
        columns=[Column(name="model"), Column(name="time", unit="ms"), Column(name="tokens per second"),
                 Column(name=f"relative to {ours}"), Column(name="its quartiles")],
        rows=rows, method=_method(s), meaning="Forward, backward and AdamW on next-token prediction.",
    )  # fmt: skip
    before("shares of a step")
    parts = layer.shares(calls[ours])
    share = Table(
        id="shares", title="Where our training step spends its time",
        columns=[Column(name="part"), Column(name="share", unit="%")],
        rows=[[name, round(100 * part, 1)] for name, part in parts.items()],
        method="torch.profiler over one step, self time of every operator; what the profiler itself costs counts as everything else.",
    )  # fmt: skip
    outside = parts["everything else"]
    return Found(
        [table, share], [],
        [f"A training step of the polarized Mamba: transformers' Mamba of the same size takes {_times(_spread(times, theirs, ours))} as long.",
         f"{100 * outside:.0f} % of our step is neither matrix products nor the scan."],
    )  # fmt: skip


# ---- every mixer ----


def every_mixer(s: Scale, before: Before) -> Found:
    made = every.entries(s.mixers)
    times = in_turns(
        [Contender(e.name, e.step) for e in made], rounds=max(2, s.rounds // 3), budget=s.budget, before=before
    )
    tokens = s.mixers.batch * s.mixers.length
    seconds = {e.name: median(times[e.name]).value for e in made}
    fastest = {kind: min(seconds[e.name] for e in made if e.kind == kind) for kind in {e.kind for e in made}}
    rows: list[list[Cell]] = [
        [e.name, e.kind, e.parameters, median(times[e.name], "ms", 1e3), round(tokens / seconds[e.name]), round(seconds[e.name] / fastest[e.kind], 2)]
        for e in sorted(made, key=lambda e: (e.kind, seconds[e.name]))
    ]  # fmt: skip
    table = Table(
        id="mixers", title=f"A training step of every mixer, {s.mixers.layers} layers, {s.mixers}",
        columns=[Column(name="mixer"), Column(name="its state"), Column(name="parameters"), Column(name="time", unit="ms"),
                 Column(name="tokens per second"), Column(name="relative to the fastest of its kind")],
        rows=rows, method=_method(s),
        meaning="Blocks of mixer and GELU MLP, each filled up by the MLP to the same number of parameters; forward, backward and AdamW.",
    )  # fmt: skip
    slowest = max(made, key=lambda e: seconds[e.name] / fastest[e.kind])
    return Found(
        [table], [],
        [f"Of all mixers, {slowest.name} is slowest beside its kind: {seconds[slowest.name] / fastest[slowest.kind]:.1f} times the fastest."],
    )  # fmt: skip


# ---- one very long sequence ----


def longest(s: Scale, before: Before) -> Found:
    before(f"one sequence of {s.long.length:,} tokens")
    seconds, peak = long.measure(s.long, torch.get_num_threads())
    table = Table(
        id="long", title=f"One sequence of {s.long.length:,} tokens through a {s.long.layers}-layer polarized Mamba of d_model {s.long.d_model}",
        columns=[Column(name="time", unit="s"), Column(name="tokens per second"), Column(name="peak memory of the process", unit="GiB")],
        rows=[[round(seconds, 2), round(s.long.length / seconds), None if peak is None else round(peak / 2**30, 2)]],
        meaning="Loss and hidden states of every token, without gradients, in one call.",
        method="In a process of its own, all of whose memory counts, Python and PyTorch included.",
    )  # fmt: skip
    size = "" if peak is None else f" and {peak / 2**30:.1f} GiB, Python and PyTorch included"
    return Found([table], [], [f"One sequence of {s.long.length:,} tokens takes {seconds:.0f} s{size}."])


PARTS = {"scan": scans, "length": lengths, "layer": layers, "step": steps, "mixers": every_mixer, "long": longest}
