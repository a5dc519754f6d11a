"""RWKV-4's normalised linear attention, with its running maximum as a scan of its own.

    m_t = max(m_{t-1} - w, k_t)        p_t = e^{m_{t-1} - w - m_t} p_{t-1} + e^{k_t - m_t} v_t        s_t the same without v
    y_t = σ(r_t) (e^{m_{t-1} - n_t} p_{t-1} + e^{u + k_t - n_t} v_t) / (the same of s and 1),   n_t = max(m_{t-1}, u + k_t)

The maximum is bookkeeping of scale: whatever m is, p_t e^{m_t} and s_t e^{m_t} are the same, so no gradient goes through it, and it
can be found before anything else. r, k, v: (batch, length, d)   w, u: (d,)   state: (p, s, m), each (batch, d)
"""

import math

import torch
from torch import Tensor

from ssmlens.ops import _check, reference
from ssmlens.ops.chunked.scan import linear_scan


@torch.no_grad()
def running_maximum(k: Tensor, w: Tensor, m: Tensor, reset: Tensor | None) -> Tensor:
    """m_0 .. m_T, (batch, length + 1, d), of m_t = max(m_{t-1} - w, k_t), and no lower than `reference.lowest`; m: m_0.

    Two levels: inside blocks of √length tokens for all blocks at once, then what enters each block."""
    batch, length, d = k.shape
    low = reference.lowest(k.dtype)
    size = math.isqrt(length - 1) + 1
    blocks = -(-length // size)
    top = k.new_full((batch, blocks * size, d), -torch.inf)
    top[:, :length] = k
    top = top.view(batch, blocks, size, d)
    closed = torch.zeros(batch, blocks, size, 1, dtype=torch.bool, device=k.device)
    if reset is not None:
        closed.view(batch, -1)[:, :length] = reset
    for i in range(1, size):
        before = (top[:, :, i - 1] - w).masked_fill_(closed[:, :, i], -torch.inf)
        torch.maximum(top[:, :, i], before, out=top[:, :, i])
    closed = closed.cumsum(2) > 0  # a reset between the block's beginning and this token
    enters = [m]
    for j in range(blocks - 1):
        before = (enters[-1] - w * size).masked_fill_(closed[:, j, -1], -torch.inf)
        enters.append(torch.maximum(top[:, j, -1], before))
    steps = torch.arange(1, size + 1, dtype=k.dtype, device=k.device)[:, None]
    before = torch.stack(enters, 1)[:, :, None] - w * steps
    top = torch.maximum(top, before.masked_fill_(closed, -torch.inf)).clamp_min_(low)
    return torch.cat([m[:, None], top.view(batch, -1, d)[:, :length]], 1)


def rwkv4_attention(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
    state: tuple[Tensor, Tensor, Tensor] | None, reset: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """`ssmlens.ops.rwkv4_attention`. y has v's dtype; the state is float32, or float64 where v is."""
    given, dtype = v.dtype, _check.state_dtype(v)
    r, k, v, w, u = (p.to(dtype) for p in (r, k, v, w, u))
    low = reference.lowest(dtype)
    if state is None:
        zero = torch.zeros_like(v[:, 0])
        p, s, m = zero, zero, torch.full_like(zero, low)
    else:
        p, s, m = (x.to(dtype) for x in state)
    tops = running_maximum(k, w, m, reset)
    before, top = tops[:, :-1], tops[:, 1:]
    if reset is not None:
        before = before.masked_fill(reset[..., None], low)
    # the difference of two maxima first: it is exact where they are close, and so cannot add up to an error over many tokens
    a = torch.exp((before - top) - w)
    new = torch.exp(k - top)
    h0 = torch.stack([p, s], -1)
    h, last = linear_scan(a[..., None], torch.stack([new * v, new], -1), h0=h0, reset=reset)
    h_before = torch.cat([h0[:, None], h[:, :-1]], 1)
    if reset is not None:
        h_before = h_before.masked_fill(reset[:, :, None, None], 0)
    here = u + k
    both = torch.maximum(before, here.detach())
    old, new = torch.exp(before - both), torch.exp(here - both)
    y = reference.weighted_mean(old * h_before[..., 0] + new * v, old * h_before[..., 1] + new)
    return (torch.sigmoid(r) * y).to(given), (last[..., 0], last[..., 1], tops[:, -1])
