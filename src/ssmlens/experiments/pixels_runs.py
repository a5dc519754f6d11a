"""Accuracies, differences and success rates of one classifier, or of several of the same kind from different seeds, under attack.

    right_{s,i}(c)   1 where model s classifies image i right under condition c (the mean over draws of noise)
    mean             over seeds s and images i; every difference is taken within a seed and an image first

Seeds and images are two ways to vary at once (every model sees the same images). With one of each varying alone,

    variance of the mean = V_seeds / S + V_images / n - V_rest / (S n)

V_seeds: of the seeds' means; V_images: of the images' means; V_rest: of what neither explains, which both have counted.
Degrees of freedom by Satterthwaite; the n of a value is these plus one.

Target attack: a pair is an image attacked and the donor of its pixels, and each of both is in several pairs. In place of V_images / n then, and of what
is subtracted, the variance clustered both ways (Cameron, Gelbach and Miller 2011), with degrees of freedom of the fewer clusters:

    V = V_victim + V_donor - V_pair,    V_g = G / (G - 1) Σ_{clusters g} (Σ_{pairs in g} e)² / pairs²    e: pair minus mean; G: clusters
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int64, UInt8

from ssmlens.experiments.pixels_measure import HARDER, donors, key
from ssmlens.results import Value
from ssmlens.tasks.pixels import Region

OVER = "± is the standard error over images, and over seeds where there are several, each difference within a seed and an image; n by degrees of freedom."


Clusters = Sequence[Int64[np.ndarray, " images"]]


def crossed(rows: Float[np.ndarray, "seeds images"], unit: str = "", clusters: Clusters = ()) -> Value:
    """The mean with its standard error over seeds and images. With one seed it speaks of that one model.

    clusters: two numberings of the columns (victims, donors); those of the same number in either are not independent."""
    seeds, n = rows.shape
    mean = float(rows.mean())
    groups = [np.unique(c, return_inverse=True)[1] for c in clusters]
    n = min([n, *(int(g.max()) + 1 for g in groups)])
    if n < 2:
        return Value.mean(rows.mean(1).tolist(), unit)
    by_image = max(_both_ways(rows.mean(0) - mean, groups), *(_one_way(rows.mean(0) - mean, g) for g in groups), 0.0)
    if seeds == 1:
        return Value(value=mean, stderr=math.sqrt(by_image), n=n, unit=unit)
    by_seed = float(rows.mean(1).var(ddof=1)) / seeds
    rest = rows - rows.mean(0) - rows.mean(1, keepdims=True) + mean
    both = sum(_both_ways(row, groups) for row in rest) / (seeds * (seeds - 1))
    variance = max(by_image + by_seed - both, by_image, by_seed)
    spread = by_image**2 / (n - 1) + by_seed**2 / (seeds - 1)
    freedom = variance**2 / spread if spread > 0 else n - 1
    return Value(
        value=mean, stderr=math.sqrt(variance), n=1 + max(seeds - 1, min(n - 1, math.floor(freedom))), unit=unit
    )


def _one_way(e: Float[np.ndarray, " images"], group: Int64[np.ndarray, " images"] | None = None) -> float:
    """Variance of a mean, from what is left of each image (group None) or of the sum over each group, when the mean is taken away."""
    sums = e if group is None else np.bincount(group, e)
    return float((sums**2).sum()) * len(sums) / (len(sums) - 1) / len(e) ** 2


def _both_ways(e: Float[np.ndarray, " images"], groups: Clusters) -> float:
    return _one_way(e) if not groups else sum(_one_way(e, g) for g in groups) - _one_way(e)


def between(a: np.ndarray, b: np.ndarray, unit: str = "points", clusters: Clusters = ()) -> Value:
    """The mean of a - b, seed by seed (as many as both have) and image by image."""
    seeds = min(len(a), len(b))
    return crossed(a[:seeds] - b[:seeds], unit, clusters)


@dataclass(frozen=True, eq=False)
class Runs:
    """name: for people. predictions: condition → the class predicted, (seeds, images); the gradient attack has the first images only.
    losses: condition → one list a seed: mean loss before, after, share of images on which it rose; of "slope": see pixels_measure.py.
    plan_seed: that of the plan, from which donors follow."""

    name: str
    labels: Int64[np.ndarray, " images"]
    predictions: Mapping[str, UInt8[np.ndarray, "seeds images"]]
    losses: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    plan_seed: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        labels: Int64[np.ndarray, " images"],
        found: Sequence[Mapping[str, np.ndarray]],
        losses: Sequence[Mapping[str, Sequence[float]]],
    ) -> "Runs":
        """found, losses: of one seed after the other."""
        return cls(
            name, labels, {k: np.stack([f[k] for f in found]) for k in found[0]}, {k: [x[k] for x in losses] for k in losses[0]}
        )  # fmt: skip

    @property
    def seeds(self) -> int:
        return len(self.predictions["clean"])

    def clean(self) -> Float[np.ndarray, "seeds images"]:
        return self._right("clean")

    def noise(self, region: Region) -> Float[np.ndarray, "seeds images"]:
        """Right under noise, mean over draws."""
        names = [name for name in self.predictions if name.startswith(key("noise", region, "#"))]
        return np.mean([self._right(name) for name in names], 0)

    def lost(self, region: Region) -> Value:
        """Accuracy lost to noise in the region, in points."""
        return crossed(100 * (self.clean() - self.noise(region)), "points")

    def asymmetry(self, trailing: Region, leading: Region) -> Value:
        """Points lost to noise in the trailing region beyond those lost to it in the leading one."""
        return crossed(100 * (self.noise(leading) - self.noise(trailing)), "points")

    def success(self, region: Region | None, classes: Sequence[int]) -> Float[np.ndarray, "seeds pairs"]:
        """Whether an image of another class is classified as the target class when attacked (region None: when not): for each target class,
        one pair for each image of other classes."""
        hits = [
            (self.predictions[key("target", region, f"={c}") if region else "clean"] == c)[:, self.labels != c]
            for c in classes
        ]
        return np.concatenate(hits, 1).astype(np.float64)

    def pairs(self, classes: Sequence[int]) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
        """Of the columns of `success`: which image is attacked, and with the pixels of which."""
        victims = [np.flatnonzero(self.labels != c) for c in classes]
        of = [donors(self.labels, c, self.plan_seed)[v] for c, v in zip(classes, victims, strict=True)]
        return np.concatenate(victims), np.concatenate(of)

    def success_rate(self, region: Region | None, classes: Sequence[int]) -> Value:
        return crossed(100 * self.success(region, classes), "%", self.pairs(classes))

    def gradient(
        self, region: Region, epsilon: float, kind: str = "pgd", more: bool = False
    ) -> Float[np.ndarray, "seeds images"]:
        """Right under the gradient attack, or under another of the same size (kind "signs", "search"); more: with more steps."""
        return self._right(key(kind, region, f"~{epsilon:.6g}{f' ×{HARDER}' if more else ''}"))

    def under_both(self, region: Region, epsilon: float) -> Float[np.ndarray, "seeds images"]:
        """Right under the gradient attack and under the one without gradients: of each image, the worse."""
        right = self.gradient(region, epsilon, "search")
        return right * self.gradient(region, epsilon)[:, : right.shape[1]]

    def slope(self, region: Region) -> tuple[float, float]:
        """Share of exact zeros in the gradient to the region's pixels, and its mean size; means over seeds."""
        zeros, size = np.mean(self.losses[key("slope", region)], 0)
        return float(zeros), float(size)

    def before_gradient(self, region: Region, epsilon: float) -> Float[np.ndarray, "seeds images"]:
        """Right before it, of the same images."""
        return self.clean()[:, : self.gradient(region, epsilon).shape[1]]

    def _right(self, name: str) -> Float[np.ndarray, "seeds images"]:
        predicted = self.predictions[name]
        return (predicted == self.labels[: predicted.shape[1]]).astype(np.float64)


def comparable(runs: Runs, classes: int) -> bool:
    """Whether every seed's classifier is shown to beat chance on clean images (one-sided binomial bound over images, 99 %): else there is nothing
    that an attack could take."""
    from scipy.stats import binom

    right = runs.clean()
    return bool((binom.sf(right.sum(1) - 1, right.shape[1], 1 / classes) < 0.01).all())


Found = Mapping[str, Runs]  # by model name
