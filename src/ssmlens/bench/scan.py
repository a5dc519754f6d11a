"""The selective scan alone, one function by every contender: y = C h + D x,  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t.

x, dt (batch, length, d_inner)   A (d_inner, d_state)   B, C (batch, length, d_state)   D (d_inner,), float32, dt > 0 already.
An element is one state channel of one inner channel of one token: batch · length · d_inner · d_state of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlens import ops

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

OURS, CHUNKED, REFERENCE = "ssmlens, C++", "ssmlens, pure torch", "ssmlens, reference"
MAMBAPY, TRANSFORMERS, LOOP = "mambapy pscan", "transformers", "token loop"
PROMISED = (OURS, CHUNKED, MAMBAPY, TRANSFORMERS, LOOP, REFERENCE)
FLOOR, TORCH_EXP = "floor: the kernel's exponentials", "torch.exp"


@dataclass(frozen=True)
class Rates:
    """Seconds that a call is expected to take, for planning only: forward and forward + backward an element, overhead a token, and
    what the backward pass costs an element and token of length where it makes a gradient as long as the sequence for every token."""

    forward: float
    both: float
    token: float = 0.0
    square: float = 0.0


RATES = {
    OURS: Rates(0.14e-9, 0.5e-9),
    CHUNKED: Rates(3e-9, 17e-9),
    MAMBAPY: Rates(9e-9, 22e-9),
    TRANSFORMERS: Rates(7e-9, 20e-9, token=5e-5, square=2.5e-9),
    LOOP: Rates(2.6e-9, 10e-9, token=5e-5, square=5e-11),
    REFERENCE: Rates(10e-9, 20e-9, token=5e-5, square=2.5e-9),
    FLOOR: Rates(0.09e-9, 0.09e-9),
    TORCH_EXP: Rates(0.2e-9, 0.2e-9),
}


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    d_inner: int
    d_state: int

    @property
    def elements(self) -> int:
        return self.batch * self.length * self.d_inner * self.d_state

    def __str__(self) -> str:
        return f"{self.batch} × {self.length} × {self.d_inner} × {self.d_state}"


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D as in a freshly initialised Mamba."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, shape.length, shape.d_inner, generator=g)
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.exp(torch.rand(x.shape, generator=g) * (high - low) + low)
    A = -torch.arange(1.0, shape.d_state + 1).repeat(shape.d_inner, 1)
    B = torch.randn(shape.batch, shape.length, shape.d_state, generator=g)
    C = torch.randn(B.shape, generator=g)
    return x, dt, A, B, C, torch.ones(shape.d_inner)


def _ours(backend: str) -> Scan:
    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        y = ops.selective_scan(x, dt, A, B, C, D=D, backend=backend)
        assert isinstance(y, Tensor)
        return y

    return scan


def _token_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence as one would write it down, with nothing kept that a token does not need."""
    h = x.new_zeros(x.shape[0], *A.shape)
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1) + D * x


def _transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from transformers.models.mamba import modeling_mamba

    turned = (x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D)
    y: Tensor = modeling_mamba.mamba_selective_scan(*turned)
    return y.transpose(1, 2)


def _mambapy(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
    y: Tensor = (states @ C[..., None])[..., 0]
    return y + D * x


def scans() -> dict[str, Scan]:
    """The contenders that this machine has, ours first. mambapy and a compiler may be missing."""
    from importlib.util import find_spec

    from ssmlens.ops import cpu

    found = {CHUNKED: _ours("chunked"), LOOP: _token_loop, REFERENCE: _ours("reference")}
    if cpu.available():
        found[OURS] = _ours("cpu")
    if find_spec("mambapy"):
        found[MAMBAPY] = _mambapy
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan  # noqa: F401

        found[TRANSFORMERS] = _transformers
    except ImportError:  # an older or newer transformers calls it otherwise
        pass
    return {name: found[name] for name in PROMISED if name in found}


def forward(name: str, shape: Shape) -> Callable[[], object]:
    scan, arguments = scans()[name], inputs(shape)

    def run() -> object:
        with torch.no_grad():
            return scan(*arguments)

    return run


def both(name: str, shape: Shape) -> Callable[[], object]:
    """Forward and backward: gradients to every argument."""
    scan = scans()[name]
    arguments = tuple(a.requires_grad_() for a in inputs(shape))
    dy = torch.randn(shape.batch, shape.length, shape.d_inner, generator=torch.Generator().manual_seed(1))

    def run() -> object:
        return torch.autograd.grad(scan(*arguments), arguments, dy)

    return run


def both_warm(name: str, shape: Shape) -> Callable[[], object]:
    """`both`, after a small call that loads what is loaded once."""
    both(name, Shape(1, 4, 8, shape.d_state))()
    return both(name, shape)


def expected(name: str, shape: Shape, backward: bool) -> float:
    """Seconds of one call, roughly, on two cores with AVX2."""
    r = RATES[name]
    once = (r.both if backward else r.forward) * shape.elements + r.token * shape.length * (3 if backward else 1)
    return once + (r.square * shape.elements * shape.length if backward else 0.0)


def exponentials(shape: Shape) -> Callable[[], object]:
    """Only the kernel's own exponentials, one an element, their argument and result in cache: what no scan can be faster than."""
    from ssmlens.ops import cpu

    _, dt, A, *_ = inputs(shape)
    return lambda: cpu.exponentials(dt, A)


def torch_exp(shape: Shape) -> Callable[[], object]:
    """One torch.exp over as many numbers, into memory that is there already."""
    values = torch.empty(shape.elements).uniform_(-1, 0, generator=torch.Generator().manual_seed(0))
    into = torch.empty_like(values)
    return lambda: torch.exp(values, out=into)
