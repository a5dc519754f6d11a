"""All measurements together: several models, the same text, one record.

    diagnose(models, inputs) → Diagnosis        .record(): tables, figures, maps, verdict     .plot(): an overview for a notebook

Ctrl-C ends it cleanly: what is finished is returned with complete=False and says so. With `out_dir` every finished measurement is on disk at once
(`ssmlens.lens.store`), so that resume=True goes on from there, after a kill too; the record of them is written as often as it costs little.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ssmlens import results
from ssmlens.errors import UserError, nearest
from ssmlens.lens import comparison
from ssmlens.lens.baseline import transformer_like
from ssmlens.lens.bounds import Bounds
from ssmlens.lens.context import Context
from ssmlens.lens.filters import Filters
from ssmlens.lens.hidden_attention import HiddenAttention
from ssmlens.lens.influence import Influence
from ssmlens.lens.measures import MEASURES, Settings
from ssmlens.lens.notebook import Shown, draw
from ssmlens.lens.progress import Bars, Progress, Silent
from ssmlens.lens.reading import Reading
from ssmlens.lens.smoothing import Smoothing
from ssmlens.lens.store import Store, fingerprint, of_tensor
from ssmlens.lens.subject import Subject
from ssmlens.lens.transitions import Transitions
from ssmlens.lens.verdict import verdict
from ssmlens.results import Cell, Column, Figure, Map, Record, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Models = nn.Module | Subject | Sequence[nn.Module | Subject] | Mapping[str, nn.Module | Subject]
_SELDOM = 10  # times as long as writing the record takes lie between two of them
_FIRST = (
    "influence",
    "reading",
    "loss-by-context",
    "loss-by-position",
)  # what influence does to behaviour belongs beside it


@dataclass(eq=False)
class Diagnosis(Shown):
    """Results by measure and model name, in the order in which the models were given; inputs: the tokens that each read. missing: what was asked for
    and not finished; skipped: what does not apply to a model, and why. initial_of: what was built at initialisation, and of which model; untrained:
    these and the transformer beside them, of which the verdict does not speak but in comparisons."""

    subjects: list[Subject]
    config: dict[str, Any]
    seed: int
    inputs: dict[str, Tensor] = field(repr=False)
    influence: dict[str, Influence] = field(default_factory=dict)
    context: dict[str, Context] = field(default_factory=dict)
    reading: dict[str, Reading] = field(default_factory=dict)
    smoothing: dict[str, Smoothing] = field(default_factory=dict)
    transitions: dict[str, Transitions] = field(default_factory=dict)
    bounds: dict[str, Bounds] = field(default_factory=dict)
    filters: dict[str, Filters] = field(default_factory=dict)
    hidden_attention: dict[str, HiddenAttention] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    initial_of: dict[str, str] = field(default_factory=dict)
    untrained: set[str] = field(default_factory=set)
    title: str = "Diagnosis"
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing

    def pairs(self, done: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is compared with what: every model with the first one, and every model with itself at initialisation; a transformer that was built beside
        them, with the first one at initialisation."""
        trained = [s.name for s in self.subjects if s.name in done and s.name not in self.untrained]
        pairs = [(trained[0], other) for other in trained[1:]]
        pairs += [(initial, of) for initial, of in self.initial_of.items() if initial in done and of in done]
        fresh = next((name for name in self.initial_of if name in done), None)
        beside = [name for name in done if name in self.untrained and name not in self.initial_of]
        return pairs + [(name, fresh) for name in beside if fresh]

    def paired(self, a: str, b: str) -> bool:
        """Whether both read the same sequences, so that they can be compared sequence by sequence."""
        return torch.equal(self.inputs[a].cpu(), self.inputs[b].cpu())

    def _done(self) -> list[tuple[str, list[Any]]]:
        """Measures that were made of some model, with their results."""
        return [(name, list(getattr(self, name).values())) for name in MEASURES if getattr(self, name)]

    def figures(self) -> list[Figure]:
        found = [f for name, made in self._done() for f in MEASURES[name].figures(made)]
        found.sort(key=lambda f: _FIRST.index(f.id) if f.id in _FIRST else len(_FIRST))
        return found + comparison.figures(self)

    def maps(self) -> list[Map]:
        """Of the models that were given; those built beside them would only crowd these out."""
        given = [(name, [r for r in made if r.name not in self.untrained]) for name, made in self._done()]
        return [m for name, made in given if made for m in MEASURES[name].maps(made)]

    def tables(self) -> list[Table]:
        found = [t for name, made in self._done() for t in MEASURES[name].tables(made)]
        if compared := comparison.comparisons(self):
            found.append(comparison.table(compared))
        return [*found, _models_table(self.subjects)]

    def verdict(self) -> list[str]:
        return verdict(self, {name: measure.says for name, measure in MEASURES.items()})

    def record(self) -> Record:
        notes = [*self.notes, *self.skipped]
        notes += [
            f"Influence of {name} was expected to take {made.cost}."
            for name, made in self.influence.items()
            if made.cost
        ]
        if len(self.subjects) - len(self.untrained) > 1:
            over = "inputs: others" if any(s.access.vectors for s in self.subjects) else "text: another text"
            notes.append(
                f"Errors are over {over} would give other numbers. Two trainings of the same configuration would differ too."
            )
        return Record(
            kind="diagnosis", title=self.title, verdict=self.verdict(), tables=self.tables(), figures=self.figures(), maps=self.maps(),
            notes=notes, config=self.config, seeds=[self.seed], complete=self.complete,
            provenance=results.provenance(str(self.subjects[0].device)),
        )  # fmt: skip

    def plot(self) -> "Canvas":
        """An overview: every figure, without the maps."""
        return draw(self.figures())

    def __str__(self) -> str:
        return "\n".join(self.verdict())


def diagnose(
    models: Models,
    inputs: Any,
    *,
    measures: Sequence[str] = tuple(MEASURES),
    method: Literal["probes", "exact"] = "probes",
    probes: int = 8,
    targets: Literal["last"] | int | Sequence[int] = "last",
    output: Literal["hidden", "logits"] = "hidden",
    at_initialisation: bool = False,
    transformer: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    exact_up_to: int = 1024,
    progress: Progress | bool = False,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    title: str | None = None,
    config: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> Diagnosis:
    """Measure models side by side on `inputs`: tokens (sequences, length), or a mapping from model names to them.

    at_initialisation: beside every model the same configuration with fresh parameters. transformer: and one of the first model's size. progress: True
    draws bars on stderr. out_dir: where what is measured is kept, and results.json; resume: go on with what is there. config, notes: of the caller's, for the record.
    Raises UserError for bad input, and where what is there was measured otherwise; KeyboardInterrupt is caught, see above."""
    if resume and out_dir is None:
        raise UserError("resume needs out_dir: the directory that holds what was finished")
    subjects = _subjects(models)
    check_measures(measures)
    given = {s.name: s.tokens(inputs[s.name] if isinstance(inputs, Mapping) else inputs) for s in subjects}
    for s in subjects:
        if not s.is_causal(given[s.name]):
            raise UserError(f"{s.name} reads later tokens too: only causal language models can be diagnosed")
    named = ", ".join(given)
    initial_of, beside = {}, []
    if at_initialisation:
        for subject in list(subjects):
            fresh = subject.at_initialisation(seed)
            subjects.append(fresh)
            initial_of[fresh.name], given[fresh.name] = subject.name, given[subject.name]
    if transformer:
        beside = [transformer_like(subjects[0], seed)]
        given[beside[0].name] = given[subjects[0].name]
    subjects += beside
    d = Diagnosis(
        subjects, {}, seed, given, initial_of=initial_of, untrained={*initial_of, *(s.name for s in beside)}, title=title or f"Diagnosis of {named}",
        notes=list(notes),
    )  # fmt: skip
    settings = Settings(method, probes, targets, output, seed, batch_size, exact_up_to)
    d.config = {
        "measures": list(measures), "method": method, "probes": probes, "targets": targets if isinstance(targets, str | int) else list(targets),
        "output": output, "seed": seed, "exact_up_to": exact_up_to, "inputs": {name: list(t.shape) for name, t in given.items()},
        "models": {s.name: _model_config(s) for s in subjects}, **(config or {}),
    }  # fmt: skip
    store = None if out_dir is None else Store(Path(out_dir), _identity(d), resume)
    jobs = _applying(d, measures)
    _run(d, jobs, settings, progress, store, None if out_dir is None else Path(out_dir))
    return d


def _run(
    d: Diagnosis, jobs: list[tuple[str, Subject]], settings: Settings, progress: Progress | bool, store: Store | None, out_dir: Path | None
) -> None:  # fmt: skip
    """Measure what is not stored yet; leave in d.missing what an interrupt did not let it."""
    bars = Bars() if progress is True else None
    shown: Progress = bars or (progress if not isinstance(progress, bool) else Silent())
    numbers = {s.name: i for i, s in enumerate(d.subjects, start=1)}
    left, due = list(jobs), -math.inf
    try:
        with ExitStack() as stack:
            stack.enter_context(bars or nullcontext())
            for subject in d.subjects:
                stack.enter_context(subject.remembering())
            for name, subject in jobs:
                found = store.load(name, numbers[subject.name]) if store else None
                if found is None:
                    found = MEASURES[name].run(subject, d.inputs[subject.name], settings, shown)
                    if store:
                        store.save(name, numbers[subject.name], found)
                getattr(d, name)[subject.name] = found
                left.remove((name, subject))
                if out_dir is not None and left and time.monotonic() > due:
                    begun = time.monotonic()
                    d.missing = _words(left)
                    d.record().write(out_dir / "results.json")
                    due = time.monotonic() + _SELDOM * (time.monotonic() - begun)
    except KeyboardInterrupt:
        pass
    d.missing = _words(left)
    if out_dir is not None:
        d.record().write(out_dir / "results.json")


def _identity(d: Diagnosis) -> dict[str, Any]:
    """What must be the same for measurements to belong together. Which measures were asked for need not be."""
    return {
        **{name: value for name, value in d.config.items() if name != "measures"},
        "tokens": {name: of_tensor(tokens) for name, tokens in d.inputs.items()},
        "parameters": {s.name: fingerprint(s.model) for s in d.subjects},
    }


def _applying(d: Diagnosis, measures: Sequence[str]) -> list[tuple[str, Subject]]:
    """The measures that mean something, with the models; what means nothing, or not in all layers, the record says, with the reason."""
    jobs: list[tuple[str, Subject]] = []
    refused: dict[str, dict[str, list[str]]] = {}
    for name, measure in MEASURES.items():
        for subject in d.subjects if name in measures else ():
            if why := measure.refuses(subject, d.inputs[subject.name].shape[1]):
                if not measure.by_name or set(measures) != set(MEASURES):
                    refused.setdefault(subject.name, {}).setdefault(why, []).append(name.replace("_", " "))
                continue
            jobs.append((name, subject))
            if measure.partly and 0 < len(subject.recurrent) < len(subject.blocks):
                layers = ", ".join(str(index + 1) for index in subject.recurrent)
                d.skipped.append(
                    f"{subject.name}: {measure.partly} measured in layers {layers}; the others have no diagonal transition."
                )
    d.skipped += [
        f"{model}: not measured because {why}: {', '.join(names)}."
        for model, reasons in refused.items()
        for why, names in reasons.items()
    ]
    return jobs


def _words(jobs: Iterable[tuple[str, Subject]]) -> list[str]:
    return [f"{name} of {subject.name}" for name, subject in jobs]


def check_measures(names: Iterable[str]) -> None:
    """Raises UserError for a name that is not among MEASURES."""
    for name in names:
        if name not in MEASURES:
            raise UserError(f"unknown measure {name!r}{nearest(name, list(MEASURES))} (known: {', '.join(MEASURES)})")


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
