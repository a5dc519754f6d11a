"""The GPU kernels side by side: ours (Triton), the chunked torch path, mamba-ssm's and flash-linear-attention's where installed.

    python benchmarks/gpu_ops.py [--quick] [--json FILE]

For each op, size and dtype, all backends that can compute it take turns on the same inputs; printed are the best time of a
forward pass and of forward and backward together, the ratio to ours, the most memory allocated beyond the inputs, and the
largest error of the output and of any gradient, relative to its largest entry, against our reference in float64 (a shorter
sequence of the same kind, since that loops over tokens). It needs a GPU, and says so where there is none. `backend="auto"` asks the
same question at the first call of each kind, of forward passes (`ssmlens.ops.choice`).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlens.ops import chunked, peers, reference
from ssmlens.ops import triton as kernels

ROUNDS = 20
CHECKED_LENGTH = 512
Arguments = dict[str, Any]


def selective(batch: int, length: int, d_inner: int, d_state: int, dtype: torch.dtype, pinned: bool) -> Arguments:
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    A = -torch.arange(1.0, d_state + 1, device="cuda").expand(d_inner, d_state).contiguous()
    if pinned:  # one state channel held at one, one at zero
        ends = torch.tensor([0.0, -math.inf], device="cuda").expand(d_inner, 2)
        A = torch.cat([A, ends], 1)
    n = A.shape[1]
    return {
        "x": rand(batch, length, d_inner), "dt": rand(batch, length, d_inner) - 4, "A": A, "B": rand(batch, length, n),
        "C": rand(batch, length, n), "D": torch.ones(d_inner, device="cuda"), "z": rand(batch, length, d_inner),
        "dt_bias": torch.zeros(d_inner, device="cuda"), "dt_softplus": True,
    }  # fmt: skip


def attention(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, by_key: bool) -> Arguments:
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    log_a = (
        torch.nn.functional.logsigmoid(torch.randn(batch, length, heads, width if by_key else 1, device="cuda")) / 16
    )
    qk = (batch, length, heads, width)
    return {"q": rand(*qk) * width**-0.5, "k": rand(*qk), "v": rand(*qk), "log_a": log_a}


def linear(batch: int, length: int, width: int, dtype: torch.dtype) -> Arguments:
    u = torch.randn(batch, length, width, device="cuda", dtype=dtype)
    return {"a": torch.rand(batch, length, width, device="cuda").to(dtype), "u": u}


def convolution(batch: int, length: int, d_inner: int, dtype: torch.dtype) -> Arguments:
    x = torch.randn(batch, length, d_inner, device="cuda", dtype=dtype)
    weight, bias = torch.randn(d_inner, 4, device="cuda"), torch.randn(d_inner, device="cuda")
    return {"x": x, "weight": weight, "bias": bias, "activation": "silu"}


def cases(quick: bool) -> list[tuple[str, str, Callable[[int], Arguments]]]:
    """(op, what, arguments at a length); the length that is timed is part of `what`."""
    out: list[tuple[str, str, Callable[[int], Arguments]]] = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for batch, length, d in [(8, 1024, 256)] if quick else [(8, 1024, 256), (8, 2048, 1536), (1, 65536, 1536)]:
            for pinned in (False, True):
                what = f"{batch}x{length}x{d}x{18 if pinned else 16} {name}{' pinned' if pinned else ''}"
                out.append(
                    ("selective_scan", what, lambda n, b=batch, d=d, t=dtype, p=pinned: selective(b, n, d, 16, t, p))
                )
        for batch, length, heads, width in [(1, 8192, 4, 64)] if quick else [(1, 8192, 4, 64), (8, 4096, 16, 128)]:
            for by_key in (False, True):
                what = f"{batch}x{length}x{heads}x{width} {name} {'a key' if by_key else 'a head'}"
                out.append(
                    ("gated_linear_attention", what,
                     lambda n, b=batch, h=heads, w=width, t=dtype, k=by_key: attention(b, n, h, w, t, k))
                )  # fmt: skip
        out.append(("linear_scan", f"4x8192x1024 {name}", lambda n, t=dtype: linear(4, n, 1024, t)))
        out.append(("causal_conv1d", f"8x2048x1536 {name}", lambda n, t=dtype: convolution(8, n, 1536, t)))
    return out


def backends(op: str, kw: Arguments) -> dict[str, Callable[..., Any] | str]:
    """What computes `op` on these arguments, or why it does not."""
    found: dict[str, Callable[..., Any] | str] = {"triton": getattr(kernels, op)}
    if op == "selective_scan":
        found["mamba_ssm"] = peers.why_not_selective_scan(kw["x"], kw["A"]) or peers.selective_scan
    if op == "gated_linear_attention":
        reason = peers.why_not_gated_linear_attention(kw["k"], kw["v"], kw["log_a"])
        found["fla"] = reason or peers.gated_linear_attention
    found["chunked"] = plain(chunked, op)
    return found


def plain(module: Any, op: str) -> Callable[..., Any]:
    """Our torch paths, which take all their arguments and one dtype."""
    none: dict[str, dict[str, Any]] = {
        "selective_scan": dict.fromkeys(("D", "z", "dt_bias", "h0", "reset")) | {"dt_softplus": False},
        "gated_linear_attention": dict.fromkeys(("bonus", "h0", "reset")),
        "linear_scan": dict.fromkeys(("h0", "reset")),
        "causal_conv1d": dict.fromkeys(("bias", "initial", "reset", "activation")),
    }

    def run(**kw: Any) -> Any:
        tensors = [v for v in kw.values() if isinstance(v, Tensor)]
        wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        kw = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in kw.items()}
        if op == "linear_scan":
            return module.linear_scan(kw["a"], kw["u"], h0=None, reset=None)
        return getattr(module, op)(**(none[op] | kw))

    return run


def leaves(kw: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    return {
        k: v.detach().to(dtype or v.dtype).requires_grad_() if isinstance(v, Tensor) else v for k, v in kw.items()
    }  # fmt: skip


def gradients(function: Callable[..., Any], kw: Arguments, dy: Tensor) -> tuple[Tensor, ...]:
    own = [v for v in kw.values() if isinstance(v, Tensor)]
    y = function(**kw)[0]
    return (y, *torch.autograd.grad(y, own, dy.to(y.dtype)))


def milliseconds(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def errors(function: Callable[..., Any], op: str, short: Arguments) -> tuple[float, float]:
    """Of y and of the worst gradient."""
    y = function(**short)[0]
    dy = torch.randn(y.shape, device="cuda", dtype=torch.float64, generator=torch.Generator("cuda").manual_seed(0))
    dy = dy.to(y.dtype)
    got = gradients(function, leaves(short), dy)
    want = gradients(plain(reference, op), leaves(short, torch.float64), dy.double())
    off = [
        ((p.double() - q).abs().max() / q.abs().max().clamp_min(1e-30)).item() for p, q in zip(got, want, strict=True)
    ]
    return off[0], max(off[1:])


def measure(op: str, what: str, make: Callable[[int], Arguments]) -> list[dict[str, Any]]:
    size = what.split()[0].split("x")
    kw = leaves(make(int(size[1])))
    short = make(min(CHECKED_LENGTH, int(size[1])))
    found = backends(op, kw)
    runnable = {name: f for name, f in found.items() if callable(f)}
    dy = torch.randn_like(kw["v"] if "v" in kw else kw["u"] if "u" in kw else kw["x"])
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runnable}
    rows: list[dict[str, Any]] = [
        {"op": op, "case": what, "backend": n, "why_not": r} for n, r in found.items() if isinstance(r, str)
    ]
    memory, off = {}, {}
    for name, function in list(runnable.items()):
        try:
            gradients(function, kw, dy)  # compiles
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            gradients(function, kw, dy)
            memory[name] = torch.cuda.max_memory_allocated() - before
            off[name] = errors(function, op, short)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as e:
            rows.append({"op": op, "case": what, "backend": name, "why_not": str(e).splitlines()[0][:80]})
            del runnable[name]
            torch.cuda.empty_cache()

    def forward(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return function(**kw)

        return run

    for _ in range(ROUNDS):
        for name, function in runnable.items():  # in turns, so that a slow moment hits all
            times[name][0].append(milliseconds(forward(function)))
            times[name][1].append(milliseconds(lambda function=function: gradients(function, kw, dy)))
    for name in runnable:
        rows.append({
            "op": op, "case": what, "backend": name, "forward_ms": min(times[name][0]), "both_ms": min(times[name][1]),
            "extra_MiB": memory[name] / 2**20, "error": off[name][0], "gradient_error": off[name][1],
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    ours = {(r["op"], r["case"]): r for r in rows if r["backend"] == "triton" and "both_ms" in r}
    lines = [
        f"{'op':24}{'case':32}{'backend':11}{'forward':>10}{'+ backward':>12}{'/ ours':>8}{'MiB':>8}{'error':>10}{'gradients':>11}"
    ]
    for r in rows:
        head = f"{r['op']:24}{r['case']:32}{r['backend']:11}"
        if "why_not" in r:
            lines.append(f"{head}   {r['why_not']}")
            continue
        own = ours.get((r["op"], r["case"]))
        ratio = f"{r['both_ms'] / own['both_ms']:8.2f}" if own else f"{'-':>8}"
        lines.append(
            f"{head}{r['forward_ms']:7.2f} ms{r['both_ms']:9.2f} ms{ratio}{r['extra_MiB']:8.0f}{r['error']:10.1e}"
            f"{r['gradient_error']:11.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the smaller sizes")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_ops.py measures GPU kernels, and PyTorch sees no CUDA device here")
    if (reason := kernels.why_unavailable()) is not None:
        sys.exit(f"gpu_ops.py measures GPU kernels, and ours cannot run: {reason}")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, best of {ROUNDS} in turns")
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.quick):
        rows += measure(*case)
    print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
