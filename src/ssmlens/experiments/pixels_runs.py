"""Accuracies, differences and success rates of one classifier, or of several of the same kind from different seeds, under attack.

    right_{s,i}(c)   1 where model s classifies image i right under condition c (the mean over draws of noise)
    mean             over seeds s and images i; every difference is taken within a seed and an image first

Seeds and images are two ways to vary at once (every model sees the same images). With one of each varying alone,

    variance of the mean = V_seeds / S + V_images / n - V_rest / (S n)

V_seeds: of the seeds' means; V_images: of the images' means; V_rest: of what neither explains, which both have counted.
Degrees of freedom by Satterthwaite; the n of a value is these plus one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int64, UInt8

from ssmlens.experiments.pixels_measure import HARDER, key
from ssmlens.results import Value
from ssmlens.tasks.pixels import Region

OVER = "± is the standard error over images, and over seeds where there are several, each difference within a seed and an image; n by degrees of freedom."


def crossed(rows: Float[np.ndarray, "seeds images"], unit: str = "") -> Value:
    """The mean with its standard error over seeds and images. With one seed it speaks of that one model."""
    seeds, n = rows.shape
    mean = float(rows.mean())
    if n < 2:
        return Value.mean(rows.mean(1).tolist(), unit)
    by_image = float(rows.mean(0).var(ddof=1)) / n
    if seeds == 1:
        return Value(value=mean, stderr=math.sqrt(by_image), n=n, unit=unit)
    by_seed = float(rows.mean(1).var(ddof=1)) / seeds
    rest = rows - rows.mean(0) - rows.mean(1, keepdims=True) + mean
    both = float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)
    variance = max(by_image + by_seed - both, by_image, by_seed)
    spread = by_image**2 / (n - 1) + by_seed**2 / (seeds - 1)
    freedom = variance**2 / spread if spread > 0 else n - 1
    return Value(
        value=mean, stderr=math.sqrt(variance), n=1 + max(seeds - 1, min(n - 1, math.floor(freedom))), unit=unit
    )


def between(a: np.ndarray, b: np.ndarray, unit: str = "points") -> Value:
    """The mean of a - b, seed by seed (as many as both have) and image by image."""
    seeds = min(len(a), len(b))
    return crossed(a[:seeds] - b[:seeds], unit)


@dataclass(frozen=True, eq=False)
class Runs:
    """name: for people. predictions: condition → the class predicted, (seeds, images); the gradient attack has the first images only.
    losses: condition → one list a seed: mean loss before, after, share of images on which it rose."""

    name: str
    labels: Int64[np.ndarray, " images"]
    predictions: Mapping[str, UInt8[np.ndarray, "seeds images"]]
    losses: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

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

    def success(self, region: Region | None, classes: Sequence[int]) -> Float[np.ndarray, "seeds images"]:
        """Share of the target classes as which an image of another class is classified when attacked (region None: when not).
        Images without another class among `classes` are left out."""
        hits = np.stack([
            np.where(self.labels == c, np.nan, (self.predictions[key("target", region, f"={c}")] if region else self.predictions["clean"]) == c)
            for c in classes
        ])  # fmt: skip
        return np.nanmean(hits[:, :, ~np.isnan(hits).all((0, 1))], 0)

    def gradient(
        self, region: Region, epsilon: float, kind: str = "pgd", more: bool = False
    ) -> Float[np.ndarray, "seeds images"]:
        """Right under the gradient attack, or under random signs of the same size (kind "signs"); more: with more steps."""
        return self._right(key(kind, region, f"~{epsilon:.6g}{f' ×{HARDER}' if more else ''}"))

    def before_gradient(self, region: Region, epsilon: float) -> Float[np.ndarray, "seeds images"]:
        """Right before it, of the same images."""
        return self.clean()[:, : self.gradient(region, epsilon).shape[1]]

    def _right(self, name: str) -> Float[np.ndarray, "seeds images"]:
        predicted = self.predictions[name]
        return (predicted == self.labels[: predicted.shape[1]]).astype(np.float64)


def comparable(runs: Runs, classes: int) -> bool:
    """Whether the classifier does better than chance on clean images, surely: else there is nothing that an attack could take."""
    bounds = crossed(runs.clean()).interval(0.99)
    return bounds is not None and bounds[0] > 1 / classes


Found = Mapping[str, Runs]  # by model name
