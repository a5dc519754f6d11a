"""vmap of the CPU operators: the mapped dimension is folded into the batch, so a Jacobian by many probes is one call."""

from collections.abc import Container
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
