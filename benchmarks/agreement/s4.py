"""Our S4D and S4 against the authors' code, on random weights and, with --checkpoint, on trained ones.

    python benchmarks/agreement/s4.py CHECKOUT [--checkpoint FILE ...]

CHECKOUT: a checkout of github.com/state-spaces/s4 (needs einops). A checkpoint is one of its example.py. Prints, for each layer, the
largest difference of the outputs over the largest output, in float32 and float64.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import nn

from ssmlens import mixers


def theirs(checkout: Path, name: str) -> types.ModuleType:
    """models/s4/<name>.py, with stand-ins for the two imports that have no part in the mathematics."""
    lightning = types.ModuleType("pytorch_lightning.utilities")
    lightning.rank_zero_only = lambda f: f
    blocks = types.ModuleType("src.models.nn")
    blocks.DropoutNd = nn.Dropout
    for module in (lightning, blocks):
        parts = module.__name__.split(".")
        for i in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        sys.modules[module.__name__] = module
    spec = importlib.util.spec_from_file_location(f"theirs_{name}", checkout / "models" / "s4" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_ours(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' S4D layer → ours."""
    renamed = {k.replace("output_linear.0", "output_linear"): v for k, v in state.items()}
    renamed["output_linear.weight"] = renamed["output_linear.weight"].squeeze(-1)
    return renamed


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def compare(label: str, ours: nn.Module, run_theirs, x: torch.Tensor) -> None:
    with torch.no_grad():
        want64, want32 = run_theirs(x.double()), run_theirs(x)
        got32 = ours.float()(x)[0]
        got64 = ours.double()(x.double())[0]
    print(f"{label:44s} float32 {error(got32, want32):.1e}   float64 {error(got64, want64):.1e}   "
          f"(theirs, float32 against float64: {error(want32, want64):.1e}; ours: {error(got32, want64):.1e})")  # fmt: skip


def s4d(module: types.ModuleType, d_model: int, state: dict[str, torch.Tensor] | None, label: str, length: int) -> None:
    layer = module.S4D(d_model)
    if state is not None:
        layer.load_state_dict(state)
    ours = mixers.build("s4d", d_model)
    ours.load_state_dict(as_ours(layer.state_dict()))
    x = torch.randn(2, length, d_model)
    compare(label, ours, lambda x: layer.to(x.dtype)(x.mT)[0].mT, x)


def s4(module: types.ModuleType, d_model: int, length: int) -> None:
    """Their kernel by Cauchy products and Woodbury's identity, convolved by FFT; then the layer's end, which is S4D's."""
    ours = mixers.build("s4", d_model)
    for p in ours.kernel.parameters():
        p.data += 0.1 * torch.randn_like(p)
    k = ours.kernel

    def run(x: torch.Tensor) -> torch.Tensor:
        kernel = module.SSMKernelDPLR(d_model=d_model, d_state=2 * k.modes, l_max=length, backend="naive")
        kernel = kernel.to(x.dtype)
        conjugate = torch.tensor([1.0, -1.0]).to(x.dtype)  # they keep the other one of each pair
        kernel.inv_dt.data = k.log_dt.data[:, None].to(x.dtype)
        kernel.A_real.data, kernel.A_imag.data = k.log_A_real.data.to(x.dtype), k.A_imag.data.to(x.dtype)
        for name in ("P", "B", "C"):
            getattr(kernel, name).data = (getattr(k, name).data.to(x.dtype) * conjugate)[None].clone()
        K = kernel(L=length)[0][0].to(x.dtype)
        s = torch.fft.irfft(torch.fft.rfft(x.mT, n=2 * length) * torch.fft.rfft(K, n=2 * length), n=2 * length)
        s = s[..., :length].mT + ours.D.to(x.dtype) * x
        z = nn.functional.gelu(s) @ ours.output_linear.weight.to(x.dtype).T + ours.output_linear.bias.to(x.dtype)
        return nn.functional.glu(z, -1)

    compare(f"S4, length {length}", ours, run, torch.randn(2, length, d_model))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    minimal, complete = theirs(arguments.checkout, "s4d"), theirs(arguments.checkout, "s4")
    for length in (64, 1024):
        s4d(minimal, 32, None, f"S4D, length {length}", length)
        s4(complete, 16, length)
    for path in arguments.checkpoint:
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("s4_layers.")})
        for i in layers:
            prefix = f"s4_layers.{i}."
            state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            s4d(minimal, len(state["D"]), state, f"{path.stem[:28]}, layer {i}", 1024)


if __name__ == "__main__":
    main()
