"""One measurement of one model as a job of a sweep, kept on disk; and what several initialisations of the same model say together.

    RUN/found.npz     what the lens measured (`ssmlens.lens.store`)       RUN/result.json    what of it the record needs beside

Initialisations are the independent samples of a number at initialisation, sequences those of a trained model.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmlens import files
from ssmlens.experiments.base import Request
from ssmlens.experiments.figures.models import Model, build, tokens
from ssmlens.lens import influence, smoothing, transitions
from ssmlens.lens.decay import Fit, fit_decay
from ssmlens.lens.floor import Floor
from ssmlens.lens.influence import Influence
from ssmlens.lens.smoothing import Smoothing
from ssmlens.lens.store import pack, unpack
from ssmlens.results import Value
from ssmlens.training import sweep, sweep_provenance
from ssmlens.training.schedulers import Report


@dataclass(frozen=True)
class Plan:
    """What is measured of a model. probes: of influence. pairs: tokens that sharpness compares at most."""

    measure: str
    length: int
    sequences: int
    probes: int = 8
    pairs: int = 1024


@dataclass(frozen=True)
class Done:
    """The jobs of a figure, finished: what was measured of each model, seed by seed, in the order of the models."""

    found: dict[str, list[Any]]
    models: dict[str, Model]
    results: dict[str, dict[str, Any]]
    seconds: float
    made_by: list[str]

    def names(self, *kinds: str, recurrent: bool | None = None) -> list[str]:
        """Of the models of some kinds; recurrent: only those that have diagonal transitions, or only the others."""
        return [
            name for name, m in self.models.items()
            if m.kind in kinds and recurrent in (None, self.results[name]["recurrent"])
        ]  # fmt: skip

    def notes(self) -> list[str]:
        losses = [f"{name} {self.results[name]['loss']:.2f}" for name in self.models if "loss" in self.results[name]]
        return [
            *([f"Loss on what the trained models read (nats a token): {', '.join(losses)}."] if losses else []),
            f"{len(self.models)} models, {self.seconds / 60:.1f} core-minutes.",
            *(f"Measured by {o}." for o in self.made_by),
        ]


def run(figure: str, request: Request, models: Sequence[Model], plan_of: Any) -> Done:
    """plan_of: from a model to its Plan. Figures that ask for the same measurement in the same directory share it. Raises SweepError where a job fails."""
    ids = {m: f"{plan_of(m).measure}-{m.id}" for m in models}
    jobs = [
        (ids[m], {"item": "figures", "scale": request.scale, "model": asdict(m), "plan": asdict(plan_of(m)), "data": request.data}) for m in models
    ]  # fmt: skip
    results = sweep(
        jobs, request.out, work, processes=request.processes, threads_per_process=1, resume=request.resume, progress=request.progress,
        title=f"{figure}, {request.scale}",
    )  # fmt: skip
    found: dict[str, list[Any]] = {}
    for m in models:
        place = request.out / "runs" / ids[m] / "found.npz"
        found.setdefault(m.name, []).append(unpack(place.read_bytes()) if place.exists() else results[ids[m]])
    origin = sweep_provenance(request.out, results).values()
    made_by = sorted({f"{p['commit'] or p['ssmlens']}, {p['device']}, {p['threads']} thread(s)" for p in origin if p})
    seconds = sum(r["seconds"] for r in results.values())
    return Done(found, {m.name: m for m in models}, {m.name: results[ids[m]] for m in models}, seconds, made_by)


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One model, in a process of its own."""
    begun = time.process_time()
    model, plan, data = Model(**config["model"]), Plan(**config["plan"]), config["data"]
    subject = build(model, directory.parents[1] / "trained", report)
    read = tokens(model, subject, data, plan.length, plan.sequences)
    told: dict[str, Any] = {
        "parameters": sum(p.numel() for p in subject.model.parameters()), "layers": len(subject.blocks), "sequences": len(read), "length": plan.length,
        "recurrent": bool(subject.recurrent),
    }  # fmt: skip
    if model.trained:
        with subject.still(), torch.no_grad():
            told["loss"] = float(subject.model(subject.tokens(read), labels=subject.tokens(read)).loss)
    if plan.measure == "transitions":
        told |= summary(transitions.measure(subject, read))
    else:
        measured: Any
        if plan.measure == "influence":
            measured = influence.measure(subject, read, probes=plan.probes, seed=model.seed)
        else:
            measured = smoothing.measure(subject, read, states=True, exact_up_to=plan.pairs, seed=model.seed)
        files.write(directory / "found.npz", pack(measured))
    return {**told, "seconds": time.process_time() - begun}


def summary(found: transitions.Transitions) -> dict[str, Any]:
    """What Figure 6 needs: the state channels themselves are hundreds of thousands."""
    ranges = np.concatenate([layer.ranges for layer in found.layers if layer.learned.any()], axis=1)
    return {
        "below": [[float((row <= t).mean()) for t in transitions.THRESHOLDS] for row in ranges],
        "by_layer": [
            found.share_below(0.5, i).value if layer.learned.any() else None for i, layer in enumerate(found.layers)
        ],
        "median_range": [float(x) for x in np.median(ranges, axis=1)],
        "channels": int(ranges.shape[1]),
        "pinned": list(found.pinned()),
    }


# ---- several initialisations of one model ----


def joined(name: str, parts: Sequence[Influence]) -> Influence:
    """All sequences of all initialisations as those of one: for pictures. Its fit is that of the pooled curve."""
    squares = np.concatenate([p.by_depth for p in parts], axis=1)
    counts = np.concatenate([p.counts for p in parts])
    floor = max((p.floor for p in parts), key=lambda f: f.value)
    assert isinstance(floor, Floor)
    return replace(
        parts[0], name=name, by_depth=squares, counts=counts, floor=floor, fit=fit_decay(squares[0], counts, floor=floor.value, seed=parts[0].seed), cost=None,
    )  # fmt: skip


def joined_smoothing(name: str, parts: Sequence[Smoothing]) -> Smoothing:
    def all_of(what: str) -> dict[str, Any]:
        return {stream: np.concatenate([getattr(p, what)[stream] for p in parts]) for stream in getattr(parts[0], what)}

    return replace(
        parts[0], name=name, distance=all_of("distance"), norm=all_of("norm"), sampling_error=all_of("sampling_error")
    )


def samples(parts: Sequence[Influence]) -> list[Influence]:
    """The independent ones: initialisations where there are several, else the sequences of the one model, each by itself."""
    if len(parts) > 1:
        return list(parts)
    one = parts[0]
    return [
        replace(one, by_depth=one.by_depth[:, i : i + 1], counts=one.counts[i : i + 1],
                fit=fit_decay(one.squares[i : i + 1], one.counts[i : i + 1], floor=one.floor.value, seed=one.seed))
        for i in range(one.n_sequences)
    ]  # fmt: skip


def fits(parts: Sequence[Influence]) -> list[Fit]:
    return [s.fit for s in samples(parts) if s.fit is not None]


def said(value: Value, unit: str = "") -> str:
    """A number with its 95 % interval."""
    interval = value.interval()
    between = (
        "one sample, no interval"
        if interval is None
        else f"95 % interval {interval[0]:.3g} to {interval[1]:.3g}, n = {value.n}"
    )
    return f"{value.value:.3g}{unit and ' ' + unit} ({between})"
