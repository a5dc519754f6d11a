"""vmap of the operators: the mapped dimension is folded into the batch, so a Jacobian by many probes is one call."""

import functools
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor


def fold(x: Any, dim: int | None, size: int) -> Any:
    """(batch, ...) with a mapped dimension of `size` → (size · batch, ...); repeats what is not mapped."""
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.reshape(size * x.shape[1], *x.shape[2:])


def fold_all(arguments: Any, in_dims: Any, size: int, parameters: Container[int] = ()) -> list[Any]:
    """Every argument folded, but for those without a batch dimension, at the positions `parameters`."""
    pairs = enumerate(zip(arguments, in_dims, strict=True))
    return [x if i in parameters else fold(x, dim, size) for i, (x, dim) in pairs]


def unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size, *x.shape[1:])


def unfold_all(outputs: Any, size: int) -> Any:
    return tuple(unfold(x, size) for x in outputs), (0,) * len(outputs)


def one_by_one(function: Any, info: Any, in_dims: Any, arguments: Any) -> Any:
    """The rare cases, such as an ensemble of parameters: one call each."""
    results = []
    for i in range(info.batch_size):
        own = [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)]
        results.append(function.apply(*own))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])


def backward_vmap(
    function: Any,
    info: Any,
    in_dims: Any,
    arguments: Any,
    first_input: int,
    gradients: int,
    parameters: tuple[int, ...],
) -> Any:
    """vmap of a backward function: of its arguments the first `gradients` are those that it is given, then come perhaps the
    saved states, from `first_input` on the inputs of the forward function (those at the positions `parameters` among them
    without a batch), and the number of samples.

    Probes alone are folded into the batch of the gradients. Mapped inputs are folded too, unless probes already have been."""
    *tensors, samples = arguments
    parameters = tuple(first_input + i for i in parameters)
    mapped = any(dim is not None for dim in in_dims[gradients:])
    if mapped and (samples > 1 or any(in_dims[i] is not None for i in parameters)):
        return one_by_one(function, info, in_dims, arguments)
    kept = parameters if mapped else range(gradients, len(tensors))
    folded = fold_all(tensors, in_dims[:-1], info.batch_size, kept)
    return unfold_all(function.apply(*folded, samples * info.batch_size), info.batch_size)


def scan_parameters(arguments: Any, in_dims: Any) -> tuple[int, ...]:
    """The positions of A, D, dt_bias and, where they have no time, B and C."""
    matrices = (i for i in (3, 4) if arguments[i].dim() - (in_dims[i] is not None) == 2)
    return (2, 5, 7, *matrices)


def if_given(given: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if given is None else gradient


def first_if_given(given: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if given is None else gradient[0]


def one_call(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of an autograd function that has a vmap. torch.autograd.grad(..., is_grads_batched=True) maps it with
    PyTorch's older vmap, which never asks for that and runs an operator once for each gradient; here it becomes torch.func.vmap."""

    @functools.wraps(backward)
    def mapped(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        if not any(_in_older_vmap(g) for g in gradients):
            return backward(ctx, *gradients)
        level = _older_level()
        dims = tuple(0 if _in_older_vmap(g) else None for g in gradients)
        plain = (
            torch._remove_batch_dim(g, level, 0, 0) if g is not None and _in_older_vmap(g) else g for g in gradients
        )
        places: list[bool] = []

        def found(*own: Tensor | None) -> tuple[Tensor, ...]:
            results = backward(ctx, *own)
            places[:] = [r is not None for r in results]
            return tuple(r for r in results if r is not None)

        results = iter(torch.func.vmap(found, in_dims=dims)(*plain))
        return tuple(torch._add_batch_dim(next(results), 0, level) if given else None for given in places)

    return mapped


def _in_older_vmap(x: Tensor | None) -> bool:
    return x is not None and bool(torch._C._functorch.is_legacy_batchedtensor(x))


def _older_level() -> int:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return int(level)
