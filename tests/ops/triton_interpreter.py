"""Where the tests of the Triton kernels run: on a GPU where there is one, else on the CPU under Triton's interpreter.

The interpreter has to be asked for before Triton is imported, which another test may have done, so a module of such tests
runs itself again, in a process of its own: `here_or_in_a_child(globals())` at its end keeps its tests or replaces them by one.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import close, doubled

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def here_or_in_a_child(module: dict[str, Any]) -> None:
    if DEVICE == "cuda" or INTERPRETED:
        return
    path = Path(module["__file__"])
    for name in [n for n in module if n.startswith("test_")]:
        del module[name]

    @needs_triton
    def test_under_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = path.parents[2]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
        assert " passed" in done.stdout

    module["test_under_the_interpreter"] = test_under_the_interpreter


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that a kernel was to fill holds NaN until it does."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def on_device(kw: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the device under test, fresh leaves."""
    out = {}
    for name, p in kw.items():
        if isinstance(p, torch.Tensor):
            p = p.detach().to(DEVICE).requires_grad_(p.requires_grad)
        out[name] = p
    return out


def agree(function: Any, reference: Any, kw: dict[str, Any], dtype: torch.dtype, slack: float = 1.0) -> None:
    """Outputs, final state and all gradients (through both) against the float64 reference."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    slack = slack * (5 if narrow else 1)  # inputs are rounded; outputs and gradients too
    own, exact = on_device(kw), doubled(kw)
    got, want = function(**own), reference(**exact)
    close(got[0].cpu(), want[0], dtype, "y", slack)
    close(got[1].cpu(), want[1], dtype, "final state", slack)
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32 if narrow else dtype)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in want]
    names = [n for n, p in kw.items() if isinstance(p, torch.Tensor) and p.requires_grad]
    rounded = [w.to(o.dtype) for w, o in zip(weights, got, strict=True)]
    expected = torch.autograd.grad(want, [exact[n] for n in names], [w.double() for w in rounded])
    computed = torch.autograd.grad(got, [own[n] for n in names], [w.to(DEVICE) for w in rounded])
    for name, actual, wanted in zip(names, computed, expected, strict=True):
        assert actual.dtype == kw[name].dtype, name
        close(actual.cpu(), wanted, dtype, f"gradient of {name}", 10 * slack)
