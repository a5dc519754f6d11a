"""One very long sequence through a whole model, in bounded memory."""

import sys
from typing import Any

from ssmlens.bench import long, memory
from ssmlens.bench.parts.base import Expectation, Found, Results, loading
from ssmlens.bench.scales import Scale
from ssmlens.bench.timing import Report
from ssmlens.results import Column, Table, Value

PROMISED = 4e9  # bytes
PER_TOKEN = 3.5e-5  # seconds


def units(s: Scale) -> dict[str, float]:
    return {"sequence": loading(s, 2) + PER_TOKEN * s.long.length}


def measure(unit: str, s: Scale, report: Report) -> Any:
    """peak: all of this process's memory, so it says something only in a process of its own (Scale.apart)."""
    seconds = long.measure(s.long)
    return {"seconds": seconds, "peak": memory.resident("VmHWM") if s.apart else None}


def found(s: Scale, results: Results) -> Found:
    if "sequence" not in results:
        return Found()
    seconds, peak = results["sequence"]["seconds"], results["sequence"]["peak"]
    table = Table(
        id="long", title=f"One sequence through a polarized Mamba, {s.long}",
        columns=[Column(name="time", unit="s"), Column(name="tokens per second"), Column(name="peak memory of the process", unit="GB")],
        rows=[[Value(value=seconds, n=1, unit="s"), round(s.long.length / seconds), None if peak is None else round(peak / 1e9, 2)]],
        meaning="Loss and hidden states of every token, without gradients, in one call.",
        method="One call in a process of its own, all of whose memory counts, Python and PyTorch included.",
    )  # fmt: skip
    size = "" if peak is None else f" and {peak / 1e9:.1f} GB, Python and PyTorch included"
    expected = []
    if peak is not None:
        expected.append(Expectation(f"{s.long.length:,} tokens through a {s.long.layers}-layer model", "under 4 GB", f"{peak / 1e9:.1f} GB", peak < PROMISED))  # fmt: skip
    notes = [] if sys.platform == "linux" or not s.apart else ["Memory is not measured: this system does not tell."]
    return Found(
        [table], [], [f"One sequence of {s.long.length:,} tokens takes {seconds:.1f} s{size}."], notes, expected
    )
