"""Linear attention with decay, H_t = diag(a_t) H_{t-1} + k_t v_tᵀ and y_t = H_tᵀ q_t, as chunked matrix products.

How it is computed is in `pieces` (chunks and the states between them) and `decay` (the decays within a chunk); here are the
operators torch.ops.ssmlens.chunked_attention and .chunked_attention_backward, which torch.compile takes as one node each, and
their derivatives, which the C++ operators in `ssmlens.ops.cpu` share. Memory is linear in length: beside inputs and outputs one
state (d_key, d_value) for each chunk.
Under vmap the mapped dimension is folded into the batch; gradients alone may be several for each sequence (`samples`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops import _check, reference
from ssmlens.ops._vmap import fold, one_call
from ssmlens.ops.chunked import pieces
from ssmlens.ops.chunked.scan import LinearScan

Maybe = Tensor | None

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor? bonus, Tensor? h0, Tensor? reset"
_library = torch.library.Library("ssmlens", "FRAGMENT")
_library.define(f"chunked_attention({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"chunked_attention_backward(Tensor dy, Tensor? dfinal, Tensor states, {_ARGUMENTS}, int samples) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    with _check.full_precision(v):
        return pieces.forward(q, k, v, *others)


def _backward(dy: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _check.full_precision(dy):
        return pieces.backward(dy, *others)


def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe, reset: Maybe, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, d_value), dtype = v.shape, _check.state_dtype(v)
    state = (batch, heads, q.shape[-1], d_value)
    states = (-(-length // pieces.chunk_size(length)) + 1, *state) if save else (0,)
    return v.new_empty(v.shape), v.new_empty(state, dtype=dtype), v.new_empty(states, dtype=dtype)


def _backward_shapes(
    dy: Tensor, dfinal: Maybe, states: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe, h0: Maybe,
    reset: Maybe, samples: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    some = (x.new_empty(dy.shape[0], *x.shape[1:]) for x in (q, k, v, log_a))
    return (*some, *(v.new_empty(0) if x is None else x.new_empty(dy.shape[0], *x.shape[1:]) for x in (bonus, h0)))


for _name, _run, _shapes in (
    ("chunked_attention", _forward, _forward_shapes),
    ("chunked_attention_backward", _backward, _backward_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssmlens::{_name}", _shapes, lib=_library)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, bonus: Maybe, h0: Maybe, reset: Maybe, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """`ssmlens.ops.gated_linear_attention`. y has v's dtype; states and decays are float32, or float64 where v is.

    compiled: by the C++ operators of `ssmlens.ops.cpu`, which have the same arguments and the same second derivatives."""
    if v.shape[1] == 1:  # generation: a state, written and read
        dtype = _check.state_dtype(v)
        y, final = reference.gated_linear_attention(
            *(x.to(dtype) for x in (q, k, v, log_a)),
            bonus=_check.promoted(bonus, dtype), h0=_check.promoted(h0, dtype), reset=reset,
        )  # fmt: skip
        return y.to(v.dtype), final
    if bonus is not None:
        bonus = bonus.expand(v.shape[0], *bonus.shape)  # a batch of its own, so that it can be mapped like the others
    tensors = (q, k, v, log_a, bonus, h0)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, final, _ = Attention.apply(*tensors, reset, save, compiled)
    return y, final


class Attention(torch.autograd.Function):
    """(q, k, v, log_a, bonus, h0, reset, save, compiled) → (y, H_T, the states between chunks); bonus: (batch, heads, d_key)."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor,
        bonus: Maybe,
        h0: Maybe,
        reset: Maybe,
        save: bool,
        compiled: bool,
    ) -> Any:
        ops = torch.ops.ssmlens
        run = ops.cpu_gated_linear_attention if compiled else ops.chunked_attention
        return run(q, k, v, log_a, bonus, h0, reset, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.save, ctx.compiled = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, dy: Maybe, dfinal: Maybe, _: Maybe) -> Any:
        *tensors, states = ctx.saved_tensors
        if not ctx.save:
            raise RuntimeError("gated_linear_attention: the forward pass ran without saving states for a backward pass")
        v, bonus, h0 = tensors[2], tensors[4], tensors[5]
        dy = torch.zeros_like(v) if dy is None else dy
        *gradients, dbonus, dh0 = AttentionBackward.apply(dy, dfinal, states, *tensors, 1, ctx.compiled)
        return *gradients, None if bonus is None else dbonus, None if h0 is None else dh0, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        folded = [fold(x, dim, info.batch_size) for x, dim in zip(arguments, in_dims, strict=True)]
        y, final, states = Attention.apply(*folded)
        if states.dim() > 1:
            states = states.unflatten(1, (info.batch_size, -1)).movedim(1, 0)
        else:
            states = states.expand(info.batch_size, -1)
        return (*(x.unflatten(0, (info.batch_size, -1)) for x in (y, final)), states), (0, 0, 0)


class AttentionBackward(torch.autograd.Function):
    """(dy, dH_T, states, q, k, v, log_a, bonus, h0, reset, samples, compiled) → gradients to q, k, v, log_a, bonus, h0 (empty where there is
    no such input). dy, dH_T and the gradients hold `samples` times as many sequences as the inputs, one set after another."""

    @staticmethod
    def forward(  # spelled out: torch.compile counts these
        dy: Tensor,
        dfinal: Maybe,
        states: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor,
        bonus: Maybe,
        h0: Maybe,
        reset: Maybe,
        samples: int,
        compiled: bool,
    ) -> Any:
        ops = torch.ops.ssmlens
        run = ops.cpu_gated_linear_attention_backward if compiled else ops.chunked_attention_backward
        return run(dy, dfinal, states, q, k, v, log_a, bonus, h0, reset, samples)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        dy, dfinal, _, *tensors, ctx.samples, _ = inputs
        ctx.save_for_backward(dy, dfinal, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @one_call
    def backward(ctx: Any, *above: Maybe) -> Any:
        """The second derivative: that of the first derivative of `composed`."""
        *tensors, reset = ctx.saved_tensors
        samples = ctx.samples

        def first(given: dict[str, Tensor]) -> dict[str, Tensor]:
            inputs = {name: _repeated(x, samples) for name, x in given.items() if name not in ("dy", "dfinal")}
            fresh = None if reset is None else _repeated(reset, samples)
            outputs, pull = _vjp(lambda own: composed(**own, reset=fresh), inputs)
            (gradients,) = pull((given["dy"], given.get("dfinal", torch.zeros_like(outputs[1]))))
            return gradients

        names = ("dy", "dfinal", "q", "k", "v", "log_a", "bonus", "h0")
        given = {name: x for name, x in zip(names, tensors, strict=True) if x is not None}
        with _check.full_precision(given["dy"]):
            gradients, pull = _vjp(first, given)
            outer = {name: g for name, g in zip(names[2:], above, strict=True) if g is not None}
            (second,) = pull({name: outer.get(name, torch.zeros_like(x)) for name, x in gradients.items()})
        dy, dfinal, *rest = (second.get(name) for name in names)
        return dy, dfinal, None, *rest, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        dy, dfinal, states, *inputs, samples, compiled = arguments
        size = info.batch_size
        several = [
            _front(x, dim, size) for x, dim in zip((dy, dfinal), in_dims[:2], strict=True)
        ]  # (size, samples · batch, ...)
        if all(dim is None for dim in in_dims[2:-2]):  # gradients alone are mapped: more of them for the same sequences
            several = [None if x is None else x.flatten(0, 1) for x in several]
            gradients = AttentionBackward.apply(*several, states, *inputs, samples * size, compiled)
            return tuple(x.unflatten(0, (size, -1)) for x in gradients), (0,) * len(gradients)
        inputs = [fold(x, dim, size) for x, dim in zip(inputs, in_dims[3:-2], strict=True)]
        states = _front(states, in_dims[2], size).movedim(0, 1).flatten(1, 2)
        several = [None if x is None else x.unflatten(1, (samples, -1)).movedim(1, 0).flatten(0, 2) for x in several]
        gradients = AttentionBackward.apply(*several, states, *inputs, samples, compiled)
        return tuple(x.unflatten(0, (samples, size, -1)).movedim(1, 0).flatten(1, 2) for x in gradients), (0,) * len(
            gradients
        )


def _vjp(function: Callable[[dict[str, Tensor]], Any], inputs: dict[str, Tensor]) -> tuple[Any, Callable[..., Any]]:
    outputs, pull, *_ = torch.func.vjp(function, inputs)
    return outputs, pull


def _front(x: Any, dim: int | None, size: int) -> Any:
    """The mapped dimension in front."""
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _repeated(x: Tensor, samples: int) -> Tensor:
    return x if samples == 1 else fold(x, None, samples)


def composed(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, bonus: Maybe = None, h0: Maybe = None, reset: Maybe = None
) -> tuple[Tensor, Tensor]:
    """y and H_T by the same tree as in `decay`, out of operations that can be differentiated any number of times."""
    _, length, heads, d_value = v.shape
    given, dtype, size = v.dtype, _check.state_dtype(v), pieces.chunk_size(length)
    q, k, v, log_a = (x.to(dtype) for x in (q, k, v, log_a))
    q, k, log_a = reference.per_head(q, v), reference.per_head(k, v), log_a.expand(*v.shape[:3], q.shape[-1])
    diagonal = (q * k if bonus is None else q * k * bonus[:, None].to(dtype)).sum(-1)
    if reset is not None:
        log_a = log_a.masked_fill(reset[..., None, None], -torch.inf)
        q = q if bonus is None else q.masked_fill(reset[..., None, None], 0)

    def chunks(x: Tensor) -> Tensor:  # (batch, length, heads, d) → (batch, chunks, heads, size, d)
        return F.pad(x, (0, 0, 0, 0, 0, -length % size)).unflatten(1, (-1, size)).transpose(2, 3)

    q, k, v, total, diagonal = (chunks(x) for x in (q, k, v, log_a, diagonal[..., None]))
    f, g = total.exp() if bonus is None else torch.ones_like(total), torch.ones_like(total)
    scores = diagonal[..., None]  # (batch, chunks, heads, blocks, b, b)
    b = 1
    while b < size:
        (_, q2), (k1, _), (f1, f2), (g1, g2) = (x.unflatten(-2, (-1, 2, b)).unbind(-3) for x in (q, k, f, g))
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        corner = (q2 * f2) @ (k1 * g1).mT
        scores = torch.cat([torch.cat([first, torch.zeros_like(corner)], -1), torch.cat([corner, second], -1)], -2)
        over = total.unflatten(-2, (-1, 2))
        over1, over2 = over.exp()[..., None, :].unbind(-3)
        f, g = (torch.stack(x, -3).flatten(-4, -2) for x in ((f1, f2 * over1), (g1 * over2, g2)))
        total = over.sum(-2)
        b *= 2
    written = ((k * g).mT @ v).flatten(2)
    keep = total.exp().squeeze(-2)[..., None].expand(-1, -1, -1, -1, d_value).flatten(2)
    start = torch.zeros_like(written[:, 0]) if h0 is None else h0.to(dtype).flatten(1)
    ends = LinearScan.apply(keep, written, start)
    begins = torch.cat([start[:, None], ends[:, :-1]], 1).unflatten(2, (heads, -1, d_value))
    y = scores.squeeze(-3) @ v + (q * f) @ begins
    y = y.transpose(2, 3).flatten(1, 2)[:, :length].to(given)
    return y, ends[:, -1].unflatten(1, (heads, -1, d_value))
