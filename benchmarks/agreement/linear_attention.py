"""Our linear attention against flash-linear-attention's `naive_recurrent_linear_attn` (needs einops), with everything around it
written out here: 1 + ELU, Hedgehog's and Performer's features, with and without the normaliser, to whose sum they add 10^-10 (our default, the authors', is 10^-6).

    python benchmarks/agreement/linear_attention.py CHECKOUT     (a checkout of github.com/fla-org/flash-linear-attention)
"""

import argparse
from pathlib import Path

import torch
from common import load, report, shown
from torch import Tensor
from torch.nn import functional as F

from ssmlens import mixers


def features(kind: str, z: Tensor, m: torch.nn.Module, which: str) -> Tensor:
    if kind == "elu":
        return F.elu(z) + 1
    if kind == "hedgehog":
        z = torch.einsum("blhd,hmd->blhm", z, getattr(m, f"{which}_map"))
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)
    z = z / z.shape[-1] ** 0.25
    w = m.projection
    return (torch.exp(z @ w.T - z.pow(2).sum(-1, keepdim=True) / 2) + 1e-4) / len(w) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    naive = load(parser.parse_args().checkout, "fla/ops/linear_attn/naive.py").naive_recurrent_linear_attn
    x = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(1))
    for kind in ("elu", "hedgehog", "performer"):
        for normalize in (True, False):
            m = shown(mixers.build("linear_attention", 64, feature_map=kind, normalize=normalize, eps=1e-10))
            q, k, v = (F.linear(x, p.weight, p.bias).view(2, 300, 4, -1) for p in (m.q_proj, m.k_proj, m.v_proj))
            o, _ = naive(features(kind, q, m, "q"), features(kind, k, m, "k"), v, scale=1.0, normalize=normalize)
            y, _ = m(x)
            report(f"linear attention, {kind}, normalize={normalize}", y, m.out_proj(o.flatten(2)))


if __name__ == "__main__":
    main()
