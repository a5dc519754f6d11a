"""The CPU scans against a float64 loop over tokens: outputs, final states and every gradient."""

from typing import Any

import pytest
import torch
from cases import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmlens.ops import cpu

pytestmark = needs_compiler
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "h0")


def loop(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, h0: Tensor | None = None, reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = exp(dt A) h + dt B x, y = (C h + D x) silu(z), one token after another."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt, threshold=200) if dt_softplus else dt
    dead = torch.isneginf(A)
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    ys = []
    for t in range(x.shape[1]):
        Bt, Ct = (m[:, t, None] if m.dim() == 3 else m for m in (B, C))
        a = torch.exp(dt[:, t, :, None] * A.masked_fill(dead, 0)).masked_fill(dead, 0)
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        h = a * h + (dt[:, t] * x[:, t])[..., None] * Bt
        ys.append((h * Ct).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D * x
    return (y if z is None else y * torch.nn.functional.silu(z)), h


def arguments(
    batch: int,
    length: int,
    d: int,
    n: int,
    dtype: torch.dtype,
    *,
    varies: tuple[bool, bool] = (True, True),
    seed: int = 0,
) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=dtype)

    A = -torch.rand(d, n, generator=make, dtype=dtype) * 4
    pins = torch.rand(d, n, generator=make)
    A[pins < 0.05], A[pins > 0.95] = 0, -torch.inf  # scattered: mixed within a vector
    if n > 2:
        A[:, 0], A[:, n - 1] = 0, -torch.inf  # whole columns, as polarization makes them
    B, C = (normal(batch, length, n) if v else normal(d, n) for v in varies)
    return {
        "x": normal(batch, length, d), "dt": normal(batch, length, d), "A": A, "B": B, "C": C, "D": normal(d),
        "z": normal(batch, length, d), "dt_bias": normal(d), "dt_softplus": True, "h0": normal(batch, d, n),
        "reset": torch.rand(batch, length, generator=make) < 0.1,
    }  # fmt: skip


def assert_same(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape, name
    scale = expected.abs().max().clamp_min(1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double() / scale, expected / scale, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


def compare(kwargs: dict[str, Any], tolerance: float) -> None:
    """Outputs and all gradients (through y and through h_T) against the loop in float64."""
    names = [k for k in NAMES if kwargs.get(k) is not None]
    results = []
    for function, dtype in ((cpu.selective_scan, None), (loop, torch.float64)):
        own = dict(kwargs)
        for k in names:
            own[k] = kwargs[k].detach().to(dtype or kwargs[k].dtype).requires_grad_()
        y, h = function(**own)
        make = torch.Generator().manual_seed(1)
        gradients = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o.dtype) for o in (y, h)]
        results.append((y, h, *torch.autograd.grad((y, h), [own[k] for k in names], gradients)))
    for name, actual, expected in zip(["y", "h_T", *names], *results, strict=True):
        assert_same(actual.detach(), expected.detach(), tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "varies"),
    [
        ((2, 70, 37, 18), (True, True)),  # more than one chunk, a last block with 5 lanes
        ((1, 40, 33, 5), (True, False)),
        ((3, 5, 16, 2), (False, True)),
        ((2, 33, 7, 9), (False, False)),
        ((1, 70, 3, 70), (True, True)),  # more than one tile of state channels
        ((1, 1, 1, 1), (True, True)),
        ((70, 2, 20, 3), (True, True)),  # more sequences than slabs
        ((1, 9, 300, 4), (True, True)),  # many groups of blocks
    ],
)
def test_outputs_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int, int], varies: tuple[bool, bool]) -> None:
    compare(arguments(*shape, dtype, varies=varies), TOLERANCE[dtype])


def test_state_of_256() -> None:
    compare(arguments(1, 70, 18, 256, torch.float32), TOLERANCE[torch.float32])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(),
    st.sets(st.sampled_from(["D", "z", "dt_bias", "h0", "reset"])), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_drawn_shapes_and_options(
    batch: int, length: int, d: int, n: int, Bv: bool, Cv: bool, without: set[str], softplus: bool, seed: int
) -> None:
    kwargs = arguments(batch, length, d, n, torch.float64, varies=(Bv, Cv), seed=seed)
    kwargs |= dict.fromkeys(without)
    kwargs["dt_softplus"] = softplus
    if not softplus:
        kwargs["dt"] = kwargs["dt"].abs() * 0.1
        kwargs["dt_bias"] = None
    compare(kwargs, TOLERANCE[torch.float64])


def test_strided_inputs_need_no_particular_layout() -> None:
    kwargs = arguments(2, 40, 24, 6, torch.float64)
    expected = cpu.selective_scan(**kwargs)[0]
    wide = torch.cat([kwargs["x"], kwargs["z"]], -1)
    kwargs["x"], kwargs["z"] = wide.chunk(2, -1)  # as after a projection
    kwargs["dt"] = kwargs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    kwargs["B"] = kwargs["B"].transpose(0, 1).contiguous().transpose(0, 1)
    kwargs["A"] = kwargs["A"].T.contiguous().T
    assert torch.equal(cpu.selective_scan(**kwargs)[0], expected)
    compare(kwargs, 1e-12)
    x = kwargs["x"].detach().requires_grad_()
    cpu.selective_scan(**(kwargs | {"x": x}))[0].sum().backward()  # a gradient with strides of zero
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_channel_at_one_is_a_cumulative_sum_and_one_at_zero_forgets() -> None:
    x = torch.randn(2, 100, 19, generator=torch.Generator().manual_seed(0))
    dt = torch.rand(2, 100, 19, generator=torch.Generator().manual_seed(1))
    dt[:, 50:60] = 0
    one = torch.ones(19, 1)
    y, h = cpu.selective_scan(x, dt, 0 * one, one, one)
    total, sums = torch.zeros(2, 19), []
    for u in (x * dt).unbind(1):
        total = total + u
        sums.append(total)
    torch.testing.assert_close(y, torch.stack(sums, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(h[..., 0], y[:, -1], rtol=0, atol=0)
    y, _ = cpu.selective_scan(x, dt, -torch.inf * one, one, one)
    assert torch.equal(y, x * dt)  # also where dt is 0


def test_dt_of_zero_leaves_the_state_bitwise() -> None:
    h0 = torch.randn(1, 33, 6)
    A = -torch.rand(33, 6) * 50
    A[:, 0] = 0
    _, h = cpu.selective_scan(
        torch.randn(1, 7, 33), torch.zeros(1, 7, 33), A, torch.randn(1, 7, 6), torch.randn(1, 7, 6), h0=h0
    )
    assert torch.equal(h, h0)


def test_a_pinned_zero_gives_no_gradient_to_A_and_dt() -> None:
    kwargs = arguments(1, 30, 20, 3, torch.float64)
    kwargs = {k: kwargs[k] for k in ("x", "dt", "A", "B", "C")}
    kwargs["dt"] = kwargs["dt"].abs()
    kwargs["dt"][:, 3] = 0
    kwargs["A"] = torch.full_like(kwargs["A"], -torch.inf).requires_grad_()
    kwargs["dt"].requires_grad_()
    y, _ = cpu.selective_scan(**kwargs)
    dA, ddt = torch.autograd.grad(y.sum(), (kwargs["A"], kwargs["dt"]))
    assert torch.equal(dA, torch.zeros_like(dA))
    torch.testing.assert_close(ddt, kwargs["x"] * (kwargs["B"] * kwargs["C"]).sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transitions_are_exact_to_an_ulp(dtype: torch.dtype) -> None:
    """a = exp(dt A) itself: one step from h0 = 1 without input."""
    A = -torch.logspace(-8, 2.2, 4096, dtype=dtype)[:, None]
    one = torch.ones(1, 1, 4096, dtype=dtype)
    nothing = torch.zeros(1, 1, 1, dtype=dtype)
    _, h = cpu.selective_scan(one, one * 0.3, A, nothing, nothing, h0=torch.ones(1, 4096, 1, dtype=dtype))
    expected = torch.exp(torch.tensor(0.3, dtype=dtype).double() * A.double())[None]
    normal = expected > torch.finfo(dtype).tiny * 2
    error = ((h - expected) / expected)[normal].abs().max().item()
    # float64 has nothing better to be compared with than the exponential of a rounded product, whose error grows with it
    assert error < (1.0 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13)
    assert (h[~normal] <= torch.finfo(dtype).tiny * 2).all()


def test_extremes() -> None:
    x = torch.ones(1, 1, 5)
    dt = torch.tensor([[[1e30, torch.inf, torch.nan, 1e-30, -1e3]]])
    h = cpu.selective_scan(x, dt, -torch.ones(5, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1), h0=torch.ones(1, 5, 1))[
        1
    ]
    h = h.flatten()
    assert h[0] == 0
    assert h[2].isnan()
    assert h[3] == 1
    assert h[4] == torch.inf
    dt = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 1e4]]])
    y = cpu.selective_scan(x, dt, torch.zeros(5, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), dt_softplus=True)[0]
    torch.testing.assert_close(
        y.double(), torch.nn.functional.softplus(dt.double(), threshold=200), rtol=1e-6, atol=1e-30
    )


def test_NaN_stays_NaN() -> None:
    kwargs = arguments(2, 40, 20, 4, torch.float32)
    kwargs |= {"reset": None, "A": -torch.rand(20, 4)}
    for name in ("x", "dt", "B", "C", "z", "h0"):
        own = dict(kwargs)
        own[name] = kwargs[name].clone()
        own[name].view(-1)[0] = torch.nan
        y, _ = cpu.selective_scan(**own)
        assert y[0, 0, 0].isnan()
        assert not y[1].isnan().any()


@pytest.mark.parametrize(("value", "word"), [(0.5, "positive"), (torch.nan, "NaN")])
def test_A_is_checked(value: float, word: str) -> None:
    kwargs = arguments(1, 3, 4, 3, torch.float32)
    kwargs["A"][1, 1] = value
    with pytest.raises(ValueError, match=f"A must be .*{word}"):
        cpu.selective_scan(**kwargs)


def run_all(kwargs: dict[str, Any]) -> list[Tensor]:
    own = {k: v.detach().requires_grad_() if k in NAMES else v for k, v in kwargs.items()}
    y, h = cpu.selective_scan(**own)
    return [y.detach(), h.detach(), *torch.autograd.grad((y.square().sum() + h.sum()), [own[k] for k in NAMES])]


@pytest.mark.parametrize("shape", [(1, 200, 150, 17), (5, 100, 40, 6), (40, 20, 16, 4)])
def test_bitwise_the_same_for_any_number_of_threads_and_run_after_run(shape: tuple[int, int, int, int]) -> None:
    kwargs = arguments(*shape, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run_all(kwargs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("cut", [1, 16, 32, 50, 99])
def test_two_halves_are_the_whole(cut: int) -> None:
    kwargs = arguments(2, 100, 21, 6, torch.float32)
    y, h = cpu.selective_scan(**kwargs)
    first = {k: v[:, :cut] if k in ("x", "dt", "B", "C", "z", "reset") else v for k, v in kwargs.items()}
    second = {k: v[:, cut:] if k in ("x", "dt", "B", "C", "z", "reset") else v for k, v in kwargs.items()}
    y1, h1 = cpu.selective_scan(**first)
    y2, h2 = cpu.selective_scan(**(second | {"h0": h1}))
    assert torch.equal(torch.cat([y1, y2], 1), y)
    assert torch.equal(h2, h)


def test_a_reset_starts_afresh() -> None:
    kwargs = arguments(1, 60, 21, 6, torch.float64)
    kwargs["reset"] = torch.arange(60)[None] == 37
    late = {k: v[:, 37:] if k in ("x", "dt", "B", "C", "z", "reset") else v for k, v in kwargs.items()}
    assert torch.equal(cpu.selective_scan(**kwargs)[0][:, 37:], cpu.selective_scan(**(late | {"h0": None}))[0])
    x = kwargs["x"].requires_grad_()
    cpu.selective_scan(**kwargs)[0][:, 37:].sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :37] == 0).all()
    assert (x.grad[:, 37:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_keeps_a_float32_state(dtype: torch.dtype) -> None:
    kwargs = arguments(2, 50, 20, 4, torch.float32)
    low = {k: v.to(dtype) if k in ("x", "dt", "z", "B", "C") else v for k, v in kwargs.items()}
    low["x"].requires_grad_()
    y, h = cpu.selective_scan(**low)
    assert y.dtype == dtype
    assert h.dtype == torch.float32
    same = {k: v.float() if isinstance(v, Tensor) and k in ("x", "dt", "z", "B", "C") else v for k, v in low.items()}
    assert torch.equal(y, cpu.selective_scan(**same)[0].to(dtype))
    y.sum().backward()
    assert low["x"].grad is not None
    assert low["x"].grad.dtype == dtype


def test_long_sequence_at_one() -> None:
    """Over 10^5 steps at a = 1 the error is that of a plain sum, also in the gradients."""
    length = 100_000
    x = torch.randn(1, length, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    one = torch.ones(2, 1)
    y, _ = cpu.selective_scan(x, torch.ones(1, length, 2), 0 * one, one, one)
    exact = x.detach().double().cumsum(1)
    plain, total = [], torch.zeros(2)
    for u in x.detach()[0].unbind(0):
        total = total + u
        plain.append(total)
    error = (y.double() - exact).abs().max()
    assert error <= 1.5 * (torch.stack(plain) - exact[0]).abs().max()
    y.sum().backward()
    assert torch.equal(x.grad[0, :, 0], torch.arange(length, 0, -1.0))  # type: ignore[index]


def test_the_floor_computes_as_many_exponentials_as_the_scan_has_elements() -> None:
    """Of the first steps of dt, again and again, so that these stay in the cache."""
    batch, length, d, n = 2, 70, 21, 5
    dt, A = torch.rand(batch, length, d, dtype=torch.float64), -torch.rand(d, n, dtype=torch.float64)
    again = dt[:, torch.arange(length) % 32]
    expected = torch.exp(again[..., None] * A).sum((0, 1, 3))
    torch.testing.assert_close(cpu.exponentials(dt, A), expected)
    torch.testing.assert_close(cpu.exponentials(dt.float(), A.float()).double(), expected, rtol=1e-5, atol=0)
    assert (cpu.exponentials(torch.zeros(batch, length, d), A.float()) == batch * length * n).all()
    with pytest.raises(TypeError, match="real"):
        cpu.exponentials(dt, A + 0j)


# ---------------------------------------------------------------- linear_scan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 30, 3, 45), (1, 1, 1), (3, 7, 300)])
def test_linear_scan(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    make = torch.Generator().manual_seed(0)
    a, u = torch.rand(*shape, generator=make, dtype=dtype), torch.randn(*shape, generator=make, dtype=dtype)
    h0 = torch.randn(shape[0], *shape[2:], generator=make, dtype=dtype)
    reset = torch.rand(shape[:2], generator=make) < 0.2
    results = []
    for own in ([a, u, h0], [a.double(), u.double(), h0.double()]):
        own = [t.detach().requires_grad_() for t in own]
        if own[0].dtype == dtype and not results:
            h, last = cpu.linear_scan(own[0], own[1], h0=own[2], reset=reset)
        else:
            state, states = own[2], []
            for t in range(shape[1]):
                state = state.masked_fill(reset[:, t].view(-1, *[1] * (len(shape) - 2)), 0)
                state = own[0][:, t] * state + own[1][:, t]
                states.append(state)
            h, last = torch.stack(states, 1), state
        weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
        results.append((h, last, *torch.autograd.grad((h * weights).sum() + last.sum(), own)))
    for name, actual, expected in zip(("h", "h_T", "da", "du", "dh0"), *results, strict=True):
        assert_same(actual.detach(), expected.detach(), TOLERANCE[dtype], name)


def test_linear_scan_broadcasts_a() -> None:
    a, u = torch.rand(2, 9, 1, requires_grad=True), torch.randn(2, 9, 20)
    h, _ = cpu.linear_scan(a, u)
    assert torch.equal(h, cpu.linear_scan(a.expand(2, 9, 20).contiguous(), u)[0])
    h.sum().backward()
    assert a.grad is not None
    assert a.grad.shape == a.shape
