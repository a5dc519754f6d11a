"""What linear attention with decay costs beside the matrix products that it consists of.

    python benchmarks/gated_linear_attention.py [--threads 1] [--length 8192] [--heads 4] [--width 64] [--rounds 15]

float32, batch 1, d_key = d_value = width. Everything is measured in this process, taking turns; a ratio is that of two times in the same
turn, printed as its median and its quartiles. With one thread the time is the thread's own, so that other programs on the machine do
not enter, except through the caches they share. Three denominators:

    own        every matrix product that the forward (backward) pass makes, recorded from a run of it and made again alone, each shape
               on one set of arrays that stays in cache
    textbook   the products of the chunked form as it is written down, without decay: 4 forward, 9 backward, all dense
    others     the recurrence with states expanded in blocks that stay in cache, and the loop over tokens (1/16 of the length, scaled)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens.ops import gated_linear_attention, reference
from ssmlens.ops.chunked import pieces
from ssmlens.ops.chunked.scan import in_blocks, linear_scan

Run = Callable[[], object]


class Products(TorchDispatchMode):
    """Records the matrix products that are made under it, by shape and stride."""

    NAMES = ("bmm", "baddbmm", "baddbmm_", "mm", "addmm", "mv")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.removeprefix("aten::") in self.NAMES:
            self.calls.append((function, tuple(args)))
        return function(*args, **(kwargs or {}))

    def alone(self) -> Run:
        """A function that makes the same products again."""
        arrays: dict[Any, Tensor] = {}

        def like(x: Tensor, place: int) -> Tensor:
            key = place, tuple(x.shape), x.stride()
            if key not in arrays:
                room = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                arrays[key] = torch.randn(room).as_strided(x.shape, x.stride())
            return arrays[key]

        calls: list[tuple[Any, list[Tensor], dict[str, Any]]] = []
        for function, args in self.calls:
            tensors = [like(x, i) for i, x in enumerate(args)]
            outer = tensors[0].shape[:-1] + tensors[-1].shape[-1:]
            if function._schema.name == "aten::bmm":
                calls.append((torch.bmm, tensors, {"out": like(torch.empty(outer), 9)}))
            elif function._schema.name.startswith("aten::baddbmm"):
                calls.append((torch.baddbmm, tensors, {"beta": 0, "out": tensors[0].contiguous()}))
            else:
                calls.append((function, tensors, {}))

        def run() -> None:
            for product, tensors, out in calls:
                product(*tensors, **out)

        return run


def textbook(chunks: int, size: int, width: int) -> tuple[Run, Run]:
    q = torch.randn(chunks, size, width)
    scores, state = torch.randn(chunks, size, size), torch.randn(chunks, width, width)
    out, s, h = torch.empty_like(q), torch.empty_like(scores), torch.empty_like(state)

    def forward() -> None:
        torch.bmm(q, q.mT, out=s)
        torch.bmm(scores, q, out=out)
        torch.bmm(q.mT, q, out=h)
        torch.bmm(q, state, out=out)

    def backward() -> None:  # the scores again; to scores, v, q, k; to states; from states to q, k, v
        for _ in range(2):
            torch.bmm(q, q.mT, out=s)
        for x in (scores, scores.mT, scores.mT):
            torch.bmm(x, q, out=out)
        torch.bmm(q.mT, q, out=h)
        for x in (state, state.mT, state.mT):
            torch.bmm(q, x, out=out)

    return forward, backward


def blockwise(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Every state of a block of tokens at once."""

    def block(H: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor]:
        u = k[..., :, None] * v[..., None, :]
        states, last = linear_scan(log_a.exp()[..., None], u, h0=H, reset=None)
        return torch.einsum("blhk,blhkv->blhv", q, states), last

    batch, _, heads, width = v.shape
    start = torch.zeros(batch, heads, width, width)
    return in_blocks(block, start, [q, k, v, log_a], start.numel())[0]


def turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:6.2f} ({low:.2f}-{high:.2f})"


def decays(kind: str, length: int, heads: int, width: int) -> Tensor:
    if kind == "one decay a head":
        return -0.1 * torch.rand(1, length, heads, 1)
    if kind == "a decay a key, mild":
        return -0.1 * torch.rand(1, length, heads, width)
    mild = kind == "a decay a key, mild, two pinned"
    log_a = -0.1 * torch.rand(1, length, heads, width) if mild else -(torch.rand(1, length, heads, width) ** 4) * 10
    log_a[..., 0], log_a[..., 1] = 0, -torch.inf  # two keys pinned
    return log_a


def measure(kind: str, length: int, heads: int, width: int, rounds: int) -> None:
    q, k, v = (torch.randn(1, length, heads, width) for _ in range(3))
    log_a, dy = decays(kind, length, heads, width), torch.randn(1, length, heads, width)
    inputs = [x.requires_grad_() for x in (q, k, v, log_a)]
    with torch.no_grad():
        *_, states = pieces.forward(q, k, v, log_a, None, None, None, True)
        with Products() as products:
            pieces.forward(q, k, v, log_a, None, None, None, True)
        with Products() as products_back:
            pieces.backward(dy, None, states, q, k, v, log_a, None, None, None, 1)
    y = gated_linear_attention(*inputs, backend="chunked")
    assert isinstance(y, Tensor)
    expanded = blockwise(*inputs)
    size = pieces.chunk_size(length)
    book, book_back = textbook(heads * -(-length // size), size, width)
    few = [x[:, : length // 16].detach() for x in inputs]
    times = turns(
        {
            "op": lambda: gated_linear_attention(*inputs, backend="chunked"),
            "own": products.alone(),
            "textbook": book,
            "back": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
            "own back": products_back.alone(),
            "textbook back": book_back,
        },
        rounds,
    )
    others = turns(
        {
            "op": lambda: gated_linear_attention(*inputs, backend="chunked"),
            "states": lambda: blockwise(*inputs),
            "loop": lambda: reference.gated_linear_attention(*few, bonus=None, h0=None, reset=None),
            "back": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
            "states back": lambda: torch.autograd.grad(expanded, inputs, dy, retain_graph=True),
        },
        3,
    )
    others["loop"] = [16 * t for t in others["loop"]]
    print(f"\n{kind}")
    print(
        f"{'':10}{'ns a token':>12}{'best ms':>10}   {'own products':20}{'textbook products':20}{'states in blocks':>18}{'loop':>10}"
    )
    for name, back in (("forward", ""), ("backward", " back")):
        op = times["back" if back else "op"]
        faster = min(others[f"states{back}"]) / min(others["back" if back else "op"])
        loop = "" if back else f"{min(others['loop']) / min(others['op']):9.0f}x"
        print(
            f"{name:10}{statistics.median(op) / length * 1e9:12.0f}{min(op) * 1e3:10.1f}   "
            f"{ratio(op, times[f'own{back}']):20}{ratio(op, times[f'textbook{back}']):20}{faster:17.0f}x{loop}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="d_key = d_value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--chunk", type=int, default=pieces.CHUNK, help="tokens in a chunk")
    parser.add_argument("--piece", type=int, default=pieces.PIECE, help="numbers of an array in a piece")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pieces.CHUNK, pieces.PIECE = options.chunk, options.piece
    print(
        f"float32, batch 1, length {options.length}, {options.heads} heads of {options.width}, {options.threads} thread(s), chunks of "
        f"{options.chunk}; ratios: median (quartiles) of {options.rounds} turns; states in blocks, loop: how much slower those are"
    )
    for kind in (
        "one decay a head",
        "a decay a key, mild",
        "a decay a key, mild, two pinned",
        "a decay a key, all sizes, 0 and 1 among them",
    ):
        measure(kind, options.length, options.heads, options.width, options.rounds)


if __name__ == "__main__":
    main()
