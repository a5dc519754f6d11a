"""Which kernels `backend="auto"` takes on a CUDA device: ours, or a peer's (`peers`) where its package is installed and faster.

Faster on what, only the user's machine can say. So the first call of a kind (operator, dtypes, sizes to a power of two, options, which
gradients are recorded, device) runs both a few times, forward and, where gradients are recorded, backward; the table of this process
remembers the winner. That call takes longer, needs memory for its copies and waits for the GPU. A peer is passed over where it

    cannot compute the call (resets, complex A, an initial state, too large: `peers`), or refuses its values (-inf in A or log_a)
    would not differentiate the final state that is asked for (mamba-ssm's, while gradients are recorded)
    raises, or differs from ours by more than `AGREES` (ten times that in a gradient): one warning, and ours from then on

and inside torch.compile, torch.func transforms and CUDA graph capture, where nothing can be measured, ours is taken.
Both results are right to the tolerance of their dtype, but not bitwise equal, and which is faster may vary from run to run: who
needs the same bits again names a backend.
"""

import functools
import warnings
from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ssmlens.ops import peers

PEERS = {"selective_scan": "mamba_ssm", "gated_linear_attention": "fla"}
AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest entry
Run = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


def gpu_seconds(run: Callable[[], object]) -> float:
    """The best of three, after one for what is compiled at a first call."""
    run()
    best = float("inf")
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


@functools.cache
def installed(package: str) -> bool:
    return find_spec(package) is not None


class Table:
    """What has been measured. seconds: how long a call takes."""

    def __init__(self, seconds: Callable[[Callable[[], object]], float] = gpu_seconds) -> None:
        self._seconds = seconds
        self._peer: dict[Hashable, bool] = {}  # whether it is the peer's
        self._warned: set[str] = set()

    def run(self, op: str, kind: Hashable, kw: dict[str, Any], ours: Run, theirs: Run) -> tuple[Tensor, Tensor]:
        """The result of the faster."""
        key = op, kind
        try:
            if key not in self._peer:
                self._peer[key] = self._measured(op, kw, ours, theirs)
            if self._peer[key]:
                return theirs(kw)
        except peers.Refused:  # of these values: nothing to remember
            pass
        except Exception as error:
            self._peer[key] = False
            self._warn(op, f"raised {type(error).__name__} ({error})")
        return ours(kw)

    def _measured(self, op: str, kw: dict[str, Any], ours: Run, theirs: Run) -> bool:
        got, want = _results(theirs, kw), _results(ours, kw)
        for name, wanted in want.items():
            scale = wanted.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = float((got[name].float() - wanted.float()).abs().max() / scale)
            if not error <= AGREES[want["y"].dtype] * (1 if name == "y" else 10):
                what = "" if name == "y" else f" in the gradient of {name}"
                self._warn(op, f"differs from ours by {error:.1e} of the largest entry{what}")
                return False
        return self._seconds(lambda: _results(theirs, kw)) < self._seconds(lambda: _results(ours, kw))

    def _warn(self, op: str, what: str) -> None:
        if op not in self._warned:
            self._warned.add(op)
            warnings.warn(f"{op}: {PEERS[op]} {what}; ssmlens uses its own kernel", RuntimeWarning, stacklevel=5)


def _results(run: Run, kw: dict[str, Any]) -> dict[str, Tensor]:
    """y and, while gradients are recorded, the gradient of every argument that has one, of a sum over y with uneven weights."""
    free = {name: _free(t) if isinstance(t, Tensor) else t for name, t in kw.items()}
    wanted = {name: t for name, t in free.items() if isinstance(t, Tensor) and t.requires_grad}
    y = run(free)[0]
    if not wanted:
        return {"y": y}
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), weights), strict=True))}


def _free(t: Tensor) -> Tensor:
    """As it is in the call, but not part of the caller's graph."""
    return t.detach().requires_grad_(t.requires_grad and torch.is_grad_enabled())


_table = Table()


def faster(
    op: str, x: Tensor, kw: dict[str, Any], ours: Run, theirs: Run, *, final_state: bool
) -> tuple[Tensor, Tensor]:
    """The faster of both for a call of `op` on input x with the arguments kw, ours where a peer is no choice."""
    if not peers.on_gpu(x) or _inside_a_transform() or not installed(PEERS[op]):
        return ours(kw)
    tensors = {name: t for name, t in kw.items() if isinstance(t, Tensor)}
    if op == "selective_scan":
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
        reason = "the final state" if final_state and recorded else None
        reason = reason or peers.why_not_selective_scan(x, kw["A"], h0=kw["h0"], reset=kw["reset"], values=False)
    else:
        reason = peers.why_not_gated_linear_attention(kw["k"], x, kw["log_a"], reset=kw["reset"], values=False)
    if reason is not None:
        return ours(kw)
    recording = torch.is_grad_enabled()
    shapes = tuple(
        (name, t.dtype, recording and t.requires_grad, *(n.bit_length() for n in t.shape))
        for name, t in tensors.items()
    )
    options = tuple(sorted(name for name, given in kw.items() if given is True))
    return _table.run(op, (shapes, options, _name(x)), kw, ours, theirs)


def _inside_a_transform() -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
