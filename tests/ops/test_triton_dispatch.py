"""The Triton operators inside PyTorch: opcheck, gradcheck, torch.compile, torch.func, second derivatives; and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import DEVICE, here_or_in_a_child, needs_triton

from ssmlens import ops
from ssmlens.ops import triton as kernels

pytestmark = needs_triton
BATCH, LENGTH, D, N = 1, 3, 2, 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        DEVICE
    )


RESET = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device=DEVICE)
RESET[0, 2] = True


def scan(x, dt, A, B, C, D, z, bias, h0):
    return kernels.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, h0=h0, reset=RESET)


def fixed(x, dt, A, B, C):
    return kernels.selective_scan(x, dt, A, B, C, dt_softplus=True)


def convolution(x, weight, bias, initial):
    return kernels.causal_conv1d(x, weight, bias, activation="silu", initial=initial, reset=RESET)


def linear(a, u, h0):
    return kernels.linear_scan(a, u, h0=h0, reset=RESET)


def attention(q, k, v, log_a, bonus, h0):
    return kernels.gated_linear_attention(q, k, v, log_a, bonus=bonus, h0=h0, reset=RESET)


ROW = (BATCH, LENGTH, D)
A = -normal(D, N).abs() - 0.1
MATRIX = (BATCH, LENGTH, N)
CASES = {
    "scan": (scan, [normal(*ROW), normal(*ROW, seed=1), A, normal(*MATRIX), normal(*MATRIX, seed=1), normal(D),
                    normal(*ROW, seed=2), normal(D, seed=1), normal(BATCH, D, N)]),
    "scan, fixed B and C": (fixed, [normal(*ROW), normal(*ROW, seed=1), A, normal(D, N), normal(D, N, seed=1)]),
    "convolution": (convolution, [normal(*ROW), normal(D, 3), normal(D), normal(BATCH, 2, D)]),
    "linear": (linear, [normal(*ROW).sigmoid(), normal(*ROW, seed=1), normal(BATCH, D)]),
    "attention": (attention, [normal(BATCH, LENGTH, 1, 2), normal(BATCH, LENGTH, 1, 2, seed=1), normal(BATCH, LENGTH, 1, 2, seed=2),
                              -normal(BATCH, LENGTH, 1, 1).abs(), normal(1, 2), normal(BATCH, 1, 2, 2)]),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    function, arguments = CASES[request.param]
    return function, [a.clone().requires_grad_() for a in arguments]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from ssmlens.ops.triton import _attention

    monkeypatch.setattr(_attention, "EXACT_CHUNK", 16)


def test_gradcheck(case):
    function, arguments = case
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


def operators():
    x, dt, A, B, C, skip, z, bias, h0 = CASES["scan"][1]
    q, k, v, log_a, bonus, H0 = CASES["attention"][1]
    defined = torch.ops.ssmlens
    saved = torch.zeros(BATCH, 1, N, D, dtype=x.dtype, device=DEVICE)
    some = (x, dt, A, B, C, skip, z, bias, True, h0, RESET)
    least = (x, dt.abs(), A, CASES["scan, fixed B and C"][1][3], C, None, None, None, False, None, None)
    conv = (x, normal(D, 3), skip, True, normal(BATCH, 2, D), RESET)
    return {
        "scan": (defined.triton_selective_scan, (*some, True)),
        "scan, least": (defined.triton_selective_scan, (*least, False)),
        "scan backward": (defined.triton_selective_scan_backward, (z, h0, saved, *some, 1)),
        "scan backward, least": (defined.triton_selective_scan_backward, (z, None, saved, *least, 1)),
        "linear": (defined.triton_linear_scan, (x.sigmoid(), z, None, RESET)),
        "linear backward": (defined.triton_linear_scan_backward, (dt, x.sigmoid(), z, h0[..., 0], RESET)),
        "convolution": (defined.triton_causal_conv1d, conv),
        "convolution backward": (defined.triton_causal_conv1d_backward, (z, *conv, 1)),
        "attention": (defined.triton_gated_linear_attention, (q, k, v, log_a, bonus, H0, RESET)),
        "attention backward": (defined.triton_gated_linear_attention_backward,
                               (v, None, q, k, v, -k.abs(), None, None, RESET, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "scan", "scan, least", "scan backward", "scan backward, least", "linear", "linear backward", "convolution",
    "convolution backward", "attention", "attention backward",
])  # fmt: skip
def test_schema_and_fake_kernel(name):
    from ssmlens.ops.triton import _autograd  # noqa: F401  (defines the operators)

    operator, arguments = operators()[name]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compile_without_graph_breaks(case):
    function, arguments = case

    def loss(*own):
        y, last = function(*own)
        return (y * 2).sum() + last.square().sum()

    value, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments), loss(*arguments)
    torch.testing.assert_close(value, expected)
    pairs = zip(torch.autograd.grad(value, arguments), torch.autograd.grad(expected, arguments), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


def test_batched_probes_are_one_call(case):
    class Calls(TorchDispatchMode):
        backward = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.backward += str(op).startswith("ssmlens.") and "_backward" in str(op)
            return op(*args, **(kwargs or {}))

    function, arguments = case
    outputs = function(*arguments)
    probes = [torch.stack([normal(*o.shape, seed=i) for i in range(2)]) for o in outputs]
    expected = [torch.autograd.grad(outputs, arguments, [p[i] for p in probes], retain_graph=True) for i in range(2)]
    with Calls() as calls:
        together = torch.autograd.grad(outputs, arguments, probes, is_grads_batched=True)
    assert calls.backward == 1
    for i, g in enumerate(together):
        torch.testing.assert_close(g, torch.stack([e[i] for e in expected]))


def test_vmap_over_an_input_and_over_everything(case):
    """Inputs fold into the batch, parameters are looped over."""
    function, arguments = case
    arguments = [a.detach() for a in arguments]

    def value_and_gradients(*own):
        numbers = tuple(range(len(own)))
        return torch.func.grad_and_value(lambda *a: function(*a)[0].square().sum() + function(*a)[1].sum(), numbers)(
            *own
        )

    for mapped in (range(1), range(len(arguments))):
        stacked = [torch.stack([a, a * 0.5]) if k in mapped else a for k, a in enumerate(arguments)]
        dims = tuple(0 if k in mapped else None for k in range(len(arguments)))
        gradients, values = torch.func.vmap(value_and_gradients, in_dims=dims)(*stacked)
        own = [a[1] if k in mapped else a for k, a in enumerate(stacked)]
        expected, value = value_and_gradients(*own)
        torch.testing.assert_close(values[1], value)
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g[1], e)


def test_nested_vmap_of_probes(case):
    function, arguments = case
    rest = [a.detach() for a in arguments[1:]]
    y, pull = torch.func.vjp(lambda x: function(x, *rest)[0], arguments[0].detach())
    probes = normal(2, 1, *y.shape)
    nested = torch.func.vmap(torch.func.vmap(pull))(probes)[0]
    torch.testing.assert_close(nested[1, 0], pull(probes[1, 0])[0])


def test_a_second_derivative_is_refused(case):
    function, arguments = case
    (gradient,) = torch.autograd.grad(function(*arguments)[0].square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"Triton kernels have no second derivative"):
        torch.autograd.grad(gradient.sum(), arguments[0])


def test_the_final_state_alone_carries_gradients(case):
    function, arguments = case
    expected = torch.autograd.grad(function(*arguments)[1].sum() + 0 * function(*arguments)[0].sum(), arguments)
    actual = torch.autograd.grad(function(*arguments)[1].sum(), arguments, allow_unused=True, materialize_grads=True)
    for p, q in zip(actual, expected, strict=True):
        torch.testing.assert_close(p, q)


def test_through_the_public_functions():
    """Arguments reach the kernels as they come; y has the dtype of x, final states are float32."""
    kw = {"dt_softplus": True, "return_final_state": True, "backend": "triton"}
    x, dt, a, B, C = (p.bfloat16() for p in CASES["scan"][1][:5])
    y, h = ops.selective_scan(x, dt, a.float(), B, C, **kw)
    want, _ = ops.selective_scan(x, dt, a.float(), B, C, **(kw | {"backend": "reference"}))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, want)
    q, k, v, log_a, bonus, _ = (p.float() for p in CASES["attention"][1])
    y = ops.gated_linear_attention(q, k, v, log_a, bonus=bonus, backend="triton")
    torch.testing.assert_close(y, ops.gated_linear_attention(q, k, v, log_a, bonus=bonus, backend="reference"))
    y = ops.linear_scan(x.sigmoid(), x, backend="triton")
    torch.testing.assert_close(y, ops.linear_scan(x.sigmoid(), x, backend="reference"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, last = ops.causal_conv1d(x, normal(D, 3).float(), backend="triton", return_final_state=True)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="backend 'triton' cannot be used here: it does not support these arguments"):
        ops.selective_scan(x, dt, a.to(torch.complex64), B, C, backend="triton")
    if DEVICE == "cuda":
        assert ops.backend_for("selective_scan", x, a.float()) == "triton"


def test_the_time_invariant_model_as_a_scan(monkeypatch):
    """What "auto" takes on a GPU where the state is emptied in between, and for a single token."""
    x, a, D, B, C = normal(*ROW), A.clone(), normal(2), normal(2, N), normal(2, N, seed=1)
    a[0, 0], a[1, 1] = 0, -torch.inf
    kw = {"A": a, "B": B, "C": C, "dt": normal(2).abs(), "D": D, "return_final_state": True}
    want = ops.lti_convolution(x, **kw, reset=RESET, backend="reference")
    monkeypatch.setattr(ops, "backend_for", lambda op, *_: "triton" if op == "selective_scan" else "chunked")
    with Operators() as seen:
        got = ops.lti_convolution(x, **kw, reset=RESET)
    assert any("triton" in name for name in seen.names)
    torch.testing.assert_close(got, want)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_what_is_supported():
    x = normal(*ROW)
    assert kernels.supports_selective_scan(x, A)
    assert not kernels.supports_selective_scan(x, A.to(torch.complex128))
    assert not kernels.supports_selective_scan(x, -normal(D, 257).abs())
    assert not kernels.supports_selective_scan(x.long(), A)
    assert not kernels.supports_linear_scan(x[:0], x[:0])
    assert not kernels.supports_linear_scan(x, x.to("meta"))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert not kernels.available()
    assert "not installed" in (kernels.why_unavailable() or "")
    assert not kernels.supports_linear_scan(normal(*ROW))
    with pytest.raises(RuntimeError, match="needs the Triton kernels"):
        linear(*CASES["linear"][1])


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(kernels, "_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in (kernels.why_unavailable() or "")


def test_nothing_imports_triton_before_it_is_used():
    code = "import sys, ssmlens.ops, ssmlens.ops.triton, ssmlens.ops.triton._library, ssmlens.ops.triton._autograd; "
    code += "sys.exit('triton' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


here_or_in_a_child(globals())
