"""Scans in blocks in pure torch: inputs in half precision, blocks that join, derivatives, and what rounding adds up to."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import close, doubled, gradients, needs_compiler, selective
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens.ops import chunked, linear_scan, reference
from ssmlens.ops.chunked import scan

HALVES = [torch.bfloat16, torch.float16]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agree(name: str, kw: dict[str, Any], dtype: torch.dtype, slack: float = 1.0) -> None:
    want_kw = doubled(kw)
    want, got = getattr(reference, name)(**want_kw), getattr(chunked, name)(**kw)
    half = dtype in HALVES
    assert got[0].dtype == dtype
    assert got[1].real.dtype == (torch.float32 if half else dtype)
    close(got[0], want[0], dtype, "y", slack)
    close(got[1], want[1], torch.float32 if half else dtype, "final state", slack)
    want_gradients, got_gradients = gradients(want, want_kw), gradients(got, kw)
    for name, g in want_gradients.items():
        assert got_gradients[name].dtype == kw[name].dtype
        close(got_gradients[name], g, dtype, f"gradient of {name}", slack if half else 10 * slack)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK", 16)


def selective_kw(*sizes: int, **kw: Any) -> dict[str, Any]:
    return {"D": None, "z": None, "dt_bias": None, "h0": None, "reset": None, **selective(*sizes, **kw)}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_selective_scan_reads_half_precision(dtype: torch.dtype, constant: bool, small: None) -> None:
    agree("selective_scan", selective_kw(length=40, dtype=dtype, constant=constant), dtype, slack=5)
    agree("selective_scan", selective_kw(length=40, dtype=dtype, extras=False), dtype, slack=5)


def test_selective_scan_widens_a_block_at_a_time(small: None) -> None:
    """No float32 copy of a whole input, in either pass."""
    kw = selective_kw(1, 600, 4, 2, dtype=torch.bfloat16, extras=False)

    class Widened(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                self.numel = max(self.numel, out.numel())
            return out

    with Widened() as seen:
        y, _ = chunked.selective_scan(**kw)
        torch.autograd.grad(y.float().sum(), [kw["x"], kw["B"]])
    assert y.dtype == torch.bfloat16
    assert seen.numel <= 600 * 4, "y.float() in this test, nothing more"
    with Widened() as seen, torch.no_grad():
        chunked.selective_scan(**kw)
    assert seen.numel <= 16 * 4 * 2, "16 tokens"


@pytest.mark.parametrize("complex_", [False, True])
def test_blocks_join_exactly(complex_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kw = selective_kw(length=70, complex_=complex_)
    for block, wide in ((16, 4096), (16, 1), (1 << 20, 1)):
        monkeypatch.setattr(scan, "BLOCK", block)
        monkeypatch.setattr(scan, "WIDE", wide)
        agree("selective_scan", kw, torch.float64)


def test_linear_scan_reads_half_precision() -> None:
    for dtype in HALVES:
        a = rand(2, 30, 3).sigmoid().float().requires_grad_()
        kw = {"a": a, "u": rand(2, 30, 3, seed=1, dtype=dtype).requires_grad_(), "h0": rand(2, 3, seed=2, dtype=torch.float32).requires_grad_(),
              "reset": torch.rand(2, 30) < 0.1}  # fmt: skip
        agree("linear_scan", kw, dtype, slack=2)
        agree("linear_scan", {**kw, "a": a.detach().to(dtype).requires_grad_(), "h0": None}, dtype, slack=2)
    h, last = chunked.linear_scan(
        torch.polar(torch.ones(1, 4, 2), rand(1, 4, 2).float()), rand(1, 4, 2).bfloat16(), h0=None, reset=None
    )
    assert h.dtype == last.dtype == torch.complex64


def test_causal_conv1d_reads_half_precision() -> None:
    for dtype in HALVES:
        kw = {"x": rand(2, 20, 3, dtype=dtype).requires_grad_(), "weight": rand(3, 4, seed=1).float().requires_grad_(),
              "bias": rand(3, seed=2).float().requires_grad_(), "activation": "silu",
              "initial": rand(2, 3, 3, seed=3).float().requires_grad_(), "reset": torch.rand(2, 20) < 0.1}  # fmt: skip
        agree("causal_conv1d", kw, dtype, slack=5)


def test_derivatives_across_blocks(small: None) -> None:
    kw = selective_kw(1, 40, 2, 3, extras=False, pinned=False)
    others = {n: p.detach() if isinstance(p, Tensor) else p for n, p in kw.items() if n != "x"}
    x = kw["x"].detach()
    run = lambda x: chunked.selective_scan(x=x, **others)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, x.clone().requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, x.clone().requires_grad_(), fast_mode=True)
    y, pull = torch.func.vjp(run, x)
    probes = rand(3, *y.shape)
    torch.testing.assert_close(torch.func.vmap(pull)(probes)[0][1], pull(probes[1])[0])
    jacobian = torch.func.jacrev(run)(x)
    torch.testing.assert_close(torch.tensordot(probes[0], jacobian, 3), pull(probes[0])[0])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(x).square().sum(), fullgraph=True, backend="aot_eager")
    own = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compiled(own), own)[0], torch.autograd.grad(run(own).square().sum(), own)[0]
    )


@pytest.mark.parametrize("backend", ["chunked", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "constant"])
def test_at_one_the_error_is_no_more_than_that_of_a_plain_sum(backend: str, kind: str) -> None:
    """10^6 tokens at a = 1, in float32. A plain sum keeps its running total in float32 (np.cumsum); torch.cumsum keeps it in
    float64 on a CPU, which a state in float32 cannot match."""
    length = 10**6
    u = {
        "normal": rand(1, length, 1).float(),
        "uniform": torch.rand(1, length, 1, generator=torch.Generator().manual_seed(0)),
        "constant": torch.full((1, length, 1), 1 / 3),
    }[kind]
    want = u.double().cumsum(1)
    plain = torch.from_numpy(np.cumsum(u.numpy(), 1, dtype=np.float32))
    h = linear_scan(torch.ones_like(u), u, backend=backend)
    assert isinstance(h, Tensor)
    error, allowed = ((x.double() - want).abs().max().item() for x in (h, plain))
    assert error <= allowed
    if backend == "chunked":
        assert error <= 0.2 * allowed, "two levels: far less"
    wide = u.double()
    exact = linear_scan(torch.ones_like(wide), wide, backend=backend)
    assert (exact - want).abs().max() <= 1e-9 * want.abs().max()


def test_batched_probes_are_one_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.func.vmap, and by is_grads_batched, which knows nothing of our functions' vmap. (Operations of PyTorch around the
    scan, such as the gradient of softplus, it does run once for each probe.)"""
    kw = {"a": rand(2, 30, 3).detach().sigmoid().requires_grad_(), "u": rand(2, 30, 3, seed=1).requires_grad_()}
    h = chunked.linear_scan(**kw, h0=None, reset=None)[0]
    probes = rand(5, *h.shape, seed=2).detach()
    alone = [torch.autograd.grad(h, list(kw.values()), p, retain_graph=True) for p in probes]
    calls = []
    scan = chunked.scan._scan
    monkeypatch.setattr(chunked.scan, "_scan", lambda *x: calls.append(1) or scan(*x))
    together = torch.autograd.grad(h, list(kw.values()), probes, is_grads_batched=True, create_graph=True)
    _, pull = torch.func.vjp(
        lambda *x: chunked.linear_scan(*x, h0=None, reset=None)[0], *(x.detach() for x in kw.values())
    )
    calls.clear()
    mapped = torch.func.vmap(pull)(probes)
    for i, wanted in enumerate(zip(*alone, strict=True)):
        torch.testing.assert_close(together[i].detach(), torch.stack(wanted))
        torch.testing.assert_close(mapped[i], torch.stack(wanted))
    # and what is_grads_batched returns can be differentiated again
    again = torch.autograd.grad(together[1].square().sum(), kw["a"])[0]
    wanted = torch.autograd.grad(h, kw["u"], probes[0], create_graph=True, retain_graph=True)[0].square().sum()
    assert again.isfinite().all()
    assert torch.autograd.grad(wanted, kw["a"])[0].isfinite().all()
