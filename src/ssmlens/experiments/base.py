"""What the experiments share: the items by name, the scales, and how a result is held against the paper's number.

An experiment is a function from a Request to a Record; its configurations are plain functions too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ssmlens.errors import UserError, nearest
from ssmlens.results import Column, Record, Table, Value

SCALES = ("smoke", "laptop", "paper")


@dataclass(frozen=True)
class Request:
    """How an item is to be run. variants, seeds: None for the scale's own. processes: runs at a time.

    data: what to read instead of the item's own text or images: paths with commas between, or `datasets:NAME` of the hub.
    models: trained models to measure, instead of the scale's own or beside them: directories, packaged checkpoints, files or hub ids."""

    scale: str
    out: Path
    variants: tuple[str, ...] | None = None
    seeds: int | None = None
    resume: bool = False
    processes: int = 1
    progress: bool = True
    data: str | None = None
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Item:
    """aliases: other names that it answers to. takes: which of the options "data" and "model" it has a use for.
    group: the item whose runs it shares, where all are run."""

    name: str
    title: str
    source: str
    scales: tuple[str, ...]
    variants: tuple[str, ...]
    run: Callable[[Request], Record]
    aliases: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    group: str | None = None


Outcome = Literal["agrees", "differs", "undecided", "not comparable"]


@dataclass(frozen=True)
class Claim:
    """One thing that the paper says, and what was found. paper, ours: a number or a shape, in words.

    value, stderr, n: the number that `outcome` was decided by. why: one sentence."""

    item: str
    claim: str
    paper: str
    ours: str
    outcome: Outcome
    why: str
    value: float | None = None
    stderr: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"outcome {self.outcome!r} is none of {', '.join(get_args(Outcome))}")


def side(value: Value, above: bool = True, of: float = 0.0) -> Outcome:
    """Whether the 95 % interval of `value` lies wholly above (or below) `of`, as claimed: agrees; on the other side: differs; on
    both, or without an interval: undecided."""
    interval = value.interval()
    if interval is None:
        return "undecided"
    low, high = interval
    if low > of or high < of:
        return "agrees" if (low > of) == above else "differs"
    return "undecided"


def helps(gain: Value, adjusted: float, margin: float) -> Outcome:
    """Whether something helps, as claimed, by a p-value adjusted for all that is claimed beside it: agrees: more than chance (5 %) and
    at least `margin`; differs: a loss that is more than chance, or a 95 % interval wholly within ± margin; undecided otherwise."""
    bounds = gain.interval()
    if adjusted < 0.05 and gain.value < 0:
        return "differs"
    if bounds is not None and -margin < bounds[0] and bounds[1] < margin:
        return "differs"
    return "agrees" if adjusted < 0.05 and gain.value >= margin else "undecided"


class Stopped(KeyboardInterrupt):
    """An item was stopped; `record` is of what it had finished."""

    def __init__(self, record: Record) -> None:
        self.record = record
        super().__init__()


def claims_config(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """For `config["claims"]` of the record, from which a page over all items is made."""
    return [asdict(claim) for claim in claims]


def claims_verdict(claims: Sequence[Claim], smoke: bool = False) -> list[str]:
    """How many comparisons with the paper came out how, then each of them with what was found."""
    if smoke:
        return ["Smoke scale: this shows that every part runs. Nothing is measured that would mean anything."]
    return [claims_counted(claims), *(f"{c.claim} Here: {c.ours}: {c.outcome}." for c in claims)]


def claims_counted(claims: Sequence[Claim], compared_with: str = "the paper") -> str:
    """A sentence: how many comparisons came out how."""
    plural = {"agrees": "agree", "differs": "differ"}
    counts = {outcome: sum(c.outcome == outcome for c in claims) for outcome in get_args(Outcome)}
    words = (f"{n} {outcome if n == 1 else plural.get(outcome, outcome)}" for outcome, n in counts.items() if n)
    return f"Of {len(claims)} comparisons with {compared_with}: {', '.join(words)}."


def claims_table(claims: Sequence[Claim]) -> Table:
    """The record's first table."""
    names = ("item", "outcome", "the paper says", "paper", "here", "why", "decided by")
    rows: list[list[Any]] = [
        [c.item, c.outcome, c.claim, c.paper, c.ours, c.why, None if c.value is None else Value(value=c.value, stderr=c.stderr, n=c.n)]
        for c in claims
    ]  # fmt: skip
    return Table(
        id="claims", title="Beside the paper", columns=[Column(name=n) for n in names], rows=rows,
        meaning="Agrees or differs: the whole 95 % interval lies on the side that the paper claims, or on the other; undecided: on both; unless “why” says otherwise.",
        method="Every interval by itself, unless “why” says otherwise: of twenty that hold nothing, one is expected to look like something.",
    )  # fmt: skip


def choose(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raises UserError, with the nearest name, where `name` is not known."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}{nearest(name, list(known))} (known: {', '.join(known)})")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: below α for all of them together, however many there are."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
