"""The CPU operators inside PyTorch: gradcheck, opcheck, torch.compile, torch.func, checkpointing, second derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import needs_compiler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssmlens.ops import cpu

pytestmark = needs_compiler
BATCH, LENGTH, D, N = 2, 6, 5, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


RESET = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
RESET[0, 3] = True


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, h0: Tensor) -> Any:
    return cpu.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, h0=h0, reset=RESET)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor) -> Any:
    return cpu.causal_conv1d(x, weight, bias, activation="silu", initial=initial, reset=RESET)


def linear(a: Tensor, u: Tensor, h0: Tensor) -> Any:
    return cpu.linear_scan(a, u, h0=h0, reset=RESET)


def complex_linear(size: Tensor, angle: Tensor, re: Tensor, im: Tensor, h0: Tensor) -> Any:
    outputs = cpu.linear_scan(torch.polar(size.sigmoid(), angle), torch.complex(re, im), h0=h0, reset=RESET)
    return tuple(torch.view_as_real(o).flatten(-2) for o in outputs)


def rwkv4(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, p: Tensor, s: Tensor, m: Tensor) -> Any:
    y, state = cpu.rwkv4_attention(r, k, v, w, u, state=(p, s, m), reset=RESET)
    return (y, *state)


def norm(x: Tensor, weight: Tensor) -> Any:
    return (cpu.rms_norm(x, weight, eps=0.1),)


def scan_arguments(fixed: bool = False) -> list[Tensor]:
    matrix = (D, N) if fixed else (BATCH, LENGTH, N)
    A = -normal(D, N).abs() - 0.1
    row = (BATCH, LENGTH, D)
    return [normal(*row), normal(*row, seed=1), A, normal(*matrix), normal(*matrix, seed=1), normal(D), normal(*row, seed=2),
            normal(D, seed=1), normal(BATCH, D, N)]  # fmt: skip


def complex_scan_arguments(fixed: bool = False) -> list[Tensor]:
    x, dt, A, B, C, *most, h0 = scan_arguments(fixed)
    imaginary = (normal(*t.shape, seed=7) for t in (A, B, C, h0))
    A, B, C, h0 = (torch.complex(t, i) for t, i in zip((A, B, C, h0), imaginary, strict=True))
    return [x, dt, A, B, C, *most, h0]


def rwkv4_arguments() -> list[Tensor]:
    row = (BATCH, LENGTH, D)
    return [normal(*row), normal(*row, seed=1), normal(*row, seed=2), normal(D).exp(), normal(D, seed=1),
            normal(BATCH, D), normal(BATCH, D, seed=1).exp(), normal(BATCH, D, seed=2)]  # fmt: skip


CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "scan": (scan, scan_arguments()),
    "scan, fixed B and C": (scan, scan_arguments(fixed=True)),
    "complex scan": (scan, complex_scan_arguments()),
    "complex scan, fixed B and real C": (
        scan,
        [a.real if i == 4 else a for i, a in enumerate(complex_scan_arguments(fixed=True))],
    ),
    "convolution": (convolution, [normal(BATCH, LENGTH, D), normal(D, 3), normal(D), normal(BATCH, 2, D)]),
    "linear": (linear, [normal(BATCH, LENGTH, D).sigmoid(), normal(BATCH, LENGTH, D, seed=1), normal(BATCH, D)]),
    "complex linear": (complex_linear, [normal(BATCH, LENGTH, D, seed=i) for i in range(4)] + [normal(BATCH, D)]),
    "rwkv4": (rwkv4, rwkv4_arguments()),
    "norm": (norm, [normal(BATCH, LENGTH, D), normal(D)]),
}


def scalar(outputs: Any) -> Tensor:
    """A real number that depends on every output."""
    parts = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
    return 2 * parts[0].square().sum() + sum(p.sum() + 0.5 * p.square().sum() for p in parts[1:])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], list[Tensor]]:
    function, arguments = CASES[request.param]
    return function, [a.clone().requires_grad_() for a in arguments]


Case = tuple[Callable[..., Any], list[Tensor]]


def test_gradcheck(case: Case) -> None:
    function, arguments = case
    assert torch.autograd.gradcheck(function, arguments, fast_mode=False)


@pytest.mark.parametrize("arguments", [scan_arguments(), complex_scan_arguments()], ids=["real", "complex"])
def test_opcheck_of_the_scan(arguments: list[Tensor]) -> None:
    x, dt, A, B, C, skip, z, bias, h0 = arguments
    ops = torch.ops.ssmlens
    some = (x, dt, A, B, C, skip, z, bias, True, h0, RESET)
    y, h, saved = ops.cpu_selective_scan(*some, True)
    torch.library.opcheck(ops.cpu_selective_scan.default, (*some, True))
    torch.library.opcheck(ops.cpu_selective_scan_backward.default, (y, h, saved, *some, 1))
    least = (x, dt.abs(), A, B[0, :D], C[0, :D], None, None, None, False, None, None)
    torch.library.opcheck(ops.cpu_selective_scan.default, (*least, True))
    torch.library.opcheck(ops.cpu_selective_scan_backward.default, (y, None, saved, *least, 1))


def test_opcheck_in_half_precision() -> None:
    x, dt, A, B, C, skip, z, bias, h0 = (a.float() for a in scan_arguments())
    x, dt, B, C, z = x.bfloat16(), dt.half(), B.bfloat16(), C.half(), z.bfloat16()
    ops = torch.ops.ssmlens
    some = (x, dt, A, B, C, skip, z, bias, True, h0, RESET)
    y, h, saved = ops.cpu_selective_scan(*some, True)
    torch.library.opcheck(ops.cpu_selective_scan.default, (*some, True))
    torch.library.opcheck(ops.cpu_selective_scan_backward.default, (y, h, saved, *some, 1))
    _, last, saved = ops.cpu_linear_scan(dt, x, None, RESET, True)
    torch.library.opcheck(ops.cpu_linear_scan.default, (dt, x, None, RESET, True))
    torch.library.opcheck(ops.cpu_linear_scan_backward.default, (x, last, saved, dt, x, None, RESET))


def test_opcheck_of_the_others() -> None:
    x, dt, A, _, _, skip, z, _, _ = scan_arguments()
    ops = torch.ops.ssmlens
    linear_arguments = (x.sigmoid(), z, None, RESET)
    h, last, saved = ops.cpu_linear_scan(*linear_arguments, True)
    torch.library.opcheck(ops.cpu_linear_scan.default, (*linear_arguments, True))
    torch.library.opcheck(ops.cpu_linear_scan_backward.default, (h, last, saved, *linear_arguments))
    conv = (x, normal(D, 3), skip, True, normal(BATCH, 2, D), RESET)
    torch.library.opcheck(ops.cpu_causal_conv1d.default, conv)
    torch.library.opcheck(ops.cpu_causal_conv1d_backward.default, (x, *conv, 1))
    attention = (*rwkv4_arguments(), RESET)
    y, p, s, m, saved = ops.cpu_rwkv4_attention(*attention, True)
    torch.library.opcheck(ops.cpu_rwkv4_attention.default, (*attention, True))
    torch.library.opcheck(ops.cpu_rwkv4_attention_backward.default, (y, p, s, m, saved, *attention, 1))
    no_state = (*rwkv4_arguments()[:5], None, None, None, None)
    torch.library.opcheck(ops.cpu_rwkv4_attention_backward.default, (y, None, None, None, saved, *no_state, 1))
    torch.library.opcheck(ops.cpu_exponentials.default, (dt, A))
    for weight in (skip, None):
        y, inverse = ops.cpu_rms_norm(x, weight, 0.1)
        torch.library.opcheck(ops.cpu_rms_norm.default, (x, weight, 0.1))
        torch.library.opcheck(ops.cpu_rms_norm_backward.default, (y, inverse, x, weight, 0.1, 1))


def test_compile_without_graph_breaks(case: Case) -> None:
    function, arguments = case

    def loss(*own: Tensor) -> Tensor:
        return scalar(function(*own))

    torch._dynamo.reset()  # `loss` is one function to it, compiled again for each case
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*arguments), loss(*arguments)
    torch.testing.assert_close(value, expected)
    pairs = zip(torch.autograd.grad(value, arguments), torch.autograd.grad(expected, arguments), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


def test_batched_probes_are_one_call(case: Case) -> None:
    function, arguments = case
    outputs = function(*arguments)
    probes = [torch.stack([normal(*o.shape, seed=i).to(o.dtype) * (2 + (1j if o.is_complex() else 0)) for i in range(4)])
              for o in outputs]  # fmt: skip
    kept = {"retain_graph": True}
    expected = [torch.autograd.grad(outputs, arguments, [p[i] for p in probes], **kept) for i in range(4)]
    with Calls() as calls:
        together = torch.autograd.grad(outputs, arguments, probes, is_grads_batched=True, **kept)
    assert calls.backward == 1
    for k, g in enumerate(together):
        torch.testing.assert_close(g, torch.stack([e[k] for e in expected]))
    pull = torch.func.vjp(function, *(a.detach() for a in arguments))[1]
    with Calls() as calls:
        torch.func.vmap(pull)(tuple(probes))
    assert calls.backward == 1


class Calls(TorchDispatchMode):
    """Counts what arrives at the backward operators themselves."""

    backward = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.backward += str(op).startswith("ssmlens.") and "_backward" in str(op)
        return op(*args, **(kwargs or {}))


def test_vmap_over_each_argument_alone_and_over_all(case: Case) -> None:
    """vmap of values and gradients, with one argument mapped (inputs fold into the batch, parameters are looped over)."""
    function, arguments = case
    arguments = [a.detach() for a in arguments]

    def value_and_gradients(*own: Tensor) -> Any:
        numbers = tuple(range(len(own)))
        return torch.func.grad_and_value(lambda *a: scalar(function(*a)), numbers)(*own)

    choices = [[k] for k in range(len(arguments))] + [list(range(len(arguments)))]
    for mapped in choices:
        stacked = [torch.stack([a, a * 0.5, a * 2]) if k in mapped else a for k, a in enumerate(arguments)]
        dims = tuple(0 if k in mapped else None for k in range(len(arguments)))
        gradients, values = torch.func.vmap(value_and_gradients, in_dims=dims)(*stacked)
        for i in range(3):
            own = [a[i] if k in mapped else a for k, a in enumerate(stacked)]
            expected, value = value_and_gradients(*own)
            torch.testing.assert_close(values[i], value)
            for g, e in zip(gradients, expected, strict=True):
                torch.testing.assert_close(g[i], e)


def test_nested_vmap_and_jacobian(case: Case) -> None:
    function, arguments = case
    rest = [a.detach() for a in arguments[1:]]
    y, pull = torch.func.vjp(lambda x: function(x, *rest)[0], arguments[0].detach())
    probes = normal(2, 3, *y.shape)
    nested = torch.func.vmap(torch.func.vmap(pull))(probes)[0]
    torch.testing.assert_close(nested[1, 2], pull(probes[1, 2])[0])
    jacobian = torch.func.jacrev(lambda x: function(x, *rest)[0])(arguments[0].detach())
    torch.testing.assert_close((jacobian * probes[0, 0][..., None, None, None]).sum((0, 1, 2)), pull(probes[0, 0])[0])
    for other in torch.func.vmap(lambda x: torch.func.vmap(lambda p: torch.func.vjp(lambda x: function(x, *rest)[0], x)[1](p))(
        probes[0]))(torch.stack([arguments[0].detach()] * 2)):  # fmt: skip
        torch.testing.assert_close(other[0][2] if isinstance(other, tuple) else other[0, 2], pull(probes[0, 2])[0])


def test_a_second_derivative_is_refused(case: Case) -> None:
    function, arguments = case
    if function is norm:
        return  # it has one: below
    (gradient,) = torch.autograd.grad(function(*arguments)[0].square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), arguments[0])


def test_backward_twice_and_by_checkpointing(case: Case) -> None:
    function, arguments = case
    loss = function(*arguments)[0].square().sum()
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    second = torch.autograd.grad(loss, arguments)
    again = checkpoint(lambda *a: function(*a)[0].square().sum(), *arguments, use_reentrant=False)
    third = torch.autograd.grad(again, arguments)
    for p, q, r in zip(first, second, third, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_only_some_arguments_need_gradients(case: Case) -> None:
    function, arguments = case
    frozen = [arguments[0], *[a.detach() for a in arguments[1:]]]
    torch.testing.assert_close(
        torch.autograd.grad(function(*frozen)[0].sum(), frozen[0]),
        torch.autograd.grad(function(*arguments)[0].sum(), arguments[0]),
    )
    with torch.no_grad():
        assert not function(*arguments)[0].requires_grad


def test_without_gradients_the_numbers_are_the_same(case: Case) -> None:
    """There the operator runs alone; but not under torch.func, which needs the autograd function's vmap."""
    function, arguments = case
    wanted = function(*arguments)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(function(*arguments), wanted, strict=True))
        mapped = torch.func.vmap(lambda x: function(x, *arguments[1:]))(torch.stack([arguments[0]] * 2))
    for got, want in zip(mapped, wanted, strict=True):
        torch.testing.assert_close(got[1], want)


def test_the_final_state_alone_carries_gradients() -> None:
    arguments = [a.requires_grad_() for a in scan_arguments()]
    expected = torch.autograd.grad(scan(*arguments)[1].sum() + 0 * scan(*arguments)[0].sum(), arguments)
    actual = torch.autograd.grad(scan(*arguments)[1].sum(), arguments, allow_unused=True, materialize_grads=True)
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_norm_can_be_differentiated_any_number_of_times(weighted: bool) -> None:
    inputs = [normal(1, 2, D).requires_grad_()] + [normal(D).requires_grad_()] * weighted

    def function(*own: Tensor) -> Tensor:
        return cpu.rms_norm(*own, eps=0.1)

    assert torch.autograd.gradgradcheck(function, inputs)

    def slope(*own: Tensor) -> Tensor:
        return torch.autograd.grad(function(*own).pow(3).sum(), own[0], create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, inputs)
    fixed = [p.detach() for p in inputs]
    hessian = torch.func.jacrev(torch.func.jacrev(lambda x: function(x, *fixed[1:]).pow(3).sum()))(fixed[0])
    expected = torch.autograd.functional.hessian(lambda x: function(x, *fixed[1:]).pow(3).sum(), fixed[0])
    torch.testing.assert_close(hessian, expected)
