"""The kernels as PyTorch operators, torch.ops.ssmlens.cpu_*: defined here, so that they exist (with fake kernels, for
torch.compile) before the C++ library is compiled and loaded; each allocates its outputs and calls torch.ops.ssmlens_cpu.*.

Shapes as in `ssmlens.ops`. States and parameters (A, D, dt_bias, h0; weight, bias; w, u; B and C without time) are in the
precision of the computation, float32 or float64, A and h0 possibly complex; tensors (batch, length, ...) are in that precision
too, or in half precision where it is float32. Gradients have the dtype of what they are gradients of. `reset` is bool. In the
backward operators dy may hold several times as many sequences as the inputs, gradients one after another through the same
sequences; `samples` is the number of groups that it consists of: parameter gradients are summed within each and have one
leading dimension more. `save` asks for what the backward operator needs of the states.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.ops.cpu.build import why_unavailable

Maybe = Tensor | None

_SCAN = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? h0, Tensor? reset"
)
_LINEAR = "Tensor a, Tensor u, Tensor? h0, Tensor? reset"
_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial, Tensor? reset"
_ATTENTION = "Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor? bonus, Tensor? h0, Tensor? reset"
_NORM = "Tensor x, Tensor? weight, float eps"
_RWKV4 = "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? p, Tensor? s, Tensor? m, Tensor? reset"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


_library = torch.library.Library("ssmlens", "FRAGMENT")
for _signature in (
    f"cpu_selective_scan({_SCAN}, bool save) -> {_tensors(3)}",
    f"cpu_selective_scan_backward(Tensor dy, Tensor? dfinal, Tensor saved, {_SCAN}, int samples) -> {_tensors(9)}",
    f"cpu_linear_scan({_LINEAR}, bool save) -> {_tensors(3)}",
    f"cpu_linear_scan_backward(Tensor dh, Tensor? dfinal, Tensor saved, {_LINEAR}) -> {_tensors(3)}",
    f"cpu_causal_conv1d({_CONVOLUTION}) -> Tensor",
    f"cpu_causal_conv1d_backward(Tensor dy, {_CONVOLUTION}, int samples) -> {_tensors(4)}",
    f"cpu_rwkv4_attention({_RWKV4}, bool save) -> {_tensors(5)}",
    f"cpu_rwkv4_attention_backward(Tensor dy, Tensor? dp, Tensor? ds, Tensor? dm, Tensor saved, {_RWKV4}, int samples) "
    f"-> {_tensors(8)}",
    f"cpu_gated_linear_attention({_ATTENTION}, bool save) -> {_tensors(3)}",
    f"cpu_gated_linear_attention_backward(Tensor dy, Tensor? dfinal, Tensor saved, {_ATTENTION}, int samples) "
    f"-> {_tensors(6)}",
    f"cpu_rms_norm({_NORM}) -> {_tensors(2)}",
    f"cpu_rms_norm_backward(Tensor dy, Tensor inverse, {_NORM}, int samples) -> {_tensors(2)}",
    "cpu_exponentials(Tensor dt, Tensor A) -> Tensor",
):
    _library.define(_signature)


def _load() -> None:
    if (reason := why_unavailable()) is not None:
        raise RuntimeError(f"the CPU operators need their compiled kernels: {reason}")


def _operator(name: str, allocate: Callable[..., Any], run: Callable[..., None]) -> None:
    """Registers an operator: `allocate(*arguments)` gives its outputs, which is all a fake tensor needs; `run` fills them."""

    def implementation(*arguments: Any) -> Any:
        _load()  # an operator may be called without a look at available()
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


def _optional(given: Maybe, shape: Any) -> Tensor:
    """A gradient to an argument that may be absent."""
    return torch.empty(0) if given is None else _like(given, shape)


def _chunks(length: int, chunk: int) -> int:
    return (length + chunk - 1) // chunk


# ------------------------------------------------------------------------------------------------------- selective_scan


@functools.cache
def _vector_width(dtype: torch.dtype) -> int:
    """Inner channels per vector of the compiled kernels."""
    _load()
    return int(torch.ops.ssmlens_cpu.vector_bytes()) // dtype.itemsize


def chunk_length(numbers: int) -> int:
    """Steps between saved states, of so many real numbers per inner channel. Longer for a larger state, so that these never
    outweigh the inputs by much."""
    return 32 if numbers <= 64 else 64 if numbers <= 256 else 128


def _state_size(A: Tensor) -> int:
    return A.shape[1] * (2 if A.is_complex() else 1)


def _check_A(A: Tensor) -> None:
    real = A.real if A.is_complex() else A
    if not bool((real <= 0).all()):
        problem = "contains NaN" if bool(real.isnan().any()) else f"has a positive entry, {real.max().item():g}"
        raise ValueError(f"selective_scan: A must be ≤ 0 everywhere{' (real part)' * A.is_complex()}, but {problem}")
    if A.is_complex() and not bool((A.imag.isfinite() | real.isneginf()).all()):
        raise ValueError("selective_scan: A must have a finite imaginary part wherever it is not -inf")


def _arguments(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
               dt_softplus: bool, h0: Maybe, reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    return (_rows(x), _rows(dt), A.contiguous(), _matrix_or_rows(B), _matrix_or_rows(C), _dense(D), _maybe_rows(z),
            _dense(dt_bias), dt_softplus, _dense(h0), reset)  # fmt: skip


def _scan_outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
                  dt_softplus: bool, h0: Maybe, reset: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, d_inner), n = x.shape, A.shape[1]
    real = A.dtype.to_real()
    saved = x.new_empty(0, dtype=real)
    if save:
        width, size = _vector_width(real), _state_size(A)
        blocks, chunks = _chunks(d_inner, width), _chunks(length, chunk_length(size))
        saved = x.new_empty(batch, blocks, chunks, size * width, dtype=real)
    return _like(x), A.new_empty(batch, d_inner, n), saved


def _scan(outputs: tuple[Tensor, ...], x: Tensor, dt: Tensor, A: Tensor, *arguments: Any) -> None:
    _check_A(A)
    *rest, _ = arguments
    torch.ops.ssmlens_cpu.selective_scan(*_arguments(x, dt, A, *rest), chunk_length(_state_size(A)), *outputs)


def _scan_gradients(dy: Tensor, dfinal: Maybe, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                    D: Maybe, z: Maybe, dt_bias: Maybe, dt_softplus: bool, h0: Maybe, reset: Maybe,
                    samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    batch, d_inner = dy.shape[0], dy.shape[2]
    parameter = (samples, d_inner)
    return (
        _like(x, dy.shape), _like(dt, dy.shape), _like(A, (samples, *A.shape)),
        *(_like(m, (batch, *m.shape[1:]) if m.dim() == 3 else (samples, *m.shape)) for m in (B, C)),
        _optional(D, parameter), _optional(z, dy.shape), _optional(dt_bias, parameter),
        _optional(h0, (batch, d_inner, A.shape[1])),
    )  # fmt: skip


def _scan_backward(outputs: tuple[Tensor, ...], dy: Tensor, dfinal: Maybe, saved: Tensor, *arguments: Any) -> None:
    *scan, samples = arguments
    A, D, z, dt_bias, h0 = scan[2], scan[5], scan[6], scan[7], scan[9]
    dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = outputs
    torch.ops.ssmlens_cpu.selective_scan_backward(
        _rows(dy), _dense(dfinal), saved, *_arguments(*scan), chunk_length(_state_size(A)), samples, dx, ddt, dA, dB, dC,
        _present(dD, D), _present(dz, z), _present(ddt_bias, dt_bias), _present(dh0, h0),
    )  # fmt: skip


def _exponential_sums(dt: Tensor, A: Tensor) -> Tensor:
    return A.new_empty(A.shape[0])


def _exponentials(sums: Tensor, dt: Tensor, A: Tensor) -> None:
    torch.ops.ssmlens_cpu.exponentials(_rows(dt), A.contiguous(), sums)


# ---------------------------------------------------------------------------------------------------------- linear_scan

_CHUNK = 32  # steps between saved states, in linear_scan.h and rwkv4.h


def _state_of(u: Tensor) -> torch.dtype:
    return u.dtype if u.is_complex() else _real_state(u)


def _real_state(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _linear_outputs(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, inner = u.shape
    state = _state_of(u)
    saved = u.new_empty((batch, _chunks(length, _CHUNK), inner) if save else 0, dtype=state)
    return _like(u), u.new_empty(batch, inner, dtype=state), saved


def _linear(outputs: tuple[Tensor, ...], a: Tensor, u: Tensor, h0: Maybe, reset: Maybe, save: bool) -> None:
    torch.ops.ssmlens_cpu.linear_scan(_rows(a), _rows(u), _dense(h0), reset, *outputs)


def _linear_gradients(dh: Tensor, dfinal: Maybe, saved: Tensor, a: Tensor, u: Tensor, h0: Maybe,
                      reset: Maybe) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(a, dh.shape), _like(u, dh.shape), _optional(h0, (dh.shape[0], dh.shape[2]))


def _linear_backward(outputs: tuple[Tensor, ...], dh: Tensor, dfinal: Maybe, saved: Tensor, a: Tensor, u: Tensor, h0: Maybe,
                     reset: Maybe) -> None:  # fmt: skip
    da, du, dh0 = outputs
    torch.ops.ssmlens_cpu.linear_scan_backward(
        _rows(dh), _dense(dfinal), saved, _rows(a), _rows(u), _dense(h0), reset, da, du, _present(dh0, h0)
    )


# -------------------------------------------------------------------------------------------------------- causal_conv1d


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
    return (_like(x, dy.shape), _like(weight, (samples, *weight.shape)), _optional(bias, (samples, x.shape[2])),
            _optional(initial, window))  # fmt: skip


def _convolution_backward(outputs: tuple[Tensor, ...], dy: Tensor, *arguments: Any) -> None:
    *convolution, samples = arguments
    bias, initial = convolution[2], convolution[4]
    dx, dweight, dbias, dinitial = outputs
    torch.ops.ssmlens_cpu.causal_conv1d_backward(
        _rows(dy), *_convolution_arguments(*convolution), samples, dx, dweight, _present(dbias, bias),
        _present(dinitial, initial),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ rwkv4_attention


def _rwkv4_arguments(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, p: Maybe, s: Maybe, m: Maybe,
                     reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    return _rows(r), _rows(k), _rows(v), w.contiguous(), u.contiguous(), _dense(p), _dense(s), _dense(m), reset


def _rwkv4_outputs(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, p: Maybe, s: Maybe, m: Maybe, reset: Maybe,
                   save: bool) -> tuple[Tensor, ...]:  # fmt: skip
    batch, length, d = v.shape
    state = [w.new_empty(batch, d) for _ in range(3)]
    return _like(v), *state, w.new_empty((batch, _chunks(length, _CHUNK), 3, d) if save else 0)


def _rwkv4(outputs: tuple[Tensor, ...], *arguments: Any) -> None:
    *rest, _ = arguments
    torch.ops.ssmlens_cpu.rwkv4_attention(*_rwkv4_arguments(*rest), *outputs)


def _rwkv4_gradients(dy: Tensor, dp: Maybe, ds: Maybe, dm: Maybe, saved: Tensor, r: Tensor, k: Tensor, v: Tensor,
                     w: Tensor, u: Tensor, p: Maybe, s: Maybe, m: Maybe, reset: Maybe,
                     samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    state = (dy.shape[0], dy.shape[2])
    return (*(_like(x, dy.shape) for x in (r, k, v)), *(_like(x, (samples, *x.shape)) for x in (w, u)),
            *(_optional(x, state) for x in (p, s, m)))  # fmt: skip


def _rwkv4_backward(outputs: tuple[Tensor, ...], dy: Tensor, dp: Maybe, ds: Maybe, dm: Maybe, saved: Tensor,
                    *arguments: Any) -> None:  # fmt: skip
    *attention, samples = arguments
    state = [_present(gradient, given) for gradient, given in zip(outputs[5:], attention[5:8], strict=True)]
    torch.ops.ssmlens_cpu.rwkv4_attention_backward(
        _rows(dy),
        _dense(dp),
        _dense(ds),
        _dense(dm),
        saved,
        *_rwkv4_arguments(*attention),
        samples,
        *outputs[:5],
        *state,
    )


# ----------------------------------------------------------------------------------------------- gated_linear_attention

ATTENTION_CHUNK = 64  # tokens between saved states, in attention.h


def _heads(x: Tensor) -> Tensor:
    """(batch, length, heads, width) → (batch, length, heads · width), as the kernels read it."""
    return _rows(x.flatten(2))


def _attention_arguments(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe,
                         reset: Maybe) -> tuple[Any, ...]:  # fmt: skip
    given = (*(_heads(x) for x in (q, k, v, log_a)), _dense(bonus), _dense(h0), reset)
    return *given, q.shape[2], v.shape[2], torch.get_num_threads()


def _attention_outputs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe, reset: Maybe,
                       save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, heads, d_value), dtype = v.shape, _real_state(v)
    state = (batch, heads, q.shape[3], d_value)
    saved = v.new_empty((_chunks(length, ATTENTION_CHUNK) + 1, *state) if save else 0, dtype=dtype)
    return _like(v), v.new_empty(state, dtype=dtype), saved


def _attention(outputs: tuple[Tensor, ...], *arguments: Any) -> None:
    *rest, _ = arguments
    y, *states = outputs
    torch.ops.ssmlens_cpu.gated_linear_attention(*_attention_arguments(*rest), y.flatten(2), *states)


def _attention_gradients(dy: Tensor, dfinal: Maybe, saved: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor,
                         bonus: Maybe, h0: Maybe, reset: Maybe, samples: int) -> tuple[Tensor, ...]:  # fmt: skip
    some = (_like(x, (dy.shape[0], *x.shape[1:])) for x in (q, k, v, log_a))
    return *some, *(_optional(x, None if x is None else (dy.shape[0], *x.shape[1:])) for x in (bonus, h0))


def _attention_backward(outputs: tuple[Tensor, ...], dy: Tensor, dfinal: Maybe, saved: Tensor,
                        *arguments: Any) -> None:  # fmt: skip
    *attention, _ = arguments
    *several, dbonus, dh0 = outputs
    torch.ops.ssmlens_cpu.gated_linear_attention_backward(
        _heads(dy), _dense(dfinal), saved, *_attention_arguments(*attention), *(x.flatten(2) for x in several),
        _present(dbonus, attention[4]), _present(dh0, attention[5]),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- rms_norm


def _norm_outputs(x: Tensor, weight: Maybe, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[:2], dtype=_real_state(x))


def _norm(outputs: tuple[Tensor, ...], x: Tensor, weight: Maybe, eps: float) -> None:
    torch.ops.ssmlens_cpu.rms_norm(_rows(x), _dense(weight), eps, *outputs)


def _norm_gradients(dy: Tensor, inverse: Tensor, x: Tensor, weight: Maybe, eps: float,
                    samples: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(x, dy.shape), _optional(weight, (samples, x.shape[2]))


def _norm_backward(outputs: tuple[Tensor, ...], dy: Tensor, inverse: Tensor, x: Tensor, weight: Maybe, eps: float,
                   samples: int) -> None:  # fmt: skip
    dx, dweight = outputs
    torch.ops.ssmlens_cpu.rms_norm_backward(
        _rows(dy), inverse.contiguous(), _rows(x), _dense(weight), eps, samples, dx, _present(dweight, weight)
    )


_operator("cpu_selective_scan", _scan_outputs, _scan)
_operator("cpu_selective_scan_backward", _scan_gradients, _scan_backward)
_operator("cpu_linear_scan", _linear_outputs, _linear)
_operator("cpu_linear_scan_backward", _linear_gradients, _linear_backward)
_operator("cpu_causal_conv1d", _convolution_outputs, _convolution)
_operator("cpu_causal_conv1d_backward", _convolution_gradients, _convolution_backward)
_operator("cpu_rwkv4_attention", _rwkv4_outputs, _rwkv4)
_operator("cpu_rwkv4_attention_backward", _rwkv4_gradients, _rwkv4_backward)
_operator("cpu_gated_linear_attention", _attention_outputs, _attention)
_operator("cpu_gated_linear_attention_backward", _attention_gradients, _attention_backward)
_operator("cpu_rms_norm", _norm_outputs, _norm)
_operator("cpu_rms_norm_backward", _norm_gradients, _norm_backward)
_operator("cpu_exponentials", _exponential_sums, _exponentials)
