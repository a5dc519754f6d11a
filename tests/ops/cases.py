"""Random arguments for the ops, and the one tolerance table that every backend is held to."""

import pytest
import torch
from torch import Tensor

from ssmlens.ops.cpu import build


def _has_compiler() -> bool:
    try:
        return bool(build.find_compiler())
    except build.BuildError:
        return False


# Only where there is no compiler at all: kernels that fail to compile or load must fail their tests, not skip them.
needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler on this machine")

# relative to the largest entry of the float64 reference
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "", slack: float = 1.0) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach(), want.detach()
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    assert torch.isfinite(torch.view_as_real(got) if got.is_complex() else got).all(), f"{what}: not finite"
    scale = max(want.abs().max().item(), 1e-30)
    error = (got - want).abs().max().item() / scale
    assert error <= slack * TOLERANCE[dtype], f"{what}: relative error {error:.2e} > {slack * TOLERANCE[dtype]:.0e}"


def selective(batch=2, length=13, d_inner=5, d_state=4, *, dtype=torch.float64, complex_=False, pinned=True, seed=0,
              constant=False, extras=True):  # fmt: skip
    """Keyword arguments of selective_scan, leaves that require grad where that makes sense."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A = -torch.exp(rand(d_inner, d_state))
    if complex_:
        A = torch.complex(A, 3 * rand(d_inner, d_state))
    if pinned and d_state >= 3:
        A[:, 0], A[:, -1] = 0, -torch.inf
    shape = (d_inner, d_state) if constant else (batch, length, d_state)
    B, C = rand(*shape), rand(*shape)
    if complex_:
        B, C = torch.complex(B, rand(*shape)), torch.complex(C, rand(*shape))
    kw = {"x": rand(batch, length, d_inner), "dt": rand(batch, length, d_inner), "A": A, "B": B, "C": C}
    if extras:
        kw |= {"D": rand(d_inner), "z": rand(batch, length, d_inner), "dt_bias": rand(d_inner)}
        h0 = rand(batch, d_inner, d_state)
        kw["h0"] = torch.complex(h0, rand(batch, d_inner, d_state)) if complex_ else h0
    out = {}
    for name, p in kw.items():
        p = p.to(dtype.to_complex() if p.is_complex() else dtype) if name in ("x", "dt", "B", "C", "z") else p
        if dtype != torch.float64 and name not in ("x", "dt", "B", "C", "z"):
            p = p.to(torch.complex64 if p.is_complex() else torch.float32)
        out[name] = p.requires_grad_()
    out["dt_softplus"] = True
    if extras:
        out["reset"] = torch.rand(batch, length, generator=g) < 0.15
    return out


def doubled(kw):
    """The same arguments in float64, fresh leaves."""
    out = {}
    for name, p in kw.items():
        if isinstance(p, Tensor) and (p.is_floating_point() or p.is_complex()):
            p = p.detach().to(torch.complex128 if p.is_complex() else torch.float64).requires_grad_(p.requires_grad)
        out[name] = p
    return out


def gradients(outputs, kw, seed=1):
    """Gradients of a random linear functional of the outputs with respect to every differentiable argument."""
    g = torch.Generator().manual_seed(seed)
    total = 0
    for y in outputs:
        weight = torch.randn(y.shape, generator=g, dtype=torch.float64)
        if y.is_complex():
            y = y.real + y.imag
        total = total + (y.double() * weight).sum()
    names = [n for n, p in kw.items() if isinstance(p, Tensor) and p.requires_grad]
    return dict(zip(names, torch.autograd.grad(total, [kw[n] for n in names], retain_graph=True), strict=True))
