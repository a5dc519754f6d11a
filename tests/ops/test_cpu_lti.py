"""The time-invariant state space model as a C++ scan: against the reference and the FFT."""

from typing import Any

import pytest
import torch
from cases import close, doubled, gradients, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_forms import lti_case
from torch import Tensor

from ssmlens import ops
from ssmlens.ops import chunked, cpu, reference

pytestmark = needs_compiler


def agree(kw: dict[str, Any], dtype: torch.dtype, reset: Tensor | None = None) -> None:
    kw = {"D": None, "h0": None, **kw}
    want_kw = doubled(kw)
    want, got = reference.lti_convolution(**want_kw, reset=reset), cpu.lti_convolution(**kw, reset=reset)
    close(got[0], want[0], dtype, "y")
    close(got[1], want[1], torch.float32 if dtype == torch.bfloat16 else dtype, "h_T")
    got_gradients = gradients(got, kw)
    for name, g in gradients(want, want_kw).items():
        close(got_gradients[name], g, dtype, f"gradient of {name}", 10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([torch.float64, torch.float32]), st.integers(0, 99))  # fmt: skip
def test_at_any_shape(batch: int, length: int, d_inner: int, d_state: int, complex_: bool, start: bool, reset: bool,
                      dtype: torch.dtype, seed: int) -> None:  # fmt: skip
    kw = lti_case(batch, length, d_inner, d_state, complex_=complex_, start=start, dtype=dtype, seed=seed)
    flags = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2 if reset else None
    agree(kw, dtype, flags)


@pytest.mark.parametrize("complex_", [False, True])
def test_half_precision_and_complex_coefficients_of_a_real_transition(complex_: bool) -> None:
    kw = {n: p.detach().to(torch.complex64 if p.is_complex() else torch.float32) for n, p in lti_case().items()}
    if not complex_:
        kw["A"] = kw["A"].real.contiguous()
    kw = {n: p.requires_grad_() for n, p in kw.items()}
    agree(kw, torch.float32)
    agree({**kw, "x": kw["x"].detach().bfloat16().requires_grad_()}, torch.bfloat16)


@pytest.mark.parametrize("complex_", [False, True])
def test_over_many_tokens_it_is_the_fft(complex_: bool) -> None:
    """But for the phase of a mode that hardly decays: rounded in each of 20,000 steps, here, to a float32."""
    kw = lti_case(1, 20_000, 2, 4, complex_=complex_, dtype=torch.float32)
    A = kw["A"].detach().clone()
    A[:, 1] = torch.complex(torch.tensor(-1e-4), torch.tensor(40.0)) if complex_ else -1e-4
    kw = {n: p.detach() for n, p in kw.items()} | {"A": A, "dt": torch.tensor([0.1, 0.037])}
    want = chunked.lti_convolution(**doubled(kw))
    for g, w in zip(cpu.lti_convolution(**kw), want, strict=True):
        close(g, w, torch.float32, slack=25 if complex_ else 5)


def test_a_step_of_zero_leaves_the_state_and_has_a_gradient() -> None:
    kw = lti_case(2, 9, 3, 3)
    dt = kw["dt"].detach()
    dt[1] = 0
    kw["dt"] = dt.requires_grad_()
    y, h = cpu.lti_convolution(**kw)
    assert torch.equal(h[:, 1, :2], kw["h0"][:, 1, :2]), "but for the channel pinned at zero"
    (got,) = torch.autograd.grad(y.sum() + h.real.sum() + h.imag.sum(), kw["dt"])
    small = {**kw, "dt": torch.where(dt == 0, 1e-7, dt).requires_grad_()}
    y, h = reference.lti_convolution(**small)
    (want,) = torch.autograd.grad(y.sum() + h.real.sum() + h.imag.sum(), small["dt"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_auto_takes_it_on_a_cpu() -> None:
    kw = {n: p.detach() for n, p in lti_case(1, 30, 2, 3, dtype=torch.float32).items()}
    assert ops.backend_for("lti_convolution", kw["x"], kw["A"]) == "cpu"
    y = ops.lti_convolution(**kw)
    assert isinstance(y, Tensor)
    assert torch.equal(y, ops.lti_convolution(**kw, backend="cpu"))
    close(y, ops.lti_convolution(**kw, backend="chunked").double(), torch.float32)


def test_a_single_token_needs_no_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an FFT of one token")

    monkeypatch.setattr(torch.fft, "rfft", refuse)
    kw = {n: p.detach() for n, p in lti_case(2, 1, 2, 3).items()}
    for g, w in zip(chunked.lti_convolution(**kw), reference.lti_convolution(**kw), strict=True):
        close(g, w, torch.float64)
