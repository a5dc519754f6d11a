"""The two theorems on one layer's coefficients: both sides of each inequality, from a_t, Δ_t, b_t as they are (SPEC §2 and §3).

    recency        Theorem 3.1 / D.2   ‖∂y_t/∂x_s‖ ≤ C exp(-κ (t-s)),   κ = log(1/A_max),   A_max = max_{t≥2,n} |a_{t,n}|
    exactly        per state channel   Π_{r=s+1..t} |a_{r,n}|  ≤  A_max^{t-s}
    smoothing      Theorem 4.2 / D.5   max_{t,s,n} |h_t - h_s|  ≤  (1 - A_min^{T-1}) · range(b),   A_min = min_{t≥2,n} a_{t,n}

a_1 meets h_0 = 0, so it is free: it is left out of A_max and A_min. A chunk of tokens at a time.

Smoothing. Assumed of every state channel n: (i) a_t + Δ_t = 1 throughout, or (ii) a_t + Δ_t ≤ 1 throughout and min_t b_t ≤ 0 ≤ max_t b_t; a, Δ ≥ 0.
As printed, case (i) fails for h_0 = 0 (b = 1, a = ½: memories differ by ½, inputs not at all). What holds, with the proof of one line
    m = min(min_t b_t, 0), M = max(max_t b_t, 0):   M - h_t ≥ a_t (M - h_{t-1})  and  h_t - m ≥ a_t (h_{t-1} - m),  as 1 - a_t ≥ Δ_t,
is the inequality with range(b) = max_n (M - m), whenever a_t + Δ_t ≤ 1: adding 0 to the range makes the condition on signs superfluous. Where h_1 = b_1
(Δ_1 = 1, as in RWKV-4) case (i) needs no zero. The *rescaled* form restores the assumption in every state channel with a < 1: Δ' = 1 - a,
b' = Δ b / (1 - a), and with the free a_1 = 0, h_1 = b'_1. It always holds, and speaks of b' instead of b. Neither has a complex version.

Legend: n sequences, T tokens, F state channels of a layer (its state flattened), D = T distances.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ssmlens.errors import UserError
from ssmlens.ops import linear_scan
from ssmlens.recurrence import Coefficients
from ssmlens.results import Value

Array = np.ndarray
TOLERANCE = 1e-6  # of a + Δ against 1: both come from float32
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class Products:
    """Π |a| of every state channel towards the last token, by distance, in logarithms (-inf: nothing is left). a_max, a_max_learned (n,): A_max
    over all state channels and over those that are not pinned (NaN where there are none).
    slowest, slowest_learned, mean (n, D): log of the largest product over state channels, and of their mean; 0 at distance 0."""

    a_max: Float[Array, " n"]
    a_max_learned: Float[Array, " n"]
    slowest: Float[Array, "n D"]
    slowest_learned: Float[Array, "n D"]
    mean: Float[Array, "n D"]


@dataclass(frozen=True, eq=False)
class Inequality:
    """One form of Theorem 4.2 on n sequences; every field (n,).

    left: max over state channels of the range of memories. right: the corrected bound. printed: as in the paper, no 0 added to the range of b.
    a_min: A_min. typical: median over state channels of left/right of each channel by itself (NaN: no channel has both).
    conserving, contracting, expanding: share of (token, state channel) with a + Δ = 1, < 1, > 1. case_i, case_ii: share of state channels that satisfy (i),
    and (ii) without (i). sufficient: share with a + Δ ≤ 1 at every token, all that the corrected form needs. covered: share of state channels
    spoken of (rescaled: those with a < 1 throughout); the rest are left out of every other field."""

    left: Float[Array, " n"]
    right: Float[Array, " n"]
    printed: Float[Array, " n"]
    a_min: Float[Array, " n"]
    typical: Float[Array, " n"]
    conserving: Float[Array, " n"]
    contracting: Float[Array, " n"]
    expanding: Float[Array, " n"]
    case_i: Float[Array, " n"]
    case_ii: Float[Array, " n"]
    sufficient: Float[Array, " n"]
    covered: Float[Array, " n"]

    @property
    def assumed(self) -> bool:
        """Whether a + Δ ≤ 1 at every token and in every state channel that is spoken of: then left ≤ right is a theorem."""
        return bool((self.sufficient == 1).all() and (self.covered > 0).all())

    @property
    def holds(self) -> bool:
        """Whether left ≤ right on every sequence (up to rounding), assumed or not."""
        return bool((self.left <= self.right * (1 + 1e-5) + 1e-12).all())

    @property
    def ratio(self) -> Value:
        """left / right: 1 is tight. 0/0 counts as 1."""
        ratios = np.divide(self.left, self.right, out=_unbounded(self.left), where=self.right > 0)
        return Value.mean(ratios) if np.isfinite(ratios).all() else Value(value=math.inf, n=len(ratios))

    @property
    def slack(self) -> Value:
        """right - left, in the units of b."""
        return Value.mean(self.right - self.left)


@torch.no_grad()
def products(c: Coefficients) -> Products:
    """Of one sequence: backwards from the last token, a chunk at a time. Raises UserError for NaN."""
    length = c.length
    slowest, learned_slowest, mean = (np.zeros(length) for _ in range(3))
    carried: Tensor | float = 0.0
    highest = highest_learned = -math.inf
    for stop in range(length, 1, -_CHUNK):
        start = max(1, stop - _CHUNK)
        a = c.a_at(slice(start, stop))[0]
        # a state whose entries share a transition (all values of a key) need not be gone through entry by entry
        one = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in a.stride()[1:])
        a = a[(slice(None), *one)].abs().flatten(1)
        if not bool(torch.isfinite(a.amax()) & torch.isfinite(a.amin())):
            raise UserError("the model's transitions hold NaN or infinity on these inputs")
        learned = ~(c.ones | c.zeros).to(a.device)[one].flatten()
        log = _float64(a.flip(0).log_())  # accurate: a has the rounding already
        log[0] += carried
        for earlier, row in itertools.pairwise(log):  # far faster than cumsum over the first dimension
            row += earlier
        carried = log[-1].clone()
        d = slice(length - stop + 1, length - start + 1)
        top = log.amax(1)
        slowest[d] = top.numpy(force=True)
        # relative to the largest, float32 is enough for a mean
        share = (log - torch.nan_to_num(top, neginf=0.0)[:, None]).float().exp_().mean(1).double()
        mean[d] = (top + share.log()).numpy(force=True)
        highest = max(highest, float(a.max()))
        if learned.any():
            learned_slowest[d] = slowest[d] if learned.all() else log[:, learned].amax(1).numpy(force=True)
            highest_learned = max(highest_learned, float((a if learned.all() else a[:, learned]).max()))
    if highest_learned == -math.inf:
        highest_learned, learned_slowest = math.nan, np.full(length, math.nan)
    return Products(np.array([highest]), np.array([highest_learned]), slowest[None], learned_slowest[None], mean[None])


def inequality(c: Coefficients, *, rescaled: bool = False) -> Inequality:
    """One form of Theorem 4.2 on one sequence; see `inequalities`."""
    return inequalities(c)[rescaled]


@torch.no_grad()
def inequalities(c: Coefficients) -> tuple[Inequality, Inequality]:
    """Theorem 4.2 on one sequence of real coefficients, original and rescaled, in their own dtype. Raises UserError for complex ones and for NaN."""
    h: Tensor | None = None
    memories, original, rescaled = _Extremes(), _Form(), _Form()
    for start in range(0, c.length, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, c.length))
        a, u, b = c.a_at(chunk)[0], c.u_at(chunk)[0], c.b_at(chunk)
        if a.is_complex() or u.is_complex():
            raise UserError("Theorem 4.2 has no complex version: this layer's transition is complex")
        states, h = linear_scan(a[None], u[None], h0=h, return_final_state=True)
        memories.add(states[0])
        rest = a[1:] if start == 0 else a
        if b is None or c.dt is None:  # Δ = 1 where a family does not separate it
            original.add(a, torch.ones((), dtype=a.dtype, device=a.device), u, rest)
        else:
            dt = c.dt[0, chunk]
            original.add(a, dt.reshape(*dt.shape, *(1 for _ in a.shape[dt.dim() :])), b[0], rest)
        if start == 0:
            a = torch.cat([torch.zeros_like(a[:1]), rest])  # a_1 is free, and this makes h_1 = b'_1
        weight = 1 - a  # where it is 0, b' is infinite, and the state channel is left out
        rescaled.add(None, weight, u / weight, rest)
    return original.concluded(c.length, memories, rescaled=False), rescaled.concluded(c.length, memories, rescaled=True)


class _Extremes:
    """Smallest and largest over tokens, gathered from chunks (tokens, *state)."""

    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, z: Tensor) -> None:
        low, high = z.amin(0), z.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def of(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        assert self.low is not None
        assert self.high is not None
        return _float64(self.low.flatten()[kept]), _float64(self.high.flatten()[kept])


class _Form:
    """What one form of the theorem needs, gathered from chunks. a None: a + Δ = 1 by construction."""

    def __init__(self) -> None:
        self.inputs, self.transitions = _Extremes(), _Extremes()
        self.equal: Tensor | None = None  # at how many tokens a + Δ = 1
        self.below: Tensor | None = None  # < 1
        self.starts: Tensor | None = None  # whether h_1 = b_1

    def add(self, a: Tensor | None, dt: Tensor, b: Tensor, rest: Tensor) -> None:
        """a, b: (tokens, *state); dt broadcasts to them; rest: the transitions but the first of the sequence."""
        self.inputs.add(b)
        if len(rest):
            self.transitions.add(rest)
        if self.starts is None:
            self.starts = (
                ((dt if dt.dim() == 0 else dt[0]) - 1).abs().le(4 * torch.finfo(dt.dtype).eps).expand(b.shape[1:])
            )
        if a is None:
            return
        gap = a + (dt - 1).masked_fill(dt < 0, math.inf)
        equal, below = gap.abs().le(TOLERANCE).float().sum(0), gap.lt(-TOLERANCE).float().sum(0)
        self.equal = equal if self.equal is None else self.equal + equal
        self.below = below if self.below is None else self.below + below

    def concluded(self, length: int, memories: _Extremes, *, rescaled: bool) -> Inequality:
        """rescaled: of the state channels with a < 1 throughout."""
        assert self.starts is not None
        starts = self.starts.flatten()
        kept = torch.ones_like(starts)
        if rescaled and self.transitions.high is not None:
            kept = self.transitions.high.flatten() < 1
        equal = kept.double() * length if self.equal is None else self.equal.flatten().double()
        below = torch.zeros_like(equal) if self.below is None else self.below.flatten().double()
        a_min = None if self.transitions.low is None else self.transitions.of(kept)[0]
        ranges = memories.of(kept), self.inputs.of(kept)
        return _concluded(length, *ranges, a_min, equal[kept], below[kept], starts[kept], float(kept.double().mean()))


def _concluded(
    length: int, memory: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor], a_min: Tensor | None, equal: Tensor,
    below: Tensor, starts: Tensor, share: float,
) -> Inequality:  # fmt: skip
    """Both sides, from extremes of memories and inputs, counts of tokens, all over the flattened state."""
    if not share:
        nothing = {f.name: np.array([math.nan]) for f in fields(Inequality)}
        return Inequality(**nothing | {"covered": np.zeros(1)})
    (h_low, h_high), (b_low, b_high) = memory, given
    if not bool(torch.isfinite(h_low + h_high + b_low + b_high).all()):
        raise UserError("the model's states hold NaN or infinity on these inputs")
    smallest = torch.ones_like(h_low) if a_min is None else a_min.clamp_min(0)
    sufficient, case_i = equal + below == length, equal == length
    signs = (b_low <= 0) & (b_high >= 0)
    bare = b_high - b_low
    # with h_1 = b_1 and a + Δ = 1 every memory is a mean of inputs: then no zero is among them
    without = case_i & starts
    zeroed = torch.where(without, bare, b_high.clamp_min(0) - b_low.clamp_max(0))
    left = h_high - h_low

    def factor(a: Tensor) -> Tensor:
        return -torch.expm1((length - 1) * a.log())

    own = factor(smallest) * zeroed
    ratios = (left / own)[own > 0]
    whole = factor(smallest.min())
    numbers = {
        "left": left.max(), "right": whole * zeroed.max(), "printed": whole * bare.max(), "a_min": smallest.min(),
        "typical": ratios.median() if len(ratios) else math.nan,
        "conserving": equal.double().mean() / length, "contracting": below.double().mean() / length,
        "expanding": 1 - (equal + below).double().mean() / length,
        "case_i": case_i.double().mean(), "case_ii": (sufficient & signs & ~case_i).double().mean(),
        "sufficient": sufficient.double().mean(), "covered": share,
    }  # fmt: skip
    return Inequality(**{name: np.array([float(x)]) for name, x in numbers.items()})


def stacked(parts: Sequence[Any]) -> Any:
    """One object of the fields of several, sequence after sequence."""
    one = parts[0]
    return type(one)(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(one)})


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()


def _unbounded(left: Array) -> Array:
    """What left/0 is: infinite, but 1 where left is 0 too."""
    return np.where(left > 0, math.inf, 1.0)
