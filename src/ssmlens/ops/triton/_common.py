# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="import-not-found,import-untyped,misc,assignment,var-annotated"

"""What the Triton kernels share: launching, how a sequence is cut into chunks, and small functions that are inlined.

A sequence is scanned in two levels where there are too few sequences and channels to fill a GPU: every chunk of time alone
(what it adds, what it multiplies the state before it by), then a scan over chunks, then every chunk again from its true
starting state. Every index of a tensor is int64: offsets pass 2^31 at lengths that people do use.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

WARPS_WANTED = 4096  # enough to fill the largest GPUs a few times over; below it, a sequence is cut into chunks
SHORTEST_CHUNK = 64


def chunk_length(length: int, warps: int) -> int:
    """How many tokens one program scans: all of them where `warps` (batch times blocks of channels) fill the GPU, otherwise
    fewer, in multiples of SHORTEST_CHUNK. It depends on shapes alone, so that results repeat on any device."""
    chunks = min(WARPS_WANTED // max(1, warps), -(-length // SHORTEST_CHUNK))
    if chunks < 3:  # two levels do everything twice
        return length
    each = -(-length // chunks)
    return -(-each // SHORTEST_CHUNK) * SHORTEST_CHUNK


def launch(kernel: Any, programs: int, like: Tensor, *arguments: Any, **constants: Any) -> None:
    if programs >= 2**31:
        raise ValueError(f"{programs} programs are more than a GPU's grid can hold")
    run: Callable[..., None] = kernel[(programs,)]
    if like.is_cuda:
        with torch.cuda.device(like.device):
            run(*arguments, **constants)
    else:
        run(*arguments, **constants)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton's name for the dtype of state and accumulation."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def flags(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def log1p(e):
    """For 0 ≤ e ≤ 1, to the last digits also where e is small: 2 atanh(s), s = e / (2 + e) ≤ 1/3, as a series in s²."""
    s = e / (2 + e)
    TERMS: tl.constexpr = 17 if e.dtype == tl.float64 else 9
    total = tl.zeros(e.shape, e.dtype)
    for k in tl.static_range(TERMS - 1, -1, -1):
        total = total * (s * s) + 1 / (2 * k + 1)
    return 2 * s * total


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    """Δ from its pre-activation; softplus as torch has it, the identity above 20."""
    pre = raw + bias
    if SOFTPLUS:
        pre = tl.where(pre > 20, pre, tl.maximum(pre, 0.0) + log1p(tl.exp(-tl.abs(pre))))
    return pre


@triton.jit
def step_size_slope(raw, bias, SOFTPLUS: tl.constexpr):
    pre = raw + bias
    slope = tl.full(pre.shape, 1.0, pre.dtype)
    if SOFTPLUS:
        slope = tl.where(pre > 20, 1.0, sigmoid(pre))
    return slope
