"""Loss with a cut context, against models whose use of context is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssmlens.errors import UserError
from ssmlens.lens import context
from ssmlens.lens.subject import Access, Subject

from .models import model, tokens


class Copier(nn.Module):
    """Predicts the token `back` positions ago, with a margin of `margin` nats; where there is none it predicts nothing in particular."""

    def __init__(self, back, vocab=8, margin=5.0):
        super().__init__()
        self.back, self.margin, self.vocab = back, margin, vocab

    def forward(self, x):
        return self.margin * F.pad(x, (0, 0, self.back, 0))[:, : x.shape[1]]


ACCESS = Access(embed=lambda m, t: F.one_hot(t, m.vocab).float(), run=lambda m, x: m(x), head=lambda m, hidden: hidden)


def periodic(n, length, period, vocab=8):
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([np.resize(rng.integers(0, vocab, period), length) for _ in range(n)]))


def test_a_model_that_looks_back_needs_that_much_context():
    """The next token is the one `back` positions ago: with back + 1 tokens the loss is log₂(1 + 7e⁻⁵), with fewer log₂ 8."""
    found = context.measure(Subject("copier", Copier(back=4), ACCESS), periodic(3, 100, 5), positions=10)
    assert found.full_loss().value == pytest.approx(math.log2(1 + 7 * math.exp(-5)), rel=1e-4)
    for width in (1, 2, 4):
        assert found.at(width).value == pytest.approx(3)
        assert found.cost(width).value == pytest.approx(3 - found.full_loss().value, rel=1e-5)
    for width in (8, 16, 32):
        assert found.cost(width).value == pytest.approx(0, abs=1e-6)
    assert found.widths.tolist() == [1, 2, 4, 8, 16, 32]
    np.testing.assert_allclose(found.by_position[:, :4], 3, rtol=1e-5)
    np.testing.assert_allclose(found.by_position[:, 4:], found.full_loss().value, rtol=1e-4)


@pytest.mark.parametrize("length", [8, 9, 31, 64, 100, 129])
def test_loss_by_position_without_the_distant_context(length):
    """Where the model looks back 2 tokens nothing is lost that `distant` tokens keep; where it looks back as far as that, everything."""
    near, far = (
        context.measure(Subject("copier", Copier(back), ACCESS), periodic(2, length, back + 1), positions=3)
        for back in (2, max(3, length // 8))
    )
    assert np.isfinite(near.cut).all()
    if near.distant >= 8:
        np.testing.assert_allclose(near.cut, near.by_position, rtol=1e-5)
    np.testing.assert_allclose(far.cut[:, far.distant :], 3, rtol=1e-5)
    np.testing.assert_allclose(far.cut[:, : far.distant // 2], far.by_position[:, : far.distant // 2], rtol=1e-5)


def test_loss_of_a_language_model_is_what_it_would_report():
    m, x = model(), tokens(2, 40)
    found = context.measure(m, x, positions=5)
    with torch.no_grad():
        loss = m(input_ids=x, labels=x).loss
    assert found.by_position.mean() * math.log(2) == pytest.approx(float(loss), rel=1e-5)
    at = np.random.default_rng(0).choice(np.arange(20, 39), 5, replace=False)  # how measure draws its first sequence
    with torch.no_grad():
        by_hand = [F.cross_entropy(m(input_ids=x[:1, t - 7 : t + 1]).logits[0, -1], x[0, t + 1]) for t in at]
    assert found.loss[0, 3] * math.log(2) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-4)


def test_figures_and_table():
    found = context.measure(Subject("copier", Copier(back=4), ACCESS), periodic(3, 100, 5), positions=10)
    kept, positions = found.figures()
    assert kept.series[0].x == [1, 2, 4, 8, 16, 32]
    assert positions.series[0].x[0] == 1
    assert positions.series[0].x[-1] <= 99
    assert positions.series[0].y[0] == pytest.approx(3)
    row = found.table_rows()[0]
    assert row[0] == "copier"
    assert row[2].value == pytest.approx(found.cost(1).value)
    alone = context.measure(Subject("copier", Copier(back=4), ACCESS), periodic(1, 100, 5), positions=10)
    assert alone.cost(1).stderr is None
    with pytest.raises(UserError, match="1, 2, 4, 8, 16, 32"):
        found.at(3)


@pytest.mark.parametrize("length", [9, 10, 64, 511, 1023, 8191])
def test_bins_cover_every_position_once(length):
    edges = context._bins(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(a < b for a, b in pairwise(edges))
    assert max(b / max(a, 1) for a, b in pairwise(edges)) <= 2.1


def test_what_cannot_be_asked():
    with pytest.raises(UserError, match="no head"):
        context.measure(Subject("s", Copier(1), Access(ACCESS.embed, ACCESS.run)), periodic(1, 20, 3))
    with pytest.raises(UserError, match="position"):
        context.measure(Subject("s", Copier(1), ACCESS), periodic(1, 20, 3), positions=0)


def test_large_models_are_asked_at_fewer_positions(monkeypatch):
    m, x = model(), tokens(2, 256)
    assert context.measure(m, x).positions == 64
    monkeypatch.setattr(context, "_BUDGET", 10)
    found = context.measure(m, x)
    assert found.positions == 8
    assert found.widths.max() == 64


def test_short_windows_of_a_mamba2_hybrid_are_not_padded_to_its_chunk(monkeypatch):
    """The loss is the same, the model as it was, and no window was read in chunks longer than itself."""
    import contextlib

    import transformers

    torch.manual_seed(0)
    hybrid = transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            mamba_n_heads=2, mamba_d_head=8, mamba_d_ssm=16, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=64,
        )
    ).eval()  # fmt: skip
    layer = next(m for m in hybrid.modules() if hasattr(m, "A_log"))
    seen = []
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(m.chunk_size), with_kwargs=True)
    inputs = torch.randint(20, (2, 40))
    found = context.measure(hybrid, inputs, positions=3)
    assert (set(seen), layer.chunk_size) == ({64, 1, 2, 4, 8, 16}, 64)
    monkeypatch.setattr(context, "_chunks", lambda model, width: contextlib.nullcontext())
    whole = context.measure(hybrid, inputs, positions=3)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(found.cut, whole.cut, rtol=1e-5)
