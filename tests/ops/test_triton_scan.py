"""The Triton scans against the float64 reference: outputs, final states and every gradient; and what must hold exactly."""

import functools

import pytest
import torch
from cases import close, selective
from triton_interpreter import DEVICE, INTERPRETED, agree, here_or_in_a_child, needs_triton, on_device, poisoned_memory

from ssmlens.ops import reference
from ssmlens.ops import triton as kernels

__all__ = ["poisoned_memory"]
pytestmark = needs_triton
OPTIONS = dict.fromkeys(("D", "z", "dt_bias", "h0", "reset"))


def scan(**kw):
    return reference.selective_scan(**(OPTIONS | kw))


def linear(a, u, h0=None, reset=None):
    return reference.linear_scan(a, u, h0=h0, reset=reset)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that short sequences have several segments, chunks and groups of blocks."""
    from ssmlens.ops.triton import _common, _selective

    monkeypatch.setattr(_selective, "SEGMENT", 4)
    monkeypatch.setattr(_common, "SHORTEST_CHUNK", 4)
    monkeypatch.setattr(_selective, "WARPS_AT_ONCE", 3)
    return monkeypatch


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 14, 5, 4), torch.float64, {}),
        ((1, 13, 20, 18), torch.float32, {}),  # two blocks of inner channels, two tiles of state channels
        ((1, 14, 5, 3), torch.bfloat16, {}),
        ((1, 14, 5, 3), torch.float16, {"extras": False}),
        ((1, 1, 1, 1), torch.float64, {}),
        ((1, 9, 3, 5), torch.float64, {"constant": True}),
        ((1, 13, 3, 2), torch.float32, {"extras": False, "pinned": False}),
    ],
)
def test_selective_scan(shape, dtype, options):
    agree(kernels.selective_scan, scan, selective(*shape, dtype=dtype, **options), dtype)


def test_one_level_and_two_levels_agree(small_chunks):
    from ssmlens.ops.triton import _common

    kw = selective(1, 14, 9, 4)
    two = kernels.selective_scan(**on_device(kw))
    small_chunks.setattr(_common, "WARPS_WANTED", 1)
    agree(kernels.selective_scan, scan, kw, torch.float64)
    one = kernels.selective_scan(**on_device(kw))
    for p, q in zip(one, two, strict=True):
        close(p, q, torch.float64)


def test_many_state_channels():
    agree(kernels.selective_scan, scan, selective(1, 5, 3, 70, dtype=torch.float32), torch.float32)


def test_without_softplus_and_with_padding():
    kw = selective(1, 11, 5, 4, extras=False)
    kw["dt"] = kw["dt"].detach().abs()
    kw["dt"][:, 6:] = 0  # padding
    kw["dt"].requires_grad_()
    kw["dt_softplus"] = False
    agree(kernels.selective_scan, scan, kw, torch.float64)


def test_layouts_do_not_matter():
    kw = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in selective(2, 5, 6, 3).items()}
    kw = on_device(kw)
    y, h = kernels.selective_scan(**kw)
    wide = torch.cat([kw["x"], kw["z"]], -1)
    kw["x"], kw["z"] = wide.chunk(2, -1)  # as after a projection
    kw["dt"] = kw["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    kw["B"] = kw["B"].transpose(0, 1).contiguous().transpose(0, 1)
    kw["A"] = kw["A"].T.contiguous().T
    again = kernels.selective_scan(**kw)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], h)
    x = kw["x"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.selective_scan(**(kw | {"x": x}))[0].sum(), x)  # dy has strides of zero
    dense = kw["x"].clone().requires_grad_()
    y = kernels.selective_scan(**(kw | {"x": dense}))[0]
    assert torch.equal(torch.autograd.grad(y, dense, torch.ones_like(y))[0], gradient)


def test_pinned_channels_are_exact():
    """A = 0 sums, A = -inf forgets, both at every dt; their final states survive a last group that is not full."""
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, 13, 5, generator=g), torch.rand(1, 13, 5, generator=g)
    dt[:, 6:9] = 0
    one = torch.ones(5, 1)
    x, dt, one = x.to(DEVICE), dt.to(DEVICE), one.to(DEVICE)
    y, h = kernels.selective_scan(x, dt, -torch.inf * one, one, one)
    assert torch.equal(y, dt * x)
    assert torch.equal(h[..., 0], y[:, -1])
    y, h = kernels.selective_scan(x, dt, 0 * one, one, one)
    close(y.cpu(), (dt * x).double().cumsum(1).cpu(), torch.float32)
    assert torch.equal(h[..., 0], y[:, -1])
    _, h = kernels.selective_scan(x, 0 * dt, -3 * one, one, one, h0=x[:, :1].transpose(1, 2))
    assert torch.equal(h[..., 0], x[:, 0])  # dt = 0 leaves the state bitwise as it is


def test_a_pinned_zero_gives_no_gradient_to_A_and_dt():
    kw = selective(1, 10, 4, 3, extras=False, pinned=False)
    kw = on_device({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kw.items()})
    kw["dt"] = kw["dt"].abs()
    kw["dt"][:, 3] = 0
    kw["dt_softplus"] = False
    kw["A"] = torch.full_like(kw["A"], -torch.inf).requires_grad_()
    kw["dt"].requires_grad_()
    y, _ = kernels.selective_scan(**kw)
    dA, ddt = torch.autograd.grad(y.sum(), (kw["A"], kw["dt"]))
    assert torch.equal(dA, torch.zeros_like(dA))
    close(ddt, kw["x"] * (kw["B"] * kw["C"]).sum(-1, keepdim=True), torch.float64)


def test_softplus_is_exact_where_it_is_small_and_where_it_is_large():
    raw = torch.tensor([[[-80.0, -30.0, -17.0, -3.0, 0.0, 3.0, 19.9, 20.1, 500.0]]])
    one = torch.ones(9, 1, device=DEVICE)
    y, _ = kernels.selective_scan(
        torch.ones(1, 1, 9, device=DEVICE), raw.to(DEVICE), 0 * one, one, one, dt_softplus=True
    )
    expected = torch.nn.functional.softplus(raw.double())
    assert ((y.cpu() - expected) / expected).abs().max() < 1e-6


def test_NaN_stays_in_its_sequence():
    kw = selective(2, 7, 3, 2, extras=False, dtype=torch.float32)
    kw = on_device({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kw.items()})
    for name in ("x", "dt", "B", "C"):
        own = dict(kw)
        own[name] = kw[name].clone()
        own[name][0, 0] = torch.nan
        y, _ = kernels.selective_scan(**own)
        assert y[0, 0].isnan().all()
        assert not y[1].isnan().any()


def test_slow_channels_through_many_chunks():
    length = 60
    g = torch.Generator().manual_seed(0)
    kw = {
        "x": torch.randn(1, length, 2, generator=g), "dt": torch.full((1, length, 2), 0.01),
        "A": torch.tensor([[-0.01, -1.0], [-1e-4, -1e-6]]), "B": torch.ones(1, length, 2), "C": torch.ones(1, length, 2),
        "dt_softplus": False,
    }  # fmt: skip
    agree(kernels.selective_scan, scan, {k: v.requires_grad_() if k != "dt_softplus" else v for k, v in kw.items()},
          torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "extras"),
    [
        ((2, 13, 5), torch.float64, True),
        ((1, 40, 150), torch.float32, False),
        ((1, 9, 2, 3), torch.bfloat16, True),
        ((1, 1, 1), torch.float64, True),
    ],
)
def test_linear_scan(shape, dtype, extras):
    g = torch.Generator().manual_seed(0)
    kw = {"a": torch.randn(shape, generator=g).sigmoid().to(dtype), "u": torch.randn(shape, generator=g).to(dtype)}
    if extras:
        state = torch.float64 if dtype == torch.float64 else torch.float32
        kw |= {"h0": torch.randn(shape[0], *shape[2:], generator=g).to(state)}
    kw = {k: v.requires_grad_() for k, v in kw.items()}
    if extras:
        kw["reset"] = torch.rand(shape[:2], generator=g) < 0.2
    agree(kernels.linear_scan, linear, kw, dtype)


def test_linear_scan_broadcasts_and_keeps_ones_and_zeros_exact():
    u = torch.arange(1.0, 15.0, device=DEVICE).reshape(1, 14, 1).expand(1, 14, 3)
    one = torch.ones(1, 1, 1, device=DEVICE)
    assert torch.equal(kernels.linear_scan(one, u)[0], u.cumsum(1))
    assert torch.equal(kernels.linear_scan(0 * one, u)[0], u)


def test_twice_the_same_bits():
    kw = on_device(selective(1, 9, 9, 3, dtype=torch.float32))
    leaves = [p for p in kw.values() if isinstance(p, torch.Tensor) and p.requires_grad]
    runs = []
    for _ in range(2):
        y, h = kernels.selective_scan(**kw)
        runs.append((y, h, *torch.autograd.grad(y.sum() + h.sum(), leaves)))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.skipif(
    not INTERPRETED, reason="reads past 2^31 entries of memory that a CPU never allocates and a GPU would"
)
def test_offsets_beyond_two_to_the_31():
    """Rows so far apart that 32 bits do not reach the last ones; the pages between them are never touched."""
    length, step = 5, 2**29 + 8

    def spread(values):
        memory = torch.empty((length - 1) * step + 16, dtype=torch.float16)
        far = memory.as_strided(values.shape, (0, step, 1))
        return far.copy_(values)

    with_small = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in selective(1, length, 4, 2).items()}
    kw = {k: v if k in ("dt_softplus", "reset") else v.half() for k, v in with_small.items()}
    torch.use_deterministic_algorithms(False)  # it would touch every page
    far = dict(kw)
    for name in ("x", "dt", "z", "B", "C"):
        far[name] = spread(kw[name])
    for p, q in zip(both(kernels.selective_scan, far), both(kernels.selective_scan, kw), strict=True):
        assert torch.equal(p, q)
    near = {"a": kw["x"].sigmoid(), "u": kw["dt"]}
    far = {k: spread(v) for k, v in near.items()}
    for p, q in zip(both(kernels.linear_scan, far), both(kernels.linear_scan, near), strict=True):
        assert torch.equal(p, q)


def both(function, kw):
    """Outputs and gradients."""
    floats = {k: v.detach().requires_grad_() for k, v in kw.items() if k not in ("dt_softplus", "reset")}
    outputs = functools.partial(function, **(kw | floats))()
    return [*outputs, *torch.autograd.grad(sum(o.float().sum() for o in outputs), list(floats.values()))]


here_or_in_a_child(globals())
