"""What the CPU scan needs beside its inputs and outputs: never (batch, length, d_inner, d_state) numbers; and linear attention. Peaks of resident
memory, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import needs_compiler

linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which this system has not"
)
pytestmark = [needs_compiler, linux]

PROGRAM = """
import re, sys
import torch
from ssmlens.ops import cpu

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors) / 1024

batch, length, d, n = map(int, sys.argv[1:5])
half, with_complex = "half" in sys.argv[5:], "complex" in sys.argv[5:]
torch.set_num_threads(2)
small = torch.bfloat16 if half else torch.float32

def inputs(batch, length):
    make = torch.Generator().manual_seed(0)
    x, dt = (torch.rand(batch, length, d, generator=make).to(small) for _ in range(2))
    B, C = (torch.rand(batch, length, n, generator=make).to(small) for _ in range(2))
    A = -torch.rand(d, n, generator=make)
    A = torch.complex(A, A) if with_complex else A
    return [t.requires_grad_() for t in (x, dt, A, B, C)], torch.ones_like(x)

def heads(batch, length):
    shape = (batch, length, d // n, n)
    leaves = [torch.rand(shape).to(small) for _ in range(3)] + [-torch.rand(shape)]
    return [t.requires_grad_() for t in leaves], torch.ones(shape, dtype=small)

run = cpu.gated_linear_attention if "attention" in sys.argv[5:] else cpu.selective_scan
inputs = heads if "attention" in sys.argv[5:] else inputs
leaves, dy = inputs(1, 40)
run(*leaves)[0].backward(dy)  # what is loaded once
leaves, dy = inputs(batch, length)
before = kilobytes("VmRSS")
y, h = run(*leaves)
gradients = torch.autograd.grad(y, leaves, dy)
print(kilobytes("VmHWM") - before, size(*leaves), size(y, h, *gradients))
assert all(g.isfinite().all() for g in gradients)
"""


def measure(*arguments: object) -> tuple[float, float]:
    """Peak memory of forward and backward beyond inputs and outputs, and the size of the inputs; in bytes / 1024."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peak, inputs, outputs = map(float, done.stdout.split())
    return peak - outputs, inputs


@pytest.mark.parametrize(
    ("d_state", "bound", "options"),
    [(16, 2.0, ()), (256, 4.0, ()), (16, 2.0, ("half", "complex")), (256, 4.0, ("half", "complex"))],
)
def test_backward_needs_little_more_than_its_inputs(d_state: int, bound: float, options: tuple[str, ...]) -> None:
    extra, inputs = measure(2, 2048, 256, d_state, *options)
    # each thread has some scratch memory of its own
    assert extra < bound * inputs + 2048, f"{extra / inputs:.2f} times the inputs"


@pytest.mark.parametrize(("batch", "length"), [(2, 16_384), (1, 32_768)])
@pytest.mark.parametrize("options", [(), ("half",)])
def test_attention_keeps_a_state_for_each_chunk(batch: int, length: int, options: tuple[str, ...]) -> None:
    """d_key = d_value = 32: half of q. Both ways of sharing the work among threads."""
    extra, inputs = measure(batch, length, 32 * (3 if batch == 2 else 1), 32, "attention", *options)
    assert extra < 0.5 * inputs + 4096, f"{extra / inputs:.2f} times the inputs"


def test_a_million_tokens() -> None:
    extra, inputs = measure(1, 1_000_000, 16, 4)
    assert extra < 2 * inputs
