"""One measurement of one model as a job of a sweep, kept on disk; and what several initialisations of the same model say together.

    RUN/found.npz     what the lens measured (`ssmlens.lens.store`)       RUN/result.json    what of it the record needs beside

Initialisations are the independent samples of a number at initialisation: each is one number, however many texts it read. A trained model is
there once, so its texts are the samples. A number of a curve is that of the curve pooled over the texts, for both alike; for one model its error is
the jackknife's over its n texts:

    stderr² = (n - 1)/n · Σ_i (x without text i - their mean)²
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ssmlens import files
from ssmlens.experiments.base import Outcome, Request, holm, side
from ssmlens.experiments.figures.models import BESIDE, Model, build, tokens
from ssmlens.lens import influence, smoothing, transitions
from ssmlens.lens.decay import fit_decay
from ssmlens.lens.influence import Influence
from ssmlens.lens.smoothing import Smoothing
from ssmlens.lens.store import pack, unpack
from ssmlens.models.pretrained import packaged
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


class Couple(NamedTuple):
    """A Mamba and a transformer of its size. when: "at initialisation" or "trained". paired: they are known to have read the same texts."""

    one: str
    other: str
    when: str
    paired: bool

    @property
    def trained(self) -> bool:
        return self.when == "trained"

    @property
    def note(self) -> str:
        """For the end of a sentence; empty where the transformer's name says it."""
        return "" if self.other.endswith("(trained here)") else f" ({self.when})"


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

    def over(self, name: str) -> str:
        """What the samples of its numbers are."""
        return "initialisations" if len(self.found[name]) > 1 else "texts read by this one model"

    def over_both(self, couple: Couple) -> str:
        several = len(self.found[couple.one]) > 1
        return "initialisations" if several else "texts, the same for both" if couple.paired else "texts"

    def couples(self) -> list[Couple]:
        found = []
        for name in self.names("mamba"):
            like = f"Pythia-{BESIDE[self.models[name].of]}"
            if like in self.found:
                found.append(Couple(name, like, "at initialisation", self._same_texts(name, like)))
        others = self.names("trained transformer") + self.names("loaded", recurrent=False)
        return found + [
            Couple(a, b, "trained", self._same_texts(a, b))
            for a, b in zip(self.names("loaded", recurrent=True), others, strict=False)
        ]

    def _same_texts(self, one: str, other: str) -> bool:
        """Published sizes read the same words, packaged models (and what was trained beside them) the same bytes; of others it is not known."""
        told, models = [self.results[n] for n in (one, other)], [self.models[n] for n in (one, other)]
        alike = all(told[0].get(key) == told[1].get(key) for key in ("length", "sequences"))
        return alike and (all(m.kind in ("mamba", "pythia") for m in models) or all(m.of in packaged() for m in models))

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


def estimates(
    statistic: Callable[..., Sequence[float] | None], *models: Sequence[Influence], paired: bool = True
) -> list[Value]:
    """Numbers of the pooled curve of one model, or of the curves of several at once, with their standard errors; none where there are none.

    models: of each its initialisations, as many of all; or each alone, and then the jackknife over its texts. paired: several models alone have
    read the same ones, so that a text is left out of all at once. statistic: from one Influence of every model to the numbers, or None."""
    assert len({len(parts) for parts in models}) == 1
    if len(models[0]) > 1:
        each = [found for of in zip(*models, strict=True) if (found := statistic(*of)) is not None]
        return [Value.mean(column) for column in zip(*each, strict=True)]
    alone = [parts[0] for parts in models]
    whole = statistic(*alone)
    if whole is None:
        return []
    everyone = set(range(len(alone)))
    variance = np.zeros(len(whole))
    for which in [everyone] if paired else [{k} for k in everyone]:
        n = min(alone[k].n_sequences for k in which)
        left = [
            statistic(*(_without(one, i) if k in which else one for k, one in enumerate(alone)))
            for i in range(n if n > 1 else 0)
        ]
        rows = np.array([row for row in left if row is not None], dtype=float)
        if n < 2 or len(rows) < n:
            return [Value(value=float(x), n=n) for x in whole]
        variance += (n - 1) / n * np.square(rows - rows.mean(0)).sum(0)
    n = min(one.n_sequences for one in alone)
    return [Value(value=float(x), stderr=math.sqrt(v), n=n) for x, v in zip(whole, variance, strict=True)]


def _without(one: Influence, i: int) -> Influence:
    squares, counts = np.delete(one.by_depth, i, axis=1), np.delete(one.counts, i, axis=0)
    return _refitted(replace(one, by_depth=squares, counts=counts))


def _refitted(one: Influence) -> Influence:
    return replace(one, fit=fit_decay(one.squares, one.counts, floor=one.floor.value, seed=one.seed), cost=None)


def joined(name: str, parts: Sequence[Influence]) -> Influence:
    """For pictures: every initialisation, pooled over its texts, as one sequence, so that bands are over initialisations; one model as it is.
    The line is the mean of theirs, as in tables."""
    if len(parts) == 1:
        return replace(parts[0], name=name)
    squares = np.stack([p.by_depth.sum(1) for p in parts], axis=1)
    counts = np.stack([p.counts.sum(0) for p in parts])
    floor = max((p.floor for p in parts), key=lambda f: f.value)
    whole = _refitted(replace(parts[0], name=name, by_depth=squares, counts=counts, floor=floor))
    fits = [p.fit for p in parts if p.fit is not None]
    if whole.fit is None or not fits:
        return whole
    kappa, intercept = (float(np.mean([getattr(f, what) for f in fits])) for what in ("kappa", "intercept"))
    return replace(whole, fit=replace(whole.fit, kappa=kappa, intercept=intercept))


def by_sample(parts: Sequence[Smoothing], of: Callable[[Smoothing], np.ndarray]) -> np.ndarray:
    """of: from a model to one row a text. (samples, ...): initialisations, each the mean of its texts; of one model the texts."""
    return np.stack([of(p).mean(0) for p in parts]) if len(parts) > 1 else of(parts[0])


def joined_smoothing(name: str, parts: Sequence[Smoothing]) -> Smoothing:
    """For pictures and tables: every initialisation, averaged over its texts, as one sequence; one model as it is."""
    if len(parts) == 1:
        return replace(parts[0], name=name)
    distance, norm, error = {}, {}, {}
    for stream in parts[0].distance:
        distance[stream] = np.stack([p.distance[stream].mean(0) for p in parts])
        relative = np.stack([p.relative_by_sequence(stream).mean(0) for p in parts])
        # by which E over the norm is the mean of the texts' own, not the ratio of their means
        norm[stream] = np.divide(distance[stream], relative, out=np.zeros_like(relative), where=relative > 0)
        error[stream] = np.zeros_like(relative)
    return replace(parts[0], name=name, distance=distance, norm=norm, sampling_error=error)


def every(values: Sequence[Value], above: bool = True) -> tuple[Outcome, int, int]:
    """Whether all lie above zero (or below), how many clearly do, and how many clearly lie on the other side.

    It agrees where every 95 % interval does, which needs no correction; it differs where one lies on the other side by Holm's p < 0.05 over all."""
    p_values = {str(i): v.p_value() for i, v in enumerate(values)}
    adjusted = holm({i: 1.0 if p is None else p for i, p in p_values.items()})
    there = sum(side(v, above) == "agrees" for v in values)
    against = sum(
        p < 0.05 and (v.value < 0) == above for p, v in zip((adjusted[i] for i in p_values), values, strict=True)
    )
    return "differs" if against else "agrees" if there == len(values) else "undecided", there, against


ONE_TRAINING = "One training of each: another might come out the other way, so no more than undecided is said."


def capped(outcome: Outcome, trained: bool) -> Outcome:
    """Of a comparison of two models: undecided at most where each was trained once."""
    return "undecided" if trained and outcome in ("agrees", "differs") else outcome


def said(value: Value, unit: str = "") -> str:
    """A number with its 95 % interval."""
    interval = value.interval()
    between = (
        "one sample, no interval"
        if interval is None
        else f"95 % interval {interval[0]:.3g} to {interval[1]:.3g}, n = {value.n}"
    )
    return f"{value.value:.3g}{unit and ' ' + unit} ({between})"
