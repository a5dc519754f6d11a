"""Our RWKV-5 and RWKV-6 layers against flash-linear-attention's `naive_recurrent_rwkv6`, with everything around it written out here,
and, where the authors' package is installed (`pip install rwkv`), against their whole layers (att_seq_v5_2, att_seq_v6_0).

    python benchmarks/agreement/rwkv.py CHECKOUT     (a checkout of github.com/fla-org/flash-linear-attention)
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch
from common import load, report, shown
from torch import Tensor
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization

LENGTH, D_MODEL = 200, 64


def projections(m: torch.nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """r, k, v, g and log a, each (batch, length, width), by the published formulas."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    linear = [m.r_proj, m.k_proj, m.v_proj, m.g_proj]
    if hasattr(m, "mix_up"):
        code = torch.tanh((x + (before - x) * m.mix["x"]) @ m.mix_down).unflatten(-1, (5, -1))
        moved = {n: x + (before - x) * (m.mix[n] + code[:, :, j] @ m.mix_up[j]) for j, n in enumerate("wkvrg")}
        w = m.decay.flatten() + torch.tanh(moved["w"] @ m.decay_down) @ m.decay_up
    else:
        moved = {n: x * m.mix[n] + before * (1 - m.mix[n]) for n in "rkvg"}
        w = m.decay.flatten().expand(*x.shape[:2], -1)
    return [moved[n] @ p.weight.T for n, p in zip("rkvg", linear, strict=True)], -torch.exp(w)


def against_fla(checkout: Path, name: str, m: torch.nn.Module, x: Tensor, kind: str) -> None:
    naive = load(checkout, "fla/ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    (r, k, v, g), log_a = projections(m, x)
    r, k, v, log_a = (z.unflatten(-1, (m.n_heads, -1)).transpose(1, 2) for z in (r, k, v, log_a))
    if m.polarization:
        log_a = F.pad(F.pad(log_a, (1, 0), value=0.0), (0, 1), value=-torch.inf)
    o, h = naive(r, k, v, log_a, m.bonus, scale=1.0, output_final_state=True)
    o = o.transpose(1, 2).flatten(2).flatten(0, 1)
    o = F.group_norm(o, m.n_heads, m.norm_weight.flatten(), m.norm_bias.flatten(), eps=64e-5).view_as(g)
    y, state = m(x)
    report(f"{name}, {kind}, naive_recurrent_rwkv6, layer output", y, (o * F.silu(g)) @ m.out_proj.weight.T)
    report(f"{name}, {kind}, naive_recurrent_rwkv6, final state", state.h, h)


def against_the_authors(name: str, m: torch.nn.Module, x: Tensor) -> None:
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    n = m.n_heads
    heads = (n, -1, 1)
    common = [m.norm_weight.flatten(), m.norm_bias.flatten()]
    weights = [p.weight.T for p in (m.k_proj, m.v_proj, m.r_proj, m.g_proj, m.out_proj)]
    nothing = [None] * 20  # scales of quantised weights
    if name == "RWKV-5":
        a = torch.exp(-torch.exp(m.decay)).reshape(heads)
        special = [*(m.mix[i] for i in "kvrg"), a, m.bonus.reshape(heads)]
        layer = RWKV.att_seq_v5_2
    else:
        special = [
            *(m.mix[i] for i in "xwkvrg"), m.mix_down, m.mix_up, m.decay_down, m.decay_up, m.decay.reshape(heads),
            m.bonus.reshape(heads),
        ]  # fmt: skip
        layer = RWKV.att_seq_v6_0
    for i in range(len(x)):
        # they normalise the input and add the residual; so give them no weight there, and ours the normalised input
        z = F.layer_norm(x[i], (D_MODEL,))
        start = torch.zeros(D_MODEL), torch.zeros(n, m.d_key, m.d_head)
        y, last, s = layer(
            None, x[i], *start, torch.ones(D_MODEL), torch.zeros(D_MODEL), *common, *special, *weights, *nothing
        )
        ours, state = m(z[None])
        report(f"{name}, the authors' package, sequence {i}, layer output", ours[0], y - x[i])
        report(f"{name}, the authors' package, sequence {i}, final state", state.h[0], s)
        report(f"{name}, the authors' package, sequence {i}, last token", state.shift[0], last)


def package_installed() -> bool:
    """This script has the package's name: out of the way with the folder it is in."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]
    return importlib.util.find_spec("rwkv") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    args = parser.parse_args()
    x = torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("RWKV-5", "RWKV-6"):
            place = {"d_head": 16, "layer": 1, "n_layers": 4}
            for polarization in (None, Polarization()):
                m = shown(mixers.build(name.lower().replace("-", ""), D_MODEL, polarization=polarization, **place))
                against_fla(args.checkout, name, m, x, "polarized" if polarization else "plain")
            if package_installed():
                m = shown(mixers.build(name.lower().replace("-", ""), D_MODEL, **place))
                against_the_authors(name, m, x)
            else:
                print(f"{name}: the authors' package is not installed (pip install rwkv)")


if __name__ == "__main__":
    main()
