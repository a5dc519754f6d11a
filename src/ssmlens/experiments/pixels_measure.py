"""What is measured of a classifier of pixel sequences: the class it predicts, image by image, clean and under every attack.

    clean               the images as they are
    noise 248:256 #0    noise in place of a region; draw 0
    target 192:256 =7   the region from random images of class 7, for the images of other classes (BLANK for its own)
    pgd 192:256 ~0.03   the gradient attack with that ε in a region, for the first images; pgd … ×4: with four times the steps
    signs 192:256 ~0.03 ± ε at random in its stead
    search 192:256 ~0.03   an attack of the same size that asks for no gradient (tasks/pixels.py)
    slope 192:256       clean; with it, the share of exact zeros in the loss's gradient to these pixels, and its mean size

Everything else (accuracies, differences, success rates, intervals) is computed from these predictions, paired by image.
A prediction is on disk when its condition is done; with `resume` it is not made again.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.tasks import pixels as attacks
from ssmlens.tasks.images import to_unit
from ssmlens.tasks.pixels import PGD, Region

BLANK = 255  # no prediction: an image of the target class
HARDER = 4  # times the steps, to see whether the gradient attack had finished
_NOISE, _DONOR, _START, _SIGNS, _SEARCH = range(5)  # the second number of a seed

Advance = Callable[[float], None]


def key(kind: str, region: Region, which: str = "") -> str:
    return f"{kind} {region.start}:{region.stop}{f' {which}' if which else ''}"


@dataclass(frozen=True)
class Plan:
    """Which attacks. draws: of the noise; classes: targets; images: how many the gradient attack is tried on, which costs 3 · steps passes
    for each; hardest: also what checks it: more steps, ε = 1 in each region and on whole images, and `queries` without gradients."""

    noise: tuple[Region, ...] = ()
    draws: int = 1
    target: tuple[Region, ...] = ()
    classes: tuple[int, ...] = ()
    gradient: tuple[Region, ...] = ()
    epsilons: tuple[float, ...] = ()
    steps: int = 20
    images: int = 200
    queries: int = 100
    hardest: bool = False
    seed: int = 0

    def work(self, n: int) -> float:
        """Passes of an image through the model, backward counted twice, all in all."""
        noise, target = len(self.noise) * self.draws, len(self.target) * len(self.classes)
        few = min(self.images, n)
        signs = len(self.gradient) * len(self.epsilons) * few
        found = n * (1 + noise + target) + signs + (3 * few if self.gradient else 0)
        if self.checked:
            found += len(self.gradient) * _half(few) * (self.queries + 2)
        return found + sum(count * _passes(attack) for *_, attack, count in _gradients(self, 1, n))

    @property
    def checked(self) -> bool:
        return self.hardest and bool(self.gradient) and bool(self.epsilons)

    @property
    def middle(self) -> float:
        """The ε at which the gradient attack is checked."""
        return self.epsilons[len(self.epsilons) // 2]


class Predictions:
    """Predictions by condition, and what the gradient attack did to the loss, in one JSON file. path None: nothing is kept.

    identity: what must be the same on resume. Raises UserError where the file is another measurement's, or holds one and resume is
    False."""

    def __init__(
        self, path: Path | None = None, identity: Mapping[str, Any] | None = None, resume: bool = True
    ) -> None:
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity or {})))
        self.found: dict[str, UInt8[np.ndarray, " n"]] = {}
        self.losses: dict[str, list[float]] = {}
        if path is None or not path.exists():
            return
        if not resume:
            raise UserError(f"{path.parent} holds a measurement already: --resume, or another --out")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            there = dict(tree["identity"])
            self.found, self.losses = unpacked(tree), dict(tree["losses"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is damaged ({e}): remove it, or choose another --out") from None
        changed = [k for k in sorted({*there, *self.identity}) if there.get(k) != self.identity.get(k)]
        if changed:
            raise UserError(
                f"{path.parent} holds another measurement: {', '.join(changed)} differ; choose another --out"
            )

    def put(self, name: str, predicted: np.ndarray, losses: list[float] | None = None) -> None:
        self.found[name] = predicted.astype(np.uint8)
        if losses is not None:
            self.losses[name] = losses
        if self.path is not None:
            files.write(self.path, json.dumps({"identity": self.identity, **self.packed()}) + "\n")

    def packed(self) -> dict[str, Any]:
        """JSON-able: {"predictions": {condition: base64 of a byte an image}, "losses": {condition: numbers}}."""
        return {
            "predictions": {k: base64.b64encode(v.tobytes()).decode() for k, v in self.found.items()},
            "losses": self.losses,
        }


def unpacked(tree: Mapping[str, Any]) -> dict[str, UInt8[np.ndarray, " n"]]:
    """The predictions of what `Predictions.packed` gave."""
    return {k: np.frombuffer(base64.b64decode(v, validate=True), np.uint8) for k, v in tree["predictions"].items()}


def measure(
    model: nn.Module,
    pixels: UInt8[np.ndarray, "n length channels"],
    labels: Int64[np.ndarray, " n"],
    plan: Plan,
    store: Predictions,
    *,
    batch_size: int = 128,
    advance: Advance = lambda passes: None,
) -> Predictions:
    """Every condition of the plan that is not in the store yet. model: Classifier or anything whose output has .logits.

    Raises UserError where the model gives no finite numbers. advance: is told the passes made, for a bar."""
    device = next(model.parameters()).device
    few = min(plan.images, len(labels))

    def logits(x: Tensor) -> Tensor:
        out: Tensor = model(x.to(device)).logits
        return out

    def first(count: int) -> tuple[Tensor, Tensor]:
        return to_unit(pixels[:count]).to(device), torch.from_numpy(labels[:count]).to(device)

    @torch.no_grad()
    def predict(change: Callable[[Tensor, slice], Tensor], places: np.ndarray) -> np.ndarray:
        """Of the images at `places`, a batch at a time, each changed first."""
        done = []
        for start in range(0, len(places), batch_size):
            now = slice(start, start + batch_size)
            out = logits(change(to_unit(pixels[places[now]]), now))
            if not bool(torch.isfinite(out).all()):
                raise UserError("the model answers with NaN or infinity: it cannot be attacked")
            done.append(out.argmax(1).cpu().numpy())
        return np.concatenate(done)

    everything, channels = np.arange(len(labels)), pixels.shape[2]
    with ready(model):
        for name in _missing(store, "clean"):
            store.put(name, predict(lambda x, now: x, everything))
        advance(len(labels))
        for region in plan.noise:
            for draw in range(plan.draws):
                for name in _missing(store, key("noise", region, f"#{draw}")):
                    seed = (plan.seed, _NOISE, draw, region.start)
                    noise = attacks.normal((len(labels), region.width, channels), seed)
                    store.put(name, predict(_replacing(region, noise), everything))
                advance(len(labels))
        for target in plan.classes if plan.target else ():
            # the same donor whatever the region: leading and trailing pixels come from one image
            victims = np.flatnonzero(labels != target)
            chosen = donors(labels, target, plan.seed)[victims]
            for region in plan.target:
                for name in _missing(store, key("target", region, f"={target}")):
                    predicted = np.full(len(labels), BLANK, np.uint8)
                    content = to_unit(pixels[chosen][:, region.here])
                    predicted[victims] = predict(_replacing(region, content), victims)
                    store.put(name, predicted)
                advance(len(labels))
        for name, region, attack, count in _gradients(plan, pixels.shape[1], len(labels)):
            for missing in _missing(store, name):
                start = (plan.seed, _START, region.start)
                found = attacks.pgd(logits, *first(count), region, attack, seed=start, batch_size=batch_size)
                before, after = found.before, found.after
                rose = [float(before.mean()), float(after.mean()), float((after > before).float().mean())]
                store.put(missing, found.predicted.cpu().numpy(), rose)
            advance(count * _passes(attack))
        for region in plan.gradient:
            signs = attacks.uniform((few, region.width, channels), (plan.seed, _SIGNS, region.start)).sub(0.5).sign()
            for epsilon in plan.epsilons:
                for name in _missing(store, key("signs", region, f"~{epsilon:.6g}")):
                    moved = (to_unit(pixels[:few, region.here]) + epsilon * signs).clamp(0, 1)
                    store.put(name, predict(_replacing(region, moved), everything[:few]))
                advance(few)
        if any(_missing(store, key("slope", region)) for region in plan.gradient):
            size = attacks.slopes(logits, *first(few), batch_size=batch_size).abs()
            for region in plan.gradient:
                part = size[:, region.here]
                store.put(
                    key("slope", region),
                    store.found["clean"][:few],
                    [float((part == 0).float().mean()), float(part.mean())],
                )
        advance(3 * few if plan.gradient else 0)
        for region in plan.gradient if plan.checked else ():
            for name in _missing(store, key("search", region, f"~{plan.middle:.6g}")):
                start = (plan.seed, _SEARCH, region.start)
                tried = attacks.search(
                    logits, *first(_half(few)), region, plan.middle, plan.queries, seed=start, batch_size=batch_size
                )
                store.put(name, tried.predicted.cpu().numpy())
            advance(_half(few) * (plan.queries + 2))
    return store


def donors(labels: Int64[np.ndarray, " n"], target: int, seed: int) -> Int64[np.ndarray, " n"]:
    """Whose pixels each image gets in the target attack of a plan of that seed."""
    return attacks.donors(labels, target, (seed, _DONOR, target))


def _gradients(plan: Plan, length: int, n: int) -> Iterator[tuple[str, Region, PGD, int]]:
    """Condition, region, attack, and on how many images. More steps and no bound are tried on a quarter of them."""
    few = min(plan.images, n)
    quarter = max(1, few // 4)
    everywhere = PGD(1.0, plan.steps)
    for region in plan.gradient:
        for epsilon in plan.epsilons:
            yield key("pgd", region, f"~{epsilon:.6g}"), region, PGD(epsilon, plan.steps), few
        if plan.checked:
            epsilon = plan.middle
            # the same step size: the way is that of the shorter attack, and goes on
            hard = PGD(epsilon, HARDER * plan.steps, PGD(epsilon, plan.steps).alpha)
            yield key("pgd", region, f"~{epsilon:.6g} ×{HARDER}"), region, hard, quarter
            yield key("pgd", region, "~1"), region, everywhere, quarter
    if plan.checked:
        yield key("pgd", Region(0, length), "~1"), Region(0, length), everywhere, quarter


def _half(few: int) -> int:
    return max(1, few // 2)


def _passes(attack: PGD) -> int:
    return 3 * attack.steps + 2


def _missing(store: Predictions, name: str) -> list[str]:
    """The condition, if it is not measured yet."""
    return [] if name in store.found else [name]


def _replacing(region: Region, content: Tensor) -> Callable[[Tensor, slice], Tensor]:
    return lambda x, now: attacks.replaced(x, region, content[now])


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients to parameters; afterwards as before."""
    training, wanted = model.training, [p.requires_grad for p in model.parameters()]
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with flushed():
            yield
    finally:
        model.train(training)
        for p, before in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(before)


@contextmanager
def flushed() -> Iterator[None]:
    """Subnormal numbers are zeros. The gradient of a class token fades into them along the sequence, and they cost processors ten
    times the time."""
    before = not bool((torch.full((1,), 1e-40) * 1.0 > 0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
