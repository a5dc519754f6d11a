"""Our HGRN2 layer against flash-linear-attention's `naive_recurrent_gla`, which its HGRN2 layer runs on, with everything around it
written out here: the gate with the authors' tied lower bounds, 1 - f as the key.

    python benchmarks/agreement/hgrn2.py CHECKOUT     (a checkout of github.com/fla-org/flash-linear-attention)
"""

import argparse
from pathlib import Path

import torch
from common import load, report, shown
from torch.nn import functional as F

from ssmlens import mixers
from ssmlens.polarization import Polarization

LAYERS, LENGTH, D_MODEL = 4, 300, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    naive = load(parser.parse_args().checkout, "fla/ops/gla/naive.py").naive_recurrent_gla
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, LENGTH, D_MODEL, generator=generator)
    bounds = torch.randn(LAYERS, D_MODEL, generator=generator).softmax(0)
    bounds = bounds.cumsum(0) - bounds[0]
    for layer in range(LAYERS):
        for polarization in (None, Polarization()):
            m = shown(
                mixers.build("hgrn2", D_MODEL, d_head=16, layer=layer, n_layers=LAYERS, polarization=polarization)
            )
            n = m.n_heads
            beta = bounds[layer].view(n, -1)
            if layer:
                m.set_lower_bound(beta)
            q, f, v = ((x @ p.weight.T).view(2, LENGTH, n, -1) for p in (m.q_proj, m.f_proj, m.v_proj))
            own = f[..., 1:-1] if polarization else f
            forget = beta + (1 - beta) * torch.sigmoid(own)
            k, gk = 1 - forget, forget.log()
            if polarization:  # a one in front, a zero behind; their input weight is what it would be without the pin
                k = torch.cat([1 - f[..., :1].sigmoid(), k, 1 - f[..., -1:].sigmoid()], -1)
                gk = F.pad(F.pad(gk, (1, 0), value=0.0), (0, 1), value=-torch.inf)
            o, h = naive(
                F.silu(q) * q.shape[-1] ** 0.5, k, v, gk, output_final_state=True
            )  # they scale q, HGRN2 does not
            o = o.flatten(2)
            want = (o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm_weight) @ m.out_proj.weight.T
            y, state = m(x)
            kind = f"layer {layer}, {'polarized' if polarization else 'plain'}"
            report(f"HGRN2, {kind}, layer output", y, want)
            report(f"HGRN2, {kind}, final state", state.h, h)


if __name__ == "__main__":
    main()
