"""All measurements together: several models, the same text, one record.

    diagnose(models, inputs) → Diagnosis        .record(): tables, figures, verdict     .plot(): an overview for a notebook

Ctrl-C ends it cleanly: what is finished is returned with complete=False and says so. With `out_dir` every finished measurement is on
disk at once, so that a kill leaves the same.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ssmlens import results
from ssmlens.errors import UserError, nearest
from ssmlens.lens import comparison, context, influence, smoothing, transitions
from ssmlens.lens.context import Context
from ssmlens.lens.influence import Influence
from ssmlens.lens.progress import Bars, Progress, Silent
from ssmlens.lens.smoothing import Smoothing
from ssmlens.lens.subject import Subject
from ssmlens.lens.transitions import Transitions
from ssmlens.lens.verdict import verdict
from ssmlens.results import Cell, Column, Figure, Record, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MEASURES = ("influence", "context", "smoothing", "transitions")
Models = nn.Module | Subject | Sequence[nn.Module | Subject] | Mapping[str, nn.Module | Subject]


@dataclass(eq=False)
class Diagnosis:
    """Results by model name, in the order in which the models were given; inputs: the tokens that each read. missing: what was asked for and not finished;
    skipped: what does not apply to a model, and why."""

    subjects: list[Subject]
    config: dict[str, Any]
    seed: int
    inputs: dict[str, Tensor] = field(repr=False)
    influence: dict[str, Influence] = field(default_factory=dict)
    context: dict[str, Context] = field(default_factory=dict)
    smoothing: dict[str, Smoothing] = field(default_factory=dict)
    transitions: dict[str, Transitions] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    initial_of: dict[str, str] = field(default_factory=dict)
    title: str = "Diagnosis"
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing

    def pairs(self, done: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is compared with what: every model with the first one, and every model with itself at initialisation."""
        trained = [s.name for s in self.subjects if s.name in done and s.name not in self.initial_of]
        pairs = [(trained[0], other) for other in trained[1:]]
        return pairs + [(initial, of) for initial, of in self.initial_of.items() if initial in done and of in done]

    def paired(self, a: str, b: str) -> bool:
        """Whether both read the same sequences, so that they can be compared sequence by sequence."""
        return torch.equal(self.inputs[a].cpu(), self.inputs[b].cpu())

    def figures(self) -> list[Figure]:
        found: list[Figure] = []
        if self.influence:
            found.append(influence.figure(_list(self.influence)))
            found += [f for f in [influence.position_figure(_list(self.influence))] if f]
        if self.context:
            found.append(context.figures(_list(self.context))[0])
        if self.smoothing:
            found += smoothing.figures(_list(self.smoothing))
        if self.transitions:
            found += transitions.figures(_list(self.transitions))
        if self.context:
            found.append(context.figures(_list(self.context))[1])
        return found

    def tables(self) -> list[Table]:
        found: list[Table] = []
        if self.influence:
            found.append(influence.table(_list(self.influence)))
        if self.context:
            found.append(context.table(_list(self.context)))
        if self.smoothing:
            found.append(smoothing.table(_list(self.smoothing)))
        if self.transitions:
            found.append(transitions.table(_list(self.transitions)))
        if compared := comparison.comparisons(self):
            found.append(comparison.table(compared))
        return [*found, _models_table(self.subjects)]

    def record(self) -> Record:
        notes = [*self.notes, *self.skipped]
        if len(self.subjects) - len(self.initial_of) > 1:
            notes.append(
                "Errors are over text: another text would give other numbers. Two trainings of the same configuration would differ too."
            )
        return Record(
            kind="diagnosis", title=self.title, verdict=verdict(self), tables=self.tables(), figures=self.figures(),
            notes=notes, config=self.config, seeds=[self.seed], complete=self.complete,
            provenance=results.provenance(str(self.subjects[0].device)),
        )  # fmt: skip

    def plot(self) -> "Canvas":
        """Every figure of the record in one matplotlib figure, for a notebook; the page has them larger and with their explanations."""
        from matplotlib.figure import Figure as Canvas

        figures = self.figures()
        canvas = Canvas(figsize=(11, 3.4 * max(1, (len(figures) + 1) // 2)), layout="constrained")
        groups = list(dict.fromkeys(s.group for f in figures for s in f.series))
        for place, figure in enumerate(figures, start=1):
            axes = canvas.add_subplot((len(figures) + 1) // 2, 2, place)
            for s in figure.series:
                colour = f"C{groups.index(s.group) % 10}"
                look: dict[str, Any] = {"drawstyle": "steps-mid"} if s.style == "step" else {}
                look |= {"linestyle": "--", "linewidth": 1} if s.style == "fit" else {}
                axes.plot(s.x, s.y, color=colour, label=s.name, **look)
                if s.stderr is not None:
                    low = [y - e for y, e in zip(s.y, s.stderr, strict=True)]
                    high = [y + e for y, e in zip(s.y, s.stderr, strict=True)]
                    axes.fill_between(s.x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel=figure.x_label, ylabel=figure.y_label, xscale=figure.x_scale, yscale=figure.y_scale)
            axes.set_title(figure.title, fontsize="medium")
            axes.legend(fontsize="x-small")
        return canvas

    def __str__(self) -> str:
        return "\n".join(verdict(self))


def diagnose(
    models: Models,
    inputs: Any,
    *,
    measures: Sequence[str] = MEASURES,
    method: Literal["probes", "exact"] = "probes",
    probes: int = 8,
    targets: Literal["last"] | int | Sequence[int] = "last",
    output: Literal["hidden", "logits"] = "hidden",
    at_initialisation: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    exact_up_to: int = 1024,
    progress: Progress | bool = False,
    out_dir: str | os.PathLike[str] | None = None,
    title: str | None = None,
    config: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> Diagnosis:
    """Measure models side by side on `inputs`: tokens (sequences, length), or a mapping from model names to them.

    at_initialisation: beside every model the same configuration with fresh parameters. progress: True draws bars on stderr.
    out_dir: results.json is (re)written there after every measurement. config, notes: of the caller's, for the record.
    Raises UserError for bad input; KeyboardInterrupt is caught, see above."""
    subjects = _subjects(models)
    for name in measures:
        if name not in MEASURES:
            raise UserError(f"unknown measure {name!r}{nearest(name, list(MEASURES))} (known: {', '.join(MEASURES)})")
    given = {s.name: s.tokens(inputs[s.name] if isinstance(inputs, Mapping) else inputs) for s in subjects}
    initial_of = {}
    if at_initialisation:
        for subject in list(subjects):
            fresh = subject.at_initialisation(seed)
            subjects.append(fresh)
            initial_of[fresh.name], given[fresh.name] = subject.name, given[subject.name]
    d = Diagnosis(
        subjects, {}, seed, given, initial_of=initial_of, title=title or f"Diagnosis of {', '.join(s.name for s in subjects if s.name not in initial_of)}",
        notes=list(notes),
    )  # fmt: skip
    d.config = {
        "measures": list(measures), "method": method, "probes": probes, "targets": targets if isinstance(targets, str | int) else list(targets),
        "output": output, "seed": seed, "exact_up_to": exact_up_to, "inputs": {name: list(t.shape) for name, t in given.items()},
        "models": {s.name: _model_config(s) for s in subjects}, **(config or {}),
    }  # fmt: skip
    jobs = [
        (name, subject) for name in MEASURES if name in measures for subject in subjects if _applies(d, name, subject)
    ]
    bars = Bars() if progress is True else None
    shown: Progress = bars or (progress if not isinstance(progress, bool) else Silent())
    done = 0
    try:
        with bars or nullcontext():
            for name, subject in jobs:
                tokens = given[subject.name]
                if name == "influence":
                    d.influence[subject.name] = influence.measure(
                        subject, tokens, method=method, probes=probes, targets=targets, output=output, seed=seed,
                        batch_size=batch_size, progress=shown,
                    )  # fmt: skip
                elif name == "context":
                    d.context[subject.name] = context.measure(subject, tokens, seed=seed, progress=shown)
                elif name == "smoothing":
                    d.smoothing[subject.name] = smoothing.measure(
                        subject, tokens, exact_up_to=exact_up_to, seed=seed, progress=shown
                    )
                else:
                    d.transitions[subject.name] = transitions.measure(subject, tokens, progress=shown)
                done += 1
                if out_dir is not None:
                    d.missing = _words(jobs[done:])
                    d.record().write(Path(out_dir) / "results.json")
    except KeyboardInterrupt:
        pass
    d.missing = _words(jobs[done:])
    if out_dir is not None:
        d.record().write(Path(out_dir) / "results.json")
    return d


def _applies(d: Diagnosis, name: str, subject: Subject) -> bool:
    """Whether a measure means something for a model; if not, or not for all of its layers, the record says why."""
    why = None
    if name == "transitions" and not subject.recurrent:
        ours = any(hasattr(mixer, "coefficients") for mixer in subject.mixers)
        why = "none of its layers has a diagonal transition" if ours else "it does not show its transitions"
    elif name == "context" and not subject.has_head:
        why = "it has no head"
    elif name == "smoothing" and not subject.blocks:
        why = "its blocks were not found"
    if why:
        d.skipped.append(f"{subject.name}: {name} was not measured, because {why}.")
    elif name in ("smoothing", "transitions") and 0 < len(subject.recurrent) < len(subject.blocks):
        what = "transitions were" if name == "transitions" else "sharpness of inputs and memories was"
        layers = ", ".join(str(index + 1) for index in subject.recurrent)
        d.skipped.append(f"{subject.name}: {what} measured in layers {layers}; the others have no diagonal transition.")
    return why is None


def _words(jobs: Iterable[tuple[str, Subject]]) -> list[str]:
    return [f"{name} of {subject.name}" for name, subject in jobs]


def _subjects(models: Models) -> list[Subject]:
    if isinstance(models, nn.Module | Subject):
        return [Subject.of(models)]
    if isinstance(models, Mapping):
        subjects = [
            Subject(m.name, m.model, m.access) if isinstance(m, Subject) else Subject(n, m) for n, m in models.items()
        ]
    else:
        subjects = [Subject.of(m, f"model {i}") for i, m in enumerate(models, start=1)]
    names = [s.name for s in subjects]
    if not names:
        raise UserError("there is no model to diagnose")
    if len(set(names)) < len(names):
        raise UserError(f"two models have the same name: {', '.join(names)}")
    return subjects


def _model_config(subject: Subject) -> Any:
    config: Any = getattr(subject.model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _models_table(subjects: Sequence[Subject]) -> Table:
    columns = [Column(name=n) for n in ("model", "parameters", "layers", "width", "mixer", "polarization")]
    rows: list[list[Cell]] = []
    for s in subjects:
        config = getattr(s.model, "config", None)
        polarization = getattr(config, "polarization", None)
        mixer = ", ".join(dict.fromkeys(type(m).__name__ for m in s.mixers if m is not None)) or None
        pinned = "none"
        if isinstance(polarization, Mapping):
            pinned = (
                f"{polarization.get('ones')} at one, {polarization.get('zeros')} at zero ({polarization.get('mode')})"
            )
        width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
        rows.append([s.name, sum(p.numel() for p in s.model.parameters()), len(s.blocks), width, mixer, pinned])
    return Table(id="models", title="The models", columns=columns, rows=rows)


def _list(found: Mapping[str, Any]) -> list[Any]:
    return list(found.values())
