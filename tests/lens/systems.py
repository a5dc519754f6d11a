"""Systems whose influence is known in closed form, to be measured like any model."""

import torch
from torch import nn

from ssmlens.lens.subject import Access


class Recurrence(nn.Module):
    """h_t = a h_{t-1} + x_t, y_t = C h_t, as a plain loop: ∂y_t/∂x_s = C diag(a)^{t-s}."""

    def __init__(self, a, C, vocab_size=16, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.as_tensor(a))
        self.C = nn.Parameter(torch.as_tensor(C, dtype=self.a.dtype))
        self.table = nn.Parameter(torch.randn(vocab_size, len(self.a), generator=generator).to(self.a.dtype))
        self.dropout = nn.Dropout(0.5)  # must be off while measured

    def forward(self, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.a * h + x[:, t]
            out.append(h @ self.C.T)
        return self.dropout(torch.stack(out, 1))


class Gated(nn.Module):
    """h_t = a(x_t) h_{t-1} + x_t with a data-dependent transition: every sequence has influences of its own."""

    def __init__(self, d=6, vocab_size=32, seed=0, offset=2.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocab_size, d, generator=generator))
        self.W = nn.Parameter(torch.randn(d, d, generator=generator))
        self.C = nn.Parameter(torch.randn(d, d, generator=generator))
        self.offset = offset

    def forward(self, x):
        a = torch.sigmoid(x @ self.W + self.offset)
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            out.append(torch.tanh(h @ self.C))
        return torch.stack(out, 1)


ACCESS = Access(
    embed=lambda model, tokens: model.table[tokens],
    run=lambda model, x: model(x),
    head=lambda model, hidden: hidden @ model.table.T,
)
