"""A straight line through log influence against distance, and how sure we are of its slope.

    log score(d) = intercept - κ d + residual,    half-life = ln 2 / κ  tokens

Pure numpy and scipy; knows nothing of models. Legend: n sequences, D distances (0 .. D-1, in tokens), R resamples.

Residuals at neighbouring distances are alike (they share tokens, and a real curve bends), so the textbook standard error of a
least-squares slope is several times too small. Two honest ones are computed:
  between sequences   the bootstrap over sequences, which assumes nothing about the residuals but needs several sequences;
  along the curve     residuals as a first-order autoregression with its ρ estimated (and corrected for the bias that a fitted trend
                      gives it): m points count as m (1 - ρ)/(1 + ρ). In simulation it covers far better than kernel (HAC) estimates
                      do at these lengths (`test_the_interval_covers_the_truth`).
From `ENOUGH_SEQUENCES` on the first is used, with Student's t on n - 1 degrees of freedom. Below that t is so wide that it says nothing
(12.7 standard errors for n = 2), so both are added in quadrature (which counts the tokens' noise twice: cautious) with the
second's critical value; for n = 1 only the second exists, and it speaks of that sequence alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from ssmlens.results import Value

ENOUGH_SEQUENCES = 5
RESAMPLES = 1000
_EVERY = 128

Array = np.ndarray


@dataclass(frozen=True)
class Fit:
    """κ̂ per token with its 95 % interval [low, high]; the line is exp(intercept - kappa d), fitted at `n_points` distances in [first, last].

    n: sequences. resampled: κ̂ of every bootstrap resample of them (None for one sequence), for `difference`.
    r2: share of the variance of log score that the line explains. r2_power: the same for a power law d^-p over the same points;
    where it is clearly larger, the decay has no single half-life."""

    kappa: float
    stderr: float
    low: float
    high: float
    intercept: float
    r2: float
    r2_power: float
    first: int
    last: int
    n_points: int
    how: str
    n: int
    resampled: Float[Array, " R"] | None = field(default=None, repr=False, compare=False)

    @property
    def half_life(self) -> float:
        """Tokens after which the score halves; infinite where it does not fall."""
        return half_life(self.kappa)

    @property
    def half_life_interval(self) -> tuple[float, float]:
        """The 95 % interval of κ̂ turned over: the upper end is infinite where κ̂ is not clearly above zero."""
        return half_life(self.high), half_life(self.low)

    @property
    def half_life_stderr(self) -> float:
        """First order: half-life · stderr/κ. Meaningless (infinite) where the interval of κ̂ reaches zero."""
        return self.half_life * self.stderr / self.kappa if self.low > 0 else math.inf

    def line(self, distances: Float[Array, " m"]) -> Float[Array, " m"]:
        return np.exp(self.intercept - self.kappa * np.asarray(distances, dtype=float))


def half_life_value(fit: Fit | None) -> Value | None:
    """Its half-life with its standard error, tokens; None without a fit."""
    if fit is None:
        return None
    error = fit.half_life_stderr
    return Value(value=fit.half_life, stderr=error if math.isfinite(error) else None, n=fit.n, unit="tokens")


def spaced(distances: int) -> Int[Array, " m"]:
    """Distances to be drawn: every one up to 128, then growing by 1.5 %, and the last. What is fitted is fitted to all."""
    if distances <= _EVERY:
        return np.arange(distances)
    far = np.geomspace(_EVERY, distances - 1, int(math.log(distances / _EVERY) / 0.015) + 2)
    return np.unique(np.concatenate([np.arange(_EVERY), np.round(far).astype(int)]))


def difference(one: Fit, other: Fit, *, paired: bool) -> Value:
    """κ̂ of `one` minus κ̂ of `other`.

    paired: both read the same sequences, so that resample r drew the same ones for both (the same `seed`), and the difference has
    replicates of its own, free of what the sequences do to both. Otherwise the errors add, with the degrees of freedom of the smaller."""
    kappa, n = one.kappa - other.kappa, min(one.n, other.n)
    if n < 2:
        error = None
    elif paired and one.resampled is not None and other.resampled is not None:
        error = float(spread(one.resampled - other.resampled, n))
    else:
        error = math.hypot(one.stderr, other.stderr)
    return Value(value=kappa, stderr=error, n=n, unit="1/token")


def half_life(kappa: float) -> float:
    return math.log(2) / kappa if kappa > 0 else math.inf


def resampling_weights(n: int, seed: int, resamples: int = RESAMPLES) -> Float[Array, "R n"]:
    """How often each of n sequences is drawn in each bootstrap resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def spread(values: Float[Array, "R ..."], n: int) -> Float[Array, "..."]:
    """Standard error from bootstrap replicates over n sequences. √(n/(n-1)) undoes the bootstrap's shrinkage: without it two
    sequences would show 71 % of the spread that they have."""
    return np.std(values, axis=0) * math.sqrt(n / (n - 1))


def pooled_curve(squares: Float[Array, "n D"], counts: Float[Array, "n D"]) -> Float[Array, " D"]:
    """Root of the mean square over everything measured at each distance. squares: sums of squares, counts: how many."""
    return np.sqrt(squares.sum(0) / counts.sum(0))


def resampled_curves(
    squares: Float[Array, "n D"], counts: Float[Array, "n D"], weights: Float[Array, "R n"]
) -> Float[Array, "R D"]:
    return np.sqrt((weights @ squares) / (weights @ counts))


def fit_decay(
    squares: Float[Array, "n D"], counts: Float[Array, "n D"], *, floor: float = 0.0, seed: int = 0, first: int = 1
) -> Fit | None:
    """Least squares of log score on distance over all distances ≥ `first` whose score is above `floor`, every distance alike
    (log-spaced points would let the first few tokens, which are not yet in the exponential regime, decide the slope).

    None where fewer than three distances are above the floor: then nothing can be said about a slope."""
    n, size = squares.shape
    curve = pooled_curve(squares, counts)
    distance = np.arange(size, dtype=float)
    used: Bool[Array, " D"] = (distance >= first) & (curve > floor) & np.isfinite(curve)
    if used.sum() < 3:
        return None
    x, y = distance[used], np.log(curve[used])
    centred = x - x.mean()
    slope_weights = centred / (centred @ centred)
    slope = float(slope_weights @ y)
    intercept = float(y.mean() - slope * x.mean())
    residual = y - intercept - slope * x
    along, along_critical = _along(x, residual)
    between, slopes = math.nan, None
    if n >= 2:
        curves = resampled_curves(squares, counts, resampling_weights(n, seed))[:, used]
        # a resample in which a distance is exactly zero has no logarithm there: leave it at the floor of what was measured
        slopes = np.log(np.maximum(curves, curve[used].min() * 1e-3)) @ slope_weights
        between = float(spread(slopes, n))
    if n >= ENOUGH_SEQUENCES:
        from scipy.stats import t

        stderr, critical = between, float(t.ppf(0.975, n - 1))
        how = f"bootstrap over {n} sequences, Student's t with {n - 1} degrees of freedom"
    elif n >= 2:
        stderr, critical = math.hypot(between, along), along_critical
        how = f"spread over {n} sequences and error along the curve in quadrature (few sequences: approximate)"
    else:
        stderr, critical = along, along_critical
        how = "autocorrelated residuals along the curve of one sequence: speaks of that sequence alone"
    return Fit(
        kappa=-slope, stderr=stderr, low=-slope - critical * stderr, high=-slope + critical * stderr,
        intercept=intercept, r2=_r2(y, residual), r2_power=_power_law_r2(x, y),
        first=int(x[0]), last=int(x[-1]), n_points=len(x), how=how,
        n=n, resampled=None if slopes is None else -slopes,
    )  # fmt: skip


def share_within(curve: Float[Array, "... D"], tokens: int) -> Float[Array, "..."]:
    """Share of the summed squared score held by the last `tokens` tokens (distances 0 .. tokens - 1)."""
    squares = np.square(curve)
    return squares[..., :tokens].sum(-1) / squares.sum(-1)


def effective_context(curve: Float[Array, "... D"], share: float = 0.9) -> Float[Array, "..."]:
    """How many of the most recent tokens hold `share` of the summed squared score (1 = the token itself is enough)."""
    running = np.cumsum(np.square(curve), axis=-1)
    return np.argmax(running >= share * running[..., -1:] * (1 - 1e-12), axis=-1) + 1.0


def with_stderr(
    statistic: Callable[[Float[Array, "... D"]], Float[Array, "..."]],
    squares: Float[Array, "n D"],
    counts: Float[Array, "n D"],
    seed: int = 0,
) -> tuple[float, float | None]:
    """A statistic of the pooled curve and its bootstrap standard error over sequences (None for one sequence)."""
    value = float(statistic(pooled_curve(squares, counts)))
    n = len(squares)
    if n < 2:
        return value, None
    return value, float(spread(statistic(resampled_curves(squares, counts, resampling_weights(n, seed))), n))


def _r2(y: Float[Array, " m"], residual: Float[Array, " m"]) -> float:
    total = float(np.square(y - y.mean()).sum())
    # a flat curve has nothing to explain: a horizontal line is then the whole truth
    return 1 - float(np.square(residual).sum()) / total if total > 1e-24 * len(y) else 1.0


def _power_law_r2(x: Float[Array, " m"], y: Float[Array, " m"]) -> float:
    if x[0] <= 0:
        return math.nan
    z = np.log(x) - np.log(x).mean()
    slope = z @ y / (z @ z)
    return _r2(y, y - y.mean() - slope * z)


def _along(x: Float[Array, " m"], residual: Float[Array, " m"]) -> tuple[float, float]:
    """Standard error of the slope under autoregressive residuals, and its two-sided 95 % critical value."""
    from scipy.stats import t

    m, total = len(x), float(residual @ residual)
    if total == 0:
        return 0.0, 1.96
    rho = float(residual[1:] @ residual[:-1]) / total
    rho = min(max(rho + (1 + 4 * rho) / m, 0.0), 0.99)
    effective = max(3.0, m * (1 - rho) / (1 + rho))
    variance = total / (m - 2) / max(1 - 2 / effective, 0.3)
    centred = x - x.mean()
    carried, cross = 0.0, 0.0  # Σ_{i>j} ρ^{i-j} x_i x_j, one point at a time
    for i in range(1, m):
        carried = rho * (carried + centred[i - 1])
        cross += centred[i] * carried
    square = float(centred @ centred)
    stderr = math.sqrt(variance * max(square + 2 * cross, 0.0)) / square
    return stderr, float(t.ppf(0.975, max(effective - 2, 1.0)))
