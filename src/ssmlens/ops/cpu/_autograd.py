"""Gradients of the CPU operators: each forward operator with its backward operator, as autograd functions that torch.compile
and torch.func understand. The backward operators have no derivative themselves; asking for one is refused, but for rms_norm's.

Under vmap the mapped dimension is folded into the batch, so a Jacobian by many probes is one call. In the backward functions
the gradients may then be `samples` times as many sequences as the inputs, and parameter gradients have that leading dimension.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ssmlens.ops import reference
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
    @one_call
    def backward(ctx: Any, dy: Maybe, dfinal: Maybe, _: Maybe) -> Any:
        *tensors, saved = ctx.saved_tensors
        x, _, _, B, C, D, z, dt_bias, h0, _ = tensors
        _must_have_saved("selective_scan", ctx.save)
        dy = torch.zeros_like(x) if dy is None else dy
        gradients = SelectiveScanBackward.apply(dy, dfinal, saved, *tensors[:8], ctx.dt_softplus, *tensors[8:], 1)
        dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0 = gradients
        dB, dC = dB if B.dim() == 3 else dB[0], dC if C.dim() == 3 else dC[0]
        return (dx, ddt, dA[0], dB, dC, first_if_given(D, dD), if_given(z, dz), first_if_given(dt_bias, ddt_bias), None, if_given(h0, dh0),
                None, None)  # fmt: skip

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        parameters = scan_parameters(arguments, in_dims)
        if any(in_dims[i] is not None for i in parameters):
            return one_by_one(SelectiveScan, info, in_dims, arguments)
        folded = fold_all(arguments, in_dims, info.batch_size, parameters)
        return unfold_all(SelectiveScan.apply(*folded), info.batch_size)


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
        return backward_vmap(
            SelectiveScanBackward, info, in_dims, arguments, 3, 2, scan_parameters(arguments[3:], in_dims[3:])
        )


class LinearScan(torch.autograd.Function):
    """(a, u, h0, reset, save) → (h, h_T, saved states)."""

    @staticmethod
    def forward(a: Tensor, u: Tensor, h0: Maybe, reset: Maybe, save: bool) -> Any:
        return ops.cpu_linear_scan(a, u, h0, reset, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.save = inputs
        ctx.save_for_backward(output[2], *tensors)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dh: Maybe, dfinal: Maybe, _: Maybe) -> Any:
        saved, a, u, h0, reset = ctx.saved_tensors
        _must_have_saved("linear_scan", ctx.save)
        dh = torch.zeros_like(u) if dh is None else dh
        da, du, dh0 = LinearScanBackward.apply(dh, dfinal, saved, a, u, h0, reset, 1)
        return da, du, if_given(h0, dh0), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return unfold_all(LinearScan.apply(*fold_all(arguments, in_dims, info.batch_size)), info.batch_size)


class LinearScanBackward(torch.autograd.Function):
    """(dh, dh_T, saved, a, u, h0, reset, samples) → gradients to a, u, h0."""

    @staticmethod
    def forward(
        dh: Tensor, dfinal: Maybe, saved: Tensor, a: Tensor, u: Tensor, h0: Maybe, reset: Maybe, samples: int
    ) -> Any:
        return ops.cpu_linear_scan_backward(dh, dfinal, saved, a, u, h0, reset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("linear_scan")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(LinearScanBackward, info, in_dims, arguments, 3, 2, ())


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
        return ops.cpu_causal_conv1d_backward(dy, x, weight, bias, silu, initial, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("causal_conv1d")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(CausalConv1dBackward, info, in_dims, arguments, 1, 1, (1, 2))


class Rwkv4(torch.autograd.Function):
    """(r, k, v, w, u, p, s, m, reset, save) → (y, p_T, s_T, m_T, saved states)."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        p: Maybe,
        s: Maybe,
        m: Maybe,
        reset: Maybe,
        save: bool,
    ) -> Any:
        return ops.cpu_rwkv4_attention(r, k, v, w, u, p, s, m, reset, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.save = inputs
        ctx.save_for_backward(output[4], *tensors)
        ctx.mark_non_differentiable(output[4])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Maybe, dp: Maybe, ds: Maybe, dm: Maybe, _: Maybe) -> Any:
        saved, *tensors = ctx.saved_tensors
        v, state = tensors[2], tensors[5:8]
        _must_have_saved("rwkv4_attention", ctx.save)
        dy = torch.zeros_like(v) if dy is None else dy
        dr, dk, dv, dw, du, *dstate = Rwkv4Backward.apply(dy, dp, ds, dm, saved, *tensors, 1)
        dstate = [if_given(given, gradient) for given, gradient in zip(state, dstate, strict=True)]
        return dr, dk, dv, dw[0], du[0], *dstate, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if in_dims[3] is not None or in_dims[4] is not None:
            return one_by_one(Rwkv4, info, in_dims, arguments)
        folded = fold_all(arguments, in_dims, info.batch_size, (3, 4))
        return unfold_all(Rwkv4.apply(*folded), info.batch_size)


class Rwkv4Backward(torch.autograd.Function):
    """(dy, dp_T, ds_T, dm_T, saved, r, k, v, w, u, p, s, m, reset, samples) → gradients to r, k, v, w, u, p, s, m."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        dy: Tensor,
        dp: Maybe,
        ds: Maybe,
        dm: Maybe,
        saved: Tensor,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        p: Maybe,
        s: Maybe,
        m: Maybe,
        reset: Maybe,
        samples: int,
    ) -> Any:
        return ops.cpu_rwkv4_attention_backward(dy, dp, ds, dm, saved, r, k, v, w, u, p, s, m, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        _refuse("rwkv4_attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(Rwkv4Backward, info, in_dims, arguments, 5, 4, (3, 4))


class RmsNorm(torch.autograd.Function):
    """(x, weight, eps) → (y, 1 / root mean square of each row)."""

    @staticmethod
    def forward(x: Tensor, weight: Maybe, eps: float) -> Any:
        return ops.cpu_rms_norm(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(output[1], x, weight)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Maybe, _: Maybe) -> Any:
        inverse, x, weight = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dweight = RmsNormBackward.apply(dy, inverse, x, weight, ctx.eps, 1)
        return dx, first_if_given(weight, dweight), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        if in_dims[1] is not None:
            return one_by_one(RmsNorm, info, in_dims, arguments)
        return unfold_all(RmsNorm.apply(*fold_all(arguments, in_dims, info.batch_size, (1,))), info.batch_size)


class RmsNormBackward(torch.autograd.Function):
    """(dy, 1 / root mean square, x, weight, eps, samples) → gradients to x, weight."""

    @staticmethod
    def forward(dy: Tensor, inverse: Tensor, x: Tensor, weight: Maybe, eps: float, samples: int) -> Any:
        return ops.cpu_rms_norm_backward(dy, inverse, x, weight, eps, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        dy, _, x, weight, ctx.eps, ctx.samples = inputs
        ctx.save_for_backward(dy, x, weight)

    @staticmethod
    @one_call
    def backward(ctx: Any, ddx: Tensor, ddweight: Tensor) -> Any:
        """The second derivative: the first one of the first one of the reference. Any norm stands between two scans, and not
        every scan refuses."""
        dy, x, weight = ctx.saved_tensors
        eps, samples, wide = ctx.eps, ctx.samples, torch.promote_types(x.dtype, torch.float32)

        def gradients(dy: Tensor, *inputs: Tensor) -> Any:
            own = (inputs[0].to(wide), *inputs[1:])
            _, pull, *_ = torch.func.vjp(lambda x, w=None: reference.rms_norm(x, w, eps=eps), *own)
            dx, *dweight = torch.func.vmap(pull)(dy.to(wide).unflatten(0, (samples, -1)))
            return dx.flatten(0, 1).to(x.dtype), *dweight

        inputs, above = ((x,), (ddx,)) if weight is None else ((x, weight), (ddx, ddweight))
        _, pull, *_ = torch.func.vjp(gradients, dy, *inputs)
        to_dy, to_x, *to_weight = pull(above)
        return to_dy, None, to_x, *(to_weight or [None]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return backward_vmap(RmsNormBackward, info, in_dims, arguments, 2, 1, (1,))


def _must_have_saved(name: str, saved: bool) -> None:
    if not saved:
        raise RuntimeError(f"{name}: the forward pass ran without saving states for a backward pass")


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: the CPU kernels have no second derivative; use backend='chunked' or backend='reference'"
    )
