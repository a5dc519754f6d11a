"""The CPU scan with a complex A against the reference in complex128: outputs, final states, every gradient, and exp(dt A)."""

from typing import Any

import pytest
import torch
from cases import TOLERANCE, close, doubled, gradients, needs_compiler, selective
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmlens.ops import cpu, reference

pytestmark = needs_compiler
OPTIONAL = ("D", "z", "dt_bias", "h0", "reset")


def compare(kw: dict[str, Any], dtype: torch.dtype) -> None:
    """Outputs and gradients of the CPU kernel against the reference's."""
    wide = dict.fromkeys(OPTIONAL) | doubled(kw)
    wanted, got = reference.selective_scan(**wide), cpu.selective_scan(**kw)
    for name, g, w in zip(("y", "h_T"), got, wanted, strict=True):
        assert g.is_complex() == (name == "h_T")
        close(g, w, dtype, name)
    want_gradients = gradients(wanted, wide)
    for name, g in gradients(got, kw).items():
        assert g.dtype == kw[name].dtype
        close(g, want_gradients[name], dtype, f"gradient to {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "constant"),
    [
        ((2, 70, 37, 18), False),
        ((2, 33, 7, 9), True),
        ((1, 70, 3, 35), False),
        ((1, 1, 1, 1), False),
        ((40, 2, 20, 3), False),
    ],
)
def test_outputs_and_gradients(dtype: torch.dtype, shape: tuple[int, int, int, int], constant: bool) -> None:
    compare(selective(*shape, dtype=dtype, complex_=True, constant=constant), dtype)


@pytest.mark.parametrize("real", [("B",), ("C",), ("h0",), ("B", "C", "h0"), ("A",)])
def test_any_of_them_may_be_real(real: tuple[str, ...]) -> None:
    kw = selective(2, 40, 20, 6, complex_=True)
    kw |= {name: kw[name].detach().real.clone().requires_grad_() for name in real}
    compare(kw, torch.float64)


def test_one_varies_and_the_other_does_not() -> None:
    kw, constant = selective(2, 40, 20, 6, complex_=True), selective(2, 40, 20, 6, complex_=True, constant=True)
    compare(kw | {"B": constant["B"]}, torch.float64)
    compare(kw | {"C": constant["C"]}, torch.float64)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.booleans(),
    st.sets(st.sampled_from(OPTIONAL)), st.integers(0, 1000),
)  # fmt: skip
def test_drawn_shapes_and_options(
    batch: int, length: int, d: int, n: int, constant: bool, without: set[str], seed: int
) -> None:
    kw = selective(batch, length, d, n, complex_=True, constant=constant, seed=seed)
    compare(kw | dict.fromkeys(without), torch.float64)


def test_a_real_rate_gives_what_the_real_kernel_gives() -> None:
    kw = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in selective(2, 70, 37, 18, dtype=torch.float32).items()
    }
    y, h = cpu.selective_scan(**kw)
    y_complex, h_complex = cpu.selective_scan(**kw | {"A": kw["A"].to(torch.complex64)})
    close(y_complex, y.double(), torch.float32, "y", slack=0.1)
    close(h_complex.real, h.double(), torch.float32, "h_T", slack=0.1)
    assert (h_complex.imag == 0).all()


def states(dt: Tensor, A: Tensor) -> Tensor:
    """exp(dt A), (len(dt), *A.shape), out of the kernel: one step from the state 1."""
    d, n = A.shape
    x, h0 = dt.new_zeros(len(dt), 1, d), torch.ones(len(dt), d, n, dtype=dt.dtype)
    zero = dt.new_zeros(len(dt), 1, n)
    return cpu.selective_scan(x, dt[:, None, None].expand(-1, 1, d), A, zero, zero, h0=h0)[1]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.5e-7), (torch.float64, 5e-12)])
@pytest.mark.parametrize("largest", [1.0, 1e2, 1e4])
def test_the_angle_is_reduced_exactly(dtype: torch.dtype, bound: float, largest: float) -> None:
    """The error in exp(i dt Im A) does not grow with the angle in float32: the product is never rounded."""
    make = torch.Generator().manual_seed(0)
    dt = torch.rand(50, generator=make, dtype=dtype)
    imaginary = torch.cat([torch.linspace(-largest, largest, 801), torch.pi / 2 * torch.arange(-40, 41)]).to(dtype)
    A = torch.complex(torch.zeros_like(imaginary), imaginary)[:, None]
    got = states(dt, A)
    angle = dt.double()[:, None, None] * A.imag.double()
    assert (got - torch.polar(torch.ones_like(angle), angle)).abs().max() < bound
    assert ((got.abs() - 1).abs() < bound).all()


def test_pinned_and_extreme_rates() -> None:
    dead, one = complex(-torch.inf, 3.0), complex(0.0, 0.0)
    A = torch.tensor([[dead, one, complex(-torch.inf, torch.inf), complex(-1.0, 0.0), complex(0.0, 1e30)]]).to(
        torch.complex64
    )
    dt = torch.tensor([0.0, 1e-3, 1.0, 1e4, 1e30])
    got = states(dt, A)[:, 0]
    assert (got[:, [0, 2]] == 0).all()
    assert (got[:, 1] == 1).all()
    assert (got[:, 3].imag == 0).all()
    assert (got[:, 4].abs() <= 1 + 1e-6).all()  # too far to tell the angle, but on the circle
    assert got[0, 4] == 1
    far = states(torch.tensor([1e38]), torch.tensor([[complex(-10.0, 10.0)]]).to(torch.complex64))
    assert (far == 0).all()


def test_pinned_channels_have_the_gradients_of_their_values() -> None:
    kw = selective(2, 40, 20, 5, complex_=True, pinned=True)
    got = gradients(cpu.selective_scan(**kw), kw)["A"]
    assert (got[:, -1] == 0).all()  # -inf
    assert (got[:, 0] != 0).all()  # 0: the ordinary gradient


def test_conjugated_views_are_what_they_stand_for() -> None:
    kw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in selective(2, 20, 8, 4, complex_=True).items()}
    views = kw | {k: kw[k].conj() for k in ("A", "B", "C", "h0")}
    plain = kw | {k: kw[k].conj().resolve_conj() for k in ("A", "B", "C", "h0")}
    for v, p in zip(cpu.selective_scan(**views), cpu.selective_scan(**plain), strict=True):
        assert torch.equal(v, p)


def test_NaN_stays_NaN_and_A_is_checked() -> None:
    kw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in selective(2, 20, 8, 4, complex_=True).items()}
    kw["reset"] = None
    for name in ("x", "dt", "B", "C", "h0"):
        own = kw | {name: kw[name].clone()}
        own[name].view(-1)[0] = torch.nan
        y, _ = cpu.selective_scan(**own)
        assert y[0, 0, 0].isnan()
        assert not y[1].isnan().any()
    for value, word in (
        (complex(0.5, 0), "positive"),
        (complex(torch.nan, 0), "NaN"),
        (complex(-1, torch.inf), "imaginary"),
    ):
        own = kw | {"A": kw["A"].clone()}
        own["A"][1, 1] = value
        with pytest.raises(ValueError, match=f"A must .*{word}"):
            cpu.selective_scan(**own)


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    kw = selective(2, 100, 70, 9, dtype=torch.float32, complex_=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs = cpu.selective_scan(**kw)
            results.append([*outputs, *gradients(outputs, kw).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_tolerances_are_the_table() -> None:
    assert TOLERANCE[torch.float32] == 2e-5
    assert TOLERANCE[torch.float64] == 1e-12
