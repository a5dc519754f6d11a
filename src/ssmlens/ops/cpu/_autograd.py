"""Gradients of the CPU operators: each forward operator with its backward operator, as autograd functions that torch.compile
and torch.func understand. The backward operators have no derivative themselves; asking for one is refused.

Under vmap the mapped dimension is folded into the batch, so a Jacobian by many probes is one call. In the backward functions
the gradients may then be `samples` times as many sequences as the inputs, and parameter gradients have that leading dimension.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

Maybe = Tensor | None
ops = torch.ops.ssmlens


class SelectiveScan(torch.autograd.Function):
    """(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, save) → (y, h_T, saved states)."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        z: Maybe,
        dt_bias: Maybe,
        dt_softplus: bool,
        h0: Maybe,
        reset: Maybe,
        save: bool,
    ) -> Any:
        return ops.cpu_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.save = inputs
        ctx.dt_softplus = tensors.pop(8)
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dfinal: Maybe, _: Maybe) -> Any:
        *tensors, saved = ctx.saved_tensors
        x, _, _, B, C, D, z, dt_bias, h0, _ = tensors
        if not ctx.save:
            raise RuntimeError("selective_scan: the forward pass ran without saving states for a backward pass")
        dy = torch.zeros_like(x) if dy is None else dy
        gradients = SelectiveScanBackward.apply(dy, dfinal, saved, *tensors[:8], ctx.dt_softplus, *tensors[8:], 1)
        dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = gradients
        dB, dC = dB if B.dim() == 3 else dB[0], dC if C.dim() == 3 else dC[0]
        return (dx, ddt, dA[0], dB, dC, _first(D, dD), _if(z, dz), _first(dt_bias, ddt_bias), None, _if(h0, dh0),
                None, None)  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if _parameters_mapped(arguments, in_dims):
            return _one_by_one(SelectiveScan, info, in_dims, arguments)
        folded = [
            _folded(a, dim, info.batch_size, i) for i, (a, dim) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        return _unfolded(SelectiveScan.apply(*folded), info)


class SelectiveScanBackward(torch.autograd.Function):
    """(dy, dh_T, saved, x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, samples) → gradients to x, dt, A, B, C, D, z,
    dt_bias, h0 (empty where there is no such input)."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        dy: Tensor,
        dfinal: Maybe,
        saved: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Maybe,
        z: Maybe,
        dt_bias: Maybe,
        dt_softplus: bool,
        h0: Maybe,
        reset: Maybe,
        samples: int,
    ) -> Any:
        return ops.cpu_selective_scan_backward(
            dy, dfinal, saved, x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, samples
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("selective_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        inputs, input_dims, samples = arguments[3:-1], in_dims[3:-1], arguments[-1]
        mapped = in_dims[2] is not None or any(dim is not None for dim in input_dims)
        if mapped and (samples > 1 or _parameters_mapped(inputs, input_dims)):
            return _one_by_one(SelectiveScanBackward, info, in_dims, arguments)
        gradients = [_fold(a, dim, info.batch_size) for a, dim in zip(arguments[:2], in_dims[:2], strict=True)]
        saved = arguments[2]
        if mapped:
            saved = _fold(saved, in_dims[2], info.batch_size)
            pairs = enumerate(zip(inputs, input_dims, strict=True))
            inputs = tuple(_folded(a, dim, info.batch_size, i) for i, (a, dim) in pairs)
        outputs = SelectiveScanBackward.apply(*gradients, saved, *inputs, samples * info.batch_size)
        return _unfolded(outputs, info)


class LinearScan(torch.autograd.Function):
    """(a, u, h0, reset) → h."""

    @staticmethod
    def forward(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> Any:
        return ops.cpu_linear_scan(a, u, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, _, h0, reset = inputs
        ctx.save_for_backward(a, output, h0, reset)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        a, h, h0, reset = ctx.saved_tensors
        da, du, dh0 = LinearScanBackward.apply(dh, a, h, h0, reset)
        return da, du, _if(h0, dh0), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        folded = [_fold(a, dim, info.batch_size) for a, dim in zip(arguments, in_dims, strict=True)]
        h = LinearScan.apply(*folded)
        return _unfold(h, info.batch_size), 0


class LinearScanBackward(torch.autograd.Function):
    """(dh, a, h, h0, reset) → gradients to a, u, h0."""

    @staticmethod
    def forward(dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe) -> Any:
        return ops.cpu_linear_scan_backward(dh, a, h, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("linear_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        dh, *inputs = arguments
        if any(dim is not None for dim in in_dims[1:]):
            if dh.shape[0 if in_dims[0] is None else 1] != inputs[0].shape[0 if in_dims[1] is None else 1]:
                return _one_by_one(LinearScanBackward, info, in_dims, arguments)  # already folded once
            inputs = [_fold(a, dim, info.batch_size) for a, dim in zip(inputs, in_dims[1:], strict=True)]
        outputs = LinearScanBackward.apply(_fold(dh, in_dims[0], info.batch_size), *inputs)
        return _unfolded(outputs, info)


class CausalConv1d(torch.autograd.Function):
    """(x, weight, bias, silu, initial, reset) → y."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe) -> Any:
        return ops.cpu_causal_conv1d(x, weight, bias, silu, initial, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.silu, initial, reset = inputs
        ctx.save_for_backward(x, weight, bias, initial, reset)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, initial, reset = ctx.saved_tensors
        gradients = CausalConv1dBackward.apply(dy, x, weight, bias, ctx.silu, initial, reset, 1)
        dx, dweight, dbias, dinitial = gradients
        return dx, dweight[0], _first(bias, dbias), None, _if(initial, dinitial), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if in_dims[1] is not None or in_dims[2] is not None:
            return _one_by_one(CausalConv1d, info, in_dims, arguments)
        return _unfold(CausalConv1d.apply(*_convolution_folded(arguments, in_dims, info)), info.batch_size), 0


class CausalConv1dBackward(torch.autograd.Function):
    """(dy, x, weight, bias, silu, initial, reset, samples) → gradients to x, weight, bias, initial."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        silu: bool,
        initial: Maybe,
        reset: Maybe,
        samples: int,
    ) -> Any:
        return ops.cpu_causal_conv1d_backward(dy, x, weight, bias, silu, initial, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("causal_conv1d")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        dy, *inputs, samples = arguments
        dims = in_dims[1:-1]
        if any(dim is not None for dim in dims):
            if samples > 1 or dims[1] is not None or dims[2] is not None:
                return _one_by_one(CausalConv1dBackward, info, in_dims, arguments)
            inputs = _convolution_folded(inputs, dims, info)
        dy = _fold(dy, in_dims[0], info.batch_size)
        return _unfolded(CausalConv1dBackward.apply(dy, *inputs, samples * info.batch_size), info)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: the CPU kernels have no second derivative; use backend='chunked' or backend='reference'"
    )


def _if(given: Maybe, gradient: Tensor) -> Maybe:
    return None if given is None else gradient


def _first(given: Maybe, gradient: Tensor) -> Maybe:
    return None if given is None else gradient[0]


# -------------------------------------------------------------------------------------------------- vmap


def _fold(x: Any, dim: int | None, size: int) -> Any:
    """(batch, ...) with a mapped dimension of `size` → (size · batch, ...); repeats what is not mapped."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _folded(x: Any, dim: int | None, size: int, position: int) -> Any:
    """The argument of SelectiveScan at `position`, folded unless it is a parameter (A, D, dt_bias, B or C without a batch)."""
    parameter = position in (2, 5, 7) or (position in (3, 4) and dim is None and x.dim() == 2)
    return x if parameter else _fold(x, dim, size)


def _parameters_mapped(arguments: Any, in_dims: Any) -> bool:
    matrices = any(in_dims[i] is not None and arguments[i].dim() == 3 for i in (3, 4))
    return matrices or any(in_dims[i] is not None for i in (2, 5, 7))


def _convolution_folded(arguments: Any, in_dims: Any, info: Any) -> list[Any]:
    x, weight, bias, silu, initial, reset = arguments
    fold: Callable[[Any, int], Any] = lambda t, i: _fold(t, in_dims[i], info.batch_size)  # noqa: E731
    return [fold(x, 0), weight, bias, silu, fold(initial, 4), fold(reset, 5)]


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])


def _unfolded(outputs: Any, info: Any) -> Any:
    return tuple(_unfold(x, info.batch_size) for x in outputs), (0,) * len(outputs)


def _one_by_one(function: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """The rare cases, such as an ensemble of parameters: one call each."""
    results = []
    for i in range(info.batch_size):
        own = [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)]
        results.append(function.apply(*own))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])
