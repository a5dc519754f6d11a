"""A backbone of every mixer there is, one after the other: what each does alone they do together."""

import pytest
import torch
from cases import close

from ssmlens import mixers
from ssmlens.models import LanguageModel, LanguageModelConfig

SMALL = {
    "attention": {"n_heads": 2, "window": 5},
    "gla": {"d_key": 4},
    "hgrn2": {"d_head": 8},
    "mamba2": {"d_head": 8, "d_state": 6},
    "retnet": {"n_heads": 4},
    "rwkv5": {"d_head": 8},
    "rwkv6": {"d_head": 8},
}
POLARIZATIONS = {"none": None, "append": {"ones": 1, "zeros": 1}, "replace": {"ones": 1, "zeros": 1, "mode": "replace"}}


@pytest.fixture(scope="module", params=POLARIZATIONS)
def backbone(request):
    torch.manual_seed(0)
    names = mixers.names()
    config = LanguageModelConfig(
        vocab_size=11, d_model=16, n_layers=len(names), mixer=names, mixer_config=SMALL, polarization=POLARIZATIONS[request.param],
    )  # fmt: skip
    model = LanguageModel(config).double()
    for p in model.parameters():  # some authors begin with a zero output projection, which would hide all before it
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    for block in model.backbone.blocks:
        pinned = block.mixer.polarization
        assert (pinned is not None) == (request.param != "none" and block.mixer.polarizable)
    return model.backbone


def inputs(length=14):
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("cut", [1, 6])
def test_prefill_then_step(backbone, cut):
    x = inputs()
    want, _, _ = backbone(x)
    y, states, _ = backbone(x[:, :cut])
    ys = [y]
    for t in range(cut, x.shape[1]):
        y, states, _ = backbone(x[:, t : t + 1], states)
        ys.append(y)
    close(torch.cat(ys, 1), want, torch.float32)


def test_left_padding(backbone):
    x = inputs()
    padded = torch.cat([torch.full_like(x[:, :4], 7.0), x], 1)
    y, states, _ = backbone(padded, mask=(torch.arange(18) >= 4).expand(2, -1))
    want, last, _ = backbone(x)
    close(y[:, 4:], want, torch.float32)
    more = inputs(3)
    close(backbone(more, states)[0], backbone(more, last)[0], torch.float32)


def test_packed_sequences(backbone):
    x = inputs()
    reset = torch.zeros(2, 14, dtype=torch.bool)
    reset[0, 5], reset[1, 9] = True, True
    y, _, _ = backbone(x, reset=reset)
    for row, cut in ((0, 5), (1, 9)):
        alone = [backbone(part)[0] for part in (x[row : row + 1, :cut], x[row : row + 1, cut:])]
        close(y[row : row + 1], torch.cat(alone, 1), torch.float32)


def test_learns(backbone):
    """Every parameter of every layer is reached, and finite."""
    backbone.zero_grad()
    y, _, _ = backbone(inputs())
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)).sum().backward()
    for name, p in backbone.named_parameters():
        if name != "embedding.weight":
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all(), name
            assert p.grad.any(), name
