"""Hidden attention: how much each token's value weighs in each output of a recurrent layer (Lemma D.1; Ali et al. 2024, arXiv 2403.01590).

    y_t = Σ_{s≤t} α_{t,s} value_s        α_{t,s} = Σ_n query_{t,n} (Π_{r=s+1..t} a_{r,n}) key_{s,n},   one α for each group g

A group is what reads its own value: an inner channel, a head, a width channel. Taken from what the mixer itself hands to the operator that runs its
recurrence (`ssmlens.ops`), so before skip, norm and gates, and true of any mixer that uses one:
    selective_scan           query C_t      key Δ_t B_t     value x_t, of an inner channel         (Mamba)
    lti_convolution          query C        key b̄           value x_t, of an inner channel; Re     (S4D; H3's diagonal model, its gates left out)
    gated_linear_attention   query q_t      key k_t         value v_t, of a head                   (GLA, RetNet, Mamba-2, HGRN2, linear attention)
      with a bonus           α_{t,s} = q_tᵀ (Π_{r=s+1..t-1} a_r) k_s,   α_{t,t} = q_tᵀ diag(bonus) k_t                                 (RWKV-5, RWKV-6)
    linear_scan              query 1        key Δ_t (1 where the family has none)   value b_t, of a width channel     (Griffin, minGRU, minLSTM)
    rwkv4_attention          the weights of its running mean, in which α_{t,t} has the bonus and rows sum to one
α has a sign, and in a unit of its own in every family: what is shown is mean_g |α|, and each row's share of its sum.

Where a mixer runs on none of these, `contributions` does for any with coefficients: ‖∂y_t/∂h · (Π a_r) u_s‖, how far y_t moves, to first order, when what
token s wrote is taken out of the state. It sees norm and gates: a scale-free norm makes the contributions to an output cancel.

Legend: T tokens of which W are in the window, G groups, N state channels of a group, n sequences.
"""

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmlens import ops
from ssmlens.errors import UserError
from ssmlens.lens.layers import choose, in_double
from ssmlens.lens.notebook import Shown
from ssmlens.lens.progress import Progress, Silent
from ssmlens.lens.subject import BlockPass, Subject
from ssmlens.ops import reference
from ssmlens.results import Cell, Column, Figure, Map, Panel, Series, Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Array = np.ndarray
_STEP = 1e-5  # of the largest number in a state: truncation and rounding both below 1e-9 of the derivative
_MODELS = 3
_OPERATORS = ("selective_scan", "lti_convolution", "gated_linear_attention", "linear_scan", "rwkv4_attention")


class Call(NamedTuple):
    """One call of an operator: its name, its arguments by name with their defaults, and y."""

    name: str
    arguments: dict[str, Any]
    y: Tensor


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls of `ssmlens.ops` that are made inside, in order. Not for several threads at once."""
    calls: list[Call] = []
    originals = {name: getattr(ops, name) for name in _OPERATORS}

    def recording(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(originals[name]).bind(*args, **kwargs)
            bound.apply_defaults()
            out = originals[name](*args, **kwargs)
            calls.append(Call(name, dict(bound.arguments), out[0] if isinstance(out, tuple) else out))
            return out

        return call

    try:
        for name in _OPERATORS:
            setattr(ops, name, recording(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


@torch.no_grad()
def weights(mixer: nn.Module, x: Float[Tensor, "1 length d_model"], window: slice | None = None) -> Float[Tensor, "G W W"] | None:  # fmt: skip
    """α_{t,s} of every group for the tokens t and s of the window (all by default), 0 above the diagonal; None where the mixer runs on no operator of ours.

    Memory: W · W · G numbers, and W states of the layer."""
    with recorded() as calls:
        mixer(x)
    if len(calls) != 1:
        return None
    first, stop, _ = (window or slice(None)).indices(x.shape[1])
    here, given = slice(first, stop), calls[0].arguments
    match calls[0].name:
        case "selective_scan":
            dt = reference.step_size(given["dt"], given["dt_bias"], given["dt_softplus"])[:1, here, :, None]
            a = reference.transition(dt, given["A"])[0]
            return _weights(_per_token(given["C"], here), a, (dt * _per_token(given["B"], here))[0])
        case "lti_convolution":
            a, b = reference.zero_order_hold(given["A"], given["B"], given["dt"])
            return _weights(*(m.expand(stop - first, *m.shape) for m in (given["C"], a, b)))
        case "gated_linear_attention":
            q, k = (reference.per_head(given[name], given["v"])[0, here] for name in ("q", "k"))
            return _weights(q, given["log_a"][0, here].exp().expand_as(k), k, given["bonus"])
        case "linear_scan":
            c: Any = getattr(mixer, "coefficients", lambda x: None)(x)
            a = given["a"].expand_as(given["u"])[0, here].flatten(1)[..., None]
            key = torch.ones_like(a)
            if c is not None and c.b_at(slice(0, 1)) is not None and c.dt is not None:
                key = c.dt[0, here].flatten(1)[..., None].expand_as(a)
            return _weights(torch.ones_like(a), a, key)
        case _:
            return _mean_weights(given["k"][0], given["w"], given["u"], here)


def _per_token(m: Tensor, here: slice) -> Tensor:
    """B or C of a selective scan: (1, T, N) for all inner channels, or (d_inner, N) for all tokens → (W or 1, d_inner or 1, N)."""
    return m[0, here, None] if m.dim() == 3 else m[None]


def _weights(query: Tensor, a: Tensor, key: Tensor, bonus: Tensor | None = None) -> Float[Tensor, "G W W"]:
    """From query, a, key (W, G, N), broadcasting; a may be complex (then the real part is read). bonus (G, N): reads before it writes."""
    query, a, key = torch.broadcast_tensors(query, a, key)
    size, groups = a.shape[:2]
    out = torch.zeros(groups, size, size, dtype=query.real.dtype, device=a.device)
    left = torch.zeros_like(a)  # what is left of every key: (W, G, N)
    for t in range(size):
        if bonus is None:
            left[:t] *= a[t]
            left[t] = key[t]
            out[:, t, : t + 1] = (left[: t + 1] * query[t]).sum(-1).real.T
        else:
            out[:, t, :t] = (left[:t] * query[t]).sum(-1).T
            out[:, t, t] = (query[t] * bonus * key[t]).sum(-1)
            left[:t] *= a[t]
            left[t] = key[t]
    return out


def _mean_weights(k: Float[Tensor, "T G"], w: Float[Tensor, " G"], u: Float[Tensor, " G"], here: slice) -> Float[Tensor, "G W W"]:  # fmt: skip
    """RWKV-4: softmax over s of k_s - (t-1-s) w, with u + k_t for the token itself; all tokens before the window are in the sum too."""
    log_s = torch.full_like(k[0], -math.inf)
    size = here.stop - here.start
    out = torch.zeros(k.shape[1], size, size, dtype=k.dtype, device=k.device)
    left = torch.full_like(k[here], -math.inf)
    for t in range(here.stop):
        at = t - here.start
        if at >= 0:
            total = torch.logaddexp(log_s, u + k[t])
            out[:, at, :at] = (left[:at] - total).exp().T
            out[:, at, at] = (u + k[t] - total).exp()
            left[:at] -= w  # an infinite w empties it: -inf - inf
            left[at] = k[t]
        log_s = torch.logaddexp(log_s - w, k[t])
    return out


@torch.no_grad()
def contributions(
    mixer: Any, x: Float[Tensor, "1 length d_model"], window: slice | None = None
) -> Float[Tensor, "W W"]:
    """‖∂y_t/∂h · (Π_{r=s+1..t} a_r) u_s‖ for the tokens t and s of the window, in the unit of y. By central differences of `decode` in float64, two passes
    for each s. Memory: the states of one layer at every token, three times. Raises ValueError where a mixer has no coefficients."""
    twin: Any = in_double(mixer)
    x = x.to(next((p.device for p in twin.parameters()), torch.device("cpu")), torch.float64)
    c = twin.coefficients(x)
    first, stop, _ = (window or slice(None)).indices(x.shape[1])
    states, u = c.states(), c.u
    out = torch.zeros(stop - first, stop - first, dtype=x.dtype, device=x.device)
    for s in range(first, stop):
        trace = torch.zeros_like(states)
        trace[:, s] = u[:, s]
        for t in range(s + 1, stop):
            trace[:, t] = c.a_at(slice(t, t + 1))[:, 0] * trace[:, t - 1]
        step = _STEP * float(states.abs().max()) / (float(trace.abs().max()) or 1.0)
        moved = (twin.decode(states + step * trace, x) - twin.decode(states - step * trace, x)) / (2 * step or 1.0)
        out[s - first :, s - first] = moved[0, s:stop].norm(dim=-1)
    return out


@dataclass(frozen=True, eq=False)
class HiddenAttention(Shown):
    """matrices[l] (n, W, W): mean over groups of |α_{t,s}|, rows t, columns s, of layer l (counted from 1); kinds[l]: "weights", or "contributions" where
    the mixer has none. start: the first token of the window."""

    name: str
    length: int
    start: int
    matrices: dict[int, Float[Array, "n W W"]] = field(repr=False)
    kinds: dict[int, Literal["weights", "contributions"]] = field(repr=False)

    @property
    def n_sequences(self) -> int:
        return len(next(iter(self.matrices.values())))

    @property
    def window(self) -> int:
        return next(iter(self.matrices.values())).shape[1]

    def shares(self, layer: int) -> Float[Array, "n W W"]:
        """Each row over its sum: what share of the window's weight in y_t token s has. A row without any weight stays 0."""
        m = self.matrices[layer]
        total = m.sum(2, keepdims=True)
        return np.divide(m, total, out=np.zeros_like(m), where=total > 0)

    def by_distance(self, layer: int) -> list[Value]:
        """Mean share of the token d before, for outputs of the window's second half, d up to half the window."""
        shares, half = self.shares(layer), self.window // 2
        rows = np.arange(self.window - half, self.window)
        return [Value.mean(shares[:, rows, rows - d].mean(1)) for d in range(half + 1)]

    def mean_distance(self, layer: int) -> Value:
        """Mean distance t - s that an output of the window's second half looks back, weighted by share, tokens."""
        back = np.arange(self.window)[:, None] - np.arange(self.window)
        looked = (self.shares(layer) * back).sum(2)[:, self.window // 2 :]
        return Value.mean(looked.mean(1), "tokens")

    def on_itself(self, layer: int) -> Value:
        """Mean share of an output's own token, in the window's second half."""
        shares = np.diagonal(self.shares(layer), axis1=1, axis2=2)
        return Value.mean(shares[:, self.window // 2 :].mean(1))

    def plot(self, sequence: int = 0, words: Sequence[str] | None = None) -> "Canvas":
        """Heat maps, one for each layer: shares of one sequence. words: of the window, written along the axes (up to 40 of them)."""
        return plot([self], sequence, words)

    def figures(self) -> list[Figure]:
        return figures([self])

    def maps(self) -> list[Map]:
        return maps([self])

    def tables(self) -> list[Table]:
        return [table([self])]

    def table_rows(self) -> list[list[Cell]]:
        return table([self]).rows


def measure(
    model: nn.Module | Subject,
    inputs: Any,
    *,
    window: int = 64,
    start: int | None = None,
    layers: int | Sequence[int] | None = 3,
    progress: Progress | None = None,
) -> HiddenAttention:
    """Hidden attention within `window` tokens from `start` on (None: the last ones) of the sequences of `inputs` (sequences, length). What lies before the
    window is in the states and not shown. layers: how many, spread evenly over the recurrent ones, or their numbers, counted from 1, or None for all.

    Raises UserError for bad tokens or options, NaN, and a model without diagonal transitions (attention shows its own weights)."""
    subject = Subject.of(model)
    known = subject.recurrent
    if not known:
        raise UserError(
            f"{subject.name} has no recurrent layers with a diagonal transition: hidden attention is theirs"
        )
    chosen = choose(layers, known)
    tokens = subject.tokens(inputs)
    length = tokens.shape[1]
    first = length - window if start is None else start
    if window < 2 or first < 0 or first + window > length:
        raise UserError(f"a window of {window} tokens from token {max(first, 0)} on does not fit into {length}")
    progress = progress or Silent()
    found: dict[int, list[Array]] = {i: [] for i in chosen}
    kinds: dict[int, Literal["weights", "contributions"]] = {}
    progress.begin(f"{subject.name}: hidden attention", len(tokens) * len(chosen))

    def visit(seen: BlockPass) -> None:
        if seen.index not in found or seen.x is None:
            return
        # a call of the mixer inside its block's hook would be seen as the block's own
        mixer, x, here = _unhooked(seen.mixer), seen.x, slice(first, first + window)
        alpha = weights(mixer, x, here)
        kinds[seen.index + 1] = "contributions" if alpha is None else "weights"
        matrix = contributions(mixer, x, here) if alpha is None else alpha.abs().mean(0)
        if not bool(torch.isfinite(matrix).all()):
            raise UserError("a layer's weights hold NaN or infinity on these inputs")
        found[seen.index].append(matrix.cpu().double().numpy())
        progress.step()

    for row in range(len(tokens)):
        subject.walk(tokens[row : row + 1], visit)
    matrices = {i + 1: np.stack(made) for i, made in found.items()}
    return HiddenAttention(subject.name, length, first, matrices, kinds)


def _unhooked(mixer: nn.Module) -> nn.Module:
    """The same module, sharing its parameters, without its hooks."""
    twin = copy.copy(mixer)
    twin._forward_hooks = OrderedDict()
    return twin


def figures(results: Sequence[HiddenAttention]) -> list[Figure]:
    """Mean share by distance, a line for each layer; the heat maps are `maps`."""
    series = []
    for r in results:
        for layer in r.matrices:
            values = r.by_distance(layer)
            kept = [(float(d), v) for d, v in enumerate(values) if v.value > 0]
            errors = [v.stderr for _, v in kept if v.stderr is not None]
            if kept:
                series.append(
                    Series(
                        name=f"{r.name}, layer {layer}", x=[d for d, _ in kept], y=[v.value for _, v in kept],
                        stderr=errors if len(errors) == len(kept) else None, group=r.name,
                    )
                )  # fmt: skip
    if not series:
        return []
    return [
        Figure(
            id="hidden-attention", title="Where a recurrent layer looks: weight by distance", x_label="distance t - s (tokens)",
            y_label="mean share of the weights in y_t", y_scale="log", series=series, method=_method(results[0]),
            meaning="What attention weights would be in a transformer: how much each earlier token's value counts in an output. A steep line looks at the "
            "last few tokens only; a flat one at all of the window.",
        )
    ]  # fmt: skip


def maps(results: Sequence[HiddenAttention], sequence: int = 0) -> list[Map]:
    """Shares of the weights in one sequence as heat maps, those of the same window together; of more than three models the first and the last layer."""
    made: list[Map] = []
    for start, window in dict.fromkeys((r.start, r.window) for r in results):
        shown = [r for r in results if (r.start, r.window) == (start, window)]
        panels = []
        for r in shown:
            for layer in list(r.matrices) if len(shown) <= _MODELS else [min(r.matrices), max(r.matrices)]:
                share = r.shares(layer)[sequence]
                values = [
                    [float(f"{x:.3g}") if s <= t else math.nan for s, x in enumerate(row)]
                    for t, row in enumerate(share)
                ]
                panels.append(Panel(name=f"{r.name}, layer {layer}", values=values, group=r.name))
        at = [float(t) for t in range(start, start + window)]
        made.append(
            Map(
                id=f"hidden-attention-{start}-{window}" if made else "hidden-attention", title="Hidden attention: which tokens every output is made of",
                x_label="token s that is read", y_label="output t", unit="share of the weights in y_t", x=at, y=at, panels=panels,
                scale="log", low=1e-4, high=1.0, method=_method(shown[0]) + f" Shown: sequence {sequence + 1}.",
                meaning="What attention weights would be in a transformer, for a recurrent layer: how much each token's value counts in each output. A bright "
                "diagonal only: the layer looks at the last few tokens. Bright columns: tokens that are kept.",
            )
        )  # fmt: skip
    return made


def table(results: Sequence[HiddenAttention]) -> Table:
    columns = [
        Column(name="model"), Column(name="layer"), Column(name="looks back", unit="tokens", meaning="mean distance, weighted by share"),
        Column(name="on the token itself", meaning="share"), Column(name="kind", meaning="weights α, or contributions where a mixer has none"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [r.name, layer, r.mean_distance(layer), r.on_itself(layer), r.kinds[layer]]
        for r in results
        for layer in r.matrices
    ]
    return Table(
        id="hidden-attention", title="Hidden attention", columns=columns, rows=rows, method=_method(results[0]),
        meaning="How far back the outputs of a layer look, within the window.",
    )  # fmt: skip


def plot(results: Sequence[HiddenAttention], sequence: int = 0, words: Sequence[str] | None = None) -> "Canvas":
    """Heat maps of shares in one sequence: a row for each model, a column for each of its layers. Logarithmic, down to a ten-thousandth."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure as Canvas

    across = max(len(r.matrices) for r in results)
    canvas = Canvas(figsize=(3.6 * across + 1, 3.6 * len(results)), layout="constrained")
    axes = canvas.subplots(len(results), across, squeeze=False)
    image = None
    for row, r in zip(axes, results, strict=True):
        if not 0 <= sequence < r.n_sequences:
            raise UserError(f"{r.name} was measured on {r.n_sequences} sequences; there is no number {sequence}")
        ends = (r.start - 0.5, r.start + r.window - 0.5)
        for axis, layer in zip(row, r.matrices, strict=False):
            share = r.shares(layer)[sequence]
            image = axis.imshow(
                np.ma.masked_less_equal(share, 0), norm=LogNorm(1e-4, 1), extent=(*ends, *ends[::-1]), cmap="magma", interpolation="nearest"
            )  # fmt: skip
            axis.set_title(f"{r.name}, layer {layer}", fontsize="medium")
            axis.set(xlabel="token s that is read", ylabel="output t")
            if words is not None and len(words) == r.window <= 40:
                at = np.arange(r.start, r.start + r.window)
                axis.set_xticks(at, words, rotation=90, fontsize="x-small")
                axis.set_yticks(at, words, fontsize="x-small")
        for axis in row[len(r.matrices) :]:
            axis.set_axis_off()
    if image is not None:
        canvas.colorbar(image, ax=axes, label="share of the weights in y_t", shrink=0.8)
    return canvas


def _method(r: HiddenAttention) -> str:
    return (
        f"Weights of the recurrence before skip, norm and gates, mean of their absolute values over groups (inner channels, heads or width channels), each row "
        f"divided by its sum; tokens {r.start} to {r.start + r.window - 1} of {r.n_sequences} sequences of {r.length} (what lies before is left out); by distance: outputs of "
        "the window's second half, mean over sequences with its standard error."
    )
