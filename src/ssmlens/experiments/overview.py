"""One page over all items: what the paper says, what was found, whether they agree, item by item.

A claim is one comparison: what the paper says once is compared for every model, variant and way of measuring.

Every item's record carries its claims in `config["claims"]` (`base.Claim`); here they are gathered, and counted.
"""

from collections.abc import Mapping
from typing import Any, get_args

from ssmlens.experiments.base import Claim, Outcome, claims_table
from ssmlens.results import Column, Figure, Link, Record, Series, Table, provenance


def record(scale: str, records: Mapping[str, Record], missing: Mapping[str, str]) -> Record:
    """records: by item, in the order of the page. missing: why an item has none. Pages lie in directories of the items' names."""
    claims = {name: [Claim(**c) for c in found.config.get("claims", [])] for name, found in records.items()}
    every = [c for of in claims.values() for c in of]
    smoke = scale == "smoke"
    return Record(
        kind="reproduce",
        title=f"The paper's tables and figures, repeated ({scale} scale)",
        verdict=_verdict(every, missing, smoke),
        tables=[*([claims_table(every)] if every and not smoke else []), _items(records, claims, missing)],
        figures=[_counts(claims)] if every and not smoke else [],
        links=[Link(title=found.title, href=f"{name}/report.html") for name, found in records.items()],
        notes=[
            "Every item has a page of its own, with its figures, methods and notes.",
            *(f"{name} is missing: {why}" for name, why in missing.items()),
        ],
        config={"item": "all", "scale": scale, "claims": [c for r in records.values() for c in r.config.get("claims", [])]},
        seeds=sorted({seed for found in records.values() for seed in found.seeds}),
        complete=all(found.complete for found in records.values()),
        provenance=provenance(),
    )  # fmt: skip


def _verdict(claims: list[Claim], missing: Mapping[str, str], smoke: bool) -> list[str]:
    if smoke:
        said = ["Smoke scale: this shows that every part runs. Nothing is measured that would mean anything."]
    else:
        said = []
        for outcome in get_args(Outcome):
            of = [c for c in claims if c.outcome == outcome]
            if of:
                said.append(f"{outcome.capitalize()}: {len(of)} of {len(claims)} comparisons with the paper.")
        if claims:
            said.append(
                f"They belong to {len({c.item for c in claims})} of the paper's tables and figures, or parts of one: what it says once is compared for "
                "every model, variant and way of measuring."
            )
        said += [f"{c.item}: {c.claim} Here: {c.ours}: {c.outcome}." for c in claims]
    if missing:
        said.insert(0, f"{len(missing)} of the items could not be run: {', '.join(missing)}.")
    return said


def _items(records: Mapping[str, Record], claims: Mapping[str, list[Claim]], missing: Mapping[str, str]) -> Table:
    rows: list[list[Any]] = []
    for name, found in records.items():
        counts = [sum(c.outcome == outcome for c in claims[name]) for outcome in get_args(Outcome)]
        rows.append([name, found.title, *counts, found.provenance.created[:10], found.provenance.commit])
    rows += [[name, "missing", *[None] * len(get_args(Outcome)), None, None] for name in missing]
    return Table(
        id="items", title="Items",
        columns=[Column(name=n) for n in ("item", "what", *get_args(Outcome), "date", "commit")], rows=rows,
        meaning="How many comparisons with the paper each item holds, and how they came out: one for every model, variant and way of measuring.",
        method="The commit is that of the code which gathered the record; each page says which code made its runs.",
    )  # fmt: skip


def _counts(claims: Mapping[str, list[Claim]]) -> Figure:
    names = [name for name, of in claims.items() if of]
    return Figure(
        id="outcomes", title="What came out, item by item", x_label="item", y_label="comparisons with the paper", x_scale="category",
        series=[
            Series(name=outcome, x=names, y=[float(sum(c.outcome == outcome for c in claims[n])) for n in names], style="bar", group=outcome)
            for outcome in get_args(Outcome)
        ],
        meaning="Agrees and differs: the 95 % interval decides, unless “why” says otherwise; undecided: it does not.", method="Counted from the table of claims.",
    )  # fmt: skip
