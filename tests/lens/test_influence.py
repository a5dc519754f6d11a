"""Influence against closed forms, exact against probes, probes against their own promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.lens import influence
from ssmlens.lens.subject import Access, Subject

from .models import model
from .systems import ACCESS, Gated, Recurrence


def tokens(n, length, vocab=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (n, length)))


def closed_form(a, C, length):
    powers = np.asarray(a, dtype=float)[None] ** np.arange(length)[:, None]
    return np.linalg.norm(np.asarray(C, dtype=float)[None] * powers[:, None], axis=(1, 2))


@settings(max_examples=15, deadline=None)
@given(
    a=st.lists(st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]), min_size=1, max_size=5),
    length=st.integers(8, 40),
    seed=st.integers(0, 99),
)
def test_exact_is_the_closed_form_product(a, length, seed):
    C = np.random.default_rng(seed).normal(size=(3, len(a)))
    model = Recurrence(torch.tensor(a, dtype=torch.float64), C)
    found = influence.measure(Subject("hand-made", model, ACCESS), tokens(2, length), method="exact", floor=0.0)
    np.testing.assert_allclose(found.score, closed_form(a, C, length), rtol=1e-10, atol=1e-300)


def test_decay_of_one_channel_is_its_half_life():
    model = Recurrence(torch.full((4,), 0.9), np.eye(4))
    found = influence.measure(Subject("a = 0.9", model, ACCESS), tokens(3, 60), probes=4)
    assert found.fit.kappa == pytest.approx(-math.log(0.9), rel=1e-5)
    assert found.half_life.value == pytest.approx(6.58, abs=0.01)
    assert found.fit.low <= -math.log(0.9) * (1 + 1e-6)
    assert found.effective_context.value == math.ceil(math.log(0.1) / (2 * math.log(0.9)))


def test_pinned_at_one_never_halves():
    found = influence.measure(Subject("a = 1", Recurrence(torch.ones(4), np.eye(4)), ACCESS), tokens(2, 50))
    assert found.half_life.value > 1e5
    assert found.share_within(0.1).value == pytest.approx(0.1)
    assert found.effective_context.value == 45


def test_probes_agree_with_exact_within_their_error():
    subject = Subject("gated", Gated(), ACCESS)
    x = tokens(1, 24, 32)
    exact = influence.measure(subject, x, method="exact", floor=0.0).squares[0]
    draws = np.stack([influence.measure(subject, x, probes=2, seed=s, floor=0.0).squares[0] for s in range(150)])
    error = draws.std(0, ddof=1) / math.sqrt(len(draws))
    z = (draws.mean(0) - exact) / error
    assert np.abs(z).max() < 4.5


def test_squares_are_averaged_and_not_roots():
    """y = (h, h): vᵀJ is ±2aᵈ or 0 with equal chance, so the root mean square is √2 aᵈ = ‖J‖_F, while the mean of roots is only aᵈ."""
    model = Recurrence(torch.tensor([0.9], dtype=torch.float64), np.ones((2, 1)))
    found = influence.measure(Subject("s", model, ACCESS), tokens(1, 12), probes=4000, floor=0.0)
    assert found.score[0] == pytest.approx(math.sqrt(2), rel=0.05)
    np.testing.assert_allclose(found.score / found.score[0], 0.9 ** np.arange(12))


def test_more_probes_bring_it_closer():
    subject = Subject("gated", Gated(), ACCESS)
    x = tokens(1, 16, 32)
    exact = influence.measure(subject, x, method="exact", floor=0.0).score

    def off(k):
        runs = [influence.measure(subject, x, probes=k, seed=s, floor=0.0).score / exact - 1 for s in range(30)]
        return np.sqrt(np.mean(np.square(runs)))

    assert off(32) < 0.5 * off(2)


def test_batch_size_and_further_sequences_change_nothing():
    subject = Subject("gated", Gated(), ACCESS)
    x = tokens(5, 12, 32)
    whole = influence.measure(subject, x, batch_size=5)
    np.testing.assert_allclose(influence.measure(subject, x, batch_size=2).squares, whole.squares, rtol=1e-5)
    np.testing.assert_allclose(influence.measure(subject, x[:3]).squares, whole.squares[:3], rtol=1e-5)
    assert not np.allclose(influence.measure(subject, x, seed=1).squares, whole.squares, rtol=1e-3)


def test_several_targets_share_their_distances():
    model = Recurrence(torch.tensor([0.8, 0.5], dtype=torch.float64), np.eye(2))
    subject = Subject("hand-made", model, ACCESS)
    found = influence.measure(subject, tokens(3, 30), targets=4, method="exact", floor=0.0)
    np.testing.assert_allclose(found.score, closed_form([0.8, 0.5], np.eye(2), len(found.score)), rtol=1e-10)
    assert found.counts[:, :15].min() == 4
    assert "4 positions" in found.targets
    assert influence.position_figure([found]) is None
    listed = influence.measure(subject, tokens(3, 30), targets=[10, 20], method="exact", floor=0.0)
    assert listed.counts[0].tolist() == [2] * 11 + [1] * 10


def test_logits_are_measured_on_request():
    model = Recurrence(torch.tensor([0.8, 0.5], dtype=torch.float64), np.eye(2))
    found = influence.measure(Subject("s", model, ACCESS), tokens(1, 12), output="logits", method="exact", floor=0.0)
    C = model.table.detach().numpy() @ np.eye(2)
    np.testing.assert_allclose(found.score, closed_form([0.8, 0.5], C, 12), rtol=1e-10)
    headless = Subject("s", model, Access(ACCESS.embed, ACCESS.run))
    with pytest.raises(UserError, match="no head"):
        influence.measure(headless, tokens(1, 12), output="logits")


def test_the_model_is_left_as_it_was():
    model = Recurrence(torch.full((2,), 0.5), np.eye(2)).train()
    model.C.requires_grad_(False)
    first = influence.measure(Subject("s", model, ACCESS), tokens(1, 10))
    assert first.score[0] == pytest.approx(math.sqrt(2)), "dropout must be off"
    assert model.training
    assert model.dropout.training
    assert model.a.requires_grad
    assert not model.C.requires_grad
    assert model.a.grad is None


class Spectral(Recurrence):
    """The same recurrence by FFT, whose rounding error is the same at every distance."""

    def forward(self, x):
        length = x.shape[1]
        kernel = self.a ** torch.arange(length, device=x.device, dtype=x.dtype)[:, None]
        y = torch.fft.irfft(
            torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0), 2 * length, dim=1
        )
        return y[:, :length] @ self.C.T


def test_the_floor_is_found_where_it_is():
    """A scan is accurate down to underflow: a fit may use it all. An FFT is not: only what is above eps or so may be used."""
    a, x = torch.full((4,), 0.7), tokens(2, 120)
    scan = influence.measure(Subject("scan", Recurrence(a, np.eye(4)), ACCESS), x)
    assert scan.floor.value < 1e-30
    assert scan.score.min() > scan.floor.value
    assert scan.fit.last == 119
    fft = influence.measure(Subject("fft", Spectral(a, np.eye(4)), ACCESS), x)
    assert 1e-9 < fft.floor.value < 1e-4
    assert fft.fit.last < 70
    for found in (scan, fft):
        assert found.fit.kappa == pytest.approx(-math.log(0.7), rel=0.02)
    bare = influence.measure(Subject("fft", Spectral(a, np.eye(4)), ACCESS), x, floor=0.0)
    assert bare.fit.kappa < 0.8 * -math.log(0.7), "without the floor the noise flattens the fit"


def test_underflow_is_noise():
    found = influence.measure(Subject("fast", Recurrence(torch.full((4,), 0.2), np.eye(4)), ACCESS), tokens(1, 120))
    assert 1e-38 < found.floor.value < 1e-35
    assert found.fit.kappa == pytest.approx(-math.log(0.2), rel=1e-4)
    assert found.fit.last == pytest.approx(36 * math.log(10) / math.log(5), abs=2)


def test_double_precision_and_floors_by_hand():
    x, model = tokens(1, 120), Spectral(torch.full((4,), 0.7), np.eye(4)).double()
    double = influence.measure(Subject("fft", model, ACCESS), x)
    assert double.floor.how.startswith("a priori")
    assert double.floor.value == pytest.approx(torch.finfo(torch.float64).eps * double.score.max())
    assert 90 < double.fit.last < 110
    assert double.fit.kappa == pytest.approx(-math.log(0.7), rel=1e-3)
    given = influence.measure(Subject("fft", model, ACCESS), x, floor=1e-3)
    assert given.floor.how == "as given"
    assert given.fit.last == int(math.log(2e3) / -math.log(0.7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(2, 4, dtype=torch.long)}, "at least one of 8"),
        ({"inputs": torch.zeros(2, 10)}, "token numbers"),
        ({"targets": "first"}, "targets"),
        ({"targets": 99}, "cannot be drawn"),
        ({"targets": [99]}, "must lie in"),
        ({"method": "magic"}, "magic"),
        ({"probes": 0}, "at least one probe"),
        ({"floor": "low"}, "floor"),
    ],
)
def test_bad_requests_are_named(change, message):
    subject = Subject("s", Recurrence(torch.ones(2), np.eye(2)), ACCESS)
    options = {"inputs": tokens(2, 10), **change}
    with pytest.raises(UserError, match=message):
        influence.measure(subject, **options)


def test_nan_is_reported():
    with pytest.raises(UserError, match="NaN"):
        influence.measure(Subject("s", Recurrence(torch.tensor([math.nan]), np.eye(1)), ACCESS), tokens(1, 10))


def test_figure_and_table_say_what_was_measured():
    subject = Subject("gated", Gated(), ACCESS)
    found = influence.measure(subject, tokens(3, 40, 32))
    figure = found.figure()
    line, fit = figure.series
    assert len(line.x) == 40
    assert line.stderr is not None
    assert fit.style == "fit"
    np.testing.assert_allclose(line.y, found.score)
    positions = influence.position_figure([found]).series[0]
    assert positions.x == [float(s) for s in range(40)]
    assert positions.y[-1] == pytest.approx(found.score[0] / found.score.max())
    row = dict(zip([c.name for c in influence.table([found]).columns], found.table_rows()[0], strict=True))
    assert row["half-life"].value == pytest.approx(found.fit.half_life)
    assert row["last 10 %"].value == pytest.approx(np.square(found.score[:4]).sum() / np.square(found.score).sum())
    alone = influence.measure(subject, tokens(1, 40, 32))
    assert alone.stderr is None
    assert alone.effective_context.stderr is None
    assert alone.figure().series[0].stderr is None


def test_the_ratio_of_two_models_is_the_difference_of_their_rates():
    """a^d over b^d, each relative to its own total: a straight line in the logarithm."""
    slow, fast = (
        influence.measure(Subject(name, Recurrence(torch.full((4,), a), np.eye(4)), ACCESS), tokens(3, 100), floor=0.0)
        for name, a in (("slow", 0.9), ("fast", 0.8))
    )
    line, fit = influence.ratio_figure([(slow, fast)]).series
    assert line.name == "fast / slow"
    assert line.x[-1] == 64
    slopes = np.diff(np.log(line.y))
    np.testing.assert_allclose(slopes, math.log(0.8 / 0.9), rtol=1e-5)
    totals = [1 / (1 - a**2) for a in (0.9, 0.8)]
    assert line.y[0] == pytest.approx(0.8 / 0.9 * math.sqrt(totals[0] / totals[1]), rel=1e-4)
    assert fit.name == "fast / slow: falls by 11 % per token"
    assert max(line.stderr) < 1e-3
    assert influence.ratio_figure([]) is None


def test_influence_from_every_layer():
    """From the last block's input the output is a residual path plus one layer: its effective context cannot exceed that of the whole."""
    found = influence.measure(model(n_layers=3), tokens(3, 48, 32))
    assert found.n_layers == 3
    np.testing.assert_array_equal(found.by_depth[0], found.squares)
    assert len(found.layer_fits) == len(found.layer_contexts) == 3
    assert found.layer_fits[0].kappa == found.fit.kappa
    assert found.layer_contexts[0].value == found.effective_context.value
    table = next(t for t in found.tables() if t.id == "influence-by-layer")
    assert [row[1] for row in table.rows] == [1, 2, 3]
    figure = next(f for f in found.figures() if f.id == "influence-by-layer")
    assert {s.name for s in figure.series} == {"model: half-life", "model: effective context"}


def test_the_floor_is_known_beyond_the_tokens_that_it_is_measured_on():
    """At 512 tokens the FFT's noise is not reached yet; at 1400 everything is noise."""
    subject = Subject("fft", Spectral(torch.full((4,), 0.98), np.eye(4)), ACCESS)
    found = influence.measure(subject, tokens(1, 1400))
    assert 1e-8 < found.floor.value < 1e-3
    assert 300 < found.fit.last < 900
    assert found.fit.kappa == pytest.approx(-math.log(0.98), rel=0.02)
