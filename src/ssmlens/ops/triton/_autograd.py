"""Gradients of the Triton operators: each forward operator with its backward operator, as autograd functions that
torch.compile and torch.func understand. The backward operators have no derivative themselves; asking for one is refused.

Under vmap the mapped dimension is folded into the batch, as in `ssmlens.ops._vmap`.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ssmlens.ops._vmap import (
    backward_vmap,
    first_if_given,
    fold_all,
    if_given,
    one_by_one,
    one_call,
    scan_parameters,
    unfold,
    unfold_all,
)
from ssmlens.ops.triton import _library  # noqa: F401  (defines the operators)

Maybe = Tensor | None
ops = torch.ops.ssmlens


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: the Triton kernels have no second derivative; use backend='chunked' or backend='reference'"
    )


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
        return ops.triton_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, reset, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.save = inputs
        ctx.dt_softplus = tensors.pop(8)
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Maybe, dfinal: Maybe, _: Maybe) -> Any:
        *tensors, saved = ctx.saved_tensors
        x, _, _, B, C, D, z, dt_bias, h0, _ = tensors
        if not ctx.save:
            raise RuntimeError("selective_scan: the forward pass ran without saving states for a backward pass")
        dy = torch.zeros_like(x) if dy is None else dy
        gradients = SelectiveScanBackward.apply(dy, dfinal, saved, *tensors[:8], ctx.dt_softplus, *tensors[8:], 1)
        dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = gradients
        dB, dC = dB if B.dim() == 3 else dB[0], dC if C.dim() == 3 else dC[0]
        return (dx, ddt, dA[0], dB, dC, first_if_given(D, dD), if_given(z, dz), first_if_given(dt_bias, ddt_bias), None, if_given(h0, dh0),
                None, None)  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _forward_vmap(SelectiveScan, info, in_dims, arguments, scan_parameters(arguments, in_dims))


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
        return ops.triton_selective_scan_backward(
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
        parameters = scan_parameters(arguments[3:], in_dims[3:])
        return backward_vmap(SelectiveScanBackward, info, in_dims, arguments, 3, 2, parameters)


class LinearScan(torch.autograd.Function):
    """(a, u, h0, reset) → h in float32 or float64."""

    @staticmethod
    def forward(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe) -> Any:
        return ops.triton_linear_scan(a, u, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, u, h0, reset = inputs
        ctx.u_dtype = u.dtype
        ctx.save_for_backward(a, output, h0, reset)

    @staticmethod
    @one_call
    def backward(ctx: Any, dh: Tensor) -> Any:
        a, h, h0, reset = ctx.saved_tensors
        da, du, dh0 = LinearScanBackward.apply(dh, a, h, h0, reset, 1)
        return da, du.to(ctx.u_dtype), if_given(h0, dh0), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return unfold(LinearScan.apply(*fold_all(arguments, in_dims, info.batch_size)), info.batch_size), 0


class LinearScanBackward(torch.autograd.Function):
    """(dh, a, h, h0, reset, samples) → gradients to a, u, h0."""

    @staticmethod
    def forward(dh: Tensor, a: Tensor, h: Tensor, h0: Maybe, reset: Maybe, samples: int) -> Any:
        return ops.triton_linear_scan_backward(dh, a, h, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("linear_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(LinearScanBackward, info, in_dims, arguments, 1, 1, ())


class CausalConv1d(torch.autograd.Function):
    """(x, weight, bias, silu, initial, reset) → y."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Maybe, silu: bool, initial: Maybe, reset: Maybe) -> Any:
        return ops.triton_causal_conv1d(x, weight, bias, silu, initial, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.silu, initial, reset = inputs
        ctx.save_for_backward(x, weight, bias, initial, reset)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, initial, reset = ctx.saved_tensors
        gradients = CausalConv1dBackward.apply(dy, x, weight, bias, ctx.silu, initial, reset, 1)
        dx, dweight, dbias, dinitial = gradients
        return dx, dweight[0], first_if_given(bias, dbias), None, if_given(initial, dinitial), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if in_dims[1] is not None or in_dims[2] is not None:
            return one_by_one(CausalConv1d, info, in_dims, arguments)
        return unfold(CausalConv1d.apply(*fold_all(arguments, in_dims, info.batch_size, (1, 2))), info.batch_size), 0


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
        return ops.triton_causal_conv1d_backward(dy, x, weight, bias, silu, initial, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("causal_conv1d")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(CausalConv1dBackward, info, in_dims, arguments, 1, 1, (1, 2))


class GatedLinearAttention(torch.autograd.Function):
    """(q, k, v, log_a, bonus, h0, reset) → (y, H_T)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe, reset: Maybe) -> Any:
        return ops.triton_gated_linear_attention(q, k, v, log_a, bonus, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Maybe, dfinal: Maybe) -> Any:
        tensors = ctx.saved_tensors
        _, _, v, _, bonus, h0, _ = tensors
        dy = torch.zeros_like(v) if dy is None else dy
        dq, dk, dv, dlog_a, dbonus, dh0 = GatedLinearAttentionBackward.apply(dy, dfinal, *tensors, 1)
        return dq, dk, dv, dlog_a, first_if_given(bonus, dbonus), if_given(h0, dh0), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _forward_vmap(GatedLinearAttention, info, in_dims, arguments, (4,))


class GatedLinearAttentionBackward(torch.autograd.Function):
    """(dy, dH_T, q, k, v, log_a, bonus, h0, reset, samples) → gradients to q, k, v, log_a, bonus, h0."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        dy: Tensor,
        dfinal: Maybe,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor,
        bonus: Maybe,
        h0: Maybe,
        reset: Maybe,
        samples: int,
    ) -> Any:
        return ops.triton_gated_linear_attention_backward(dy, dfinal, q, k, v, log_a, bonus, h0, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("gated_linear_attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(GatedLinearAttentionBackward, info, in_dims, arguments, 2, 2, (4,))


def _forward_vmap(function: Any, info: Any, in_dims: Any, arguments: Any, parameters: tuple[int, ...]) -> Any:
    """Folds a mapped dimension into the batch, unless a parameter is mapped."""
    if any(in_dims[i] is not None for i in parameters):
        return one_by_one(function, info, in_dims, arguments)
    folded = fold_all(arguments, in_dims, info.batch_size, parameters)
    return unfold_all(function.apply(*folded), info.batch_size)
