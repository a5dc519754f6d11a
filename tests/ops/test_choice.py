"""Which of two kernels "auto" takes on a GPU: with stand-ins for both and for the clock, on a CPU."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import close, selective
from test_peers import attention_arguments, calls, scan_arguments  # noqa: F401  (a fixture)
from torch import Tensor

from ssmlens import ops
from ssmlens.ops import choice, peers, reference


class Clock:
    """Takes one call to last as long as it is told, by order: theirs, ours."""

    def __init__(self, theirs: float, ours: float) -> None:
        self.answers, self.asked = [theirs, ours], 0

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        self.asked += 1
        return self.answers[(self.asked - 1) % 2]


def table(monkeypatch: pytest.MonkeyPatch, theirs: float = 1.0, ours: float = 2.0) -> Clock:
    clock = Clock(theirs, ours)
    monkeypatch.setattr(choice, "_table", choice.Table(clock))
    monkeypatch.setattr(choice, "installed", lambda package: True)
    return clock


@pytest.fixture
def used(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """The peers' operators that "auto" has run, by name."""
    names: list[str] = []
    for name in choice.PEERS:
        original = getattr(peers, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kw: Any) -> Any:
            names.append(_name)
            return _original(*args, **kw)

        monkeypatch.setattr(peers, name, counted)
    return names


def attention(**options: Any) -> dict[str, Any]:
    return {k: v.detach() for k, v in attention_arguments(True, False).items()} | options


def scan(**options: Any) -> dict[str, Any]:
    kw = scan_arguments(torch.float32)
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in kw.items()} | options


def test_the_faster_is_taken_and_remembered(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for theirs, wanted in ((1.0, 1), (3.0, 0)):
        clock = table(monkeypatch, theirs)
        y = ops.gated_linear_attention(**attention())
        assert clock.asked == 2
        used.clear()
        for _ in range(3):
            again = ops.gated_linear_attention(**attention())
        assert used == ["gated_linear_attention"] * (3 * wanted)
        assert clock.asked == 2, "measured once"
        assert torch.equal(again, y)
        want, _ = reference.gated_linear_attention(**attention(), bonus=None, reset=None)
        close(y, want, torch.float32)


def test_each_kind_of_call_is_measured(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = table(monkeypatch)
    kw = attention()
    for length, measured in ((7, 1), (5, 1), (4, 1), (3, 2)):  # 4 to 7 are one size
        ops.gated_linear_attention(**{n: x[:, :length] if n != "h0" else x for n, x in kw.items()})
        assert clock.asked == 2 * measured
    ops.gated_linear_attention(**{**kw, "h0": None})
    ops.gated_linear_attention(**{**kw, "v": kw["v"].bfloat16()})
    assert clock.asked == 8
    ops.selective_scan(**scan())
    assert clock.asked == 10
    assert "selective_scan" in used


def test_gradients_go_through_the_peer(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch)
    kw = scan_arguments(torch.float32)
    y = ops.selective_scan(**kw)
    assert isinstance(y, Tensor)
    got = torch.autograd.grad(y.sum(), kw["x"])[0]
    close(got, torch.autograd.grad(ops.selective_scan(**kw, backend="reference").sum(), kw["x"])[0], torch.float32)
    used.clear()
    ops.selective_scan(**kw)
    assert used == ["selective_scan"]
    _, h = ops.selective_scan(**kw, return_final_state=True)
    assert used == ["selective_scan"], "its final state has no gradient"
    h.sum().backward()
    with torch.no_grad():  # another kind: measured, and taken
        ops.selective_scan(**kw, return_final_state=True)
        used.clear()
        ops.selective_scan(**kw, return_final_state=True)
    assert used == ["selective_scan"]


def test_gradients_are_measured_where_they_are_recorded(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kw = attention_arguments(True, False)
    backwards: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, factor: float) -> Tensor:
            ctx.factor = factor
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
            backwards.append("theirs")
            return dy * ctx.factor, None

    factor = 1.0

    def peer(**kw: Any) -> tuple[Tensor, Tensor]:
        used.append("peer")
        y, h = reference.gated_linear_attention(**kw)
        return Watched.apply(y, factor), h

    monkeypatch.setattr(peers, "gated_linear_attention", peer)
    table(monkeypatch)
    y = ops.gated_linear_attention(**kw)
    assert len(backwards) == 2, "compared, and timed"
    assert used == ["peer"] * 3
    assert isinstance(y, Tensor)
    torch.autograd.grad(y.sum(), kw["q"])
    assert len(backwards) == 3
    with torch.no_grad():
        ops.gated_linear_attention(**kw)
    assert len(backwards) == 3

    factor = 1.01  # right values, wrong gradients
    clock = table(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"differs from ours by .* in the gradient of q"):
        y = ops.gated_linear_attention(**kw)
    assert clock.asked == 0
    assert torch.equal(y, ops.gated_linear_attention(**kw, backend="cpu"))
    assert all(t.grad is None for t in kw.values() if isinstance(t, Tensor)), (
        "nothing of the measuring is left in the caller's"
    )


def test_what_a_peer_cannot_do_is_ours(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = table(monkeypatch)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    ops.selective_scan(**scan(reset=reset))
    ops.selective_scan(**scan(h0=torch.zeros(2, 5, 4)))
    ops.selective_scan(**selective(dtype=torch.float32, complex_=True))
    ops.selective_scan(**scan(x=scan()["x"].double()))
    ops.gated_linear_attention(**attention(reset=torch.zeros(2, 7, dtype=torch.bool)))
    assert clock.asked == 0
    assert used == []
    ops.selective_scan(**scan())
    assert clock.asked == 2
    used.clear()
    pinned = scan()["A"].clone()
    pinned[:, 0] = -torch.inf  # which only a look at the values shows
    y = ops.selective_scan(**scan(A=pinned))
    assert torch.equal(y, ops.selective_scan(**scan(A=pinned), backend=ops.backend_for("selective_scan", y, pinned)))
    used.clear()
    ops.selective_scan(**scan())
    assert used == ["selective_scan"], "it is still the faster one for others"


def test_a_refusal_at_the_first_call_decides_nothing(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = table(monkeypatch)
    kw = attention()
    zero = kw["log_a"].clone()
    zero[0, 0, 0, 0] = -torch.inf
    ops.gated_linear_attention(**{**kw, "log_a": zero})
    assert clock.asked == 0
    ops.gated_linear_attention(**kw)
    assert clock.asked == 2


@pytest.mark.parametrize("how", ["raises", "is wrong", "is NaN"])
def test_a_broken_peer_is_one_warning(how: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tried = table(monkeypatch), []

    def broken(**kw: Any) -> tuple[Tensor, Tensor]:
        tried.append(1)
        if how == "raises":
            raise RuntimeError("no kernel image is available")
        y, h = reference.gated_linear_attention(**kw)
        return (y * 1.01 if how == "is wrong" else y * torch.nan), h

    monkeypatch.setattr(peers, "gated_linear_attention", broken)
    with pytest.warns(RuntimeWarning, match=r"fla (raised RuntimeError \(no kernel image|differs from ours by)"):
        y = ops.gated_linear_attention(**attention())
    assert torch.equal(y, ops.gated_linear_attention(**attention(), backend="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gated_linear_attention(**attention())
        ops.gated_linear_attention(**attention(h0=None))  # another kind: tried again, without a word
    assert len(tried) == 2
    assert clock.asked == 0


def test_a_peer_that_breaks_later_is_given_up(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch)
    ops.gated_linear_attention(**attention())

    def broken(**kw: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(peers, "gated_linear_attention", broken)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        ops.gated_linear_attention(**attention())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gated_linear_attention(**attention())


def test_nothing_is_tried_where_it_cannot_be(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = table(monkeypatch)
    kw = attention()
    torch.func.vmap(lambda q: ops.gated_linear_attention(**{**kw, "q": q}))(torch.stack([kw["q"], kw["q"]]))
    torch.compile(lambda **kw: ops.gated_linear_attention(**kw), backend="eager", fullgraph=True)(**kw)
    ops.gated_linear_attention(**kw, backend="chunked")
    monkeypatch.setattr(choice, "installed", lambda package: False)
    ops.gated_linear_attention(**kw)
    monkeypatch.setattr(choice, "installed", lambda package: True)
    monkeypatch.setattr(peers, "on_gpu", lambda x: False)
    ops.gated_linear_attention(**kw)
    assert clock.asked == 0
    assert used == []
