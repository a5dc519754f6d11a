"""Triton's gated linear attention against the float64 reference: outputs, final states, every gradient, extreme decays."""

import pytest
import torch
from cases import close
from triton_interpreter import DEVICE, INTERPRETED, agree, here_or_in_a_child, needs_triton, on_device, poisoned_memory

from ssmlens.ops import reference
from ssmlens.ops import triton as kernels

__all__ = ["poisoned_memory"]
pytestmark = needs_triton


def recurrence(q, k, v, log_a, bonus=None, h0=None, reset=None):
    return reference.gated_linear_attention(q, k, v, log_a, bonus=bonus, h0=h0, reset=reset)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of two blocks, so that short sequences have several of both."""
    from ssmlens.ops.triton import _attention

    monkeypatch.setattr(_attention, "CHUNK", 32)
    monkeypatch.setattr(_attention, "EXACT_CHUNK", 32)
    return monkeypatch


def arguments(batch=1, length=20, groups=1, heads=1, d_key=3, d_value=4, *, by_key=True, bonus=False, state=True,
              resets=True, scale=1.0, pinned=True, dtype=torch.float64, seed=0):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    log_a = -scale * torch.rand(batch, length, heads, d_key if by_key else 1, generator=g, dtype=torch.float64)
    if pinned:  # a = 1 and a = 0 anywhere
        drawn = torch.rand(log_a.shape, generator=g)
        log_a[drawn < 0.1], log_a[drawn > 0.95] = 0, -torch.inf
    rows = {
        "q": normal(batch, length, groups, d_key), "k": normal(batch, length, groups, d_key),
        "v": normal(batch, length, heads, d_value), "log_a": log_a,
    }  # fmt: skip
    kw = {n: p.to(dtype) for n, p in rows.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if bonus:
        kw["bonus"] = normal(heads, d_key).to(wide)
    if state:
        kw["h0"] = normal(batch, heads, d_key, d_value).to(wide)
    kw = {n: p.requires_grad_() for n, p in kw.items()}
    if resets:
        kw["reset"] = torch.rand(batch, length, generator=g) < 0.1
    return kw


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1, 1, 1), {}),
        ((1, 37, 1, 2, 3, 4), {}),  # two chunks, three blocks
        ((2, 7, 2, 4, 5, 3), {"state": False, "resets": False, "dtype": torch.float32}),
    ],
)
def test_agrees_with_the_reference(shape, options, by_key, bonus):
    kw = arguments(*shape, by_key=by_key, bonus=bonus, **options)
    agree(kernels.gated_linear_attention, recurrence, kw, kw["q"].dtype)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype, by_key):
    kw = arguments(1, 18, 1, 2, 4, 4, by_key=by_key, bonus=by_key, dtype=dtype, pinned=False)
    agree(kernels.gated_linear_attention, recurrence, kw, dtype)


@pytest.mark.parametrize("by_key", [False, True])
def test_wider_than_a_block(by_key):
    kw = arguments(1, 18, 1, 1, 40, 35, by_key=by_key, dtype=torch.float32)
    agree(kernels.gated_linear_attention, recurrence, kw, torch.float32)


def test_four_blocks_a_chunk(small_chunks):
    """A token is read across blocks that lie between."""
    from ssmlens.ops.triton import _attention

    small_chunks.setattr(_attention, "EXACT_CHUNK", 64)
    agree(kernels.gated_linear_attention, recurrence, arguments(length=62, resets=False, pinned=False), torch.float64)


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(("scale", "dtype"), [(60.0, torch.float64), (1e-5, torch.float32)])
def test_the_fastest_and_the_slowest_decay(scale, dtype, by_key, bonus):
    """Every gradient is held to its own largest entry: that to log a is of order e^-60 and must not drown in rounding."""
    kw = arguments(length=34, scale=scale, by_key=by_key, bonus=bonus, pinned=False, resets=False, dtype=dtype)
    agree(kernels.gated_linear_attention, recurrence, kw, dtype)


@pytest.mark.parametrize("by_key", [False, True])
def test_where_a_is_zero_nothing_passes_and_log_a_has_no_gradient(by_key):
    kw = on_device(arguments(length=34, by_key=by_key, pinned=False, resets=False, state=False))
    kw["log_a"] = torch.full_like(kw["log_a"], -torch.inf).requires_grad_()
    y, _ = kernels.gated_linear_attention(**kw)
    close(y.detach(), (kw["q"] * kw["k"]).sum(-1, keepdim=True) * kw["v"], torch.float64)
    (gradient,) = torch.autograd.grad(y.square().sum(), kw["log_a"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_layouts_do_not_matter_and_bits_repeat():
    kw = on_device({k: v.detach() for k, v in arguments(2, 20, 1, 2).items()})
    y, h = kernels.gated_linear_attention(**kw)
    both = torch.cat([kw["q"], kw["k"]], -1)
    kw["q"], kw["k"] = both.chunk(2, -1)
    kw["v"] = kw["v"].transpose(1, 2).contiguous().transpose(1, 2)
    kw["log_a"] = kw["log_a"].transpose(0, 3).contiguous().transpose(0, 3)
    again = kernels.gated_linear_attention(**kw)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], h)


@pytest.mark.skipif(
    not INTERPRETED, reason="reads past 2^31 entries of memory that a CPU never allocates and a GPU would"
)
def test_offsets_beyond_two_to_the_31():
    length, step = 5, 2**29 + 8
    torch.use_deterministic_algorithms(False)  # it would touch every page
    kw = {k: v.detach().half() for k, v in arguments(length=length, resets=False, state=False).items()}
    results = []
    for apart in (False, True):
        leaves = {}
        for name, values in kw.items():
            own = values.clone()
            if apart:
                memory = torch.empty((length - 1) * step + 16, dtype=torch.float16)
                own = memory.as_strided(values.shape, (0, step, 4, 1)).copy_(values)
            leaves[name] = own.requires_grad_()
        y, h = kernels.gated_linear_attention(**leaves)
        results.append([y, h, *torch.autograd.grad(y.float().sum() + h.sum(), list(leaves.values()))])
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_it_runs_where_it_is_tested():
    assert kernels.available()
    kw = on_device(arguments())
    assert kernels.supports_gated_linear_attention(kw["v"], kw["log_a"])
    assert kw["v"].device.type == DEVICE


here_or_in_a_child(globals())
