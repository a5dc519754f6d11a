"""`ssmlens bench`: how fast we are, beside others and beside what is possible, everything measured in one run on this machine."""

from collections.abc import Callable, Sequence

import torch

from ssmlens.bench.parts import PARTS, SCALES
from ssmlens.results import Record, provenance

__all__ = ["PARTS", "SCALES", "run"]


def run(
    parts: Sequence[str], scale: str, *, threads: int | None = None, before: Callable[[str], None] = lambda _: None
) -> Record:
    """Measure `parts` (names of PARTS) at `scale` (a name of SCALES) with `threads` threads (None: as PyTorch is set).
    before(what) is called ahead of every single measurement."""
    had = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        found = [PARTS[part](SCALES[scale], before) for part in parts]
        verdict = [sentence for f in found for sentence in f.verdict]
        if scale == "smoke":
            verdict = [
                "Smoke scale: this shows that every part runs. Sizes are too small for the times to mean anything."
            ]
        return Record(
            kind="bench",
            title=f"Speed ({scale} scale, {torch.get_num_threads()} thread(s))",
            verdict=verdict,
            tables=[t for f in found for t in f.tables],
            figures=[g for f in found for g in f.figures],
            config={"parts": list(parts), "scale": scale, "threads": torch.get_num_threads()},
            seeds=[0],
            provenance=provenance(),
        )
    finally:
        torch.set_num_threads(had)
