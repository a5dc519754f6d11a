"""Attacks on images as sequences of pixels (the paper's Section 3.3 and Appendix E.3; SPEC.md §5).

    noise     x_t ~ N(0, 1), all channels, for a ≤ t < b: noise takes the place of the pixels
    target    x_t of a random image of the target class, for a ≤ t < b
    search    signs of ± ε for a ≤ t < b, a random block set anew in each query, kept where the margin max_{j≠y} logit_j - logit_y grows: without
              gradients   (after Andriushchenko et al. 2020)
    PGD       x ← Π(x + α sign ∇_x loss(x)), Π onto |x - x₀| ≤ ε for a ≤ t < b, x = x₀ elsewhere, 0 ≤ x ≤ 1   (Madry et al. 2018)

    pixels: (n, length, channels) float32 in [0, 1]     labels: (n,) int64     logits: a function of pixels, (n, classes)
    [a:b]: a region of the sequence. Leading pixels are read first, trailing ones last, just before a class token

All randomness is a function of seeds, not of the size of a batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ssmlens.errors import UserError
from ssmlens.tasks.base import Seed, bits, permutation, words

Logits = Callable[[Float[Tensor, "n length channels"]], Float[Tensor, "n classes"]]


@dataclass(frozen=True, order=True)
class Region:
    """Pixels start ≤ t < stop of a sequence."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise UserError(f"region [{self.start}:{self.stop}] holds no pixel")

    def __str__(self) -> str:
        return f"[{self.start}:{self.stop}]"

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def here(self) -> slice:
        return slice(self.start, self.stop)

    @classmethod
    def parse(cls, text: str, length: int) -> "Region":
        """Of "a:b", read as Python reads it: ":32" begins at 0, "-32:" are the last 32. Raises UserError for another text and for a
        region that leaves 0 ... length."""
        example = f"such as 0:{max(1, length // 4)} or -{max(1, length // 4)}:"
        first, colon, last = text.strip().removeprefix("[").removesuffix("]").partition(":")
        try:
            a, b = int(first or 0), int(last or length)
        except ValueError:
            colon = ""
        if not colon:
            raise UserError(f"a region is START:STOP, {example}, not {text!r}")
        start, stop = (end + length if end < 0 else end for end in (a, b))
        if not 0 <= start < stop <= length:
            raise UserError(f"region {text} is not within the {length} pixels of an image: give one {example}")
        return cls(start, stop)

    def scaled(self, length: int, of: int) -> "Region":
        """This region of a sequence of `of` pixels in one of `length`: the same share of it (at least one pixel), at the same place.
        What touches an end still does, and equal widths stay equal."""
        width = max(1, math.floor(self.width * length / of + 0.5))
        if self.start == 0:
            return Region(0, width)
        if self.stop == of:
            return Region(length - width, length)
        start = min(length - width, math.floor(self.start * length / of + 0.5))
        return Region(start, start + width)


def positions(width: int, length: int) -> dict[str, Region]:
    """Leading, middle and trailing regions of `width` pixels. Raises UserError where the sequence is not longer."""
    if not 0 < width < length:
        raise UserError(f"{width} of {length} pixels: a region must be shorter than the image")
    middle = (length - width) // 2
    return {
        "leading": Region(0, width),
        "middle": Region(middle, middle + width),
        "trailing": Region(length - width, length),
    }


def uniform(shape: tuple[int, ...], seed: Seed) -> Float[Tensor, "..."]:
    """Uniform in (0, 1), float32."""
    raw = words(bits(seed), math.prod(shape)) >> np.uint64(40)  # 24 bits: what a float32 holds
    return torch.from_numpy(((raw.astype(np.float32) + np.float32(0.5)) / np.float32(1 << 24)).reshape(shape))


def normal(shape: tuple[int, ...], seed: Seed) -> Float[Tensor, "..."]:
    """N(0, 1), float32, by Box and Muller."""
    pairs = (math.prod(shape) + 1) // 2
    u, v = uniform((2, pairs), seed).double()
    radius, angle = torch.sqrt(-2 * torch.log(u)), 2 * math.pi * v
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1).flatten()
    return both[: math.prod(shape)].reshape(shape).float()


def replaced(pixels: Tensor, region: Region, content: Tensor) -> Tensor:
    """A copy with `content` (n, width, channels) in the region."""
    _inside(region, pixels)
    out = pixels.clone()
    out[:, region.here] = content.to(out)
    return out


def corrupted(pixels: Tensor, region: Region, seed: Seed) -> Tensor:
    """A copy with N(0, 1) noise in the region, drawn anew for every image and channel."""
    return replaced(pixels, region, normal((len(pixels), region.width, pixels.shape[2]), seed))


def donors(labels: Int64[np.ndarray, " n"], target: int, seed: Seed) -> Int64[np.ndarray, " n"]:
    """For each image the place of a random one of the target class; over the images of other classes, which are attacked, each serves equally
    often (as far as it goes). Raises UserError where there is none."""
    among = np.flatnonzero(labels == target)
    if not len(among):
        raise UserError(f"no image is of class {target}: there is nothing to attack with")
    found = np.empty(len(labels), np.int64)
    among = among[permutation(len(among), (*seed, 0))]
    for which, here in enumerate((np.flatnonzero(labels != target), np.flatnonzero(labels == target)), 1):
        found[here] = among[permutation(len(here), (*seed, which)) % len(among)]
    return found


@dataclass(frozen=True)
class PGD:
    """epsilon: largest change of a pixel, in [0, 1]. step_size α: None for 2.5 ε / steps, which can cross the ball."""

    epsilon: float
    steps: int = 20
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise UserError(
                f"epsilon is a change of pixels in [0, 1], such as {8 / 255:.4f} for 8/255, not {self.epsilon:g}"
            )
        if self.steps < 1:
            raise UserError(f"a gradient attack takes at least one step, not {self.steps}")

    @property
    def alpha(self) -> float:
        return self.step_size if self.step_size is not None else 2.5 * self.epsilon / self.steps


@dataclass(frozen=True)
class Attacked:
    """What PGD found. pixels: the image as changed; predicted: its class; before, after: the loss that was climbed, in nats (of `search`:
    the margin, of logits)."""

    pixels: Float[Tensor, "n length channels"]
    predicted: Int64[Tensor, " n"]
    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]


def pgd(
    logits: Logits,
    pixels: Float[Tensor, "n length channels"],
    labels: Int64[Tensor, " n"],
    region: Region,
    attack: PGD,
    *,
    target: int | None = None,
    seed: Seed = (0,),
    batch_size: int = 64,
) -> Attacked:
    """Projected gradient ascent on the cross-entropy of the labels, or descent on that of `target`, from a random start in the ball.

    Of all images on the way, the untouched one included, the one is kept that is misclassified (or classified as target) at the
    highest (lowest) loss; so it is never weaker than no attack, and with the same step size never weaker for more steps.
    Gradients are taken to the pixels alone: the caller may set requires_grad of parameters to False, which saves time."""
    _inside(region, pixels)
    start = 2 * uniform((len(pixels), region.width, pixels.shape[2]), seed) - 1
    done = [
        _climb(logits, pixels[i : i + batch_size], labels[i : i + batch_size], region, attack, target, start[i : i + batch_size])
        for i in range(0, len(pixels), batch_size)
    ]  # fmt: skip
    return Attacked(
        *(torch.cat([getattr(part, name) for part in done]) for name in ("pixels", "predicted", "before", "after"))
    )


def _climb(
    logits: Logits, x: Tensor, y: Tensor, region: Region, attack: PGD, target: int | None, start: Tensor
) -> Attacked:
    aim = y if target is None else torch.full_like(y, target)
    origin = x[:, region.here]
    low, high = (origin - attack.epsilon).clamp(min=0.0), (origin + attack.epsilon).clamp(max=1.0)
    clean = _look(logits, x, origin, region, aim, target is not None, gradient=False)
    best, predicted, loss, fooled = clean.part, clean.predicted, clean.loss, clean.fooled
    part = torch.minimum(torch.maximum(origin + attack.epsilon * start.to(origin), low), high)
    for step in range(attack.steps + 1):
        last = step == attack.steps
        now = _look(logits, x, part, region, aim, target is not None, gradient=not last)
        better = torch.where(now.fooled == fooled, now.loss > loss, now.fooled)
        best = torch.where(better[:, None, None], now.part, best)
        predicted, loss = torch.where(better, now.predicted, predicted), torch.where(better, now.loss, loss)
        fooled = fooled | now.fooled
        if now.gradient is not None:
            part = torch.minimum(torch.maximum(part + attack.alpha * now.gradient.sign(), low), high)
    sign = 1.0 if target is None else -1.0
    return Attacked(replaced(x, region, best), predicted, sign * clean.loss, sign * loss)


@dataclass(frozen=True)
class _Look:
    """What the model says of x with `part` in the region. loss: to be made large; fooled: whether the attack has what it wants."""

    part: Tensor
    predicted: Tensor
    loss: Tensor
    fooled: Bool[Tensor, " n"]
    gradient: Tensor | None


def _look(
    logits: Logits, x: Tensor, part: Tensor, region: Region, aim: Tensor, targeted: bool, *, gradient: bool
) -> _Look:
    part = part.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        out = logits(torch.cat([x[:, : region.start], part, x[:, region.stop :]], 1)).float()
        loss = F.cross_entropy(out, aim, reduction="none") * (-1.0 if targeted else 1.0)
        slope = torch.autograd.grad(loss.sum(), part)[0] if gradient else None
    predicted = out.detach().argmax(1)
    fooled = (predicted == aim) if targeted else (predicted != aim)
    return _Look(part.detach(), predicted, loss.detach(), fooled, slope)


@torch.no_grad()
def search(
    logits: Logits,
    pixels: Float[Tensor, "n length channels"],
    labels: Int64[Tensor, " n"],
    region: Region,
    epsilon: float,
    queries: int,
    *,
    seed: Seed = (0,),
    batch_size: int = 64,
) -> Attacked:
    """Random search for the signs of ± ε that misclassify, from random ones: no gradient can mislead it.

    Each query sets a random block of the region to one random sign a channel, half the region wide at first and one pixel in the end, and is kept where
    it raises the margin. Of all images looked at, the untouched one included, the one with the largest margin is kept; those misclassified are
    not asked again."""
    _inside(region, pixels)
    width, channels = region.width, pixels.shape[2]
    start = uniform((len(pixels), width, channels), (*seed, 0)).sub(0.5).sign().to(pixels)
    place = uniform((queries, len(pixels)), (*seed, 1))
    signs = uniform((queries, len(pixels), 1, channels), (*seed, 2)).sub(0.5).sign().to(pixels)
    t = torch.arange(width)
    parts = []
    for first in range(0, len(pixels), batch_size):
        rows = slice(first, first + batch_size)
        x, y, s = pixels[rows], labels[rows], start[rows]
        predicted, before = _margin(logits(x), y)
        best, part, after = x[:, region.here].clone(), s, before.clone()
        reached = torch.full_like(before, -math.inf)  # the margin of s, which may be below that of the untouched image
        for query in range(queries + 1):
            left = torch.nonzero(predicted == y)[:, 0]
            if not len(left):
                break
            if query:
                block = math.ceil(width * 0.5 ** (1 + (query - 1) / queries * math.log2(width)))
                from_ = (place[query - 1, rows] * (width - block + 1)).floor()
                here = (t >= from_[:, None]) & (t < from_[:, None] + block)
                part = torch.where(here[:, :, None].to(x.device), signs[query - 1, rows], s)
            moved = (x[left, region.here] + epsilon * part[left]).clamp(0, 1)
            says, margin = _margin(logits(replaced(x[left], region, moved)), y[left])
            kept, better = margin > reached[left], margin > after[left]
            s[left[kept]], reached[left[kept]] = part[left][kept], margin[kept]
            best[left[better]], after[left[better]], predicted[left[better]] = (
                moved[better],
                margin[better],
                says[better],
            )
        parts.append((replaced(x, region, best), predicted, before, after))
    return Attacked(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _margin(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The class predicted, and the largest other logit minus that of y: above zero where the class is not y."""
    out = out.float()
    own = F.one_hot(y, out.shape[1]).bool()
    return out.argmax(1), out.masked_fill(own, -math.inf).amax(1) - out[own]


def slopes(
    logits: Logits, pixels: Float[Tensor, "n length channels"], labels: Int64[Tensor, " n"], batch_size: int = 64
) -> Float[Tensor, "n length channels"]:
    """The gradient of each image's own cross-entropy to its pixels, which PGD begins with."""
    found = []
    for first in range(0, len(pixels), batch_size):
        x, y = pixels[first : first + batch_size], labels[first : first + batch_size]
        whole = Region(0, x.shape[1])
        slope = _look(logits, x, x, whole, y, False, gradient=True).gradient
        assert slope is not None
        found.append(slope)
    return torch.cat(found)


def _inside(region: Region, pixels: Tensor) -> None:
    if region.stop > pixels.shape[1]:
        raise UserError(f"region {region} is not within the {pixels.shape[1]} pixels of an image")
