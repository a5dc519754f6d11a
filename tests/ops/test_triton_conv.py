"""Triton's short causal convolution against the float64 reference."""

import pytest
import torch
from triton_interpreter import DEVICE, INTERPRETED, agree, here_or_in_a_child, needs_triton, on_device, poisoned_memory

from ssmlens.ops import reference
from ssmlens.ops import triton as kernels

__all__ = ["poisoned_memory"]
pytestmark = needs_triton


def loop(x, weight, bias=None, initial=None, reset=None, activation=None):
    return reference.causal_conv1d(x, weight, bias, activation=activation, initial=initial, reset=reset)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    from ssmlens.ops.triton import _convolution

    monkeypatch.setattr(_convolution, "TIME", 8)


def arguments(batch, length, d, width, dtype, extras=True):
    g = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kw = {
        "x": torch.randn(batch, length, d, generator=g).to(dtype),
        "weight": torch.randn(d, width, generator=g).to(wide),
    }
    if extras:
        kw["bias"] = torch.randn(d, generator=g).to(wide)
        kw["initial"] = torch.randn(batch, width - 1, d, generator=g).to(dtype)
    kw = {k: v.requires_grad_() for k, v in kw.items()}
    if extras:
        kw["reset"] = torch.rand(batch, length, generator=g) < 0.2
    return kw


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 20, 5, 4), torch.float64),
        ((1, 9, 70, 3), torch.float32),
        ((1, 2, 5, 4), torch.float64),  # shorter than the window
        ((1, 1, 1, 2), torch.float64),
        ((1, 9, 3, 1), torch.float32),
        ((1, 10, 4, 4), torch.bfloat16),
    ],
)
def test_agrees_with_the_reference(shape, dtype, extras, activation):
    kw = arguments(*shape, dtype, extras) | {"activation": activation}
    agree(kernels.causal_conv1d, loop, kw, dtype)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_two_halves_are_the_whole(cut):
    kw = on_device({k: v.detach() for k, v in arguments(2, 12, 5, 4, torch.float32).items()})
    y, last = kernels.causal_conv1d(**kw, activation="silu")
    x, reset = kw.pop("x"), kw.pop("reset")
    first, kw["initial"] = kernels.causal_conv1d(x[:, :cut], **kw, reset=reset[:, :cut], activation="silu")
    second, end = kernels.causal_conv1d(x[:, cut:], **kw, reset=reset[:, cut:], activation="silu")
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(end, last)


def test_layouts_do_not_matter():
    kw = on_device({k: v.detach() for k, v in arguments(2, 12, 5, 4, torch.float32).items()})
    y, _ = kernels.causal_conv1d(**kw)
    kw["x"] = kw["x"].transpose(1, 2).contiguous().transpose(1, 2)
    kw["weight"] = kw["weight"].T.contiguous().T
    assert torch.equal(kernels.causal_conv1d(**kw)[0], y)


def test_limits():
    x = torch.zeros(1, 3, 2, device=DEVICE)
    assert kernels.supports_causal_conv1d(x, torch.zeros(2, 16, device=DEVICE))
    assert not kernels.supports_causal_conv1d(x, torch.zeros(2, 17, device=DEVICE))
    assert not kernels.supports_causal_conv1d(x.to(torch.complex64))
    assert not kernels.supports_causal_conv1d(x[:, :, :0])


@pytest.mark.skipif(
    not INTERPRETED, reason="reads past 2^31 entries of memory that a CPU never allocates and a GPU would"
)
def test_offsets_beyond_two_to_the_31():
    length, step = 5, 2**29 + 8
    torch.use_deterministic_algorithms(False)  # it would touch every page
    x, weight = torch.randn(1, length, 4).half(), torch.randn(4, 3)
    far = torch.empty((length - 1) * step + 16, dtype=torch.float16).as_strided(x.shape, (0, step, 1)).copy_(x)
    results = []
    for own in (x, far):
        leaf, w = own.requires_grad_(), weight.clone().requires_grad_()
        y, _ = kernels.causal_conv1d(leaf, w, activation="silu")
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (leaf, w))))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


here_or_in_a_child(globals())
