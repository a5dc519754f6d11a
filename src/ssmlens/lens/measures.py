"""The measurements of a diagnosis, one entry each: what runs it, for which models it means something, what it shows and says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ssmlens.lens import (
    bounds,
    context,
    filters,
    hidden_attention,
    influence,
    reading,
    smoothing,
    transitions,
    verdict,
)
from ssmlens.lens.layers import large
from ssmlens.lens.progress import Progress
from ssmlens.lens.subject import Subject
from ssmlens.mixers import Mixer
from ssmlens.results import Figure, Map, Table

WINDOW = 64  # tokens of hidden attention
BOUND_LAYERS = 6  # 3 of a large model


@dataclass(frozen=True)
class Settings:
    """What the caller of `diagnose` may set."""

    method: Literal["probes", "exact"]
    probes: int
    targets: Literal["last"] | int | Sequence[int]
    output: Literal["hidden", "logits"]
    seed: int
    batch_size: int | None
    exact_up_to: int


Run = Callable[[Subject, Tensor, Settings, Progress], Any]


@dataclass(frozen=True)
class Measure:
    """refuses(subject, length): why it means nothing for a model, or None. partly: what of it was measured in the recurrent layers alone, where
    not all are. says: a sentence about one model. figures, tables, maps: of the results of several. by_name: that it is
    refused is only said where it was asked for by name."""

    run: Run
    figures: Callable[[Sequence[Any]], list[Figure]]
    tables: Callable[[Sequence[Any]], list[Table]]
    says: Callable[[Any], str | None]
    maps: Callable[[Sequence[Any]], list[Map]] = lambda results: []
    refuses: Callable[[Subject, int], str | None] = lambda subject, length: None
    partly: str | None = None
    by_name: bool = False


def _not_recurrent(subject: Subject, length: int) -> str | None:
    if subject.recurrent:
        return None
    ours = any(hasattr(mixer, "coefficients") for mixer in subject.mixers)
    return "none of its layers has a diagonal transition" if ours else "it does not show its transitions"


def _no_next_token(subject: Subject, length: int) -> str | None:
    if subject.access.read:
        return "it predicts no next token"
    return None if subject.has_head else "it has no head"


def _no_filter(subject: Subject, length: int) -> str | None:
    if not any(isinstance(mixer, Mixer) for mixer in subject.mixers):
        return "its mixers cannot be run by themselves"
    return f"{length} tokens are too few for a frequency; it takes 32" if length < 32 else None


def _influence(subject: Subject, tokens: Tensor, s: Settings, progress: Progress) -> Any:
    return influence.measure(
        subject, tokens, method=s.method, probes=s.probes, targets=s.targets, output=s.output, seed=s.seed, batch_size=s.batch_size, progress=progress
    )  # fmt: skip


MEASURES: dict[str, Measure] = {
    "influence": Measure(_influence, influence.figures, influence.tables, verdict.forgetting),
    "context": Measure(
        lambda subject, tokens, s, progress: context.measure(subject, tokens, seed=s.seed, progress=progress),
        context.figures, lambda results: [context.table(results)], verdict.behaviour,
        refuses=_no_next_token,
    ),
    "reading": Measure(
        lambda subject, tokens, s, progress: reading.measure(subject, tokens, seed=s.seed, batch_size=s.batch_size, progress=progress),
        reading.figures, lambda results: [reading.table(results)], reading.says, maps=reading.maps,
        refuses=lambda subject, length: None if subject.access.read else "it answers at every token and not once for all", by_name=True,
    ),
    "smoothing": Measure(
        lambda subject, tokens, s, progress: smoothing.measure(subject, tokens, exact_up_to=s.exact_up_to, seed=s.seed, progress=progress),
        smoothing.figures, lambda results: [smoothing.table(results)], verdict.blurring,
        refuses=lambda subject, length: None if subject.blocks else "its blocks were not found",
        partly="sharpness of inputs and memories was",
    ),
    "transitions": Measure(
        lambda subject, tokens, s, progress: transitions.measure(subject, tokens, progress=progress),
        transitions.figures, lambda results: [transitions.table(results)], verdict.transitions, maps=transitions.maps,
        refuses=_not_recurrent, partly="transitions were",
    ),
    "bounds": Measure(
        lambda subject, tokens, s, progress: bounds.measure(subject, tokens, layers=BOUND_LAYERS // (2 if large(subject, tokens.shape[1]) else 1), seed=s.seed, progress=progress),
        bounds.figures, bounds.tables, verdict.bounded, refuses=_not_recurrent,
    ),
    "filters": Measure(
        lambda subject, tokens, s, progress: filters.measure(subject, tokens, seed=s.seed, progress=progress),
        filters.figures, filters.tables, verdict.filtering, refuses=_no_filter,
    ),
    "hidden_attention": Measure(
        lambda subject, tokens, s, progress: hidden_attention.measure(
            subject, tokens, window=min(WINDOW, tokens.shape[1]), progress=progress
        ),
        lambda results: [], lambda results: [hidden_attention.table(results)], lambda result: None, maps=hidden_attention.maps,
        refuses=_not_recurrent,
    ),
}  # fmt: skip
