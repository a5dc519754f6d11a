"""RWKV-4's running maximum and S4D's convolution without a loop over tokens: against the reference."""

import itertools
from typing import Any

import pytest
import torch
from cases import close, doubled, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens.ops import chunked, reference
from ssmlens.ops.chunked import lti, rwkv, scan


def generator(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def mean_case(batch: int = 2, length: int = 30, d: int = 4, *, spread: float = 3.0, reset: bool = True, state: bool = True,
              dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    rand = generator(seed)
    w = rand(d).abs()
    w[0] = 0  # holds everything
    if d > 1:
        w[1] = torch.inf  # only the last token
    k = spread * rand(batch, length, d)
    k[torch.rand(k.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = -torch.inf
    k[0, : length // 3] = -torch.inf  # begins with padding
    kw: dict[str, Any] = {"r": rand(batch, length, d), "k": k, "v": rand(batch, length, d), "w": w, "u": rand(d)}
    if state:
        kw["p"], kw["s"], kw["m"] = rand(batch, d), rand(batch, d).abs() + 0.1, spread * rand(batch, d)
    out = {name: x.to(dtype).requires_grad_(name != "m") for name, x in kw.items()}
    out["reset"] = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.1 if reset else None
    return out


def mean(op: Any, kw: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    state = (kw["p"], kw["s"], kw["m"]) if "p" in kw else None
    return op(*(kw[name] for name in "rkvwu"), state=state, reset=kw["reset"])


def at_scale(state: tuple[Tensor, Tensor, Tensor], m: Tensor) -> tuple[Tensor, Tensor]:
    """The sums at the scale e^m: two states with another maximum may still be the same."""
    factor = torch.exp((state[2].double() - m.double()).clamp(-30, 30))
    return state[0] * factor, state[1] * factor


def agree(kw: dict[str, Any], dtype: torch.dtype) -> None:
    want_kw = doubled(kw)
    want, want_state = mean(reference.rwkv4_attention, want_kw)
    got, state = mean(chunked.rwkv4_attention, kw)
    assert got.dtype == kw["v"].dtype
    assert state[0].dtype == state[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    close(got, want, dtype, "y")
    M = want_state[2].detach()
    outputs, wanted = (got, *at_scale(state, M)), (want, *at_scale(want_state, M))
    for x, w in zip(outputs[1:], wanted[1:], strict=True):
        close(x, w, torch.float32 if half else dtype, "state")
    found = gradients(outputs, kw)
    for name, g in gradients(wanted, want_kw).items():
        # a softmax that is all on one token has gradients that are nothing but rounding: at least the scale of y counts
        got, want = (torch.cat([x.double().flatten(), torch.ones(1)]) for x in (found[name], g))
        close(got, want, dtype, f"gradient of {name}", 1 if half else 10)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.1, 3.0, 60.0]), st.booleans(), st.booleans(),
       st.sampled_from([torch.float64, torch.float32]), st.integers(0, 99))  # fmt: skip
def test_rwkv4_at_any_shape(
    batch: int, length: int, d: int, spread: float, reset: bool, state: bool, dtype: torch.dtype, seed: int
) -> None:
    agree(mean_case(batch, length, d, spread=spread, reset=reset, state=state, dtype=dtype, seed=seed), dtype)


def test_rwkv4_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        kw = mean_case(dtype=dtype)
        for name in ("w", "u", "p", "s", "m"):
            kw[name] = kw[name].detach().float().requires_grad_(name != "m")
        agree(kw, dtype)


def test_rwkv4_two_parts_are_the_whole_and_gradcheck() -> None:
    kw = mean_case(2, 23, 3)
    whole, last = mean(chunked.rwkv4_attention, kw)
    for cut in (1, 5, 22):
        first = {n: x[:, :cut] if n in ("r", "k", "v", "reset") else x for n, x in kw.items()}
        second = {n: x[:, cut:] if n in ("r", "k", "v", "reset") else x for n, x in kw.items()}
        y, state = mean(chunked.rwkv4_attention, first)
        rest, end = mean(chunked.rwkv4_attention, {**second, **dict(zip("psm", state, strict=True))})
        close(torch.cat([y, rest], 1), whole, torch.float64)
        for x, w in zip(at_scale(end, last[2]), last[:2], strict=True):
            close(x, w, torch.float64)
    small = mean_case(1, 6, 2, spread=1.0)
    small["k"] = small["k"].detach().clamp_min(-3).requires_grad_()
    w = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    names = ("r", "k", "v", "u", "p", "s")
    run = lambda w, *own: mean(chunked.rwkv4_attention, {**small, "w": w, **dict(zip(names, own, strict=True))})[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, (w, *(small[name] for name in names)))
    assert torch.autograd.gradgradcheck(run, (w, *(small[name] for name in names)), fast_mode=True)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_running_maximum_is_that_of_the_loop(length: int) -> None:
    kw = mean_case(2, length, 4, spread=50)
    k, w, m, reset = (kw[name].detach() for name in ("k", "w", "m", "reset"))
    tops = rwkv.running_maximum(k, w, m, reset)
    low = reference.lowest(k.dtype)
    assert torch.equal(tops[:, 0], m)
    for t in range(length):
        m = torch.maximum((m.masked_fill(reset[:, t, None], low) - w).clamp_min(low), k[:, t])
        torch.testing.assert_close(tops[:, t + 1], m, rtol=1e-13, atol=1e-12)


def test_rwkv4_over_many_tokens_in_float32() -> None:
    """A mean with slow decay over tokens whose maximum lies far back: no rounding may build up in the maximum."""
    rand = generator(0)
    length = 4000
    kw = {"r": rand(1, length, 3), "k": rand(1, length, 3), "v": rand(1, length, 3), "w": torch.tensor([0.0, 1e-3, 1e-2]),
          "u": rand(3), "reset": None}  # fmt: skip
    kw["k"][:, 7] = 90
    kw = {n: x if x is None else x.float() for n, x in kw.items()}
    close(mean(chunked.rwkv4_attention, kw)[0], mean(reference.rwkv4_attention, doubled(kw))[0], torch.float32)


class Python(TorchDispatchMode):
    """Counts operations, and the largest array that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_rwkv4_does_not_loop_over_tokens() -> None:
    calls = []
    for length in (1024, 4096):
        kw = mean_case(1, length, 2)
        with Python() as counted:
            mean(chunked.rwkv4_attention, kw)
        calls.append(counted.calls)
    assert calls[1] < 2.2 * calls[0], "grows as the root of the length"
    assert calls[1] < 4096


# ---------------------------------------------------------------------------------------- S4D


def lti_case(batch: int = 2, length: int = 50, d_inner: int = 3, d_state: int = 4, *, complex_: bool = True, start: bool = True,
             dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    rand = generator(seed)

    def matrix() -> Tensor:
        m = rand(d_inner, d_state)
        return torch.complex(m, rand(d_inner, d_state)) if complex_ else m

    A = -torch.exp(rand(d_inner, d_state))
    if complex_:
        A = torch.complex(A, 5 * rand(d_inner, d_state))
    if d_state > 2:
        A[:, 0], A[:, -1] = 0, -torch.inf
    kw = {
        "x": rand(batch, length, d_inner),
        "A": A,
        "B": matrix(),
        "C": matrix(),
        "dt": 0.3 * rand(d_inner).abs(),
        "D": rand(d_inner),
    }
    if start:
        h0 = rand(batch, d_inner, d_state)
        kw["h0"] = torch.complex(h0, rand(batch, d_inner, d_state)) if complex_ else h0
    return {n: p.to(dtype.to_complex() if p.is_complex() else dtype).requires_grad_() for n, p in kw.items()}


def agree_lti(kw: dict[str, Any], dtype: torch.dtype, reset: Tensor | None = None, slack: float = 1.0) -> None:
    kw = {"D": None, "h0": None, **kw}
    want_kw = doubled(kw)
    want, got = reference.lti_convolution(**want_kw, reset=reset), chunked.lti_convolution(**kw, reset=reset)
    assert got[0].dtype == kw["x"].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    close(got[0], want[0], dtype, "y", slack)
    close(got[1], want[1], torch.float32 if half else dtype, "h_T", slack)
    want_gradients, got_gradients = gradients(want, want_kw), gradients(got, kw)
    for name, g in want_gradients.items():
        close(got_gradients[name], g, dtype, f"gradient of {name}", 10 * slack)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([torch.float64, torch.float32]), st.integers(0, 99))  # fmt: skip
def test_lti_at_any_shape(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int,
    complex_: bool,
    start: bool,
    reset: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    kw = lti_case(batch, length, d_inner, d_state, complex_=complex_, start=start, dtype=dtype, seed=seed)
    flags = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2 if reset else None
    agree_lti(kw, dtype, flags)


def test_lti_in_half_precision_and_without_skip() -> None:
    kw = lti_case()
    kw = {
        n: p.detach().to(torch.complex64 if p.is_complex() else torch.float32).requires_grad_() for n, p in kw.items()
    }
    kw["x"] = kw["x"].detach().bfloat16().requires_grad_()
    agree_lti(kw, torch.bfloat16)
    del kw["D"]
    agree_lti(kw, torch.bfloat16)


@pytest.mark.parametrize("complex_", [False, True])
def test_lti_over_many_tokens_in_float32(complex_: bool) -> None:
    """Phases of thousands of radians, a mode held at one, and one that decays over the whole length."""
    length = 100_000
    kw = lti_case(1, length, 2, 4, complex_=complex_, dtype=torch.float32)
    A = kw["A"].detach().clone()
    A[:, 1] = torch.complex(torch.tensor(-1e-4), torch.tensor(40.0)) if complex_ else -1e-4
    kw = {n: p.detach() for n, p in kw.items()} | {"A": A, "dt": torch.tensor([0.1, 0.037])}
    want_kw = doubled(kw)
    a, b = reference.zero_order_hold(want_kw["A"], want_kw["B"], want_kw["dt"])
    u = b * want_kw["x"][..., None]
    h, last = chunked.linear_scan(
        a.expand_as(u), u, h0=want_kw["h0"], reset=None
    )  # float64; the loop would take minutes
    y, got_last = chunked.lti_convolution(**kw)
    close(y, reference.read_out(h, want_kw["C"], want_kw["x"], want_kw["D"], None), torch.float32)
    close(got_last, last, torch.float32)


def test_lti_pins_exactly() -> None:
    kw = lti_case(1, 40, 2, 3, start=False)
    x = kw["x"].detach()
    _, last = chunked.lti_convolution(**kw, h0=None)
    held = (kw["dt"][:, None] * kw["B"])[:, 0] * x.sum(1)
    close(last[:, :, 0], held, torch.float64)
    other = torch.cat([torch.randn(1, 39, 2, dtype=torch.float64), x[:, -1:]], 1)
    assert torch.equal(chunked.lti_convolution(**{**kw, "x": other}, h0=None)[1][..., 2], last[..., 2])
    (g,) = torch.autograd.grad(last.abs().sum(), kw["A"])
    assert torch.equal(g[:, 2], torch.zeros(2, dtype=torch.complex128)), "-inf takes no gradient"
    assert torch.isfinite(torch.view_as_real(g)).all()


def test_lti_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the powers of a: nothing in either pass has length · d_inner · d_state numbers."""
    d_inner, d_state = 2, 64
    monkeypatch.setattr(scan, "BLOCK", 1 << 17)
    for length, reset in itertools.product((4096, 16384), (False, True)):
        kw = lti_case(1, length, d_inner, d_state, dtype=torch.float32)
        flags = torch.zeros(1, length, dtype=torch.bool) if reset else None
        with Python() as counted:
            y, last = chunked.lti_convolution(**kw, reset=flags)
            torch.autograd.grad(y.sum() + last.abs().sum(), [p for p in kw.values() if p is not None])
        assert counted.numel <= max(16 * length * d_inner, 4 * scan.BLOCK)


def test_lti_kernel_is_what_an_impulse_gives() -> None:
    kw = lti_case(1, 33, 2, 3, start=False)
    x = torch.zeros(1, 33, 2, dtype=torch.float64)
    x[:, 0] = 1
    y, _ = chunked.lti_convolution(**{**kw, "x": x, "D": None}, h0=None)
    a, b = reference.zero_order_hold(kw["A"], kw["B"], kw["dt"])
    for j in (0, 1, 7, 32):
        power = torch.ones_like(a)
        for _ in range(j):
            power = power * a
        close(y[0, j], (kw["C"] * b * power).sum(-1).real, torch.float64)


@pytest.mark.parametrize("complex_", [False, True])
def test_lti_gradcheck_and_probes(complex_: bool) -> None:
    kw = lti_case(1, 7, 2, 2, complex_=complex_)
    names = list(kw)
    run = lambda *own: chunked.lti_convolution(**dict(zip(names, own, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(kw.values()))
    own = [p.detach() for p in kw.values()]
    y, pull = torch.func.vjp(lambda x: run(x, *own[1:])[0], own[0])
    probes = torch.randn(3, *y.shape, dtype=y.dtype)
    torch.testing.assert_close(torch.func.vmap(pull)(probes)[0][1], pull(probes[1])[0])


def test_fast_sizes() -> None:
    for n in range(1, 3000):
        size = lti._fast_size(n)
        assert n <= size <= max(4, 1.35 * n)
        for p in (2, 3, 5):
            while size % p == 0:
                size //= p
        assert size == 1
