"""Statements hidden in a long text, asked of language models that are there already: what `ssmlens needle` and Figure 2 at paper scale share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from ssmlens.experiments import needle, needle_record
from ssmlens.experiments.needle import Needle
from ssmlens.lens import Subject
from ssmlens.lens.store import fingerprint
from ssmlens.mixers import Mixer
from ssmlens.mixers.attention import Attention
from ssmlens.models.pretrained import tokens
from ssmlens.results import Record
from ssmlens.tasks import corpus
from ssmlens.tasks.facts import FACTS
from ssmlens.tasks.needle import SLACK, Grid, Haystack

Memory = Literal["recurrent", "attention", "both", "unknown"]
"""How a model remembers: in states of fixed size, by looking back at the tokens, in both ways; unknown: it shows no layers that we know."""


class Asked(NamedTuple):
    found: list[Needle]
    record: Record


def statements(
    loaded: Mapping[str, Any], paths: Sequence[str], text: Path | None, lengths: Sequence[int], depths: list[float],
    batch_size: int, resume: bool, where: Path, shown: bool, on: str,
) -> Asked:  # fmt: skip
    """Every statement at every length and depth. loaded: models by name, on the device `on`; paths: where each came from, and with it its
    tokenizer. text: the haystack; None: held-out English of Python's own documentation. Cells are kept in `where`.

    Raises UserError for a model without a tokenizer, a length that it cannot read, and NaN."""
    source = corpus.python_reference() if text is None else corpus.text_file(text, heldout=1.0)
    words = bytes(source.heldout).decode("utf-8", errors="replace")
    grids, decoders = {}, {}
    for (name, model), path in zip(loaded.items(), paths, strict=True):
        coder = tokens.coder(tokens.tokenizer(name, model, path))
        decoders[name] = coder.decode
        haystack = Haystack.of(source.name, words, coder.encode, max(lengths), coder.start)
        grids[name] = Grid.of(haystack, FACTS, coder.encode)
    identity = {
        "text": source.sha256, "lengths": list(lengths), "depths": depths, "facts": len(FACTS),
        "models": {name: fingerprint(model) for name, model in loaded.items()},
    }  # fmt: skip
    store = needle.Store(where / "cells.json", identity, resume)
    with bar(shown, sum(needle.work(grid, lengths, depths) for grid in grids.values())) as advance:
        found = [
            needle.measure_statements(
                name, model, grids[name], decoders[name], lengths, depths, batch_size=batch_size, store=store, advance=advance
            )
            for name, model in loaded.items()
        ]  # fmt: skip
    notes = [
        f"Haystack: {source.name}{', its held-out part' if text is None else ''}; a needle stands after a sentence that ends at its depth or up to "
        f"{100 * SLACK:.0f} % of the text before it; where none does, between two words.",
        f"{len(FACTS)} statements that contradict the world, of {len({f.kind for f in FACTS})} kinds; each stands in the text once, at every depth.",
    ]
    for name, grid in grids.items():
        if grid.haystack.repeated > 1:
            notes.append(f"{name}: the text is repeated {grid.haystack.repeated} times to reach {max(lengths)} tokens.")
    notes += needle_record.slow(found)
    made = needle_record.record(found, synthetic=False, config=identity, seeds=[], notes=notes, device=on)
    return Asked(found, made)


def memory(model: nn.Module) -> Memory:
    """By its layers. Raises UserError for a model that the lens does not know how to run."""
    found: set[Memory] = {_remembers(mixer) for mixer in Subject("model", model).mixers}
    if "unknown" in found or not found:
        return "unknown"
    return found.pop() if len(found) == 1 else "both"


def _remembers(mixer: Any) -> Memory:
    if isinstance(mixer, Attention):
        return "attention"
    if isinstance(mixer, Mixer):
        return "recurrent"
    # transformers' own, which the lens could not turn into ours
    return "attention" if "attention" in type(mixer).__name__.lower() else "unknown"


@contextmanager
def bar(shown: bool, total: int) -> Iterator[Callable[[float], None]]:
    """A bar over tokens, with the time left."""
    from ssmlens.progress import bars

    if not shown:
        yield lambda tokens: None
        return
    with bars("{task.percentage:>3.0f}%") as progress:
        task = progress.add_task("needle", total=total)
        yield lambda tokens: progress.advance(task, tokens)
