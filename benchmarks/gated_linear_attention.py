"""What linear attention with decay costs beside the matrix products that it consists of.

    python benchmarks/gated_linear_attention.py [--threads 1] [--length 8192] [--heads 4] [--width 64] [--rounds 15] [--backend auto]
                                               [--others]

float32, batch 1, d_key = d_value = width. Everything is measured in this process, taking turns. The denominator is what the chunked form
consists of as it is written down, dense and without decay, in chunks of 64 tokens (`textbook`), made by torch.bmm into arrays that are
there already, each product measured alone at its best and these times added up:

    forward    4: scores q kᵀ, scores v, the states kᵀ v, q times the states
    backward   9: the scores again; to scores, v, q, k; to states; from states to q, k, v

Printed are the ratio of the best times, and the median and the quartiles of the ratios of a turn. --others: the recurrence with states
expanded in blocks that stay in cache, and the loop over tokens (1/16 of the length, scaled). With one thread the time is the
thread's own, so that other programs on the machine do not enter, except through the caches they share.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssmlens.ops import backend_for, gated_linear_attention, reference
from ssmlens.ops.chunked.scan import in_blocks, linear_scan

Run = Callable[[], object]
CHUNK = 64  # the field's usual size


def textbook(chunks: int, size: int, width: int) -> tuple[dict[str, Run], dict[str, Run]]:
    """The products of the forward pass, and those of the backward pass."""
    q = torch.randn(chunks, size, width)
    scores, state = torch.randn(chunks, size, size), torch.randn(chunks, width, width)
    out, s, h = torch.empty_like(q), torch.empty_like(scores), torch.empty_like(state)

    def product(x: Tensor, y: Tensor, to: Tensor) -> Run:
        return lambda: torch.bmm(x, y, out=to)

    forward = {
        "scores": product(q, q.mT, s),
        "scores times values": product(scores, q, out),
        "states": product(q.mT, q, h),
        "reading states": product(q, state, out),
    }
    back = {
        "scores again": product(q, q.mT, s),
        "to scores": product(q, q.mT, s),
        "to values": product(scores.mT, q, out),
        "to queries": product(scores, q, out),
        "to keys": product(scores.mT, q, out),
        "to states": product(q.mT, q, h),
        "from states to values": product(q, state, out),
        "from states to queries": product(q, state.mT, out),
        "from states to keys": product(q, state.mT, out),
    }
    return forward, back


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


def summary(over: list[float], under: list[list[float]]) -> str:
    """The ratio of the best times, and of a turn's, to the sum over the products."""
    turns = [a / sum(b) for a, b in zip(over, zip(*under, strict=True), strict=True)]
    low, middle, high = statistics.quantiles(turns, n=4)
    return f"{min(over) / sum(map(min, under)):8.2f}   {middle:6.2f} ({low:.2f}-{high:.2f})"


def decays(kind: str, length: int, heads: int, width: int) -> Tensor:
    if kind == "one decay a head":
        return -0.1 * torch.rand(1, length, heads, 1)
    if kind == "a decay a key, mild":
        return -0.1 * torch.rand(1, length, heads, width)
    mild = kind == "a decay a key, mild, two pinned"
    log_a = -0.1 * torch.rand(1, length, heads, width) if mild else -(torch.rand(1, length, heads, width) ** 4) * 10
    log_a[..., 0], log_a[..., 1] = 0, -torch.inf  # two keys pinned
    return log_a


def measure(kind: str, length: int, heads: int, width: int, rounds: int, backend: str, with_others: bool) -> None:
    q, k, v = (torch.randn(1, length, heads, width) for _ in range(3))
    log_a, dy = decays(kind, length, heads, width), torch.randn(1, length, heads, width)
    inputs = [x.requires_grad_() for x in (q, k, v, log_a)]

    def op() -> Tensor:
        y = gated_linear_attention(*inputs, backend=backend)
        assert isinstance(y, Tensor)
        return y

    y = op()
    book, book_back = textbook(heads * -(-length // CHUNK), CHUNK, width)
    ours = {"op": op, "back": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)}
    times = turns({**ours, **book, **{f"back: {name}": run for name, run in book_back.items()}}, rounds)
    print(f"\n{kind}")
    print(f"{'':10}{'best ms':>8}{'products ms':>13}{'ratio of best':>15}   of a turn")
    for name, which, products in (
        ("forward", "op", list(book)),
        ("backward", "back", [f"back: {name}" for name in book_back]),
    ):
        alone = [times[p] for p in products]
        print(
            f"{name:10}{min(times[which]) * 1e3:8.1f}{sum(map(min, alone)) * 1e3:13.1f}       {summary(times[which], alone)}"
        )
    if with_others:
        expanded = blockwise(*inputs)
        few = [x[:, : length // 16].detach() for x in inputs]
        others = turns(
            {
                **ours,
                "states": lambda: blockwise(*inputs),
                "loop": lambda: reference.gated_linear_attention(*few, bonus=None, h0=None, reset=None),
                "states back": lambda: torch.autograd.grad(expanded, inputs, dy, retain_graph=True),
            },
            3,
        )
        best = {name: min(t) for name, t in others.items()}
        print(
            f"slower: states in blocks {best['states'] / best['op']:.0f}x, backward {best['states back'] / best['back']:.0f}x; "
            f"loop over tokens {16 * best['loop'] / best['op']:.0f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="d_key = d_value")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "chunked"))
    parser.add_argument("--others", action="store_true", help="measure the recurrence done in other ways, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    backend = options.backend
    if backend == "auto":
        backend = backend_for("gated_linear_attention", torch.empty(1, options.length, options.heads, options.width))
    print(
        f"float32, batch 1, length {options.length}, {options.heads} heads of {options.width}, {options.threads} thread(s), backend "
        f"{backend}, against 4 and 9 dense products in chunks of {CHUNK}; {options.rounds} turns"
    )
    for kind in (
        "one decay a head",
        "a decay a key, mild",
        "a decay a key, mild, two pinned",
        "a decay a key, all sizes, 0 and 1 among them",
    ):
        measure(kind, options.length, options.heads, options.width, options.rounds, backend, options.others)


if __name__ == "__main__":
    main()
