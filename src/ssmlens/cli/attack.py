"""`ssmlens attack CHECKPOINT [CHECKPOINT ...] --images SOURCE`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError, nearest

KINDS = ("noise", "target", "pgd")
EPSILONS = ("2/255", "8/255", "32/255")


def run(
    checkpoints: list[str], source: str, kinds: list[str], regions: list[str], targets: list[str], epsilons: list[str], steps: int, draws: int,
    side: int | None, limit: int, gradient_limit: int, batch_size: int, seed: int, device: str, resume: bool, out: Path | None, json: bool,
) -> None:  # fmt: skip
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown kind of attack {kind!r}{nearest(kind, list(KINDS))} (known: {', '.join(KINDS)})")
    sizes = tuple(sorted({_epsilon(text) for text in epsilons or EPSILONS}))

    from ssmlens.cli import devices
    from ssmlens.cli.images import read_as_trained
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import pixels_attack
    from ssmlens.experiments.pixels import chosen
    from ssmlens.experiments.pixels_measure import Predictions, measure
    from ssmlens.experiments.pixels_runs import Runs
    from ssmlens.lens.store import fingerprint
    from ssmlens.models.pretrained import load

    on, names = devices.chosen(device), _names(checkpoints)
    images = chosen(read_as_trained(source, checkpoints, side), test=limit)
    models = {name: load(path) for name, path in zip(names, checkpoints, strict=True)}
    for name, model in models.items():
        _fits(name, model, images)
    plan = _plan(images, kinds or list(KINDS), regions, targets, sizes, steps, draws, gradient_limit, seed)
    where = directory(out, "attack")
    identity = {"images": {"name": images.name, "sha256": images.sha256}}
    found: dict[str, Runs] = {}
    with _bar(not json, len(models) * plan.work(len(images.test))) as advance:
        for i, (name, model) in enumerate(models.items(), 1):
            own = {**identity, "model": fingerprint(model), "plan": asdict(plan)}
            store = Predictions(where / "measured" / f"{i}.json", own, resume)
            measure(
                model.to(on), images.test.pixels, images.test.labels, plan, store, batch_size=batch_size, advance=advance
            )  # fmt: skip
            found[name] = Runs.of(name, images.test.labels, [store.found], [store.losses])
            model.cpu()
    record = pixels_attack.record(
        found, images, plan, identity | {"models": {n: fingerprint(m) for n, m in models.items()}}
    )
    finish(record, where, json)


def _epsilon(text: str) -> float:
    """Of "8/255" or "0.03"."""
    above, _, below = text.partition("/")
    try:
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--eps is a change of pixels in [0, 1], such as 8/255 or 0.03, not {text!r}") from None
    if not 0 < value <= 1:
        raise UserError(
            f"--eps is a change of pixels in [0, 1], such as 8/255 or 0.03; {text} is not above 0 and at most 1"
        )
    return value


def _names(checkpoints: list[str]) -> list[str]:
    """Short names for the page. Trained models lie in RUN/model, where it is the run that tells them apart."""
    from ssmlens.models.pretrained import tokens

    return tokens.names(
        [str(Path(c).resolve().parent) if Path(c).resolve().name == "model" else c for c in checkpoints]
    )


def _fits(name: str, model: Any, images: Any) -> None:
    from ssmlens.models import Classifier

    if not isinstance(model, Classifier):
        raise UserError(f"{name} is no classifier of images (`ssmlens needle` and `diagnose` are for language models)")
    a = model.config.architecture
    if a.d_input != images.channels:
        raise UserError(f"{name} reads pixels of {a.d_input} channels, {images.name} has {images.channels}")
    if len(images.classes) > 255:
        raise UserError(
            f"{images.name} has {len(images.classes)} classes; attack keeps its predictions in a byte: at most 255"
        )
    if a.n_classes != len(images.classes):
        raise UserError(f"{name} knows {a.n_classes} classes, {images.name} has {len(images.classes)}")
    tokens = images.length + (a.pooling == "class_token")
    if a.positions is not None and a.positions < tokens:
        raise UserError(
            f"{name} has positions for {a.positions} tokens, images of {images.height} × {images.width} pixels are {tokens}: make them smaller (--side)"
        )


def _plan(
    images: Any, kinds: list[str], regions: list[str], targets: list[str], epsilons: tuple[float, ...], steps: int, draws: int,
    gradient_limit: int, seed: int,
) -> Any:  # fmt: skip
    from ssmlens.experiments.pixels import scaled_regions
    from ssmlens.experiments.pixels_measure import Plan
    from ssmlens.tasks.pixels import Region

    own = tuple(dict.fromkeys(Region.parse(r, images.length) for r in regions))
    noise, target, gradient = scaled_regions(images.length)
    known = {name: i for i, name in enumerate(images.classes)}
    for name in targets:
        if name not in known:
            raise UserError(f"no class {name!r}{nearest(name, list(known))} (known: {', '.join(known)})")
    return Plan(
        noise=(own or noise) if "noise" in kinds else (), draws=draws, target=(own or target) if "target" in kinds else (),
        classes=tuple(known[t] for t in dict.fromkeys(targets)) or tuple(known.values()), gradient=(own or gradient) if "pgd" in kinds else (),
        epsilons=epsilons, steps=steps, images=gradient_limit, hardest=True, seed=seed,
    )  # fmt: skip


@contextmanager
def _bar(shown: bool, total: float) -> Iterator[Callable[[float], None]]:
    from ssmlens.progress import bars

    if not shown:
        yield lambda passes: None
        return
    with bars("{task.percentage:>3.0f}%") as progress:
        task = progress.add_task("attack", total=total)
        yield lambda passes: progress.advance(task, passes)
