"""Our GLA layer against flash-linear-attention's `naive_recurrent_gla`, with everything around it written out here.

python benchmarks/agreement/gla.py CHECKOUT     (a checkout of github.com/fla-org/flash-linear-attention)
"""

import argparse
from pathlib import Path

import torch
from common import load, report, shown
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    naive = load(parser.parse_args().checkout, "fla/ops/gla/naive.py").naive_recurrent_gla
    x = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(1))
    for polarization in (None, Polarization()):
        m = shown(mixers.build("gla", 64, polarization=polarization))
        n = m.n_heads
        q, k, v, g = (x @ p.weight.T for p in (m.q_proj, m.k_proj, m.v_proj, m.g_proj))
        q, k, v, g = (z.view(2, 300, n, -1) for z in (q, k, v, g))
        gk = F.logsigmoid(x @ m.gate_down.weight.T @ m.gate_up.weight.T + m.gate_up.bias).view(2, 300, n, -1) / 16
        if polarization:
            gk = F.pad(F.pad(gk, (1, 0), value=0.0), (0, 1), value=-torch.inf)
        q = q * (q.shape[-1] / m.units) ** 0.5  # they scale by all key dimensions, we by those without the pinned ones
        o, h = naive(q, k, v, gk, output_final_state=True)
        o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm_weight
        want = (o * F.silu(g)).flatten(2) @ m.out_proj.weight.T
        y, state = m(x)
        kind = "polarized" if polarization else "plain"
        report(f"GLA, {kind}, layer output", y, want)
        report(f"GLA, {kind}, final state", state.h, h)


if __name__ == "__main__":
    main()
