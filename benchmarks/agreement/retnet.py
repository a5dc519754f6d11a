"""Our RetNet layer against flash-linear-attention's `naive_retention`, with everything around it written out here, and against the
authors' whole layer (torchscale's MultiScaleRetention), parallel and token by token.

    python benchmarks/agreement/retnet.py CHECKOUT [--torchscale CHECKOUT]
    (checkouts of github.com/fla-org/flash-linear-attention and github.com/microsoft/torchscale)

The authors also divide by sums of weights before their norm, so the two differ by as much as its eps (10^-6) matters.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from common import load, report, shown
from torch import Tensor
from torch.nn import functional as F

from ssmlens import mixers

LENGTH, D_MODEL, HEADS = 300, 64, 4


def turned(x: Tensor, theta: Tensor) -> Tensor:
    """Rotary positions by complex numbers; x: (batch, length, heads, d_key)."""
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1])[:, None].double() * theta)
    return torch.view_as_real(z * turn[:, None]).flatten(-2).to(x.dtype)


def against_fla(checkout: Path, m: torch.nn.Module, x: Tensor) -> None:
    naive = load(checkout, "fla/ops/retention/naive.py").naive_retention
    theta = 10000 ** -torch.linspace(0, 1, m.d_key // 2, dtype=torch.float64)
    q, k, v, g = ((x @ p.weight.T).view(2, LENGTH, HEADS, -1) for p in (m.q_proj, m.k_proj, m.v_proj, m.g_proj))
    o = naive(turned(q, theta).transpose(1, 2), turned(k, theta).transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    o = o / (o.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    report("RetNet, naive_retention, layer output", m(x)[0], (o * F.silu(g)).flatten(2) @ m.out_proj.weight.T)


def against_the_authors(checkout: Path, m: torch.nn.Module, x: Tensor) -> None:
    sys.path.insert(0, str(checkout))
    from torchscale.component.multiscale_retention import MultiScaleRetention

    eps = m.config.norm_eps
    theirs = MultiScaleRetention(SimpleNamespace(multiway=False, layernorm_eps=eps), D_MODEL, 2 * D_MODEL, HEADS)
    theirs.load_state_dict(m.state_dict())
    angle = (10000 ** -torch.linspace(0, 1, m.d_key // 2)).repeat_interleave(2)
    at = torch.arange(LENGTH)
    sin, cos = torch.sin(at[:, None] * angle), torch.cos(at[:, None] * angle)
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS))
    decays = torch.where(at[:, None] >= at, gamma[:, None, None] ** (at[:, None] - at).clamp_min(0), 0)
    decays = decays / decays.sum(-1, keepdim=True).sqrt()
    want = theirs(x, ((sin, cos), decays))
    report(f"RetNet, torchscale, parallel, eps {eps:g}", m(x)[0], want)
    state: dict = {}
    steps = [theirs(x[:, t : t + 1], ((sin[t], cos[t]), gamma), incremental_state=state) for t in range(LENGTH)]
    report(f"RetNet, torchscale, token by token, eps {eps:g}", m(x)[0], torch.cat(steps, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--torchscale", type=Path)
    args = parser.parse_args()
    x = torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))
    m = shown(mixers.build("retnet", D_MODEL, n_heads=HEADS))
    with torch.no_grad():
        against_fla(args.checkout, m, x)
        if args.torchscale:
            for eps in (m.config.norm_eps, 1e-12):
                again = mixers.build("retnet", D_MODEL, n_heads=HEADS, norm_eps=eps)
                again.load_state_dict(m.state_dict())
                against_the_authors(args.torchscale, again, x)


if __name__ == "__main__":
    main()
