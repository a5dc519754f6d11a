"""Other people's GPU kernels for the same functions, where their packages are installed: mamba-ssm's CUDA scan as backend
"mamba_ssm" of `selective_scan`, flash-linear-attention's chunked kernels as backend "fla" of `gated_linear_attention`.

Each is used when asked for by name, and by `backend="auto"` where it is measured to be faster (`choice`). They compute the same
function only under the conditions below, one of which (no -inf in A or log_a) cannot be seen without waiting for the GPU.

Shapes and meaning as in `ssmlens.ops`; each function raises ValueError with the reason where the peer cannot be used.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INT32 = 2**31


class Refused(ValueError):
    """The peer does not compute this call."""


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
    """By mamba_ssm.ops.selective_scan_interface.selective_scan_fn. The final state has no gradient there: asking for one is
    refused. Waits for the GPU once, to see that A is finite."""
    _refuse("selective_scan", "mamba_ssm", why_not_selective_scan(x, A, h0=h0, reset=reset))
    same = all(m is None or m.dtype == x.dtype for m in (dt, z, *(m for m in (B, C) if m.dim() == 3)))
    dtype = x.dtype if same else torch.float32  # the kernel wants one dtype; the widest loses nothing

    def channels_first(m: Tensor | None) -> Tensor | None:
        return None if m is None else m.to(dtype).transpose(1, 2).contiguous()

    def parameter(m: Tensor | None) -> Tensor | None:
        return None if m is None else m.float().contiguous()

    def either(m: Tensor) -> Tensor | None:
        return channels_first(m) if m.dim() == 3 else parameter(m)

    y, last = _mamba_ssm().selective_scan_fn(
        channels_first(x), channels_first(dt), parameter(A), either(B), either(C), parameter(D), z=channels_first(z),
        delta_bias=parameter(dt_bias), delta_softplus=dt_softplus, return_last_state=True,
    )  # fmt: skip
    return y.transpose(1, 2).to(x.dtype), _WithoutGradient.apply(last.float(), y)


def why_not_selective_scan(
    x: Tensor, A: Tensor, *, h0: Tensor | None = None, reset: Tensor | None = None, values: bool = True
) -> str | None:
    """Why mamba-ssm cannot compute this, None where it can. values: look at A, which waits for the GPU."""
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    try:
        if _mamba_ssm().selective_scan_cuda is None:
            return "mamba-ssm is installed without its CUDA scan"
    except ImportError as e:
        return f"mamba-ssm cannot be imported ({e})"
    if not on_gpu(x):
        return "it needs a CUDA device"
    if x.dtype not in _DTYPES or A.is_complex() or A.dtype == torch.float64:
        return "it computes float32, bfloat16 and float16 with real A"
    if h0 is not None or reset is not None:
        return "it knows neither an initial state nor resets"
    if d_state > 256:
        return "it holds at most 256 state channels"
    states = batch * d_inner * -(-length // 2048) * d_state
    if max(x.numel(), states, batch * length * d_state) >= _INT32:
        return "its 32-bit offsets would overflow (mamba issues 880, 884)"
    if values and not bool(torch.isfinite(A).all()):
        return "A has infinite entries (pinned channels), where its gradients are NaN"
    return None


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
    """By fla.ops: chunk_rwkv6 with a bonus, else chunk_simple_gla with one decay a head and chunk_gla with one a key. Waits for
    the GPU once, to see that log_a is finite."""
    _refuse("gated_linear_attention", "fla", why_not_gated_linear_attention(k, v, log_a, reset=reset))
    per_group = v.shape[2] // q.shape[2]
    if per_group > 1:
        q, k = (m.repeat_interleave(per_group, dim=2) for m in (q, k))
    options = {"scale": 1.0, "initial_state": None if h0 is None else h0.float(), "output_final_state": True}
    q, k = q.to(v.dtype).contiguous(), k.to(v.dtype).contiguous()
    log_a = log_a.float()
    if bonus is not None:
        log_a = log_a.expand(*log_a.shape[:3], k.shape[3]).contiguous()
        y, last = _fla("rwkv6").chunk_rwkv6(q, k, v.contiguous(), log_a, bonus.float().contiguous(), **options)
    elif log_a.shape[3] == 1 and k.shape[3] > 1:
        y, last = _fla("simple_gla").chunk_simple_gla(q, k, v.contiguous(), log_a[..., 0].contiguous(), **options)
    else:
        y, last = _fla("gla").chunk_gla(q, k, v.contiguous(), log_a.contiguous(), **options)
    return y.to(v.dtype), last


def why_not_gated_linear_attention(
    k: Tensor, v: Tensor, log_a: Tensor, *, reset: Tensor | None = None, values: bool = True
) -> str | None:
    """Why flash-linear-attention cannot compute this, None where it can. values: look at log_a, which waits for the GPU."""
    batch, length, heads, d_value = v.shape
    d_key = k.shape[3]
    try:
        _fla("gla")
    except ImportError as e:
        return f"flash-linear-attention cannot be imported ({e})"
    if not on_gpu(v):
        return "it needs a CUDA device"
    if v.dtype not in _DTYPES or torch.float64 in (k.dtype, log_a.dtype):
        return "it computes float32, bfloat16 and float16"
    if reset is not None:
        return "it knows no resets inside a batch"
    if d_key > 256:
        return "it holds at most 256 keys a head"
    states = batch * -(-length // 16) * heads * d_key * d_value
    if max(batch * length * heads * max(d_key, d_value), states) >= _INT32:
        return "32-bit offsets could overflow"
    if values and not bool(torch.isfinite(log_a).all()):
        return "log_a has infinite entries (a = 0), of which it would take differences"
    return None


def _refuse(op: str, backend: str, reason: str | None) -> None:
    if reason is not None:
        raise Refused(f"{op}: backend {backend!r} cannot be used here: {reason}")


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _mamba_ssm() -> ModuleType:
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface")


def _fla(family: str) -> ModuleType:
    return importlib.import_module(f"fla.ops.{family}")


class _WithoutGradient(torch.autograd.Function):
    """The last state as it is, tied to y so that a gradient asked of it is an error and not silently zero."""

    @staticmethod
    def forward(state: Tensor, y: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            "selective_scan: mamba-ssm has no gradient through the final state; use backend='triton' or 'chunked'"
        )
