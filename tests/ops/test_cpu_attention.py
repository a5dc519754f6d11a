"""Linear attention with decay in C++: all that the chunked form is tested for, in chunks of the kernel's own size, and threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import test_chunked_attention as shared
import torch
from cases import close, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunked_attention import (  # noqa: F401  (these run here too, with the kernels)
    agree,
    case,
    small,
    test_a_bonus_of_one_reads_what_is_written_without_its_decay,
    test_a_reset_separates_sequences,
    test_autocast_touches_neither_pass,
    test_decay_may_be_moved_into_keys_and_queries,
    test_extreme_decays_neither_overflow_nor_leak,
    test_gradcheck_and_gradgradcheck,
    test_gradients_where_only_some_are_asked_for,
    test_half_precision_with_state_and_decay_in_float32,
    test_linear_in_values_and_causal,
    test_non_contiguous_arguments,
    test_nothing_in_nothing_out,
    test_one_decay_a_head_is_that_decay_for_every_key,
    test_one_is_a_sum_and_zero_has_no_memory,
    test_second_derivatives_at_zero_and_one,
    test_several_chunks_of_the_size_in_use,
    test_slow_decay_over_many_tokens,
    test_two_parts_are_the_whole,
    test_vmap_and_jacobians,
    test_what_is_pinned_at_zero_sees_the_current_token_or_the_one_before,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens import ops
from ssmlens.ops import cpu

pytestmark = needs_compiler


def attention(**kw: Any) -> tuple[Tensor, Tensor]:
    return cpu.gated_linear_attention(**kw)


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "attention", attention)
        yield


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    kw = case(
        draw(st.integers(1, 2)), draw(st.integers(1, 140)), draw(st.integers(1, 2)), draw(st.integers(1, 3)),
        draw(st.integers(1, 35)), draw(st.integers(1, 35)), keys=draw(st.booleans()), bonus=draw(st.booleans()),
        decays=draw(st.sampled_from(["mild", "mixed", "strong", "pinned"])), reset=draw(st.booleans()),
        start=draw(st.booleans()), dtype=dtype, seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    agree(kw, dtype)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("sizes", [(3, 150, 1, 2), (1, 700, 1, 1), (2, 100, 5, 2), (7, 70, 1, 1)])
def test_bitwise_the_same_for_any_number_of_threads(keys: bool, sizes: tuple[int, ...]) -> None:
    """Whether threads share sequences or, where there are not enough of them, chunks."""
    kw = case(*sizes, 17, 19, keys=keys, bonus=True, dtype=torch.float32)
    own = [x for x in kw.values() if x.requires_grad]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y, H = attention(**kw)
            with torch.no_grad():  # which keeps no states
                assert torch.equal(attention(**kw)[0], y)
            results.append([y, H, *torch.autograd.grad(y.sum() + H.square().sum(), own)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Calls(TorchDispatchMode):
    """How often the backward operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.ssmlens.cpu_gated_linear_attention_backward.default
        return function(*args, **(kwargs or {}))


def test_many_probes_are_one_call() -> None:
    kw = case(2, 80, 1, 2, 3, 2, bonus=True)
    names = [name for name in kw if name != "reset"]
    own = [kw[name].detach() for name in names]
    outputs, pull = torch.func.vjp(lambda *x: attention(**dict(zip(names, x, strict=True)), reset=kw["reset"]), *own)
    probes = tuple(torch.randn(5, *o.shape, dtype=o.dtype) for o in outputs)
    alone = [pull(tuple(p[i] for p in probes)) for i in range(5)]
    kept = attention(**kw)
    with Calls() as calls:
        together = torch.autograd.grad(kept, [kw[name] for name in names], probes, is_grads_batched=True)
    assert calls.count == 1
    for many in (torch.func.vmap(pull)(probes), together):
        for i, g in enumerate(many):
            torch.testing.assert_close(g, torch.stack([a[i] for a in alone]))


def test_compiles_into_one_graph_with_its_gradients() -> None:
    kw = case(2, 70, 1, 2, 3, 4, bonus=True, dtype=torch.float32)
    own = [kw[name] for name in kw if name != "reset"]

    def loss(**kw: Any) -> Tensor:
        y, h = ops.gated_linear_attention(**kw, return_final_state=True, backend="cpu")
        return (2 * y).sum() + h.square().sum()

    want = torch.autograd.grad(loss(**kw), own)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for g, w in zip(torch.autograd.grad(compiled(**kw), own), want, strict=True):
            torch.testing.assert_close(g, w)


def test_operators_are_described_correctly() -> None:
    kw = case(2, 70, 1, 2, 3, 4, bonus=True)
    inputs = [kw[name].detach() for name in ("q", "k", "v", "log_a")]
    others = [kw["bonus"].detach().expand(2, -1, -1), kw["h0"].detach(), kw["reset"]]
    forward = torch.ops.ssmlens.cpu_gated_linear_attention
    backward = torch.ops.ssmlens.cpu_gated_linear_attention_backward
    y, last, states = forward(*inputs, *others, True)
    torch.library.opcheck(forward.default, (*inputs, *others, True))
    torch.library.opcheck(forward.default, (*inputs, None, None, None, False))
    torch.library.opcheck(backward.default, (y, last, states, *inputs, *others, 1))
    torch.library.opcheck(backward.default, (torch.cat([y, y]), None, states, *inputs, None, None, None, 2))


def test_it_is_what_auto_takes_on_a_cpu_and_agrees_with_the_chunked_form() -> None:
    kw = case(2, 130, 2, 2, 8, 8, dtype=torch.float32)
    assert ops.backend_for("gated_linear_attention", kw["v"], kw["log_a"]) == "cpu"
    y = ops.gated_linear_attention(**kw)
    assert isinstance(y, Tensor)
    assert torch.equal(y, ops.gated_linear_attention(**kw, backend="cpu"))
    close(y, ops.gated_linear_attention(**doubled(kw), backend="chunked"), torch.float32)


def doubled(kw: dict[str, Any]) -> dict[str, Any]:
    return {name: x if name == "reset" else x.detach().double() for name, x in kw.items()}


def test_nothing_of_what_is_small_is_slow_or_wrong() -> None:
    """Numbers below the smallest normal one are zero inside the kernel, and only there."""
    kw = case(1, 130, 1, 1, 4, 4, decays="strong", reset=False, start=False, dtype=torch.float32)
    tiny = torch.tensor(1e-40)
    y, _ = attention(**{**kw, "v": kw["v"].detach() * 1e-38})
    assert y.abs().max() < 1e-36
    assert (tiny * 1.0).item() == tiny.item() != 0, "the processor's mode is as it was"


def test_without_keys_nothing_is_read_and_nothing_overrun() -> None:
    q = torch.zeros(2, 5, 1, 0)
    y, h = ops.gated_linear_attention(q, q, torch.randn(2, 5, 2, 3), torch.zeros(2, 5, 2, 1), return_final_state=True)
    assert y.shape == (2, 5, 2, 3)
    assert h.shape == (2, 2, 0, 3)
    assert not y.any()


def test_numbers_too_small_to_be_normal_are_zeros_and_half_ones_are_not() -> None:
    tiny = torch.full((1, 64, 1, 4), 2.0**-20, dtype=torch.float16)  # subnormal as float16, an ordinary float32
    ones = torch.ones_like(tiny)
    y = ops.gated_linear_attention(ones, ones, tiny, torch.zeros(1, 64, 1, 4))
    assert y[0, -1, 0, 0].item() == pytest.approx(4 * 64 * 2.0**-20, rel=1e-2)
    faint = torch.full((1, 64, 1, 4), 1e-40)
    assert not ops.gated_linear_attention(ones.float(), ones.float(), faint, torch.zeros(1, 64, 1, 4)).any()
