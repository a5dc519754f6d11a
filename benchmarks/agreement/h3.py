"""Our H3 layer against the authors' (`src/models/ssm/h3.py`), on random weights: a whole sequence, and token by token.

python benchmarks/agreement/h3.py CHECKOUT     (a checkout of github.com/HazyResearch/H3; needs einops and opt_einsum)

Token by token with heads of 1 alone: their step fails with wider ones. What a wide head leaves they order by value first, head second,
so the columns of the last projection are another permutation.

They discretise the diagonal model by the zero-order hold, as ours, or by the bilinear rule, their default: that is our recurrence with
A = log ā / Δ, and C times the ratio of the two input weights.
"""

import argparse
import logging
import sys
import types
from pathlib import Path

import torch
from common import report, shown
from torch import Tensor, nn

from ssmlens import mixers

LENGTH, D_MODEL = 300, 32


def theirs(checkout: Path) -> type[nn.Module]:
    """The layer, with a stand-in for their logger, which would ask for PyTorch Lightning."""
    sys.path.insert(0, str(checkout))
    stand_in = types.ModuleType("src.utils.utils")
    stand_in.get_logger = logging.getLogger  # type: ignore[attr-defined]
    sys.modules[stand_in.__name__] = stand_in
    from src.models.ssm.h3 import H3  # type: ignore[import-not-found]

    return H3


def as_ours(layer: nn.Module, d_shift: int, d_head: int) -> dict[str, Tensor]:
    """Their weights → ours."""
    shift, diagonal = layer.ssm_k_kernel.kernel, layer.kernel.kernel
    n = 2 * d_shift
    filter_ = torch.fft.irfft(torch.fft.rfft(shift.B, n=n).conj() * torch.fft.rfft(shift.C[0], n=n), n=n)[:, :d_shift]
    filter_[:, 0] += layer.ssm_k_D
    dt = diagonal.log_dt.exp()[:, None]
    A = -diagonal.inv_A_real.exp() + 1j * diagonal.A_imag
    C = torch.view_as_complex(diagonal.C)[0] * torch.view_as_complex(diagonal.B)
    if diagonal.disc == "bilinear":
        half = dt * A / 2
        a = (1 + half) / (1 - half)
        A = torch.log(a) / dt
        C = C * dt / (1 - half) / ((a - 1) / A)
    state = {
        n: p
        for n, p in layer.state_dict().items()
        if n.split(".")[0] in ("q_proj", "k_proj", "v_proj", "output_linear", "D")
    }
    order = torch.arange(D_MODEL).view(d_head, -1).T.flatten()
    return state | {
        "output_linear.weight": layer.output_linear.weight[:, order],
        "shift": filter_.flip(-1), "kernel.log_dt": diagonal.log_dt, "kernel.log_A_real": (-A.real).log(), "kernel.A_imag": A.imag,
        "kernel.C": torch.view_as_real(C),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    H3 = theirs(parser.parse_args().checkout)
    x = torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for disc in ("zoh", "bilinear"):
            for d_head in (1, 8):
                torch.manual_seed(0)
                layer = H3(D_MODEL, d_state=64, head_dim=d_head, disc=disc)
                layer.ssm_k_kernel = shown(layer.ssm_k_kernel)
                for p in (layer.kernel.kernel.inv_A_real, layer.kernel.kernel.C):
                    p += 0.2 * torch.randn_like(p)
                ours = mixers.build("h3", D_MODEL, d_state=64, d_shift=64, d_head=d_head)
                ours.load_state_dict(as_ours(layer, 64, d_head))
                what = f"H3, {disc}, heads of {d_head}"
                want = layer(x)
                report(f"{what}, whole sequence", ours(x)[0], want)
                if d_head > 1:
                    continue
                layer.kernel._setup_step()
                past, state = (layer.ssm_k_kernel.default_state(2), layer.kernel.default_state(2)), None
                got, steps = [], []
                for t in range(100):
                    y, *past = layer.step(x[:, t : t + 1], *past)
                    steps.append(y)
                    y, state = ours.step(x[:, t], state)
                    got.append(y)
                report(f"{what}, token by token", torch.stack(got, 1), torch.cat(steps, 1))


if __name__ == "__main__":
    main()
