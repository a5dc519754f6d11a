"""The CPU's short causal convolution against torch's own, and against a loop where a reset cuts it."""

from typing import Any

import pytest
import torch
from cases import needs_compiler
from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops import cpu

pytestmark = needs_compiler
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    window = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial is None else initial
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            window = window.masked_fill(reset[:, t, None, None], 0)
        window = torch.cat([window, x[:, t : t + 1]], 1)
        y = (window * weight.T).sum(1)
        ys.append(y if bias is None else y + bias)
        window = window[:, 1:]
    out = torch.stack(ys, 1)
    return F.silu(out) if activation == "silu" else out, window


def arguments(batch: int, length: int, d: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = [(batch, length, d), (d, width), (d,), (batch, width - 1, d)]
    return [torch.randn(*shape, generator=make, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("resets", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(2, 70, 37, 4), (1, 2, 5, 4), (3, 9, 16, 1), (1, 1, 1, 2), (1, 30, 2000, 3)])
def test_outputs_and_gradients(
    dtype: torch.dtype, activation: str | None, resets: float, shape: tuple[int, int, int, int]
) -> None:
    tensors = arguments(*shape, dtype)
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < resets if resets else None
    results = []
    for function, own_dtype in ((cpu.causal_conv1d, dtype), (loop, torch.float64)):
        own = [t.detach().to(own_dtype).requires_grad_() for t in tensors]
        x, weight, bias, initial = own
        y, last = function(x, weight, bias, activation=activation, initial=initial, reset=reset)
        make = torch.Generator().manual_seed(2)
        gradients = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(own_dtype) for o in (y, last)]
        results.append((y, last, *torch.autograd.grad((y, last), own, gradients)))
    for name, actual, expected in zip(("y", "final", "dx", "dweight", "dbias", "dinitial"), *results, strict=True):
        assert actual.shape == expected.shape
        scale = expected.detach().abs().max().clamp_min(1e-3) if expected.numel() else 1.0
        difference = (actual.detach().double() - expected.detach()) / scale
        assert not difference.numel() or difference.abs().max() < TOLERANCE[dtype], name


def test_agrees_with_torch() -> None:
    x, weight, bias, _ = arguments(2, 50, 24, 4, torch.float32)
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=24)[..., :50].transpose(1, 2)
    torch.testing.assert_close(cpu.causal_conv1d(x, weight, bias)[0], expected)
    torch.testing.assert_close(cpu.causal_conv1d(x, weight, None)[0], expected - bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 49])
def test_two_halves_are_the_whole(cut: int) -> None:
    x, weight, bias, initial = arguments(2, 50, 24, 4, torch.float32)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[0, 17], reset[1, 2] = True, True
    own: dict[str, Any] = {"activation": "silu"}
    y, last = cpu.causal_conv1d(x, weight, bias, initial=initial, reset=reset, **own)
    y1, last1 = cpu.causal_conv1d(x[:, :cut], weight, bias, initial=initial, reset=reset[:, :cut], **own)
    y2, last2 = cpu.causal_conv1d(x[:, cut:], weight, bias, initial=last1, reset=reset[:, cut:], **own)
    assert torch.equal(torch.cat([y1, y2], 1), y)
    assert torch.equal(last2, last)


def test_half_of_a_wider_tensor_and_threads() -> None:
    wide = torch.randn(3, 400, 80, generator=torch.Generator().manual_seed(0))
    _, weight, bias, _ = arguments(3, 400, 40, 4, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x, w = wide.clone().requires_grad_(), weight.clone().requires_grad_()
            y, _ = cpu.causal_conv1d(x.chunk(2, -1)[1], w, bias, activation="silu")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(
        results[0][0], cpu.causal_conv1d(wide[..., 40:].contiguous(), weight, bias, activation="silu")[0]
    )
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    assert (results[0][1][..., :40] == 0).all()


def test_bfloat16() -> None:
    x, weight, bias, _ = arguments(2, 20, 16, 4, torch.float32)
    y, _ = cpu.causal_conv1d(x.bfloat16(), weight, bias, activation="silu")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, cpu.causal_conv1d(x.bfloat16().float(), weight, bias, activation="silu")[0].bfloat16())
