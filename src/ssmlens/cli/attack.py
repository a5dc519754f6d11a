"""`ssmlens attack CHECKPOINT [CHECKPOINT ...] --images SOURCE`."""

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
    from ssmlens.cli.output import directory, finish
    from ssmlens.experiments import pixels_attack
    from ssmlens.experiments.pixels_images import chosen, fits, read_as_trained
    from ssmlens.models.pretrained import load, tokens

    on, names = devices.chosen(device), tokens.names(checkpoints)
    images = chosen(read_as_trained(source, checkpoints, side), test=limit)
    models = {name: load(path) for name, path in zip(names, checkpoints, strict=True)}
    for name, model in models.items():
        fits(name, model, images)
    plan = _plan(images, kinds or list(KINDS), regions, targets, sizes, steps, draws, gradient_limit, seed)
    where = directory(out, "attack")
    found = pixels_attack.measured(
        models, images, plan, where / "measured", resume=resume, progress=not json, device=on, batch_size=batch_size
    )  # fmt: skip
    finish(pixels_attack.record(found, images, plan, pixels_attack.identity(models, images)), where, json)


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


def _plan(
    images: Any, kinds: list[str], regions: list[str], targets: list[str], epsilons: tuple[float, ...], steps: int, draws: int,
    gradient_limit: int, seed: int,
) -> Any:  # fmt: skip
    from ssmlens.experiments.pixels_measure import Plan
    from ssmlens.experiments.pixels_models import scaled_regions
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
