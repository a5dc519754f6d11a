"""bfloat16 and float16 in the CPU kernels: read and written as they are, computed in float32. The judge is the same kernel on the
same numbers in float32: rounding its results gives theirs, bit by bit, as does rounding its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import close, doubled, gradients, needs_compiler, selective
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens.ops import cpu, reference

pytestmark = needs_compiler
HALF = (torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaves(kw: Arguments, dtypes: dict[str, torch.dtype]) -> tuple[Arguments, Arguments]:
    """The arguments with some of them in other dtypes, and the same numbers in float32 (or complex64)."""
    mixed: Arguments = {}
    for name, p in kw.items():
        differentiable = isinstance(p, Tensor) and p.dtype != torch.bool
        mixed[name] = p.detach().to(dtypes.get(name, p.dtype)).requires_grad_() if differentiable else p
    wide = {
        name: p.detach().float().requires_grad_() if isinstance(p, Tensor) and p.dtype in HALF else p
        for name, p in mixed.items()
    }
    return mixed, {k: p.detach().requires_grad_() if p is mixed[k] and isinstance(p, Tensor) and p.requires_grad else p
                   for k, p in wide.items()}  # fmt: skip


def compare(function: Callable[..., Any], kw: Arguments, dtypes: dict[str, torch.dtype], like: str) -> None:
    mixed, wide = leaves(kw, dtypes)
    got, wanted = function(**mixed), function(**wide)
    assert got[0].dtype == mixed[like].dtype
    assert torch.equal(got[0], wanted[0].to(got[0].dtype))
    assert got[1].dtype == wanted[1].dtype
    assert torch.equal(got[1], wanted[1])
    # a gradient to y that y's dtype can hold
    dy = normal(*got[0].shape, seed=3).to(got[0].dtype)
    dlast = normal(*got[1].shape, seed=4).to(got[1].dtype)
    names = [k for k, p in mixed.items() if isinstance(p, Tensor) and p.requires_grad]
    through = slice(2 if got[1].requires_grad else 1)
    actual = torch.autograd.grad(got[through], [mixed[k] for k in names], (dy, dlast)[through])
    expected = torch.autograd.grad(wanted[through], [wide[k] for k in names], (dy.to(wanted[0].dtype), dlast)[through])
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.dtype == mixed[name].dtype, name
        assert torch.equal(a, e.to(a.dtype)), name


def scan(**kw: Any) -> Any:
    return cpu.selective_scan(**kw)


MIXTURES = [
    dict.fromkeys(("x", "dt", "B", "C", "z"), torch.bfloat16),
    dict.fromkeys(("x", "dt", "B", "C", "z"), torch.float16),
    {"x": torch.bfloat16, "B": torch.float16},
    {"dt": torch.float16, "C": torch.bfloat16, "z": torch.float16},
]


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("kind", ["real", "complex, real B and C", "fixed B and C", "one sequence, one channel"])
def test_selective_scan(kind: str, dtypes: dict[str, torch.dtype]) -> None:
    shape = (1, 40, 1, 3) if kind.startswith("one") else (2, 70, 37, 18)
    kw = selective(*shape, dtype=torch.float32, complex_=kind.startswith("complex"), constant=kind.startswith("fixed"))
    if kind.startswith("complex"):
        kw |= {k: kw[k].detach().real.clone().requires_grad_() for k in ("B", "C")}
    compare(scan, kw, dtypes, "x")


@pytest.mark.parametrize("dtype", HALF)
def test_selective_scan_against_the_reference(dtype: torch.dtype) -> None:
    kw = selective(2, 50, 20, 6, dtype=dtype)
    wide = doubled(kw)
    wanted, got = reference.selective_scan(**wide), cpu.selective_scan(**kw)
    close(got[0], wanted[0], dtype, "y")
    close(got[1], wanted[1], torch.float32, "h_T")  # the state never was in half precision
    want_gradients = gradients(wanted, wide)
    for name, g in gradients(got, kw).items():
        close(g, want_gradients[name], dtype, f"gradient to {name}")


@pytest.mark.parametrize(
    "dtypes", [{"a": HALF[0], "u": HALF[0]}, {"a": HALF[1], "u": HALF[1]}, {"u": HALF[0]}, {"a": HALF[1]}]
)
def test_linear_scan(dtypes: dict[str, torch.dtype]) -> None:
    kw = {"a": normal(2, 70, 37).sigmoid(), "u": normal(2, 70, 37, seed=1), "h0": normal(2, 37),
          "reset": normal(2, 70) < -1.5}  # fmt: skip
    compare(cpu.linear_scan, kw, dtypes, "u")


@pytest.mark.parametrize(
    "dtypes", [{"x": HALF[0]}, {"x": HALF[1], "initial": HALF[1]}, {"x": HALF[0], "weight": HALF[0]}]
)
def test_causal_conv1d(dtypes: dict[str, torch.dtype]) -> None:
    kw = {"x": normal(2, 70, 37), "weight": normal(37, 4), "bias": normal(37), "activation": "silu",
          "initial": normal(2, 3, 37), "reset": normal(2, 70) < -1.5}  # fmt: skip
    compare(lambda **own: (cpu.causal_conv1d(**own)[0], cpu.causal_conv1d(**own)[1].detach()), kw, dtypes, "x")


@pytest.mark.parametrize("dtypes", [{"x": HALF[0]}, {"x": HALF[1]}, {"x": HALF[0], "weight": HALF[0]}])
def test_rms_norm(dtypes: dict[str, torch.dtype]) -> None:
    kw = {"x": normal(2, 70, 37), "weight": normal(37)}
    compare(lambda **own: (cpu.rms_norm(**own, eps=1e-5), own["x"].detach().float()), kw, dtypes, "x")


@pytest.mark.parametrize("dtype", HALF)
def test_rwkv4(dtype: torch.dtype) -> None:
    kw = {"r": normal(2, 70, 37), "k": normal(2, 70, 37, seed=1), "v": normal(2, 70, 37, seed=2), "w": normal(37).exp(),
          "u": normal(37, seed=1), "reset": normal(2, 70) < -1.5}  # fmt: skip

    def function(**own: Any) -> Any:
        y, (p, _, _) = cpu.rwkv4_attention(**own)
        return y, p

    compare(function, kw, dict.fromkeys("rkv", dtype), "v")


@pytest.mark.parametrize("dtype", HALF)
def test_every_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """All 65,536 of them times factors that make subnormal numbers, ties, infinities."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1, 64)
    for factor in (1.0, -1.0, 1 / 3, 2.0**-9, 1.0009765625, 1e30):
        weight = torch.full((64, 1), factor)
        got, _ = cpu.causal_conv1d(patterns, weight)
        expected = (patterns.float() * factor).to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))


class WideTensors(TorchDispatchMode):
    """Counts the float32 tensors of `size` numbers or more that come about."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor) and t.dtype == torch.float32 and t.numel() >= self.size:
                self.found.append(str(function))
        return result


@pytest.mark.parametrize("op", ["selective_scan", "linear_scan", "causal_conv1d", "rwkv4_attention"])
def test_nothing_is_copied_to_float32_as_a_whole(op: str) -> None:
    rows = [normal(2, 200, 37, seed=i).bfloat16().requires_grad_() for i in range(3)]
    B, C = (normal(2, 200, 9, seed=i).bfloat16().requires_grad_() for i in range(2))
    A = -normal(37, 9).abs()
    calls = {
        "selective_scan": lambda: cpu.selective_scan(rows[0], rows[1], A, B, C, z=rows[2], dt_softplus=True),
        "linear_scan": lambda: cpu.linear_scan(rows[0].sigmoid(), rows[1]),
        "causal_conv1d": lambda: cpu.causal_conv1d(rows[0], normal(37, 4)),
        "rwkv4_attention": lambda: cpu.rwkv4_attention(*rows, normal(37).abs(), normal(37)),
    }
    with WideTensors(rows[0].numel()) as wide:
        y, _ = calls[op]()
        y.backward(torch.ones_like(y))
    assert wide.found == []
    assert rows[0].grad is not None
    with wide:
        rows[0].float()
    assert wide.found  # it does see them


def test_float64_beside_half_precision_is_computed_in_the_first_ones_precision() -> None:
    kw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in selective(1, 10, 5, 4).items()}
    kw["dt"] = kw["dt"].bfloat16()
    y, h = cpu.selective_scan(**kw)
    assert (y.dtype, h.dtype) == (torch.float64, torch.float64)
    assert torch.equal(y, cpu.selective_scan(**kw | {"dt": kw["dt"].double()})[0])
    y, h = cpu.selective_scan(**kw | {"x": kw["x"].bfloat16()})
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
