"""`ssmlens evaluate MODEL [MODEL ...] --images SOURCE`: how many test images a classifier gets right."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmlens.errors import UserError
from ssmlens.results import Column, Figure, Record, Series, Table, Value, provenance


@dataclass(frozen=True, eq=False)
class Found:
    """right: of every test image whether its class was found; loss: its cross-entropy, nats."""

    name: str
    right: np.ndarray
    loss: np.ndarray

    @property
    def accuracy(self) -> Value:
        return Value.mean((100 * self.right).tolist(), unit="%")

    def interval(self) -> tuple[float, float]:
        """95 % (Wilson), which stays inside 0..100 %."""
        n, p, z = len(self.right), float(self.right.mean()), 1.959963985
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def run(
    models: list[str],
    images: str,
    side: int | None,
    limit: int | None,
    batch_size: int,
    device: str,
    out: Path | None,
    json: bool,
) -> None:
    from ssmlens.cli import devices
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments.pixels_images import read_as_trained
    from ssmlens.models import Classifier
    from ssmlens.models.pretrained import load
    from ssmlens.models.pretrained.tokens import names
    from ssmlens.progress import bars
    from ssmlens.tasks.images import balanced_order

    on, where = devices.chosen(device), directory(out, "evaluate")
    found = read_as_trained(images, models, side)
    order = np.sort(balanced_order(found.test.labels)[:limit])
    results: list[Found] = []
    with bars("{task.percentage:>3.0f}%") as progress:
        for name, path in zip(names(models), models, strict=True):
            model = load(path)
            if not isinstance(model, Classifier):
                raise UserError(f"{path} is a {type(model).__name__}; evaluate is for classifiers of images")
            there = (found.channels, len(found.classes))
            if there != (model.config.d_input, model.config.n_classes):
                raise UserError(
                    f"{images} has {there[0]} channels and {there[1]} classes, {name} {model.config.d_input} and {model.config.n_classes}"
                )
            task = progress.add_task(name, total=len(order))
            results.append(
                measure(
                    name, model.to(on), found.test, order, batch_size, lambda n, task=task: progress.advance(task, n)
                )
            )
    finish(record(results, found, order, images), where, json)


def measure(name: str, model: Any, split: Any, order: np.ndarray, batch_size: int, advance: Any) -> Found:
    """Raises UserError where the model answers with NaN."""
    import torch
    from torch.nn import functional as F

    from ssmlens.tasks.images import to_unit

    right, loss = [], []
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            wanted = torch.from_numpy(split.labels[places]).to(device)
            logits = model(to_unit(split.pixels[places]).to(device)).logits
            if not bool(torch.isfinite(logits).all()):
                raise UserError(f"{name} answers these images with NaN or infinity")
            right.append((logits.argmax(-1) == wanted).cpu().numpy())
            loss.append(F.cross_entropy(logits.float(), wanted, reduction="none").cpu().numpy())
            advance(len(places))
    return Found(name, np.concatenate(right), np.concatenate(loss))


def record(results: list[Found], images: Any, order: np.ndarray, source: str) -> Record:
    labels = images.test.labels[order]
    by_class = {
        r.name: [Value.mean((100 * r.right[labels == c]).tolist(), unit="%") for c in range(len(images.classes))]
        for r in results
    }
    verdict = [
        f"{r.name}: {r.accuracy.value:.2f} % of {len(order):,} test images right (95 % interval {r.interval()[0]:.1f} to {r.interval()[1]:.1f} %); "
        f"guessing would be {100 / len(images.classes):.0f} %."
        for r in results
    ]
    verdict += [_against(results[0], other) for other in results[1:]]
    whole = Table(
        id="accuracy", title="Accuracy", columns=[Column(name="model"), Column(name="accuracy", unit="%"), Column(name="loss", unit="nats"), Column(name="images")],
        rows=[[r.name, r.accuracy, Value.mean(r.loss.tolist(), unit="nats"), len(order)] for r in results],
        method="Share of test images whose class has the largest logit, ± its standard error over images.",
    )  # fmt: skip
    classes = Table(
        id="accuracy-by-class", title="Accuracy by class", columns=[Column(name="class"), *(Column(name=r.name, unit="%") for r in results)],
        rows=[[name, *(by_class[r.name][c] for r in results)] for c, name in enumerate(images.classes)], method=whole.method,
    )  # fmt: skip
    series = [
        Series(name=r.name, x=list(images.classes), y=[v.value for v in by_class[r.name]], stderr=[v.stderr or 0.0 for v in by_class[r.name]], group=r.name, style="bar")
        for r in results
    ]  # fmt: skip
    figure = Figure(
        id="accuracy-by-class", title="Accuracy by class", x_label="class", y_label="accuracy (%)", x_scale="category", series=series, method=whole.method
    )  # fmt: skip
    name = source if source.startswith("datasets:") else Path(source).name
    return Record(
        kind="evaluation", title="Accuracy of " + ", ".join(r.name for r in results), verdict=verdict, tables=[whole, classes], figures=[figure],
        config={"images": {"name": name, "sha256": images.sha256}, "test_images": len(order)}, provenance=provenance(),
    )  # fmt: skip


def _against(a: Found, b: Found) -> str:
    """On the same images, so image by image."""
    more = Value.mean((100.0 * (b.right.astype(float) - a.right)).tolist())
    low, high = more.interval() or (-math.inf, math.inf)
    if low <= 0 <= high:
        return f"No difference between {a.name} and {b.name} can be told ({more.value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})."
    which = "more" if low > 0 else "fewer"
    return (
        f"{b.name} gets {which} right than {a.name}: {more.value:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}."
    )
