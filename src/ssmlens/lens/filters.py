"""Frequency response: what a layer does to slow and to fast changes of its input (SPEC §3; Definition D.3, Proposition D.4).

    continuous   F(ω) = Σ_n c_n b_n / (iω - a_n)              ω in radians per unit of the layer's own time; Δ of them to a token
    discrete     H(ω) = Σ_n c_n b̄_n e^{iω} / (e^{iω} - ā_n)   ω in radians per token, up to π (Nyquist: every other token)
    cut-off      Ω(ε) = the smallest Ω such that |F(ω)| ≤ ε for all |ω| ≥ Ω
    D.4's bound  Ω(ε) ≤ ‖b‖‖c‖/ε + max|a_n|, and ≤ ‖b‖‖c‖/ε + max|Im a_n|, as |iω - a| ≥ |ω - Im a|

Time-invariant layers (S4D, S4, the diagonal model of H3) have one filter for each inner channel: `ssmlens.lens.transfer`. It leaves out what the proposition
does not speak of: the skip D and state channels held at zero, which pass every frequency alike, and those held at one, which are not integrable.

Every other mixer is linearised around a real input: a sinusoid v e^{iωt} with a random unit vector v is added to what enters the mixer, in float64,
and over the last half of the tokens (a whole number of periods)
    gain(ω) = √ mean over v of ‖mean_t δy_t e^{-iωt}‖²           what comes out at the frequency that went in
    power(ω) = √ mean over v and t of ‖δy_t‖²                     what comes out at all frequencies (a layer that depends on its input mixes them)
That includes the mixer's direct path (skip, short convolution, gates): whatever the layer does. Low-pass: gains fall with frequency.

Legend: d inner channels, w frequencies, n sequences, T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.lens.layers import choose, in_double, large
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.lens.transfer import system
from ssmlens.mixers import Mixer
from ssmlens.results import Cell, Column, Figure, Series, Table, Value

Array = np.ndarray
EPSILONS = (0.1, 0.01)  # of the largest response of each inner channel
_STEP = 1e-6  # of the input's root mean square: truncation and rounding both below 1e-5 of the derivative


@dataclass(frozen=True, eq=False)
class Invariant:
    """One time-invariant layer. omega (w,): radians per token. learned, whole (d, w): |H| of the learned modes, and with skip and channels at zero.
    cut_offs[ε]: Ω(ε) measured, D.4's bound, the tighter bound, each (d,), radians per token (Δ times those per unit of time)."""

    omega: Float[Array, " w"]
    learned: Float[Array, "d w"]
    whole: Float[Array, "d w"]
    cut_offs: dict[float, tuple[Array, Array, Array]]
    ones: int
    zeros: int

    def share_below_nyquist(self, epsilon: float) -> float:
        """Share of inner channels whose cut-off lies below π radians per token: those that tokens can show to be low-pass."""
        return float((self.cut_offs[epsilon][0] < math.pi).mean())


@dataclass(frozen=True, eq=False)
class Response:
    """One layer, linearised around n inputs. omega (w,): radians per token. gain, power (n, w): squares of what the file's head defines."""

    omega: Float[Array, " w"]
    gain: Float[Array, "n w"]
    power: Float[Array, "n w"]

    def high_over_low(self) -> Value:
        """Root mean square gain at periods of at most 4 tokens over that at periods of at least 16: below one, the layer is low-pass."""
        high, low = self.omega >= math.pi / 2 - 1e-9, self.omega <= math.pi / 8 + 1e-9
        below = self.gain[:, low].mean(1)
        ratio = np.divide(self.gain[:, high].mean(1), below, out=np.ones(len(below)), where=below > 0)
        return Value.mean(np.sqrt(ratio))

    def coherent(self) -> Value:
        """Share of the output's power that has the frequency of the input; 1 for a time-invariant layer."""
        total = self.power.sum(1)
        return Value.mean(np.divide(self.gain.sum(1), total, out=np.ones(len(total)), where=total > 0))


def invariant(mixer: nn.Module, points: int = 96) -> Invariant | None:
    """The filter of a time-invariant mixer from its parameters; None for any other. points: frequencies, up to Nyquist."""
    made = system(mixer)
    if made is None:
        return None
    omega = torch.logspace(-3, math.log10(math.pi * (1 - 1e-9)), points, dtype=torch.float64)
    response = made.discrete(omega.to(made.dt.device))
    dt = made.dt.numpy(force=True)
    cut_offs = {e: tuple(x * dt for x in made.cut_off(e)) for e in EPSILONS}
    learned, whole = response.abs(), (response + made.flat[:, None]).abs()
    return Invariant(omega.numpy(), learned.numpy(force=True), whole.numpy(force=True), cut_offs, made.ones, made.zeros)


@torch.no_grad()
def response(
    mixer: nn.Module,
    x: Float[Tensor, "1 length d_model"],
    *,
    points: int = 8,
    directions: int = 2,
    seed: Sequence[int] = (0,),
) -> Response:
    """Gains of one mixer around one input, by differences of its outputs in float64. Memory: a few copies of x."""
    twin = in_double(mixer)
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    x = x.detach().to(device, torch.float64)
    length, window = x.shape[1], x.shape[1] // 2
    bins = np.unique(np.round(np.geomspace(1, window // 2, points)).astype(int))
    omega = 2 * math.pi * bins / window
    step = _STEP * (float(x.square().mean().sqrt()) or 1.0)
    base = twin(x)[0][:, length - window :]
    rng = np.random.default_rng(list(seed))
    gain, power = np.zeros(len(bins)), np.zeros(len(bins))
    t = torch.arange(length, dtype=torch.float64, device=device)
    v = torch.from_numpy(rng.normal(size=(directions, 1, x.shape[2]))).to(x)
    v /= v.norm(dim=-1, keepdim=True)  # the same at all frequencies, so that these compare
    for k, w in enumerate(omega):
        waves = torch.cat([torch.cos(w * t)[:, None] * v, torch.sin(w * t)[:, None] * v])
        change = (twin(x + step * waves)[0][:, length - window :] - base) / step
        z = torch.complex(*change.chunk(2))
        back = torch.exp(-1j * w * t[length - window :])[:, None]
        gain[k] = float((z * back).mean(1).abs().square().sum(-1).mean())
        power[k] = float(z.abs().square().sum(-1).mean())
    if not (np.isfinite(gain).all() and np.isfinite(power).all()):
        raise UserError("a mixer answers these inputs with NaN or infinity: its frequency response cannot be measured")
    return Response(omega, gain[None], power[None])


@dataclass(frozen=True, eq=False)
class Filters(Shown):
    """By number of the layer, counted from 1. invariant: every time-invariant layer; responses: the layers that were linearised."""

    name: str
    length: int
    directions: int
    invariant: dict[int, Invariant] = field(repr=False)
    responses: dict[int, Response] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(next(iter(self.responses.values())).gain)

    def figures(self) -> list[Figure]:
        return figures([self])

    def tables(self) -> list[Table]:
        return tables([self])

    def table_rows(self) -> list[list[Cell]]:
        """Those of `table`: the linearised layers."""
        return table([self]).rows


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    layers: int | Sequence[int] | None = 3,
    points: int = 8,
    directions: int = 2,
    longest: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Filters:
    """The filter of every time-invariant layer, and the response around the sequences of `inputs` (sequences, length) of some layers.

    layers: how many to linearise, spread evenly over the depth, or their numbers, counted from 1, or None for all. Each costs points · (2 directions) passes of its mixer
    over at most `longest` tokens of each sequence (None: 512, in a large model 256). Raises UserError for bad tokens or options, NaN, and a model that has no mixers of ssmlens' kind."""
    subject = Subject.of(model)
    known = [i for i, mixer in enumerate(subject.mixers) if isinstance(mixer, Mixer)]
    if not known:
        raise UserError(f"{subject.name} has no mixers that can be run by themselves: only ssmlens' own models do")
    longest = longest or (256 if large(subject, 512) else 512)
    if directions < 1 or points < 2 or longest < 32:
        raise UserError(
            f"at least one direction, two points and 32 tokens are needed, not {directions}, {points} and {longest}"
        )
    chosen = choose(layers, known)
    tokens = subject.tokens(inputs, shortest=32)
    progress = progress or Silent()
    invariants = [(i, invariant(mixer)) for i in known if (mixer := subject.mixers[i]) is not None]
    found: dict[int, list[Response]] = {i: [] for i in chosen}
    progress.begin(f"{subject.name}: frequency response", len(tokens) * len(chosen))
    for row in range(len(tokens)):

        def visit(seen: BlockPass, row: int = row) -> None:
            if seen.index in found and seen.x is not None:
                made = response(
                    seen.mixer, seen.x[:, :longest], points=points, directions=directions, seed=(seed, row, seen.index)
                )
                found[seen.index].append(made)
                progress.step()

        subject.walk(tokens[row : row + 1], visit)
    responses = {
        i + 1: Response(rs[0].omega, np.concatenate([r.gain for r in rs]), np.concatenate([r.power for r in rs]))
        for i, rs in found.items()
    }
    filters = {i + 1: one for i, one in invariants if one is not None}
    return Filters(subject.name, min(longest, tokens.shape[1]), directions, filters, responses)


def figures(results: Sequence[Filters]) -> list[Figure]:
    """The response of the linearised layers; of a time-invariant one (the middle one of each model); and cut-offs by layer."""
    measured = [_measured(r, number) for r in results for number in r.responses]
    filters = [s for r in results if r.invariant for s in _filter(r, sorted(r.invariant)[len(r.invariant) // 2])]
    cut_offs = [s for r in results if r.invariant for s in _cut_offs(r)]
    described = (
        (
            "measured", "Is a layer low-pass? Its gain by frequency", "frequency (radians per token)", "gain, relative to the slowest frequency", measured, results,
            "How strongly a small oscillation of what enters a layer comes out of it at the same frequency. A falling line: slow changes pass, fast ones are "
            "blurred away. π is an oscillation from each token to the next.",
        ),
        (
            "filter", "The filter of a time-invariant layer", "frequency (radians per token)", "|H|, relative to its largest value", filters, results,
            "Median over inner channels, the band from quartile to quartile. Solid: the learned modes. Thin: with the skip and with state channels held at "
            "zero, which let every frequency through.",
        ),
        (
            "cut-off", "Cut-off of time-invariant layers, and its bound", "layer", f"Ω(ε) at ε = {EPSILONS[0]:g} of the largest response (radians per token)", cut_offs, results,
            "Points: beyond this frequency the learned modes pass less than ε, median over inner channels. Thin: the bound of Proposition D.4. Above π no "
            "sequence of tokens has such frequencies.",
        ),
    )  # fmt: skip
    return [
        Figure(
            id=f"filters-{id}", title=title, x_label=x, y_label=y, x_scale="linear" if x == "layer" else "log", y_scale="log",
            series=series, meaning=meaning, method=_method(results[0]),
        )
        for id, title, x, y, series, results, meaning in described
        if series
    ]  # fmt: skip


def _measured(r: Filters, number: int) -> Series:
    one = r.responses[number]
    gains = np.sqrt(one.gain / np.maximum(one.gain[:, :1], np.finfo(float).tiny))
    values = [Value.mean(column) for column in gains.T]
    errors = [v.stderr for v in values if v.stderr is not None]
    return Series(
        name=f"{r.name}, layer {number}", x=one.omega.tolist(), y=[v.value for v in values],
        stderr=errors if len(errors) == len(values) else None, group=r.name,
    )  # fmt: skip


def _filter(r: Filters, number: int) -> list[Series]:
    one, made = r.invariant[number], []
    curves: tuple[tuple[str, Array, Literal["line", "fit"]], ...] = (
        ("learned modes", one.learned, "line"),
        ("with skip and zeros", one.whole, "fit"),
    )
    for what, curve, style in curves:
        low, middle, high = np.quantile(curve / curve.max(1, keepdims=True), (0.25, 0.5, 0.75), axis=0).tolist()
        name = f"{r.name}, layer {number}: {what}"
        made.append(Series(name=name, x=one.omega.tolist(), y=middle, low=low, high=high, group=r.name, style=style))
    return made


def _cut_offs(r: Filters) -> list[Series]:
    numbers = sorted(r.invariant)
    parts: tuple[tuple[str, int, Literal["points", "fit"]], ...] = (("measured", 0, "points"), ("bound", 2, "fit"))
    return [
        Series(
            name=f"{r.name}: {what}", x=[float(n) for n in numbers], group=r.name, style=style,
            y=[float(np.median(r.invariant[n].cut_offs[EPSILONS[0]][which])) for n in numbers],
        )
        for what, which, style in parts
    ]  # fmt: skip


def tables(results: Sequence[Filters]) -> list[Table]:
    return [table(results), *([cut_off_table(results)] if any(r.invariant for r in results) else [])]


def table(results: Sequence[Filters]) -> Table:
    """The linearised layers."""
    columns = [
        Column(name="model"), Column(name="layer"),
        Column(name="fast / slow", meaning="gain at periods of at most 4 tokens over that at periods of at least 16"),
        Column(name="at the frequency of the input", meaning="share of the output's power; the rest was moved to others by what depends on the input"),
        Column(name="it is"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [r.name, number, one.high_over_low(), one.coherent(), verdict(one)]
        for r in results
        for number, one in r.responses.items()
    ]
    return Table(
        id="filters-measured", title="Slow and fast changes through a layer", columns=columns, rows=rows, method=_method(results[0]),
        meaning="Whether a layer lets fast changes of its input through, direct path included.",
    )  # fmt: skip


def verdict(one: Response) -> str:
    """Low-pass where the 95 % interval of fast / slow lies below one (for one sequence: below 0.8), high-pass where above (above 1.25)."""
    ratio = one.high_over_low()
    low, high = ratio.interval() or (0.8 * ratio.value, 1.25 * ratio.value)
    return "low-pass" if high < 1 else "high-pass" if low > 1 else "neither, clearly"


def cut_off_table(results: Sequence[Filters]) -> Table:
    """Ω(ε) of time-invariant layers against Proposition D.4."""
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="ε", meaning="share of each inner channel's largest response"),
        Column(name="Ω(ε) measured", unit="radians per token", meaning="median over inner channels"),
        Column(name="bound", unit="radians per token", meaning="D.4, centre max|a|; median"),
        Column(name="tighter bound", unit="radians per token", meaning="centre max|Im a|; median"),
        Column(name="measured / tighter bound", meaning="median"),
        Column(name="below π", meaning="share of inner channels whose cut-off tokens can show"),
        Column(name="left out: at one", meaning="state channels of each inner channel; not integrable"),
        Column(name="left out: at zero", meaning="state channels of each inner channel; pass all frequencies"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for r in results:
        for number, one in sorted(r.invariant.items()):
            for epsilon, (omega, bound, tight) in one.cut_offs.items():
                medians = [float(np.median(x)) for x in (omega, bound, tight, omega / tight)]
                rows.append([r.name, number, epsilon, *medians, one.share_below_nyquist(epsilon), one.ones, one.zeros])
    return Table(
        id="filters-cut-off", title="Cut-off of time-invariant layers", columns=columns, rows=rows, method=_method(results[0]),
        meaning="Beyond Ω(ε) the learned modes pass less than ε. The proposition's bound is for continuous time.",
    )  # fmt: skip


def _method(r: Filters) -> str:
    return (
        f"Measured: sinusoids along {r.directions} random directions added to what enters a mixer, outputs differenced in float64 around {r.n_sequences} sequences "
        f"(their first {r.length} tokens), last half of the tokens, root mean square over directions, mean over sequences with its standard error. Time-invariant filters "
        "and cut-offs: from the parameters alone, so without error; the skip and pinned state channels left out; Ω in continuous time, times Δ."
    )
