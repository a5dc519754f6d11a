"""The kernels as PyTorch operators, torch.ops.ssmlens.triton_*, with fake kernels for torch.compile. Triton is imported, and
the kernels with it, when one of them first runs.

Shapes as in `ssmlens.ops`; x, dt, B, C, z, a, u, q, k, v, log_a and gradients to them have any floating dtype, the rest is
float32 (float64 with float64 input); `reset` is bool. As in `ssmlens.ops.cpu._library`, in the backward operators dy may hold
several times as many sequences as the inputs, in `samples` groups within which parameter gradients are summed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Maybe = Tensor | None

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? h0, Tensor? reset"
)
_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, Tensor? reset"
_ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor? bonus, Tensor? h0, Tensor? reset"

_library = torch.library.Library("ssmlens", "FRAGMENT")
_library.define(f"triton_selective_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"triton_selective_scan_backward(Tensor dy, Tensor? dfinal, Tensor saved, {_ARGUMENTS}, int samples) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("triton_linear_scan(Tensor a, Tensor u, Tensor? h0, Tensor? reset) -> Tensor")
_library.define(
    "triton_linear_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? h0, Tensor? reset) -> (Tensor, Tensor, Tensor)"
)
_library.define(f"triton_causal_conv1d({_CONVOLUTION}) -> Tensor")
_library.define(
    f"triton_causal_conv1d_backward(Tensor dy, {_CONVOLUTION}, int samples) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"triton_gated_linear_attention({_ATTENTION}) -> (Tensor, Tensor)")
_library.define(
    f"triton_gated_linear_attention_backward(Tensor dy, Tensor? dfinal, {_ATTENTION}, int samples) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _operator(name: str, allocate: Callable[..., Any], run: Callable[..., None]) -> None:
    """Registers an operator: `allocate(*arguments)` gives its outputs, which is all a fake tensor needs; `run` fills them."""

    def implementation(*arguments: Any) -> Any:
        from ssmlens.ops.triton import why_unavailable  # an operator may be called without a look at available()

        if (reason := why_unavailable()) is not None:
            raise RuntimeError(f"ssmlens::{name} needs the Triton kernels: {reason}")
        outputs = allocate(*arguments)
        run(outputs, *arguments)
        return outputs

    for device in ("CPU", "CUDA"):  # on a CPU under Triton's interpreter
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"ssmlens::{name}", allocate, lib=_library)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: the kernels take any stride in the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _maybe_rows(x: Maybe) -> Maybe:
    return None if x is None else _rows(x)


def _dense(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


def _like(x: Tensor, shape: Any = None) -> Tensor:
    return x.new_empty(x.shape if shape is None else shape)  # contiguous, unlike empty_like of a strided x


def _optional(given: Maybe, shape: Any, like: Tensor) -> Tensor:
    """An operator has to return a tensor: an empty one says there is none."""
    return like.new_empty((0,) if given is None else shape)


def _fill(output: Tensor, computed: Maybe) -> None:
    if computed is not None:
        output.copy_(computed)


# -------------------------------------------------------------------------------------------------- selective scan


def _scan_arguments(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
                    dt_softplus: bool, h0: Maybe, reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    return (_rows(x), _rows(dt), A, _rows(B), _rows(C), _dense(D), _maybe_rows(z), _dense(dt_bias), dt_softplus,
            h0, reset)  # fmt: skip


def _segments(length: int, d_state: int) -> int:
    from ssmlens.ops.triton._selective import segment_length

    return -(-length // segment_length(d_state))


def _scan_outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
                  dt_softplus: bool, h0: Maybe, reset: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, d_inner), n = x.shape, A.shape[1]
    saved = A.new_empty(batch, _segments(length, n), n, d_inner) if save else A.new_empty(0)
    return _like(x), A.new_empty(batch, d_inner, n), saved


def _scan(outputs: tuple[Tensor, ...], *arguments: Any) -> None:
    from ssmlens.ops.triton import _selective

    y, final, saved = outputs
    *scan, save = arguments
    transposed = final.new_empty(final.shape[0], final.shape[2], final.shape[1])
    _selective.forward(*_scan_arguments(*scan), y=y, final=transposed, saved=saved if save else None)
    final.copy_(transposed.transpose(1, 2))


def _scan_gradients(dy: Tensor, dfinal: Maybe, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Maybe, z: Maybe, dt_bias: Maybe, dt_softplus: bool, h0: Maybe, reset: Maybe,
                    samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    batch, d_inner = dy.shape[0], dy.shape[2]
    parameter = (samples, d_inner)
    return (
        _like(x, dy.shape), _like(dt, dy.shape), A.new_empty(samples, *A.shape),
        *(_like(m, (batch, *m.shape[1:]) if m.dim() == 3 else (samples, *m.shape)) for m in (B, C)),
        _optional(D, parameter, A), _optional(z, dy.shape, x if z is None else z), _optional(dt_bias, parameter, A),
        _optional(h0, (batch, d_inner, A.shape[1]), A),
    )  # fmt: skip


def _scan_backward(outputs: tuple[Tensor, ...], dy: Tensor, dfinal: Maybe, saved: Tensor, *arguments: Any) -> None:
    from ssmlens.ops.triton import _selective

    *scan, samples = arguments
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = outputs
    computed = _selective.backward(
        _rows(dy),
        dfinal,
        saved,
        *_scan_arguments(*scan),
        samples=samples,
        dx=dx,
        ddt=ddt,
        dz=None if scan[6] is None else dz,
    )
    for output, gradient in zip((dA, dB, dC, dD, ddt_bias, dh0), computed, strict=True):
        _fill(output, gradient)


# ------------------------------------------------------------------------------------------------------ linear scan


def _linear_outputs(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> Tensor:
    return u.new_empty(u.shape, dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)


def _linear(h: Tensor, a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> None:
    from ssmlens.ops.triton import _linear

    _linear.scan(_rows(a), _rows(u), _dense(h0), reset, out=h)


def _linear_gradients(dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    return _like(a, dh.shape), _like(h, dh.shape), _optional(h0, (dh.shape[0], dh.shape[2]), h)


def _linear_backward(outputs: tuple[Tensor, ...], dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe) -> None:
    from ssmlens.ops.triton import _linear

    da, du, dh0 = outputs
    _linear.gradients(_rows(dh), _rows(a), h, _dense(h0), reset, da, du, None if h0 is None else dh0)


# ------------------------------------------------------------------------------------------------------ convolution


def _convolution_outputs(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe) -> Tensor:
    return _like(x)


def _convolution(y: Tensor, x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe) -> None:
    from ssmlens.ops.triton import _convolution

    _convolution.forward(_rows(x), weight, _dense(bias), silu, _maybe_rows(initial), reset, y)


def _convolution_gradients(dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe,
                           samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    window = (dy.shape[0], weight.shape[1] - 1, x.shape[2])
    return (_like(x, dy.shape), weight.new_empty(samples, *weight.shape), _optional(bias, (samples, x.shape[2]), weight),
            _optional(initial, window, weight))  # fmt: skip


def _convolution_backward(
    outputs: tuple[Tensor, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    silu: bool,
    initial: Maybe,
    reset: Maybe,
    samples: int,
) -> None:
    from ssmlens.ops.triton import _convolution

    dx, dweight, dbias, dinitial = outputs
    computed = _convolution.backward(
        _rows(dy), _rows(x), weight, _dense(bias), silu, _maybe_rows(initial), reset, samples, dx,
        None if initial is None else dinitial,
    )  # fmt: skip
    _fill(dweight, computed[0])
    _fill(dbias, computed[1])


# -------------------------------------------------------------------------------------------------------- attention


def _attention_outputs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe,
                       reset: Maybe) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, heads, d_value = v.shape
    state = torch.float64 if v.dtype == torch.float64 else torch.float32
    return _like(v), v.new_empty((batch, heads, k.shape[3], d_value), dtype=state)


def _attention(outputs: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *arguments: Any) -> None:
    from ssmlens.ops.triton import _attention

    bonus, h0, reset = arguments
    y, final = outputs
    final.copy_(_attention.forward(_rows(q), _rows(k), _rows(v), _rows(log_a), _dense(bonus), h0, reset, y))


def _attention_gradients(dy: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe,
                         h0: Maybe, reset: Maybe, samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    batch = dy.shape[0]
    state = torch.float64 if v.dtype == torch.float64 else torch.float32
    dh0 = (0,) if h0 is None else (batch, *h0.shape[1:])
    dbonus = (0,) if bonus is None else (samples, *bonus.shape)
    return (
        *(_like(x, (batch, *x.shape[1:])) for x in (q, k, v, log_a)),
        v.new_empty(dbonus, dtype=state), v.new_empty(dh0, dtype=state),
    )  # fmt: skip


def _attention_backward(outputs: tuple[Tensor, ...], dy: Tensor, dfinal: Maybe, q: Tensor, k: Tensor, v: Tensor,
                        log_a: Tensor, bonus: Maybe, h0: Maybe, reset: Maybe, samples: int) -> None:  # fmt: skip
    from ssmlens.ops.triton import _attention

    dq, dk, dv, dlog_a, dbonus, dh0 = outputs
    computed = _attention.backward(
        _rows(dy), dfinal, _rows(q), _rows(k), _rows(v), _rows(log_a), _dense(bonus), h0, reset, samples, dv
    )
    for output, gradient in zip((dq, dk, dlog_a, dbonus), computed, strict=False):
        _fill(output, gradient)
    if h0 is not None:
        dh0.copy_(computed[4])


_operator("triton_selective_scan", _scan_outputs, _scan)
_operator("triton_selective_scan_backward", _scan_gradients, _scan_backward)
_operator("triton_linear_scan", _linear_outputs, _linear)
_operator("triton_linear_scan_backward", _linear_gradients, _linear_backward)
_operator("triton_causal_conv1d", _convolution_outputs, _convolution)
_operator("triton_causal_conv1d_backward", _convolution_gradients, _convolution_backward)
_operator("triton_gated_linear_attention", _attention_outputs, _attention)
_operator("triton_gated_linear_attention_backward", _attention_gradients, _attention_backward)
