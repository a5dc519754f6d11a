"""RWKV-4's attention on the CPU against the reference: outputs, states, every gradient."""

from typing import Any

import pytest
import torch
from cases import close, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmlens.ops import cpu, reference

pytestmark = needs_compiler
ROWS, VECTORS = ("r", "k", "v"), ("w", "u")


def arguments(
    batch: int, length: int, d: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(batch, length, d, generator=make, dtype=torch.float64) for name in ROWS}
    rows["k"] = 3 * rows["k"]
    w = torch.rand(d, generator=make, dtype=torch.float64) * 2
    u = torch.randn(d, generator=make, dtype=torch.float64)
    state = {name: torch.randn(batch, d, generator=make, dtype=torch.float64) for name in "psm"}
    state["s"] = state["s"].exp()
    return {k: v.to(dtype) for k, v in (rows | {"w": w, "u": u} | state).items()}


def run(function: Any, given: dict[str, Tensor], reset: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    own = {k: v.detach().to(dtype).requires_grad_() for k, v in given.items()}
    state = (own["p"], own["s"], own["m"]) if "p" in own else None
    y, final = function(*(own[k] for k in (*ROWS, *VECTORS)), state=state, reset=reset)
    outputs = {"y": y, "p_T": final[0], "s_T": final[1], "m_T": final[2]}
    make = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o.dtype) for o in outputs.values()]
    finite = [(o, w) for o, w in zip(outputs.values(), weights, strict=True)]
    found = torch.autograd.grad([o for o, _ in finite], list(own.values()), [w for _, w in finite])
    return {k: v.detach() for k, v in outputs.items()} | {
        f"gradient to {k}": g for k, g in zip(own, found, strict=True)
    }


def compare(given: dict[str, Tensor], reset: Tensor | None, dtype: torch.dtype, slack: float = 1.0) -> None:
    got, wanted = (
        run(cpu.rwkv4_attention, given, reset, dtype),
        run(reference.rwkv4_attention, given, reset, torch.float64),
    )
    for name in wanted:
        if name == "m_T":  # the maximum of no tokens has its own value in each dtype
            none = wanted[name] < -1e30
            assert torch.equal(got[name] < -1e30, none)
            got[name], wanted[name] = (m[name].masked_fill(none, 0) for m in (got, wanted))
        # Some are zero but for rounding: to u and k where a token is alone. So what is compared has a 1 in it.
        got[name], wanted[name] = (torch.cat([m[name].flatten(), torch.ones(1)]) for m in (got, wanted))
        close(got[name], wanted[name], dtype, name, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 70, 37), (1, 1, 1), (40, 3, 16), (1, 33, 200)])
@pytest.mark.parametrize("with_state", [True, False])
def test_outputs_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int], with_state: bool) -> None:
    kw = arguments(*shape, dtype=dtype)
    kw = kw if with_state else {k: v for k, v in kw.items() if k not in "psm"}
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(2)) < 0.1
    compare(kw, reset, dtype)
    compare(kw, None, dtype)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.integers(0, 1000),
)
def test_invisible_tokens_and_resets(batch: int, length: int, d: int, hidden: float, resets: float, seed: int) -> None:
    kw = arguments(batch, length, d, seed=seed)
    make = torch.Generator().manual_seed(seed)
    kw["k"][torch.rand(batch, length, d, generator=make) < hidden] = -torch.inf
    kw["w"][0] = 0
    compare(kw, torch.rand(batch, length, generator=make) < resets, torch.float64)
    compare({k: v for k, v in kw.items() if k not in "psm"}, None, torch.float64)


def test_decay_of_infinity_keeps_the_last_token_only() -> None:
    kw = arguments(2, 20, 5)
    kw["w"][:] = torch.inf
    y, _ = cpu.rwkv4_attention(*(kw[k] for k in (*ROWS, *VECTORS)))
    here, before = (kw["u"] + kw["k"])[:, 1:], kw["k"][:, :-1]
    share = torch.sigmoid(here - before)
    expected = torch.sigmoid(kw["r"][:, 1:]) * (share * kw["v"][:, 1:] + (1 - share) * kw["v"][:, :-1])
    torch.testing.assert_close(y[:, 1:], expected)
    torch.testing.assert_close(y[:, 0], torch.sigmoid(kw["r"][:, 0]) * kw["v"][:, 0])
    compare(kw, None, torch.float64)


def test_no_decay_is_a_running_softmax() -> None:
    kw = arguments(1, 200, 8, dtype=torch.float32)
    kw["w"][:], kw["u"][:] = 0, 0
    y, _ = cpu.rwkv4_attention(*(kw[k] for k in (*ROWS, *VECTORS)))
    k, v = kw["k"].double(), kw["v"].double()
    expected = torch.sigmoid(kw["r"].double()) * (k.exp() * v).cumsum(1) / k.exp().cumsum(1)
    close(y, expected, torch.float32)


def test_large_keys_do_not_overflow() -> None:
    kw = arguments(2, 30, 5, dtype=torch.float32)
    kw["k"] = kw["k"] * 1e4
    compare({k: v for k, v in kw.items() if k not in "psm"}, None, torch.float32)


@pytest.mark.parametrize("cut", [1, 16, 32, 50])
def test_two_halves_are_the_whole(cut: int) -> None:
    kw = arguments(2, 60, 21, dtype=torch.float32)
    r, k, v, w, u = (kw[name] for name in (*ROWS, *VECTORS))
    y, state = cpu.rwkv4_attention(r, k, v, w, u)
    y1, between = cpu.rwkv4_attention(r[:, :cut], k[:, :cut], v[:, :cut], w, u)
    y2, last = cpu.rwkv4_attention(r[:, cut:], k[:, cut:], v[:, cut:], w, u, state=between)
    assert torch.equal(torch.cat([y1, y2], 1), y)
    assert all(torch.equal(a, b) for a, b in zip(last, state, strict=True))


def test_NaN_stays_NaN() -> None:
    kw = arguments(2, 20, 5, dtype=torch.float32)
    for name in ROWS:
        own = {k: t.clone() for k, t in kw.items()}
        own[name][0, 3, 1] = torch.nan
        y, _ = cpu.rwkv4_attention(*(own[k] for k in (*ROWS, *VECTORS)))
        assert y[0, 3, 1].isnan()
        assert not y[1].isnan().any()
        assert not y[0, :3].isnan().any()


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    kw = arguments(3, 100, 70, dtype=torch.float32)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(cpu.rwkv4_attention, kw, None, torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)
