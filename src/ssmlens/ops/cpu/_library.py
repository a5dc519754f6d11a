"""The kernels as PyTorch operators, torch.ops.ssmlens.cpu_*: defined here, so that they exist (with fake kernels, for
torch.compile) before the C++ library is compiled and loaded; each allocates its outputs and calls torch.ops.ssmlens_cpu.*.

Shapes as in `ssmlens.ops`; everything is float32, or everything float64; `reset` is bool. In the backward operators
dy may hold several times as many sequences as the inputs, gradients one after another through the same sequences; `samples` is
the number of groups that it consists of: parameter gradients are summed within each and have one leading dimension more.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.ops.cpu.build import why_unavailable

Maybe = Tensor | None

_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? h0, Tensor? reset"
)
_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, Tensor? reset"

_library = torch.library.Library("ssmlens", "FRAGMENT")
_library.define(f"cpu_selective_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"cpu_selective_scan_backward(Tensor dy, Tensor? dfinal, Tensor saved, {_ARGUMENTS}, int samples) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("cpu_linear_scan(Tensor a, Tensor u, Tensor? h0, Tensor? reset) -> Tensor")
_library.define(
    "cpu_linear_scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? h0, Tensor? reset) -> (Tensor, Tensor, Tensor)"
)
_library.define(f"cpu_causal_conv1d({_CONVOLUTION}) -> Tensor")
_library.define(
    f"cpu_causal_conv1d_backward(Tensor dy, {_CONVOLUTION}, int samples) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _operator(name: str, allocate: Callable[..., Any], run: Callable[..., None]) -> None:
    """Registers an operator: `allocate(*arguments)` gives its outputs, which is all a fake tensor needs; `run` fills them."""

    def implementation(*arguments: Any) -> Any:
        if (
            reason := why_unavailable()
        ) is not None:  # also loads it: an operator may be called without a look at available()
            raise RuntimeError(f"ssmlens::{name} needs the CPU kernels: {reason}")
        outputs = allocate(*arguments)
        run(outputs, *arguments)
        return outputs

    _library.impl(name, implementation, "CPU")
    torch.library.register_fake(f"ssmlens::{name}", allocate, lib=_library)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: the kernels take any stride in the others."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _maybe_rows(x: Maybe) -> Maybe:
    return None if x is None else _rows(x)


def _dense(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


def _matrix_or_rows(x: Tensor) -> Tensor:
    return _rows(x) if x.dim() == 3 else x.contiguous()


def _present(x: Tensor, given: Maybe) -> Maybe:
    """An optional output: an operator has to return a tensor, an empty one says there is none."""
    return None if given is None else x


def _like(x: Tensor, shape: Any = None) -> Tensor:
    return x.new_empty(x.shape if shape is None else shape)  # contiguous, unlike empty_like of a strided x


def _optional(given: Maybe, shape: Any, like: Tensor) -> Tensor:
    return like.new_empty((0,) if given is None else shape)


@functools.cache
def _vector_width(dtype: torch.dtype) -> int:
    """Inner channels per vector of the compiled kernels."""
    return int(torch.ops.ssmlens_cpu.vector_bytes()) // dtype.itemsize


def chunk_length(d_state: int) -> int:
    """Steps between saved states. Longer for a larger state, so that these never outweigh the inputs by much."""
    return 32 if d_state <= 64 else 64


def _check_A(A: Tensor) -> None:
    if not bool((A <= 0).all()):
        problem = "contains NaN" if bool(A.isnan().any()) else f"has a positive entry, {A.max().item():g}"
        raise ValueError(f"selective_scan: A must be ≤ 0 everywhere, but {problem}")


def _arguments(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
               dt_softplus: bool, h0: Maybe, reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    return (_rows(x), _rows(dt), A.contiguous(), _matrix_or_rows(B), _matrix_or_rows(C), _dense(D), _maybe_rows(z),
            _dense(dt_bias), dt_softplus, _dense(h0), reset)  # fmt: skip


def _scan_outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
                  dt_softplus: bool, h0: Maybe, reset: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, d_inner), n = x.shape, A.shape[1]
    saved = x.new_empty(0)
    if save:
        width, chunk = _vector_width(x.dtype), chunk_length(n)
        saved = x.new_empty(batch, (d_inner + width - 1) // width, (length + chunk - 1) // chunk, n, width)
    return _like(x), x.new_empty(batch, d_inner, n), saved


def _scan(outputs: tuple[Tensor, ...], x: Tensor, dt: Tensor, A: Tensor, *arguments: Any) -> None:
    _check_A(A)
    *rest, _ = arguments
    torch.ops.ssmlens_cpu.selective_scan(*_arguments(x, dt, A, *rest), chunk_length(A.shape[1]), *outputs)


def _scan_gradients(dy: Tensor, dfinal: Maybe, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Maybe, z: Maybe, dt_bias: Maybe, dt_softplus: bool, h0: Maybe, reset: Maybe,
                    samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    batch, d_inner = dy.shape[0], dy.shape[2]
    parameter = (samples, d_inner)
    return (
        _like(x, dy.shape), _like(x, dy.shape), x.new_empty(samples, *A.shape),
        *(_like(m, (batch, *m.shape[1:]) if m.dim() == 3 else (samples, *m.shape)) for m in (B, C)),
        _optional(D, parameter, x), _optional(z, dy.shape, x), _optional(dt_bias, parameter, x),
        _optional(h0, (batch, d_inner, A.shape[1]), x),
    )  # fmt: skip


def _scan_backward(outputs: tuple[Tensor, ...], dy: Tensor, dfinal: Maybe, saved: Tensor, *arguments: Any) -> None:
    *scan, samples = arguments
    A, D, z, dt_bias, h0 = scan[2], scan[5], scan[6], scan[7], scan[9]
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = outputs
    for gradient in (dB, dC):
        gradient.zero_()  # the kernel adds to these
    torch.ops.ssmlens_cpu.selective_scan_backward(
        _rows(dy), _dense(dfinal), saved, *_arguments(*scan), chunk_length(A.shape[1]), samples, dx, ddt, dA, dB, dC,
        _present(dD, D), _present(dz, z), _present(ddt_bias, dt_bias), _present(dh0, h0),
    )  # fmt: skip


def _linear_outputs(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> Tensor:
    return _like(u)


def _linear(h: Tensor, a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> None:
    torch.ops.ssmlens_cpu.linear_scan(_rows(a), _rows(u), _dense(h0), reset, h)


def _linear_gradients(dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    return _like(h, dh.shape), _like(h, dh.shape), _optional(h0, (dh.shape[0], dh.shape[2]), h)


def _linear_backward(outputs: tuple[Tensor, ...], dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe) -> None:
    da, du, dh0 = outputs
    torch.ops.ssmlens_cpu.linear_scan_backward(_rows(dh), _rows(a), h, _dense(h0), reset, da, du, _present(dh0, h0))


def _convolution_arguments(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe,
                           reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    return _rows(x), weight.contiguous(), _dense(bias), silu, _maybe_rows(initial), reset


def _convolution_outputs(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe) -> Tensor:
    return _like(x)


def _convolution(y: Tensor, *arguments: Any) -> None:
    torch.ops.ssmlens_cpu.causal_conv1d(*_convolution_arguments(*arguments), y)


def _convolution_gradients(dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe,
                           samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    window = (dy.shape[0], weight.shape[1] - 1, x.shape[2])
    return (_like(x, dy.shape), x.new_empty(samples, *weight.shape), _optional(bias, (samples, x.shape[2]), x),
            _optional(initial, window, x))  # fmt: skip


def _convolution_backward(outputs: tuple[Tensor, ...], dy: Tensor, *arguments: Any) -> None:
    *convolution, samples = arguments
    bias, initial = convolution[2], convolution[4]
    dx, dweight, dbias, dinitial = outputs
    torch.ops.ssmlens_cpu.causal_conv1d_backward(
        _rows(dy), *_convolution_arguments(*convolution), samples, dx, dweight, _present(dbias, bias),
        _present(dinitial, initial),
    )  # fmt: skip


_operator("cpu_selective_scan", _scan_outputs, _scan)
_operator("cpu_selective_scan_backward", _scan_gradients, _scan_backward)
_operator("cpu_linear_scan", _linear_outputs, _linear)
_operator("cpu_linear_scan_backward", _linear_gradients, _linear_backward)
_operator("cpu_causal_conv1d", _convolution_outputs, _convolution)
_operator("cpu_causal_conv1d_backward", _convolution_gradients, _convolution_backward)
