"""Triton kernels for the recurrence on an NVIDIA GPU (compute capability 8.0 or later), compiled on first use.

Shapes and meaning as in `ssmlens.ops`, whose functions check the arguments and call these; every function returns its
output and the final state. float32, float64, bfloat16 and float16 are read as they come; state and accumulation are float32
(float64 for float64 input). Results are the same run after run: nothing is added in an order that varies.

Values are not checked (that would wait for the GPU): A and log_a must be ≤ 0. Tensors on a CPU are computed under Triton's
interpreter where TRITON_INTERPRET=1 was set before Triton was imported: that is how these kernels are tested, and slow.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops.chunked.lti import by_scan

__all__ = [
    "available", "causal_conv1d", "gated_linear_attention", "linear_scan", "lti_convolution", "selective_scan", "supports_causal_conv1d",
    "supports_gated_linear_attention", "supports_linear_scan", "supports_selective_scan", "why_unavailable",
]  # fmt: skip

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LARGEST_STATE = 256
_LONGEST_CONVOLUTION = 16


def available() -> bool:
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """None where the kernels can run, else the reason they cannot. Imports Triton, compiles nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch for CUDA on Linux; elsewhere `pip install triton`)"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if torch.version.hip is None and oldest < (8, 0):
        return f"the GPU has compute capability {oldest[0]}.{oldest[1]}; the kernels need 8.0"
    return None


def _interpreting() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


# What torch.compiler.assume_constant_result does, without importing all of dynamo: tracing calls these, and keeps the answer.
for _function in (available, why_unavailable, _interpreting):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def _supported(*tensors: Tensor | None) -> bool:
    given = [t for t in tensors if t is not None]
    if not available() or any(t.dtype not in _DTYPES or t.numel() == 0 for t in given):
        return False
    return all(t.device.type == ("cpu" if _interpreting() else "cuda") for t in given)


def supports_selective_scan(x: Tensor, A: Tensor | None = None) -> bool:
    """Real A of at most 256 state channels; complex A is left to the chunked backend."""
    return _supported(x, A) and (A is None or A.shape[1] <= _LARGEST_STATE)


def supports_linear_scan(u: Tensor, a: Tensor | None = None) -> bool:
    """Real u and a."""
    return _supported(u, a)


def supports_gated_linear_attention(v: Tensor, log_a: Tensor | None = None) -> bool:
    return _supported(v, log_a)


def supports_causal_conv1d(x: Tensor, weight: Tensor | None = None) -> bool:
    """Windows of at most 16 tokens."""
    return _supported(x, weight) and (weight is None or weight.shape[1] <= _LONGEST_CONVOLUTION)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.selective_scan` for real A."""
    A, D, dt_bias, h0 = (_promoted(t, x) for t in (A, D, dt_bias, h0))
    needed = (x, dt, A, B, C, D, z, dt_bias, h0)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needed)
    y, final_state, _ = _functions().SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, save)
    return y, final_state


def lti_convolution(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    *,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.lti_convolution` as a scan, where `supports_selective_scan`."""
    return by_scan(selective_scan, x, A, B, C, dt, D=D, h0=h0, reset=reset)


def linear_scan(
    a: Tensor, u: Tensor, *, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.linear_scan` for real a, which broadcasts to u."""
    batch, length, *state = u.shape
    start = None if h0 is None else _promoted(h0, u).reshape(batch, -1)
    flat = (a.expand_as(u).reshape(batch, length, -1), u.reshape(batch, length, -1))
    h = _functions().LinearScan.apply(*flat, start, reset).view(batch, length, *state)
    return h.to(u.dtype), h[:, -1]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    *,
    bonus: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.gated_linear_attention`. Products of matrices are formed in float32 (IEEE) or float64; in TF32 with float32
    accumulation where q, k and v are all bfloat16 or all float16."""
    return _functions().GatedLinearAttention.apply(q, k, v, log_a, _promoted(bonus, v), _promoted(h0, v), reset)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.causal_conv1d`. The final state is zero where a later token could not reach it because of a reset."""
    first = _promoted(initial, x)
    y = _functions().CausalConv1d.apply(x, _promoted(weight, x), _promoted(bias, x), activation == "silu", first, reset)
    return y, _last_tokens(x, weight.shape[1] - 1, first, reset)


def _last_tokens(x: Tensor, count: int, initial: Tensor | None, reset: Tensor | None) -> Tensor:
    """The last `count` tokens of initial and x in the dtype of the state, zeros before the last reset."""
    missing = max(0, count - x.shape[1])
    last: Tensor = _promoted(x[:, x.shape[1] - (count - missing) :], x)
    if missing:
        last = F.pad(last, (0, 0, missing, 0)) if initial is None else torch.cat([initial[:, -missing:], last], 1)
    if reset is not None and count:
        resets = F.pad(reset[:, max(0, x.shape[1] - count) :], (missing, 0))
        later = resets.flip(1).cumsum(1).flip(1) - resets.long()  # resets after each token
        last = last.masked_fill((later > 0)[..., None], 0)
    return last


def _functions() -> Any:
    """The autograd functions; importing them defines the operators."""
    from ssmlens.ops.triton import _autograd

    return _autograd


def _promoted(t: Any, like: Tensor) -> Any:
    """t in the dtype of the state: float64 for float64 input, else float32."""
    return None if t is None else t.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
