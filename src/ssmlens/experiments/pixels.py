"""Tables 1 and 3, Figures 3 and 10: classifiers of pixel sequences under noise, target and gradient attack, beside the paper's numbers.

One set of runs and one page for all of them: a run trains a classifier (pixels_models.py) and measures everything on it (pixels_measure.py).

    DIR/images/KEY.images    the images, as small and as many as the scale has them        DIR/runs/ID/model    the trained classifier
    DIR/trained/KEY.json     what classifiers trained elsewhere (`--model`) answer
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError
from ssmlens.experiments import pixels_measure, pixels_record, pixels_trained
from ssmlens.experiments.base import Item, Request, choose
from ssmlens.experiments.pixels_images import chosen, shrunk
from ssmlens.experiments.pixels_measure import Predictions
from ssmlens.experiments.pixels_models import SCALES, Model, Scale, build, classifier, names, plan, training
from ssmlens.experiments.pixels_runs import Runs
from ssmlens.results import Record
from ssmlens.tasks.images import ImageConfig, ImageSet, ImageStream, digits, read
from ssmlens.tasks.images.store import read as read_store
from ssmlens.tasks.images.store import write as write_store
from ssmlens.training import sweep, sweep_provenance, train
from ssmlens.training.schedulers import Report


def run(request: Request) -> Record:
    choose("scale", request.scale, SCALES)
    scale = SCALES[request.scale]
    for name in request.variants or ():
        choose("variant", name, names())
    models = [Model.of(name) for name in request.variants or scale.models]
    seeds = {m.name: list(range(request.seeds or scale.models.get(m.name, 1))) for m in models}
    images = prepared(scale, request)
    elsewhere = pixels_trained.opened(request.models or (), request.data or "digits", scale)
    known = {"name": images.name, "sha256": images.sha256}
    sizes = {k: v for k, v in asdict(scale).items() if k != "models"}
    jobs = [
        (_id(m, s), {"item": "pixels", "scale": request.scale, "sizes": sizes, "images": known, "model": m.name, "seed": s})
        for s in range(max(map(len, seeds.values()))) for m in models if s in seeds[m.name]
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume,
        progress=request.progress, title=f"pixels, {request.scale}", keep=True,
    )  # fmt: skip
    labels = images.test.labels
    found: dict[str, Runs] = {}
    for m in models:
        of = [results[_id(m, s)] for s in seeds[m.name]]
        found[m.name] = Runs.of(m.label, labels, [pixels_measure.unpacked(r) for r in of], [r["losses"] for r in of])
    record = pixels_record.record(
        request.scale, images, found, {m.name: [results[_id(m, s)] for s in seeds[m.name]] for m in models},
        plan(scale, images), sweep_provenance(request.out, results),
    )  # fmt: skip
    for group in elsewhere:
        measured = pixels_trained.measured(group, request.out / "trained", request.progress)
        record = pixels_trained.beside(record, group, measured)
    return record


def _id(model: Model, seed: int) -> str:
    return f"{model.name}-seed{seed}"


def prepared(scale: Scale, request: Request) -> ImageSet:
    """The images as this scale has them, written where its runs find them. Raises UserError where the source has too few or other ones."""
    if request.data is None and request.scale != "smoke":
        raise UserError(
            "name the images with --data: CIFAR-10 as a directory or an archive (docs/images.md), or datasets:uoft-cs/cifar10"
        )
    small = shrunk(digits() if request.data is None else read(request.data), scale.side)
    kept = None if scale.train_images is None else scale.train_images + scale.validation_images
    images = chosen(small, kept, scale.test_images)
    if not (place := _place(request.out, images.sha256)).exists():
        write_store(place, images)
    return images


def _place(out: Path, sha256: str) -> Path:
    return out / "images" / f"{sha256[:32]}.images"


def streamed(scale: Scale, seed: int, images: ImageSet) -> ImageStream:
    """The batches of one run; its `validation` are images to draw the learning curve of."""
    return ImageStream(
        ImageConfig(
            source="", batch_size=scale.batch_size, train_images=scale.train_images, validation_images=scale.validation_images, seed=seed
        ),
        images,
    )  # fmt: skip


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One run, in a process of its own: training, then everything that is measured. Resumes from what is in `directory`."""
    import torch

    scale, model, seed = SCALES[config["scale"]], Model.of(config["model"]), int(config["seed"])
    images = read_store(_place(directory.parents[1], config["images"]["sha256"]))
    if images is None:
        raise UserError("the images of this run are gone from DIR/images: start again with the same --data")
    stream = streamed(scale, seed, images)
    net = build(classifier(scale, model, images), seed, scale.length)
    settings = training(scale, seed, stream.batches_per_epoch)
    labels = images.test.labels

    def evaluate(net: torch.nn.Module) -> dict[str, float]:
        device = next(net.parameters()).device
        right = [net(b.tokens.to(device)).logits.argmax(1).cpu() == b.targets for b in stream.validation()]
        return {"accuracy": float(torch.cat(right).float().mean())}

    with pixels_measure.flushed():
        result = train(
            net, stream, settings, directory / "training", evaluate=evaluate, resume=True, identity=config["images"],
            optimizer_groups=net.parameter_groups(settings.weight_decay), progress=lambda share: report(0.7 * share),
        )  # fmt: skip
    if not (directory / "model").exists():
        _save(net, directory / "model", scale.side)
    done, attacks = 0.0, plan(scale, images)

    def advance(passes: float) -> None:
        nonlocal done
        done += passes
        report(0.7 + 0.3 * done / attacks.work(len(labels)))

    found = pixels_measure.measure(
        net, images.test.pixels, labels, attacks, Predictions(directory / "predictions.json", {"images": config["images"]}), advance=advance
    )  # fmt: skip
    return {
        **found.packed(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": result.step,
        "seconds": result.seconds,
        "accuracy": [[row["step"], row["evaluation"]["accuracy"]] for row in result.evaluations],
        "loss": [[row["step"], row["loss"]] for row in result.history[:: max(1, len(result.history) // 40)]],
    }


def _save(net: Any, directory: Path, side: int) -> None:
    """The classifier, and beside it, in data.json, how small its images were: `ssmlens attack` makes them as small."""
    from transformers.utils import logging

    from ssmlens import files

    logging.disable_progress_bar()
    with files.replace_directory(directory) as temporary:
        net.save_pretrained(temporary)
        files.write(Path(temporary) / "data.json", json.dumps({"task": "images", "side": side}) + "\n")


ITEM = Item(
    name="pixels", title="classifiers of pixel sequences: a region corrupted, target attack, gradient attack",
    source="Tables 1 and 3, Figures 3 and 10", scales=tuple(SCALES), variants=names(), run=run, aliases=("table1", "table3", "figure3", "figure10"),
    takes=("data", "model"),
)  # fmt: skip
