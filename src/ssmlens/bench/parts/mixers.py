"""A training step of every mixer, at equal parameters, beside the others of its kind."""

from typing import Any

from ssmlens import mixers
from ssmlens.bench import every
from ssmlens.bench.parts.base import Expectation, Found, Results, loading, method, seconds_of_turns
from ssmlens.bench.scales import Scale
from ssmlens.bench.timing import Contender, Report, Times, in_turns, median, ratio
from ssmlens.errors import UserError
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

STEP = 3e-5  # seconds of a step a token and layer: they differ by a factor of a few
SLOWER = 3.0  # times the fastest of its kind: marked


def units(s: Scale) -> dict[str, float]:
    step = STEP * s.mixers.batch * s.mixers.length * s.mixers.layers
    return {
        _unit(kind): loading(s, 3) + seconds_of_turns(dict.fromkeys(names, step), s)
        for kind, names in every.kinds().items()
    }


def _unit(kind: str) -> str:
    return kind.replace(" ", "-")


def measure(unit: str, s: Scale, report: Report) -> Any:
    names = {_unit(kind): names for kind, names in every.kinds().items()}.get(unit)
    if names is None:
        raise UserError(
            "mixers of one's own must be registered where their file is imported, not under __main__ alone: this is a new process"
        )
    made = every.entries(s.mixers, names)
    times = in_turns([Contender(e.name, e.step) for e in made], rounds=s.rounds, budget=s.budget, report=report)
    return {"times": times, "parameters": {e.name: e.parameters for e in made}}


def found(s: Scale, results: Results) -> Found:
    kinds = {kind: results[_unit(kind)] for kind in every.MEANINGS if _unit(kind) in results}
    if not kinds:
        return Found()
    tokens = s.mixers.batch * s.mixers.length
    rows: list[list[Cell]] = []
    bars: list[Series] = []
    against: dict[str, float] = {}
    for kind, result in kinds.items():
        times: Times = result["times"]
        ordered = sorted(times, key=lambda name: median(times[name]).value)
        speeds = [_speed(times[name], tokens) for name in ordered]
        bars.append(
            Series(name=kind, x=ordered, y=[v.value for v in speeds], stderr=[v.stderr or 0.0 for v in speeds], style="bar")
        )  # fmt: skip
        for name, speed in zip(ordered, speeds, strict=True):
            by = ratio(times, name, ordered[0])
            against[name] = by.value
            rows.append([
                name, kind, speed, median(times[name], "ms", 1e3), by.cell(),
                (mixers.get(name).slower or "no reason stated") if by.value > SLOWER else "", result["parameters"][name],
            ])  # fmt: skip
    table = Table(
        id="mixers", title=f"A training step of every mixer, {s.mixers}",
        columns=[
            Column(name="mixer"), Column(name="kind"), Column(name="tokens per second"), Column(name="time", unit="ms"),
            Column(name="times the fastest of its kind (quartiles)"),
            Column(name=f"why more than {SLOWER:g} times"), Column(name="parameters"),
        ],
        rows=rows, method=method(s),
        meaning="Blocks of mixer and GELU MLP, each filled up by the MLP to the same number of parameters; forward, backward and AdamW. "
        "A kind is what computes it: " + "; ".join(f"{kind}: {every.MEANINGS[kind]}" for kind in kinds) + ".",
    )  # fmt: skip
    figure = Figure(
        id="mixers-speed", title="Tokens per second in training, by mixer", x_label="mixer", y_label="tokens per second", x_scale="category",
        series=bars, meaning="Higher is faster. Colours are kinds; mixers of two kinds differ by more than their code.",
        method="The medians of the table of the same measurement, with their standard errors.",
    )  # fmt: skip
    return Found([table], [figure], *_words(against, [result["parameters"] for result in kinds.values()]))


def _speed(samples: list[float], tokens: int) -> Value:
    time = median(samples)
    stderr = None if time.stderr is None else tokens * time.stderr / time.value**2
    return Value(value=tokens / time.value, stderr=stderr, n=time.n)


def _words(
    against: dict[str, float], parameters: list[dict[str, int]]
) -> tuple[list[str], list[str], list[Expectation]]:
    """Verdict, notes, expectations."""
    late = {name: by for name, by in against.items() if by > SLOWER}
    slowest = max(against, key=lambda name: against[name])
    said = (
        ", ".join(f"{name} ({by:.1f} times)" for name, by in late.items())
        or f"none (the slowest beside its kind is {slowest}, {against[slowest]:.1f} times)"
    )
    counts = [n for each in parameters for n in each.values()]
    return (
        [f"Mixers whose training step takes more than {SLOWER:g} times as long as the fastest of their kind: {said}."],
        [f"Mixers: the models have {min(counts):,} to {max(counts):,} parameters, equal within {100 * (max(counts) / min(counts) - 1):.2g} %."],
        [Expectation(
            f"mixers more than {SLOWER:g} times slower than the fastest of their kind", "none without a reason", said,
            all(mixers.get(name).slower for name in late),
        )],
    )  # fmt: skip
