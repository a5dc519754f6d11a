"""rms_norm on the CPU: the rows it takes, threads, memory, numbers that are hard. (Values and gradients: test_ops, test_cpu_dispatch.)"""

import pytest
import torch
from cases import close, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens.ops import cpu

pytestmark = needs_compiler


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(x: Tensor, weight: Tensor | None, dy: Tensor, eps: float = 1e-5) -> list[Tensor]:
    own = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    y = cpu.rms_norm(*own, eps=eps)
    return [y.detach(), *torch.autograd.grad(y, own, dy)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 99))
def test_against_torch_at_any_shape(batch: int, length: int, d: int, weighted: bool, seed: int) -> None:
    x, dy = normal(batch, length, d, seed=seed), normal(batch, length, d, seed=seed + 1)
    weight = normal(d, seed=seed + 2) if weighted else None
    wide = [t.double().requires_grad_() for t in (x, weight) if t is not None]
    y = F.rms_norm(wide[0], (d,), *wide[1:], eps=0.1)
    wanted = [y, *torch.autograd.grad(y, wide, dy.double())]
    for got, want in zip(results(x, weight, dy, 0.1), wanted, strict=True):
        close(got, want, torch.float32)


def test_rows_of_a_wider_tensor_and_of_one_repeated() -> None:
    x, weight, dy = normal(3, 9, 40), normal(20), normal(3, 9, 20, seed=1)
    layouts = [x[..., 20:], x[:, ::2, :20], x.transpose(0, 1)[..., 3:23], x[:1, :1, :20].expand(3, 9, 20), x[..., ::2]]
    for view in layouts:
        own = dy[: view.shape[0]] if view.shape[1] == 9 else normal(*view.shape, seed=1)
        for a, b in zip(results(view, weight, own), results(view.contiguous(), weight, own), strict=True):
            assert torch.equal(a, b)
    strided = torch.ones(1).expand(3, 9, 20)
    for a, b in zip(
        results(x[..., :20], weight, strided), results(x[..., :20], weight, strided.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    x, weight, dy = normal(3, 500, 70), normal(70), normal(3, 500, 70, seed=1)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(x, weight, dy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class Largest(TorchDispatchMode):
    """The numbers in all that an operator allocates (its outputs), one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = op(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)
        }
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_full_size_but_the_result(dtype: torch.dtype) -> None:
    x, weight = normal(4, 100, 64, dtype=dtype).requires_grad_(), torch.ones(64, requires_grad=True)
    with Largest() as forward:
        y = cpu.rms_norm(x, weight, eps=1e-5)
    assert sorted(forward.sizes) == [400, x.numel()], "the result, and one number a row"
    with Largest() as backward:
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert sorted(s for s in backward.sizes if s > 64) == [x.numel()] * 2, (
        "the gradient handed in, and the one that comes out"
    )


def test_hard_numbers() -> None:
    x = torch.tensor([[0.0] * 9, [1e-30] * 9, [1e18] * 9, [torch.nan] + [1.0] * 8, [1.0] * 9])[None]
    y, dx, dweight = results(x, torch.ones(9), torch.ones_like(x), 0.0)
    close(y[0, 4], torch.ones(9), torch.float32)
    assert y[0, 3].isnan().all()
    assert not y[0, 4].isnan().any(), "NaN stays in its row"
    assert not dx[0, 4].isnan().any()
    close(y[0, 2], torch.ones(9), torch.float32)
    y, dx, dweight = results(x[:, [0, 1, 2, 4]], torch.ones(9), normal(1, 4, 9), 1e-6)
    assert all(t.isfinite().all() for t in (y, dx, dweight))
    assert (y[0, 0] == 0).all()
    close(dx[0, 0], normal(1, 4, 9)[0, 0] * 1e3, torch.float32)


def test_many_rows_add_up() -> None:
    """The gradient to the weight is a sum over 200,000 rows."""
    x, dy = normal(2, 100_000, 5), normal(2, 100_000, 5, seed=1)
    _, _, dweight = results(x, torch.ones(5), dy)
    _, _, wanted = results(x.double(), torch.ones(5, dtype=torch.float64), dy.double())
    close(dweight, wanted, torch.float32)
