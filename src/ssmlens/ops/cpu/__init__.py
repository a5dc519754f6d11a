"""C++ kernels for the recurrence on a CPU, compiled for this machine on first use. See DESIGN.md, "The kernels".

Shapes and meaning as in `ssmlens.ops`, whose functions check the arguments and call these; every function of a sequence returns
its output and the final state. States, parameters and sums are float32, or float64 for float64 input; tensors (batch, length, ...)
may be bfloat16 or float16, in any mixture with float32, and are never copied to float32 as a whole. Results are bitwise the
same for any number of threads.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops import chunked
from ssmlens.ops.chunked.lti import by_scan
from ssmlens.ops.cpu import _autograd, _library  # noqa: F401  (_library defines the operators)
from ssmlens.ops.cpu.build import available, why_unavailable

__all__ = [
    "available", "causal_conv1d", "exponentials", "gated_linear_attention", "linear_scan", "lti_convolution", "rms_norm", "rwkv4_attention", "selective_scan",
    "supports_causal_conv1d", "supports_gated_linear_attention", "supports_linear_scan", "supports_lti_convolution", "supports_rms_norm", "supports_rwkv4_attention",
    "supports_selective_scan", "why_unavailable",
]  # fmt: skip

_HALF = (torch.bfloat16, torch.float16)
_REAL = (torch.float32, torch.float64, *_HALF)
_COMPLEX = (torch.complex64, torch.complex128)
Maybe = Tensor | None
Given = TypeVar("Given", Tensor, Tensor | None)


def _supported(x: Tensor, transition: Maybe, dtypes: tuple[torch.dtype, ...] = _REAL) -> bool:
    on_cpu = x.device.type == "cpu" and (transition is None or transition.device.type == "cpu")
    return on_cpu and x.dtype in _REAL and (transition is None or transition.dtype in dtypes)


def supports_selective_scan(x: Tensor, A: Maybe = None) -> bool:
    return _supported(x, A, _REAL + _COMPLEX)


def supports_linear_scan(u: Tensor, a: Maybe = None) -> bool:
    return _supported(u.real if u.is_complex() else u, a, _REAL + _COMPLEX)


def supports_lti_convolution(x: Tensor, A: Maybe = None) -> bool:
    return supports_selective_scan(x, A)


def supports_causal_conv1d(x: Tensor, weight: Maybe = None) -> bool:
    return _supported(x, weight)


def supports_gated_linear_attention(v: Tensor, log_a: Maybe = None) -> bool:
    return _supported(v, log_a)


def supports_rwkv4_attention(v: Tensor, w: Maybe = None) -> bool:
    return _supported(v, w)


def supports_rms_norm(x: Tensor, weight: Maybe = None) -> bool:
    return _supported(x, weight)


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
    """`ssmlens.ops.selective_scan`. Raises ValueError where A (its real part) is positive or NaN."""
    s = _state_dtype(x)
    if any(t is not None and t.is_complex() for t in (A, B, C, h0)):
        A, h0 = _complex(A, s), _complex(h0, s)
        B, C = (_complex(m, s) if m.dim() == 2 else m for m in (B, C))
    tensors = [
        _input(x, s), _input(dt, s), _state(A, s), *(_input(m, s) if m.dim() == 3 else _state(m, s) for m in (B, C)),
        _state(D, s), _input(z, s), _state(dt_bias, s), _state(h0, s),
    ]  # fmt: skip
    *most, start = tensors
    y, final_state, _ = _run(_autograd.SelectiveScan, *most, dt_softplus, start, reset, _needs_gradient(tensors))
    return y, final_state


def linear_scan(
    a: Tensor, u: Tensor, *, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.linear_scan`; a broadcasts to u. h is complex where a or u is."""
    s = _state_dtype(u.real if u.is_complex() else u)
    if any(t is not None and t.is_complex() for t in (a, u, h0)):
        a, u, h0 = _complex(a, s), _complex(u, s), _complex(h0, s)
    batch, length, *state = u.shape
    flat = [_input(t, s).reshape(batch, length, -1) for t in (a.expand_as(u), u)]
    start = None if h0 is None else _state(h0, s).reshape(batch, -1)
    h, final_state, _ = _run(_autograd.LinearScan, *flat, start, reset, _needs_gradient([*flat, start]))
    return h.view(batch, length, *state), final_state.view(batch, *state)


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
    """`ssmlens.ops.lti_convolution`, as a scan: on a CPU that takes less time than the FFT at any length."""
    return by_scan(selective_scan, x, A, B, C, dt, D=D, h0=h0, reset=reset)


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
    s = _state_dtype(x)
    xs, first = _input(x, s), _input(initial, s)
    y = _run(_autograd.CausalConv1d, xs, _state(weight, s), _state(bias, s), activation == "silu", first, reset)
    return y, _last_tokens(xs, weight.shape[1] - 1, first, reset, s)


def rwkv4_attention(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """`ssmlens.ops.rwkv4_attention`."""
    s = _state_dtype(v)
    carried = (None, None, None) if state is None else tuple(_state(t, s) for t in state)
    tensors = [*(_input(t, s) for t in (r, k, v)), _state(w, s), _state(u, s), *carried]
    y, *final_state, _ = _run(_autograd.Rwkv4, *tensors, reset, _needs_gradient(tensors))
    p, s_T, m = final_state
    return y, (p, s_T, m)


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
    """`ssmlens.ops.gated_linear_attention`, with the chunked form's second derivatives."""
    s = _state_dtype(v)
    given = (_input(t, s) for t in (q, k, v, log_a))
    return chunked.gated_linear_attention(
        *given, bonus=_state(bonus, s), h0=_state(h0, s), reset=reset, compiled=True
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float) -> Tensor:
    """`ssmlens.ops.rms_norm`."""
    s = _state_dtype(x)
    rows = _input(x, s) if x.dim() == 3 else _input(x, s).reshape(1, -1, x.shape[-1])
    y, _ = _run(_autograd.RmsNorm, rows, _state(weight, s), eps)
    return y.view(x.shape)


def exponentials(dt: Tensor, A: Tensor) -> Tensor:
    """The floor of `selective_scan`, for measuring: the kernel's own exponentials alone, as many as there are (batch, length,
    d_inner, d_state) entries, of numbers that are in the cache (the first steps of dt (batch, length, d_inner), again and again,
    times real A (d_inner, d_state)). Returns sums of them, (d_inner,); no gradients. Raises TypeError for complex A."""
    if A.is_complex():
        raise TypeError("exponentials: A must be real")
    s = _state_dtype(A)
    with torch.no_grad():
        total: Tensor = torch.ops.ssmlens.cpu_exponentials(_input(dt, s), _state(A, s))
    return total


def _last_tokens(x: Tensor, count: int, initial: Maybe, reset: Maybe, dtype: torch.dtype) -> Tensor:
    """The last `count` tokens of initial and x, zeros before the last reset."""
    missing = max(0, count - x.shape[1])
    last = x[:, x.shape[1] - (count - missing) :].to(dtype)
    if missing and initial is not None:
        last = torch.cat([initial[:, -missing:].to(dtype), last], 1)
    elif missing:
        last = F.pad(last, (0, 0, missing, 0))
    if reset is not None and count:
        resets = F.pad(reset, (missing, 0))[:, -count:]
        later = resets.flip(1).cumsum(1).flip(1) - resets.long()  # resets after each token
        last = last.masked_fill((later > 0)[..., None], 0)
    return last


def _run(function: Any, *arguments: Any) -> Any:
    """An autograd function; where nothing can ask for a gradient, as in generation, its operator alone: for one token, autograd
    takes several times as long."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return function.forward(*arguments)


def _needs_gradient(tensors: list[Maybe]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _complex(t: Given, dtype: torch.dtype) -> Given:
    if t is None:
        return t
    return t.to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )  # torch.compile does not know to_complex()


def _state(t: Given, dtype: torch.dtype) -> Given:
    """t in the real dtype of the state, or its complex counterpart."""
    if t is None:
        return t
    return _complex(t, dtype) if t.is_complex() else t.to(dtype)


def _input(t: Given, dtype: torch.dtype) -> Given:
    """A tensor (batch, length, ...) as the kernels read it: half precision stays as it is beside float32."""
    if t is not None and t.dtype in _HALF and dtype == torch.float32:
        return t
    return _state(t, dtype)
