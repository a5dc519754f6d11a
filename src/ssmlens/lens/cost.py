"""What going backwards through a model will take, before it is done: seconds and bytes, from a short piece of the text.

    seconds ≈ length/l · (forward + forward + vectors · backward),  timed at l tokens
    bytes   ≈ what enters every block + one gˡ for every vector + three times what a block's graph keeps (so much is at work beside it)

Both are linear in the length, as recurrent models are; attention takes longer than that where length ≫ 10 d_model. Bytes are those beyond the model's
own; `plan` makes the most of what is free: fewer sequences at a time, then fewer vectors at a time (each group costs two forward passes more).
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ssmlens.errors import UserError
from ssmlens.lens.floor import LONGEST
from ssmlens.lens.jacobian import Ask, Backward

_PIECE = 256  # tokens that are timed
_SHORT = 1.0  # seconds
_VECTORS_AT_ONCE = 2**27  # numbers in all gˡ of a group
_FLOOR_RUNS = (
    3.5  # the float64 copy and its float32 twin, in float32 runs with one vector, of at most floor.LONGEST tokens
)
_USABLE = 0.8  # of the free memory


@dataclass(frozen=True)
class Cost:
    """What is expected: seconds, bytes beyond the model's own. batch, group: sequences and vectors that go through together.
    in_double: whether a float64 copy has room too."""

    seconds: float
    bytes: int
    batch: int
    group: int
    in_double: bool = True

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} and {size(self.bytes)} of memory"


def plan(
    backward: Backward, tokens: Int[Tensor, "n length"], ask: Ask, vectors: list[Tensor], count: int, batch: int, free: int | None = None
) -> Cost:  # fmt: skip
    """The cost of `count` vectors on each of the sequences, `batch` of them together at most. vectors: three, for one sequence; ask: what they
    multiply, at any length. free: bytes; None: what the device has.

    Raises UserError where even one sequence with one vector does not fit."""
    n, length = tokens.shape
    piece = tokens[:1, : min(length, _PIECE)]
    share = length / piece.shape[1]
    one, kept = _timed(backward, piece, ask, vectors[:1])
    if one < _SHORT:  # the first time is slower
        one = min(one, _timed(backward, piece, ask, vectors[:1])[0])
    all_three, _ = _timed(backward, piece, ask, vectors)
    each = max(all_three - one, 0.0) / (len(vectors) - 1)
    width, own = backward.subject.embed(piece[:, :1]).shape[-1], torch.finfo(backward.subject.dtype).bits // 8
    free = _free(tokens.device) if free is None else free

    def bytes_of(sequences: int, group: int, item: int, length: int) -> int:
        streams = (backward.depths if backward.in_blocks else 0) + group + 1
        return int(sequences * length * (streams * width * item + 3 * kept / piece.shape[1] * item / own))

    model = sum(p.numel() for p in backward.subject.model.parameters())
    floor = bytes_of(1, 1, 8, min(length, LONGEST)) + 8 * model if own < 8 else 0
    batch = min(batch, n)
    group = max(1, min(count, _VECTORS_AT_ONCE // (batch * length * width)))
    while free is not None and bytes_of(batch, group, own, length) > _USABLE * free and (batch > 1 or group > 1):
        batch, group = (batch // 2, group) if batch > 1 else (1, group // 2)
    needed = bytes_of(batch, group, own, length)
    if free is not None and needed > _USABLE * free:
        raise UserError(
            f"{backward.subject.name}: influence over {length} tokens needs {size(needed)} of memory, {size(free)} are free; "
            "give a smaller length, or a device with more memory"
        )
    fixed = max(one - each, 0.0)
    seconds = (
        share * n * (math.ceil(count / group) * fixed + count * each)
        + min(share, LONGEST / piece.shape[1]) * _FLOOR_RUNS * one
    )
    in_double = free is None or floor <= _USABLE * free
    return Cost(seconds, max(needed, floor if in_double else 0), batch, group, in_double)


def _timed(backward: Backward, piece: Tensor, ask: Ask, vectors: list[Tensor]) -> tuple[float, int]:
    """Seconds, and the largest number of bytes that one block's graph (or the whole model's) keeps."""
    own = {p.untyped_storage().data_ptr() for p in backward.subject.model.parameters()}
    seen: dict[int, Tensor] = {}  # held, so that no address is used twice
    bytes_, largest = 0, 0

    def keep(x: Tensor) -> Tensor:
        nonlocal bytes_
        where = x.untyped_storage().data_ptr()
        if where not in own and where not in seen:
            seen[where] = x
            bytes_ += x.untyped_storage().nbytes()
        return x

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        for _ in backward(piece, ask, vectors):
            largest, bytes_ = max(largest, bytes_), 0
            seen.clear()
    if piece.device.type == "cuda":
        torch.cuda.synchronize(piece.device)
    return time.perf_counter() - start, largest


def _free(device: torch.device) -> int | None:
    """Bytes that are free where the tensors are; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:  # a container may have less
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf"):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        except (OSError, ValueError):
            return None
    return min(found) if found else None


def duration(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ > 0.95 * 2**30 else f"{max(1, round(bytes_ / 2**20))} MiB"
