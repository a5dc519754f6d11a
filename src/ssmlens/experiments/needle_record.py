"""What `needle` found, as a record: tables, curves over depth, heat maps over length and depth, a sentence for each model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssmlens.experiments.needle import Needle
from ssmlens.results import Column, Figure, Map, Panel, Record, Series, Table, provenance


def record(
    found: Sequence[Needle], *, synthetic: bool, config: Mapping[str, Any], seeds: list[int], notes: Sequence[str], chance: float = math.nan,
    device: str = "cpu", trained: int | None = None,
) -> Record:  # fmt: skip
    """Tables, curve over depth, heat maps, verdict. device: where it was measured. Of the synthetic task, chance: accuracy in % of guessing;
    trained: the longest length of training."""
    whats = ["right"] if synthetic else ["right", "generated"]
    return Record(
        kind="needle",
        title="Needle in a haystack: " + ", ".join(n.name for n in found),
        verdict=[*(verdict(n, synthetic) for n in found), *_within(found, trained)],
        tables=[_table(found, what, synthetic) for what in whats],
        figures=[
            *(_by_depth(found, what, synthetic, chance) for what in whats),
            *([] if synthetic or not all(n.control for n in found) else [_moved(found)]),
        ],
        maps=[_map(found, what, synthetic) for what in whats],
        notes=list(notes),
        config=dict(config),
        seeds=seeds,
        complete=all(n.complete for n in found),
        provenance=provenance(device),
    )


def _within(found: Sequence[Needle], trained: int | None) -> list[str]:
    """What each model finds in texts no longer than in training, where there are longer ones too."""
    inside = [length for length in found[0].lengths if trained is not None and length <= trained]
    if not inside or len(inside) == len(found[0].lengths):
        return []
    shares = [f"{n.name} {n.accuracy([k for k in n.cells if k[0] in inside]).value:.1f} %" for n in found]
    return [f"Of needles in texts no longer than those of training ({trained} tokens) {', '.join(shares)} are found."]


def slow(found: Sequence[Needle]) -> list[str]:
    """A note on every model that could not go on from its state."""
    return [
        f"{n.name} cannot go on from its own state with more text (tried before), so it read the whole text again at every step: slower, and as right."
        for n in found
        if not n.carries
    ]  # fmt: skip


_WORDS = {
    "right": ("answer of the text preferred", "The model holds the answer of the text for more probable than the true one."),
    "generated": ("answer of the text generated", "The answer that the model writes, token by token the most probable, is that of the text."),
}  # fmt: skip


def _what(what: str, synthetic: bool) -> tuple[str, str]:
    return ("value recalled", "The most probable token is the value of the key.") if synthetic else _WORDS[what]


def verdict(n: Needle, synthetic: bool = False) -> str:
    early, late, index = n.third(last=False), n.third(last=True), n.recency_index()
    numbers = f"{late.value:.0f} % right in the last third of the text, {early.value:.0f} % in the first"
    if n.control:
        numbers += f", {n.without().value:.0f} % without any needle"
    bounds = index.interval()
    if bounds is None:
        return f"{n.name}: {numbers}."
    if not synthetic and n.control and (over := n.over_control().interval()) is not None and over[0] <= 0:
        return (
            f"{n.name} does not answer by the text more often than without any needle ({n.over_control().value:+.1f} points, "
            f"95 % interval {over[0]:+.1f} to {over[1]:+.1f}): too weak a model for this test, or one that has forgotten it all."
        )
    digits = 1 if max(map(abs, bounds)) < 10 else 0
    interval = f"recency index {index.value:+.{digits}f} points, 95 % interval {bounds[0]:+.{digits}f} to {bounds[1]:+.{digits}f}"
    if bounds[0] > 0:
        return f"{n.name} finds needles near the end better than those near the beginning: {numbers} ({interval})."
    if bounds[1] < 0:
        return f"{n.name} finds needles near the beginning better than those near the end: {numbers} ({interval})."
    return f"{n.name}: no difference between early and late needles can be told: {numbers} ({interval})."


def _errors(found: Sequence[Needle], synthetic: bool) -> str:
    if synthetic:
        return "± its standard error over prompts."
    n = len(set(found[0].kinds))
    if n < 2:
        return "± its standard error over statements (the same ones at every length and depth)."
    return (
        f"± its standard error over the {n} kinds of statements, since those of one kind are alike (the same statements at every length and "
        f"depth); intervals by Student's t with {n - 1} degrees of freedom."
    )


def _table(found: Sequence[Needle], what: str, synthetic: bool) -> Table:
    title, meaning = _what(what, synthetic)
    columns = [
        Column(name="model"), Column(name=title, unit="%", meaning=meaning),
        Column(name="first third", unit="%", meaning="needles in the first third of the text"),
        Column(name="last third", unit="%", meaning="needles in its last third"),
        Column(name="recency index", unit="points", meaning="last third minus first third"),
    ]  # fmt: skip
    if not synthetic:
        columns.append(
            Column(name="without needle", unit="%", meaning="the same prompts with no needle: what the model says by itself")
        )  # fmt: skip
    columns.append(Column(name="parameters"))
    rows: list[list[Any]] = []
    for n in found:
        row: list[Any] = [n.name, n.accuracy(list(n.cells), what)]
        row += [n.third(False, what), n.third(True, what), n.recency_index(what)]
        rows.append([*row, *([] if synthetic else [n.without(what)]), n.parameters])
    return Table(
        id="needle" if what == "right" else f"needle-{what}", columns=columns, rows=rows,
        title="Needles found" if synthetic else f"Needles found: {title}",
        meaning="A model that remembers equally well everywhere has a recency index of 0; one that forgets has a positive one.",
        method=f"Mean over {'prompts' if synthetic else 'statements'}, each averaged over lengths and depths first, " + _errors(found, synthetic),
    )  # fmt: skip


def _by_depth(found: Sequence[Needle], what: str, synthetic: bool, chance: float) -> Figure:
    title, meaning = _what(what, synthetic)
    series = []
    for n in found:
        depths = [d for d in n.depths if any((length, d) in n.cells for length in n.lengths)]
        values = [n.at_depth(d, what) for d in depths]
        series.append(
            Series(
                name=n.name, x=[100 * d for d in depths], y=[v.value for v in values],
                stderr=[v.stderr or 0.0 for v in values], group=n.name,
            )
        )  # fmt: skip
    ends = [100 * min(found[0].depths), 100 * max(found[0].depths)]
    if synthetic:
        series.append(Series(name="guessing", x=ends, y=[chance, chance], style="fit", group="paper"))
    else:  # a model that knows the world is far below the half that a coin would have
        for n in found:
            series.append(
                Series(name=f"{n.name}, no needle", x=ends, y=[n.without(what).value] * 2, style="fit", group=n.name)
            )
    return Figure(
        id=f"by-depth-{what}", title=f"By depth: {title}", x_label="depth of the needle (% of the text before it)",
        y_label=f"{title} (%)", series=series, meaning=f"{meaning} Left: needles at the beginning; right: just before the question.",
        method="Mean over all lengths, " + _errors(found, synthetic),
    )  # fmt: skip


def _moved(found: Sequence[Needle]) -> Figure:
    series = []
    for n in found:
        values = [n.moved(d) for d in n.depths]
        series.append(
            Series(
                name=n.name, x=[100 * d for d in n.depths], y=[v.value for v in values],
                stderr=[v.stderr or 0.0 for v in values], group=n.name,
            )
        )  # fmt: skip
    return Figure(
        id="evidence", title="By depth: what the needle is worth", x_label="depth of the needle (% of the text before it)",
        y_label="log-odds added by the needle (nats)", series=series,
        meaning="How far the needle moves the odds of the text's answer against the true one. Zero: it might as well not be there. "
        "It shows a trace that is too weak to turn an answer.",
        method="Log-probability of the text's answer minus that of the world's, with the needle minus without it; mean over lengths and "
        f"statements, {_errors(found, synthetic=False)}",
    )  # fmt: skip


def _map(found: Sequence[Needle], what: str, synthetic: bool) -> Map:
    title, meaning = _what(what, synthetic)
    lengths, depths = found[0].lengths, found[0].depths
    panels = []
    for n in found:
        cells = [[n.accuracy([(i, d)], what) if (i, d) in n.cells else None for d in depths] for i in lengths]
        values = [[math.nan if v is None else v.value for v in row] for row in cells]
        errors = [[math.nan if v is None or v.stderr is None else v.stderr for v in row] for row in cells]
        panels.append(Panel(name=n.name, group=n.name, values=values, stderr=errors))
    return Map(
        id=f"map-{what}", title=f"By length and depth: {title}", x_label="depth of the needle (%)", y_label="length (tokens)",
        unit=f"{title} (%)", x=[f"{100 * d:.0f}" for d in depths], y=[f"{length}" for length in lengths], panels=panels, low=0, high=100,
        meaning=f"{meaning} One square: one length of text, one depth.",
        method=f"Share of {len(next(iter(found[0].cells.values())).right)} {'prompts' if synthetic else 'statements'} a square.",
    )  # fmt: skip
