"""Linear attention with decay as chunked matrix products: against the reference, and inside PyTorch."""

import itertools
from typing import Any

import pytest
import torch
from cases import close, doubled, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ssmlens import ops
from ssmlens.ops import reference
from ssmlens.ops.chunked import decay, pieces
from ssmlens.ops.chunked import gated_linear_attention as chunked

DTYPES = [torch.float64, torch.float32]


def attention(**kw: Any) -> tuple[Tensor, Tensor]:
    return chunked(**{"bonus": None, "h0": None, "reset": None, **kw})


def case(batch: int = 2, length: int = 40, groups: int = 2, per_group: int = 2, d_key: int = 3, d_value: int = 5, *,
         keys: bool = True, bonus: bool = False, decays: str = "mixed", reset: bool = True, start: bool = True,
         dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """decays: "mild", "strong", "mixed" with 0, -inf and -1e4 among them, "pinned": mild but for -inf throughout here and there."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    heads = groups * per_group
    log_a = (
        -rand(batch, length, heads, d_key if keys else 1).abs()
        * {"mild": 0.05, "mixed": 1, "strong": 8, "pinned": 0.05}[decays]
    )
    if decays == "pinned":
        log_a[:, :, 0, 0], log_a[-1, : length // 2, -1, -1], log_a[0, length // 2 :, :, -1] = (-torch.inf,) * 3
    if decays == "mixed":
        which = torch.rand(log_a.shape, generator=g)
        for low, value in ((0.0, -torch.inf), (0.05, -1e4), (0.1, 0.0)):
            log_a[(which >= low) & (which < low + 0.07)] = value
    kw = {"q": rand(batch, length, groups, d_key), "k": rand(batch, length, groups, d_key),
          "v": rand(batch, length, heads, d_value), "log_a": log_a}  # fmt: skip
    if bonus:
        kw["bonus"] = rand(heads, d_key)
    if start:
        kw["h0"] = rand(batch, heads, d_key, d_value)
    out: dict[str, Any] = {name: p.to(dtype).requires_grad_() for name, p in kw.items()}
    if reset:
        out["reset"] = torch.rand(batch, length, generator=g) < 0.1
    return out


def agree(kw: dict[str, Any], dtype: torch.dtype, slack: float = 1.0) -> None:
    want_kw = doubled(kw)
    want = reference.gated_linear_attention(**{"bonus": None, "h0": None, "reset": None, **want_kw})
    got = attention(**kw)
    assert got[0].dtype == kw["v"].dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype in (torch.bfloat16, torch.float16)
    close(got[0], want[0], dtype, "y", slack)
    close(got[1], want[1], torch.float32 if half else dtype, "H_T", slack)
    want_gradients, got_gradients = gradients(want, want_kw), gradients(got, kw)
    for name, g in want_gradients.items():
        assert got_gradients[name].dtype == kw[name].dtype
        close(got_gradients[name], g, dtype, f"gradient of {name}", slack if half else 10 * slack)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks, pieces and groups of sequences even at small sizes."""
    monkeypatch.setattr(pieces, "CHUNK", 8)
    monkeypatch.setattr(pieces, "PIECE", 300)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    kw = case(
        draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 2)), draw(st.integers(1, 3)),
        draw(st.integers(1, 5)), draw(st.integers(1, 4)), keys=draw(st.booleans()), bonus=draw(st.booleans()),
        decays=draw(st.sampled_from(["mild", "mixed", "strong", "pinned"])), reset=draw(st.booleans()),
        start=draw(st.booleans()), dtype=dtype, seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "CHUNK", draw(st.sampled_from([1, 4, 16, 64])))
        patch.setattr(pieces, "PIECE", draw(st.sampled_from([1, 200, 1 << 17])))
        agree(kw, dtype)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("decays", ["mild", "mixed", "strong", "pinned"])
@pytest.mark.parametrize("bonus", [False, True])
def test_several_chunks_of_the_size_in_use(keys: bool, decays: str, bonus: bool) -> None:
    for dtype in DTYPES:
        agree(case(1, 200, 1, 2, 4, 3, keys=keys, decays=decays, bonus=bonus, dtype=dtype), dtype)
        agree(case(1, 200, 1, 2, 4, 3, keys=keys, decays=decays, bonus=bonus, dtype=dtype, reset=False), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_state_and_decay_in_float32(dtype: torch.dtype, small: None) -> None:
    kw = case(bonus=True, decays="mild", dtype=dtype)
    for name in ("log_a", "bonus", "h0"):
        kw[name] = kw[name].detach().float().requires_grad_()
    agree(kw, dtype, slack=5)
    agree(case(bonus=True, decays="mild", dtype=dtype), dtype, slack=5)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_gradcheck_and_gradgradcheck(keys: bool, bonus: bool, small: None) -> None:
    kw = case(1, 5, 1, 2, 2, 2, keys=keys, bonus=bonus, decays="mild")
    kw["reset"] = torch.tensor([[False, False, False, True, False]])
    log_a = kw["log_a"].detach()
    log_a[0, 1, 0, 0] = 0
    kw["log_a"] = log_a.requires_grad_()
    names = [name for name in kw if name != "reset"]

    def run(*own: Tensor) -> tuple[Tensor, Tensor]:
        return attention(**{**kw, **dict(zip(names, own, strict=True))})

    assert torch.autograd.gradcheck(run, [kw[name] for name in names])
    assert torch.autograd.gradgradcheck(run, [kw[name] for name in names], fast_mode=True)


def test_second_derivatives_at_zero_and_one(small: None) -> None:
    kw = case(1, 30, 1, 2, 2, 2, decays="mixed", bonus=True)
    names = [name for name in kw if name != "reset"]

    def hessian_times_ones(run: Any) -> tuple[Tensor, ...]:
        own = [kw[name] for name in names]
        first = torch.autograd.grad(run(**kw)[0].square().sum(), own, create_graph=True)
        return torch.autograd.grad(sum(g.sum() for g in first), own)

    for got, want in zip(
        hessian_times_ones(attention), hessian_times_ones(reference.gated_linear_attention), strict=True
    ):
        close(got, want, torch.float64, slack=10)


@pytest.mark.parametrize("keys", [False, True])
def test_vmap_and_jacobians(keys: bool, small: None) -> None:
    kw = case(2, 12, 1, 2, 2, 3, keys=keys, bonus=True)
    reset = kw.pop("reset")
    names = list(kw)
    own = [kw[name].detach() for name in names]

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return attention(**dict(zip(names, inputs, strict=True)), reset=reset)

    def value_and_gradients(*inputs: Tensor) -> Any:
        loss = lambda *x: run(*x)[0].square().sum() + run(*x)[1].sum()  # noqa: E731
        return torch.func.grad_and_value(loss, tuple(range(len(names))))(*inputs)

    for mapped in [*([i] for i in range(len(names))), list(range(len(names)))]:
        stacked = [torch.stack([x, 0.5 * x, 2 * x], 1) if i in mapped else x for i, x in enumerate(own)]
        dims = tuple(1 if i in mapped else None for i in range(len(names)))
        many, values = torch.func.vmap(value_and_gradients, in_dims=dims)(*stacked)
        for j in range(3):
            alone, value = value_and_gradients(*(x[:, j] if i in mapped else x for i, x in enumerate(stacked)))
            torch.testing.assert_close(values[j], value)
            for g, w in zip(many, alone, strict=True):
                torch.testing.assert_close(g[j], w)
    y, pull = torch.func.vjp(lambda q: run(q, *own[1:])[0], own[0])
    probes = torch.randn(2, 3, *y.shape, dtype=y.dtype)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(pull))(probes)[0][1, 2], pull(probes[1, 2])[0])
    jacobian = torch.func.jacrev(lambda q: run(q, *own[1:])[0])(own[0])
    torch.testing.assert_close(torch.tensordot(probes[0, 0], jacobian, 4), pull(probes[0, 0])[0])
    both = torch.func.vmap(  # inputs outside, probes inside
        lambda q: torch.func.vmap(lambda p: torch.func.vjp(lambda q: run(q, *own[1:])[0], q)[1](p)[0])(probes[0])
    )(torch.stack([own[0], own[0]]))
    torch.testing.assert_close(both[1, 2], pull(probes[0, 2])[0])


def test_many_probes_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    kw = case(2, 20, 1, 2, 3, 2, bonus=True)
    names = [name for name in kw if name != "reset"]
    own = [kw[name].detach() for name in names]
    outputs, pull = torch.func.vjp(lambda *x: attention(**dict(zip(names, x, strict=True)), reset=kw["reset"]), *own)
    probes = tuple(torch.randn(5, *o.shape, dtype=o.dtype) for o in outputs)
    alone = [pull(tuple(p[i] for p in probes)) for i in range(5)]
    kept = attention(**kw)
    calls = []
    backward = pieces.backward
    monkeypatch.setattr(pieces, "backward", lambda *x: calls.append(1) or backward(*x))
    for piece in (1 << 17, 1):  # all samples in one piece; one sample of one sequence at a time
        monkeypatch.setattr(pieces, "PIECE", piece)
        for i, g in enumerate(torch.func.vmap(pull)(probes)):
            torch.testing.assert_close(g, torch.stack([a[i] for a in alone]))
    together = torch.autograd.grad(kept, [kw[name] for name in names], probes, is_grads_batched=True)
    assert len(calls) == 3
    for i, g in enumerate(together):
        torch.testing.assert_close(g, torch.stack([a[i] for a in alone]))


def test_compiles_into_one_graph_with_its_gradients() -> None:
    kw = case(2, 70, 1, 2, 3, 4, bonus=True, dtype=torch.float32)
    own = [kw[name] for name in kw if name != "reset"]

    def loss(**kw: Any) -> Tensor:
        y, h = ops.gated_linear_attention(**kw, return_final_state=True, backend="chunked")
        return (2 * y).sum() + h.square().sum()

    want = torch.autograd.grad(loss(**kw), own)
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for g, w in zip(torch.autograd.grad(compiled(**kw), own), want, strict=True):
            torch.testing.assert_close(g, w)


def test_operators_are_described_correctly() -> None:
    kw = case(2, 20, 1, 2, 3, 4, bonus=True)
    inputs = [kw[name].detach() for name in ("q", "k", "v", "log_a")]
    others = [kw["bonus"].detach().expand(2, -1, -1), kw["h0"].detach(), kw["reset"]]
    forward, backward = torch.ops.ssmlens.chunked_attention, torch.ops.ssmlens.chunked_attention_backward
    y, last, states = forward(*inputs, *others, True)
    torch.library.opcheck(forward.default, (*inputs, *others, True))
    torch.library.opcheck(forward.default, (*inputs, None, None, None, False))
    torch.library.opcheck(backward.default, (y, last, states, *inputs, *others, 1))
    torch.library.opcheck(backward.default, (torch.cat([y, y]), None, states, *inputs, None, None, None, 2))


# ---------------------------------------------------------------------------------------- what the decays do


def test_one_is_a_sum_and_zero_has_no_memory(small: None) -> None:
    kw = case(1, 30, 1, 1, 3, 2, decays="mild", reset=False, start=False, dtype=torch.float32)
    log_a = torch.tensor([0.0, -torch.inf, -0.1]).repeat(1, 30, 1, 1).requires_grad_()
    _, H = attention(**{**kw, "log_a": log_a})
    u = kw["k"][0, :, 0, :, None] * kw["v"][0, :, 0, None]
    close(H[0, 0, 0], u[:, 0].double().sum(0), torch.float32)
    other = {**kw, "v": torch.cat([torch.randn(1, 29, 1, 2), kw["v"][:, -1:]], 1)}
    assert torch.equal(attention(**{**other, "log_a": log_a})[1][0, 0, 1], H[0, 0, 1]), (
        "bitwise: nothing of the past is left"
    )
    assert torch.equal(H[0, 0, 1], u[-1, 1])
    y, H = attention(**{**kw, "log_a": log_a})
    (g,) = torch.autograd.grad(y.square().sum() + H.sum(), log_a)
    assert torch.equal(g[..., 1], torch.zeros(1, 30, 1)), "a = 0 passes no gradient to log_a"
    assert g[0, 1:, 0, 0].abs().min() > 0, "a = 1 does"


@pytest.mark.parametrize("keys", [False, True])
def test_extreme_decays_neither_overflow_nor_leak(keys: bool) -> None:
    """Every kind of decay beside every other: what is far below the rest must not disturb it."""
    kinds = [0.0, -1e-7, -0.5, -20.0, -90.0, -1e4, -3e38, -torch.inf]
    kw = case(1, 192, 1, 1, 8, 3, keys=keys, reset=False, dtype=torch.float32)
    order = [kinds[(3 * i + i // 8) % 8] for i in range(192)]
    log_a = torch.tensor(order)[:, None].repeat(1, 8 if keys else 1)
    if keys:
        log_a = torch.stack([row.roll(i) for i, row in enumerate(torch.tensor(kinds).repeat(192, 1))])
    kw["log_a"] = log_a[None, :, None].requires_grad_()
    agree(kw, torch.float32)
    for kind in kinds:
        kw["log_a"] = torch.full_like(kw["log_a"], kind).requires_grad_()
        agree(kw, torch.float32)


def test_slow_decay_over_many_tokens() -> None:
    """Products of a rounded a = exp(-1e-5) would be off by 1e-3 here; sums of log_a are not."""
    length = 20_000
    for keys in (1, 2):
        kw = {"q": torch.ones(1, length, 1, 2), "k": torch.zeros(1, length, 1, 2), "v": torch.zeros(1, length, 1, 1),
              "log_a": torch.full((1, length, 1, keys), -1e-5), "h0": torch.ones(1, 1, 2, 1)}  # fmt: skip
        y, _ = attention(**kw)
        steps = torch.arange(1, length + 1, dtype=torch.float64)
        close(
            y[0, :, 0, 0], 2 * torch.exp(-steps * float(kw["log_a"][0, 0, 0, 0].double())).reciprocal(), torch.float32
        )


def test_no_subnormal_number_reaches_a_product() -> None:
    """They would make it a hundred times slower on a CPU."""
    for dtype, scale in itertools.product(DTYPES, (0.5, 1.4, 3.0, 12.0, 40.0, 200.0)):
        work = decay.Decays(2, 1, 64, 4, 4, torch.empty(0, dtype=dtype), inclusive=True, keep=True)
        work.qk.fill_(1)
        work.log_a.copy_(-scale * torch.rand(work.log_a.shape, generator=torch.Generator().manual_seed(0)))
        _, rows, cols, keep = work.forward()
        for x in [rows, cols, keep, *(at.scaled for at in work.levels[work.start :])]:
            assert not ((x != 0) & (x.abs() < torch.finfo(dtype).tiny ** 0.5)).any()


def test_mild_decays_take_the_short_way_and_others_do_not() -> None:
    for (scale, start), pinned in itertools.product(((0.05, 6), (0.5, 5), (100.0, 0)), (False, True)):
        work = decay.Decays(1, 1, 64, 2, 2, torch.empty(0), inclusive=True, keep=False)
        work.qk.fill_(1)
        work.log_a.fill_(-scale)
        if pinned:
            work.log_a[..., 1] = -torch.inf
        work.forward()
        assert work.start == start
        assert (work.dead is not None) == (pinned and start > 0)
        work.log_a.fill_(-scale)
        work.log_a[..., 32, 1] = -torch.inf  # only one token
        work.forward()
        assert work.start == 0


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_what_is_pinned_at_zero_sees_the_current_token_or_the_one_before(bonus: bool, scale: float) -> None:
    """Blocks of 64 and of 32 tokens at once, in heads that share q and k."""
    for keys, reset in itertools.product((False, True), (False, True)):
        kw = case(1, 192, 2, 2, 4, 3, keys=keys, bonus=bonus, decays="mild", reset=False)
        log_a = (kw["log_a"].detach() * (scale / 0.05)).clamp_min(-22 * scale / 32 / 0.5)
        log_a[:, :, 1, :2] = -torch.inf
        log_a[:, 64:, 2, -1:] = -torch.inf
        kw["log_a"] = log_a.requires_grad_()
        if reset:
            kw["reset"] = torch.arange(192)[None] == 70
        agree(kw, torch.float64)


# ---------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("cut", [1, 8, 29])
def test_two_parts_are_the_whole(keys: bool, cut: int, small: None) -> None:
    kw = case(keys=keys, bonus=True)
    whole, H = attention(**kw)
    first = attention(**{n: p[:, :cut] if n in ("q", "k", "v", "log_a", "reset") else p for n, p in kw.items()})
    rest = {n: p[:, cut:] if n in ("q", "k", "v", "log_a", "reset") else p for n, p in kw.items()}
    second = attention(**{**rest, "h0": first[1]})
    close(torch.cat([first[0], second[0]], 1), whole, torch.float64)
    close(second[1], H, torch.float64)


def test_decay_may_be_moved_into_keys_and_queries(small: None) -> None:
    """With c_t = Σ_{r≤t} log_a_r: q_t e^{c_t} and k_t e^{-c_t} without decay are the same."""
    kw = case(decays="mild", reset=False, start=False)
    y, _ = attention(**kw)
    c = kw["log_a"].cumsum(1)
    kw |= {"q": kw["q"].repeat_interleave(2, 2) * c.exp(), "k": kw["k"].repeat_interleave(2, 2) * (-c).exp()}
    close(attention(**{**kw, "log_a": torch.zeros_like(c)})[0], y, torch.float64)


def test_one_decay_a_head_is_that_decay_for_every_key(small: None) -> None:
    for decays in ("mild", "mixed"):
        kw = case(keys=False, decays=decays)
        wide = {**kw, "log_a": kw["log_a"].expand(-1, -1, -1, 3)}
        close(attention(**wide)[0], attention(**kw)[0], torch.float64)


def test_linear_in_values_and_causal(small: None) -> None:
    kw = case(reset=False, start=False)
    other = torch.randn_like(kw["v"])
    y = attention(**kw)[0]
    close(attention(**{**kw, "v": 2 * kw["v"] + other})[0], 2 * y + attention(**{**kw, "v": other})[0], torch.float64)
    grads = torch.autograd.grad(y[:, 11].sum(), [kw[name] for name in ("q", "k", "v", "log_a")])
    for g in grads:
        assert not g[:, 12:].any()
        assert g[:, 11:12].any()


def test_a_bonus_of_one_reads_what_is_written_without_its_decay(small: None) -> None:
    kw = case(bonus=True, decays="mixed")
    kw["bonus"] = torch.ones_like(kw["bonus"])
    late = {**kw, "log_a": torch.zeros_like(kw["log_a"])}
    close(attention(**late)[0], attention(**{**late, "bonus": None})[0], torch.float64)


def test_a_reset_separates_sequences(small: None) -> None:
    kw = case(1, 40, reset=False, start=False, bonus=True)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, [7, 8, 25]] = True
    parts = [
        attention(**{n: p[:, a:b] if n != "bonus" else p for n, p in kw.items()})[0]
        for a, b in ((0, 7), (7, 8), (8, 25), (25, 40))
    ]
    close(attention(**kw, reset=reset)[0], torch.cat(parts, 1), torch.float64)


# ---------------------------------------------------------------------------------------- the rest of PyTorch


def test_non_contiguous_arguments(small: None) -> None:
    kw = case(3, 20, bonus=True)
    odd = {
        n: p if n == "reset" else p.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for n, p in kw.items()
    }
    assert not odd["v"].is_contiguous()
    agree(odd, torch.float64)


@pytest.mark.parametrize("empty", ["batch", "d_key", "d_value"])
def test_nothing_in_nothing_out(empty: str) -> None:
    sizes = {"batch": 2, "d_key": 3, "d_value": 4} | {empty: 0}
    kw = case(length=5, **sizes, bonus=True)
    y, H = attention(**kw)
    assert y.shape == (sizes["batch"], 5, 4, sizes["d_value"])
    assert H.shape == (sizes["batch"], 4, sizes["d_key"], sizes["d_value"])
    assert not y.any()
    for g in torch.autograd.grad(y.sum() + H.sum(), [kw[name] for name in kw if name != "reset"]):
        assert torch.isfinite(g).all()


def test_autocast_touches_neither_pass() -> None:
    kw = case(dtype=torch.float32)
    own = [kw[name] for name in kw if name != "reset"]
    want = attention(**kw)
    want_gradients = torch.autograd.grad(want[0].square().sum(), own)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(**kw)
        got_gradients = torch.autograd.grad(got[0].square().sum(), own)
    for g, w in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        assert torch.equal(g, w)


def test_gradients_where_only_some_are_asked_for() -> None:
    kw = case()
    full = torch.autograd.grad(attention(**kw)[1].sum(), kw["k"])[0]  # the final state alone
    fixed = {n: p.detach() if n != "k" and n != "reset" else p for n, p in kw.items()}
    torch.testing.assert_close(torch.autograd.grad(attention(**fixed)[1].sum(), kw["k"])[0], full)
    again = checkpoint(lambda k: attention(**{**kw, "k": k})[1].sum(), kw["k"], use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, kw["k"])[0], full)
    with torch.no_grad():
        assert not attention(**kw)[0].requires_grad


class Largest(TorchDispatchMode):
    """The largest array that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        for x in made:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_memory_is_linear_in_length() -> None:
    """No array with a state for each token; nothing larger than a few inputs, and that in proportion to the length."""
    for keys in (False, True):
        sizes = []
        for length in (2048, 4096):
            kw = case(1, length, 1, 2, 32, 32, keys=keys, decays="mixed", reset=False, dtype=torch.float32)
            own = [kw[n].detach() for n in ("q", "k", "v", "log_a")]
            with Largest() as forward:
                y, last, states = pieces.forward(*own, None, kw["h0"].detach(), None, True)
            with Largest() as backward:
                pieces.backward(y, last, states, *own, None, kw["h0"].detach(), None, 1)
            assert states.numel() <= kw["v"].numel(), "half of it at chunks of 64, twice the width"
            sizes.append(max(forward.numel, backward.numel))
            assert sizes[-1] <= max(2 * kw["v"].numel(), 4 * pieces.PIECE)
        assert sizes[1] <= 2 * sizes[0]
