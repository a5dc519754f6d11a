"""The fit recovers what was put in, and its intervals hold what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.lens import decay


def curves(kappa, n, size, noise, rho, rng, between=0.0):
    """n sequences of squared scores exp(-2κd), with AR(1) noise along distance and slopes that differ between sequences."""
    d = np.arange(size)
    shocks = rng.normal(0, noise * math.sqrt(1 - rho**2), (n, size))
    ar = np.zeros((n, size))
    ar[:, 0] = rng.normal(0, noise, n)
    for i in range(1, size):
        ar[:, i] = rho * ar[:, i - 1] + shocks[:, i]
    kappas = kappa + rng.normal(0, between, (n, 1))
    return np.exp(2 * (-kappas * d + ar)), np.ones((n, size))


@settings(deadline=None)
@given(kappa=st.floats(-0.02, 0.8), size=st.integers(5, 300), scale=st.floats(1e-6, 1e6))
def test_an_exact_exponential_is_recovered(kappa, size, scale):
    squares = np.square(scale * np.exp(-kappa * np.arange(size)))[None]
    fit = decay.fit_decay(squares, np.ones((1, size)))
    assert fit.kappa == pytest.approx(kappa, rel=1e-6, abs=1e-9)
    assert math.exp(fit.intercept) == pytest.approx(scale, rel=1e-5)
    assert fit.low - 1e-9 <= kappa <= fit.high + 1e-9
    if kappa > 1e-3:
        assert fit.half_life == pytest.approx(math.log(2) / kappa, rel=1e-5)
        assert fit.r2 == pytest.approx(1)
    if kappa < -1e-3:
        assert fit.half_life == math.inf


def test_a_flat_curve_does_not_halve():
    rng = np.random.default_rng(0)
    squares, counts = curves(0.0, 6, 200, 0.2, 0.5, rng)
    fit = decay.fit_decay(squares, counts)
    assert fit.half_life_interval[1] == math.inf
    assert fit.half_life > 1000
    constant = decay.fit_decay(np.ones((1, 50)), np.ones((1, 50)))
    assert constant.half_life > 1e9
    assert constant.half_life_stderr == math.inf


@pytest.mark.parametrize(
    ("n", "rho", "between"),
    [(1, 0.0, 0.0), (1, 0.9, 0.0), (2, 0.9, 0.0), (2, 0.5, 0.001), (6, 0.9, 0.0), (6, 0.5, 0.001), (12, 0.8, 0.001)],
)
def test_the_interval_covers_the_truth(n, rho, between):
    """It promises 95 %. Asked for: 86 % of 200 draws, which a true 92 % (what it has, being approximate) misses once in a thousand."""
    rng = np.random.default_rng(5)
    # sequences that differ have an RMS curve of their own slope, dominated by the slowest: that is what is estimated
    truth = decay.fit_decay(*curves(0.05, 4000, 200, 0.5, rho, rng, between)).kappa if between else 0.05
    fits = [decay.fit_decay(*curves(0.05, n, 200, 0.5, rho, rng, between)) for _ in range(200)]
    assert sum(fit.low <= truth <= fit.high for fit in fits) >= 172
    assert np.median([fit.high - fit.low for fit in fits]) < 0.4 * truth, "and it is not merely wide"


def test_the_textbook_interval_would_not():
    """Why the fit does not use it: with residuals as alike as these it misses far too often."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        squares, _ = curves(0.05, 1, 200, 0.5, 0.9, rng)
        x, y = np.arange(1.0, 200), 0.5 * np.log(squares[0, 1:])
        slope, intercept = np.polyfit(x, y, 1)
        residual = y - slope * x - intercept
        stderr = math.sqrt(residual @ residual / (len(x) - 2) / np.square(x - x.mean()).sum())
        hits += abs(slope + 0.05) <= 1.96 * stderr
    assert hits < 150


def test_points_at_the_floor_do_not_bend_the_fit():
    d = np.arange(200)
    clean = np.exp(-0.3 * d)
    noisy = np.square(np.maximum(clean, 1e-9))[None]
    assert decay.fit_decay(noisy, np.ones((1, 200)), floor=1e-9).kappa == pytest.approx(0.3)
    assert decay.fit_decay(noisy, np.ones((1, 200))).kappa < 0.2
    assert decay.fit_decay(noisy, np.ones((1, 200)), floor=1e-9).last == int(9 * math.log(10) / 0.3)
    assert decay.fit_decay(noisy, np.ones((1, 200)), floor=0.5) is None


def test_zeros_are_left_out():
    squares = np.square(np.where(np.arange(100) < 40, np.exp(-0.5 * np.arange(100)), 0.0))[None]
    fit = decay.fit_decay(np.repeat(squares, 3, 0), np.ones((3, 100)))
    assert fit.kappa == pytest.approx(0.5)
    assert fit.last == 39


def test_a_power_law_is_told_apart():
    d = np.arange(1, 400)
    squares = np.concatenate([[4.0], d**-1.6])[None]
    fit = decay.fit_decay(squares, np.ones((1, 400)))
    assert fit.r2_power == pytest.approx(1)
    assert fit.r2 < 0.9


def test_shares_and_effective_context_by_hand():
    curve = np.sqrt(np.array([6.0, 2.0, 1.0, 1.0]))
    assert decay.share_within(curve, 1) == pytest.approx(0.6)
    assert decay.share_within(curve, 3) == pytest.approx(0.9)
    assert decay.effective_context(curve) == 3
    assert decay.effective_context(np.array([1.0, 0.0, 0.0])) == 1
    assert decay.effective_context(np.ones(100)) == 90


def test_bootstrap_matches_the_textbook_for_a_mean():
    """For the mean itself the bootstrap must give s/√n: also for two sequences, where the plain one would be 29 % short."""
    rng = np.random.default_rng(1)
    for n in (2, 3, 20):
        squares = rng.uniform(1, 2, (n, 1))
        _, error = decay.with_stderr(lambda c: np.square(c[..., 0]), squares, np.ones((n, 1)))
        assert error == pytest.approx(squares.std(ddof=1) / math.sqrt(n), rel=0.08)
    assert decay.with_stderr(lambda c: c[..., 0], squares[:1], np.ones((1, 1)))[1] is None


def two_models(n, rng, apart=0.0, between=0.003):
    """Two models on the same n sequences: what a sequence does to the slope it does to both."""
    text = rng.normal(0, between, (n, 1))

    def one(kappa):
        squares, counts = curves(kappa, n, 120, 0.3, 0.8, rng)
        return decay.fit_decay(squares * np.exp(-2 * text * np.arange(120)), counts)

    return one(0.05), one(0.05 - apart)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_difference_is_claimed_wrongly_no_more_often_than_promised(n):
    """5 %; asked for: 10 % of 200 draws, which a true 6 % exceeds once in a hundred."""
    rng = np.random.default_rng(n)
    intervals = [decay.difference(*two_models(n, rng), paired=True).interval() for _ in range(200)]
    assert sum(not low <= 0 <= high for low, high in intervals) <= 20


def test_pairing_sees_what_the_text_would_hide():
    rng = np.random.default_rng(0)
    found = [two_models(8, rng, apart=0.003, between=0.006) for _ in range(40)]
    paired, apart = (
        sum(decay.difference(a, b, paired=paired).interval()[0] > 0 for a, b in found) for paired in (True, False)
    )
    assert paired > 20
    assert apart < 10


def test_one_sequence_has_no_difference_to_speak_of():
    rng = np.random.default_rng(0)
    (one, other), (many, _) = two_models(1, rng), two_models(5, rng)
    alone = decay.difference(one, other, paired=True)
    assert alone.value == pytest.approx(one.kappa - other.kappa)
    assert alone.interval() is None
    assert decay.difference(many, one, paired=False).interval() is None


@pytest.mark.parametrize("n", [1, 8, 128, 129, 1000, 8192])
def test_what_is_drawn_begins_and_ends_where_the_curve_does(n):
    shown = decay.spaced(n)
    assert (shown[0], shown[-1]) == (0, n - 1)
    assert (np.diff(shown) > 0).all()
    assert len(shown) <= 128 + 300
    assert (shown[1:] <= np.maximum(shown[:-1] + 1, 1.02 * shown[:-1] + 1)).all()
