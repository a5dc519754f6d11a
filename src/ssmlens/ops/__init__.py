"""How the recurrence is computed. One public function for each form it takes; each runs on one of these backends:

    reference   a plain loop over tokens, the judge of the others
    chunked     pure torch, any device, real and complex, memory linear in length
    cpu         C++, compiled for this machine on first use (`ssmlens.ops.cpu`)
    triton      kernels for an NVIDIA GPU (`ssmlens.ops.triton`)
    mamba_ssm, fla   other people's GPU kernels, where their packages are installed (`ssmlens.ops.peers`)

`backend="auto"` takes the fastest of our own that supports the arguments; `backend_for` says which. On a CUDA device where one of those
packages is installed it takes that where it is measured to be faster (`ssmlens.ops.choice`: then name a backend for bitwise the same
results). The state, A, a, dt_bias and every
accumulation are float32 (float64 for float64 input) under any autocast; y has the dtype of x, final states are float32/64.
Wrong shapes, dtypes and devices raise ValueError or TypeError that name the argument; values are checked under `checks(True)`.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

from ssmlens.ops import _check
from ssmlens.ops._check import checks

__all__ = [
    "BACKENDS", "backend_for", "causal_conv1d", "checks", "gated_linear_attention", "linear_scan", "lti_convolution", "rms_norm",
    "rwkv4_attention", "selective_scan",
]  # fmt: skip

BACKENDS = ("auto", "reference", "chunked", "cpu", "triton", "mamba_ssm", "fla")
_PEERS = {"mamba_ssm": "selective_scan", "fla": "gated_linear_attention"}  # what each computes


def backend_for(op: str, x: Tensor, A: Tensor | None = None) -> str:
    """The backend that `backend="auto"` takes for `op` (a public function's name) on input x, with transition A or a."""
    own = {"cpu": "cpu", "cuda": "triton"}.get(x.device.type)
    return own if own is not None and _can(op, own, x, A) else "chunked"


def _kernels(backend: str) -> ModuleType:
    if backend == "cpu":
        from ssmlens.ops import cpu

        return cpu
    from ssmlens.ops import triton

    return triton


def _can(op: str, backend: str, x: Tensor, A: Tensor | None) -> bool:
    """Each kernel of "cpu" and "triton" comes with the question what it can do."""
    if x.numel() == 0 or (A is not None and A.numel() == 0):
        return False
    kernels = _kernels(backend)
    supports = getattr(kernels, f"supports_{op}", None)
    return supports is not None and bool(supports(x, A)) and bool(kernels.available())


def _module(op: str, backend: str, x: Tensor, A: Tensor | None = None) -> ModuleType:
    if backend == "auto":
        backend = backend_for(op, x, A)
    elif backend in ("cpu", "triton") and not _can(op, backend, x, A):
        reason = _kernels(backend).why_unavailable() or "it does not support these arguments"
        raise ValueError(f"{op}: backend {backend!r} cannot be used here: {reason}")
    elif backend in _PEERS and _PEERS[backend] != op:
        raise ValueError(f"{op}: backend {backend!r} computes {_PEERS[backend]} only")
    if backend in ("cpu", "triton"):
        return _kernels(backend)
    if backend == "chunked":
        from ssmlens.ops import chunked

        return chunked
    if backend == "reference":
        from ssmlens.ops import reference

        return reference
    if backend in _PEERS:
        from ssmlens.ops import peers

        return peers
    raise ValueError(f"{op}: unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def _run(
    op: str, backend: str, module: ModuleType, x: Tensor, kw: dict[str, Any], final_state: bool
) -> tuple[Tensor, Tensor]:
    """Of an operator that a peer computes, too."""

    def ours(kw: dict[str, Any]) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = getattr(module, op)(**kw)
        return result

    if backend != "auto":
        return ours(kw)
    from ssmlens.ops import choice, peers

    return choice.faster(op, x, kw, ours, lambda kw: getattr(peers, op)(**kw), final_state=final_state)


def _widened(module: ModuleType, x: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """For the reference, which computes in the dtype it is given: everything in that of the state. The others read half precision
    themselves, and need no copies of it."""
    if not module.__name__.endswith(".reference"):
        return list(tensors)
    return [_check.promoted(t, _check.state_dtype(x)) for t in tensors]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's recurrence (SPEC: the paper's Eq. 1 with a_t = exp(Δ_t A), b_t = B_t x_t):

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = (Re(C_t h_t) + D x_t) · silu(z_t)

    x, dt, z: (batch, length, d_inner)   A: (d_inner, d_state), real ≤ 0 or complex with real part ≤ 0
    B, C: (batch, length, d_state), or (d_inner, d_state) where they do not depend on time   D, dt_bias: (d_inner,)
    h0: (batch, d_inner, d_state)   reset: (batch, length) bool, the state is emptied before such a token
    dt_softplus: dt is a pre-activation, Δ = softplus(dt + dt_bias).

    An entry A = 0 is a state channel held at exactly one, with the ordinary gradient. An entry A = -inf is one held at exactly
    zero at every dt, dt = 0 included: zero gradient to A, nothing to dt through a. dt = 0 leaves other channels as they are.

    Returns y like x, and h_T (batch, d_inner, d_state) if return_final_state.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong.
    """
    with _check.naming("selective_scan"):
        _check.tensor("x", x, ("batch", "length", "d_inner"))
        batch, length, d_inner = x.shape
        _check.floating("x", x)
        if length == 0:
            raise ValueError("x has length 0")
        _check.tensor("dt", dt, (batch, length, d_inner), x)
        _check.floating("dt", dt)
        _check.tensor("A", A, (d_inner, None), x)
        _check.floating("A", A, complex_ok=True)
        n = A.shape[1]
        for name, m in (("B", B), ("C", C)):
            if isinstance(m, Tensor) and m.dim() == 2:
                _check.tensor(name, m, (d_inner, n), x)
            else:
                _check.tensor(name, m, (batch, length, n), x)
            _check.floating(name, m, complex_ok=A.is_complex())
        for name, p, shape in (
            ("D", D, (d_inner,)),
            ("dt_bias", dt_bias, (d_inner,)),
            ("z", z, (batch, length, d_inner)),
        ):
            if p is not None:
                _check.tensor(name, p, shape, x)
                _check.floating(name, p)
        if h0 is not None:
            _check.tensor("h0", h0, (batch, d_inner, n), x)
            _check.floating("h0", h0, complex_ok=A.is_complex())
        _check.flags("reset", reset, batch, length, x)
        _check.values(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, h0=h0)
        _check.not_positive("A", A)

    module = _module("selective_scan", backend, x, A)
    with _check.full_precision(x):
        *needed, D, z, dt_bias, h0 = _widened(module, x, (x, dt, A, B, C, D, z, dt_bias, h0))
        kw: dict[str, Any] = dict(zip(("x", "dt", "A", "B", "C"), needed, strict=True))
        kw |= {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "h0": h0, "reset": reset}
        y, h_T = _run("selective_scan", backend, module, x, kw, return_final_state)
    y = y.to(x.dtype)
    return (y, h_T) if return_final_state else y


def linear_scan(
    a: Tensor,
    u: Tensor,
    *,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + u_t, entry by entry: the recurrence itself, with its coefficients given.

    a, u: (batch, length, ...) real or complex, a broadcasts to u   h0: (batch, ...)   reset: (batch, length) bool
    Returns all states (batch, length, ...) in u's dtype, and the last (batch, ...) if return_final_state.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("linear_scan"):
        if not isinstance(u, Tensor) or u.dim() < 2:
            raise ValueError("u must be a tensor of shape (batch, length, ...)")
        if u.shape[1] == 0:
            raise ValueError("u has length 0")
        _check.floating("u", u, complex_ok=True)
        if not isinstance(a, Tensor) or a.dim() != u.dim():
            raise ValueError(f"a must have as many dimensions as u {tuple(u.shape)}")
        _check.tensor("a", a, tuple(g if g != 1 else None for g in a.shape), u)
        if any(m not in (1, w) for m, w in zip(a.shape, u.shape, strict=True)):
            raise ValueError(f"a of shape {tuple(a.shape)} does not broadcast to u's {tuple(u.shape)}")
        _check.floating("a", a, complex_ok=True)
        if h0 is not None:
            _check.tensor("h0", h0, (u.shape[0], *u.shape[2:]), u)
            _check.floating("h0", h0, complex_ok=a.is_complex() or u.is_complex())
        _check.flags("reset", reset, u.shape[0], u.shape[1], u)
        _check.values(a=a, u=u, h0=h0)
    scalar = u.dim() == 2
    if scalar:
        a, u, h0 = a[..., None], u[..., None], None if h0 is None else h0[..., None]
    module = _module("linear_scan", backend, u, a)
    with _check.full_precision(u):
        *needed, h0 = _widened(module, u.real if u.is_complex() else u, (a, u, h0))
        h, h_T = module.linear_scan(*needed, h0=h0, reset=reset)
    if not (h.is_complex() and not u.is_complex()):
        h = h.to(u.dtype)
    if scalar:
        h, h_T = h[..., 0], h_T[..., 0]
    return (h, h_T) if return_final_state else h


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    *,
    bonus: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with decay (GLA, RetNet, Mamba-2, RWKV-5/6, HGRN2): H_t = diag(a_t) H_{t-1} + k_t v_tᵀ, y_t = H_tᵀ q_t.

    q, k: (batch, length, groups, d_key), groups divides heads (head i reads group i // (heads / groups))
    v: (batch, length, heads, d_value)   log_a: (batch, length, heads, d_key or 1), ≤ 0; 0 (a = 1) and -inf (a = 0) legal anywhere
    h0: (batch, heads, d_key, d_value)   bonus: (heads, d_key): y_t reads H_{t-1} + diag(bonus) k_t v_tᵀ instead of H_t (RWKV)
    Returns y like v, and H_T (batch, heads, d_key, d_value) if return_final_state.
    Values must be finite: by matrix products over chunks, NaN or infinity reaches earlier tokens and passes resets. On a CPU, float32 numbers
    below the smallest normal one (1.2e-38) count as zero.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("gated_linear_attention"):
        _check.tensor("v", v, ("batch", "length", "heads", "d_value"))
        batch, length, heads, d_value = v.shape
        _check.floating("v", v)
        if length == 0:
            raise ValueError("v has length 0")
        _check.tensor("k", k, (batch, length, None, None), v)
        groups, d_key = k.shape[2:]
        if groups == 0 or heads % groups:
            raise ValueError(f"k has {groups} groups, which do not divide the {heads} heads of v")
        _check.tensor("q", q, (batch, length, groups, d_key), v)
        _check.tensor("log_a", log_a, (batch, length, heads, None), v)
        if log_a.shape[3] not in (1, d_key):
            raise ValueError(f"log_a must have shape (batch, length, heads, {d_key} or 1), got {tuple(log_a.shape)}")
        for name, p in (("q", q), ("k", k), ("log_a", log_a)):
            _check.floating(name, p)
        if bonus is not None:
            _check.tensor("bonus", bonus, (heads, d_key), v)
            _check.floating("bonus", bonus)
        if h0 is not None:
            _check.tensor("h0", h0, (batch, heads, d_key, d_value), v)
            _check.floating("h0", h0)
        _check.flags("reset", reset, batch, length, v)
        _check.values(q=q, k=k, v=v, log_a=log_a, bonus=bonus, h0=h0)
        _check.not_positive("log_a", log_a)
    module = _module("gated_linear_attention", backend, v, log_a)
    with _check.full_precision(v):
        *needed, bonus, h0 = _widened(module, v, (q, k, v, log_a, bonus, h0))
        kw = dict(zip(("q", "k", "v", "log_a"), needed, strict=True)) | {"bonus": bonus, "h0": h0, "reset": reset}
        y, H_T = _run("gated_linear_attention", backend, module, v, kw, return_final_state)
    y = y.to(v.dtype)
    return (y, H_T) if return_final_state else y


def rwkv4_attention(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """RWKV-4's normalised form: with weights e^{k_i - w (t-1-i)} for earlier tokens and e^{u + k_t} for the current one,
    y_t = σ(r_t) · (weighted mean of v). Sums are carried relative to a running maximum, so no exponent can overflow.

    r, k, v: (batch, length, d)   w: (d,) ≥ 0, the decay in log units (0: nothing is forgotten; inf: only the last token)
    u: (d,)   state: (numerator, denominator, maximum), each (batch, d)   reset: (batch, length) bool
    k = -inf makes a token invisible (padding). Returns y like v, and the state if return_final_state.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("rwkv4_attention"):
        _check.tensor("v", v, ("batch", "length", "d"))
        _check.floating("v", v)
        batch, length, d = v.shape
        if length == 0:
            raise ValueError("v has length 0")
        for name, p in (("r", r), ("k", k)):
            _check.tensor(name, p, (batch, length, d), v)
            _check.floating(name, p)
        for name, p in (("w", w), ("u", u)):
            _check.tensor(name, p, (d,), v)
            _check.floating(name, p)
        if state is not None:
            for name, p in zip(("state[0]", "state[1]", "state[2]"), state, strict=True):
                _check.tensor(name, p, (batch, d), v)
                _check.floating(name, p)
        _check.flags("reset", reset, batch, length, v)
        _check.values(r=r, k=k, v=v, w=w, u=u)
        _check.not_positive("-w", -w)
    module = _module("rwkv4_attention", backend, v, w)
    with _check.full_precision(v):
        carried = None if state is None else tuple(_widened(module, v, state))
        y, state_T = module.rwkv4_attention(*_widened(module, v, (r, k, v, w, u)), state=carried, reset=reset)
    y = y.to(v.dtype)
    return (y, state_T) if return_final_state else y


def lti_convolution(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    *,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S4D, time-invariant: h_t = ā h_{t-1} + b̄ x_t, y_t = Re(C h_t) + D x_t, with the zero-order hold
    ā = exp(dt A), b̄ = (ā - 1)/A · B (and dt B where A is 0 or -inf: a pinned channel keeps an input weight).

    x: (batch, length, d_inner)   A, B, C: (d_inner, d_state), real or complex, real part of A ≤ 0   dt, D: (d_inner,)
    h0: (batch, d_inner, d_state). A factor 2 for one of each conjugate pair belongs into C.
    reset: (batch, length) bool, the state is emptied before such a token.
    An FFT convolution (backend "chunked"), or the selective scan: that where it is C++, and on a GPU for a single token or with resets.
    The scan rounds a mode's phase at every token, the FFT does not: in float32 they differ by 1e-4 after 20,000 tokens of a mode that
    hardly decays.
    Returns y like x, and h_T if return_final_state.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("lti_convolution"):
        _check.tensor("x", x, ("batch", "length", "d_inner"))
        batch, length, d_inner = x.shape
        _check.floating("x", x)
        if length == 0:
            raise ValueError("x has length 0")
        _check.tensor("A", A, (d_inner, None), x)
        for name, p in (("B", B), ("C", C)):
            _check.tensor(name, p, (d_inner, A.shape[1]), x)
        for name, p in (("A", A), ("B", B), ("C", C)):
            _check.floating(name, p, complex_ok=True)
        for name, per_channel in (("dt", dt), ("D", D)):
            if per_channel is not None:
                _check.tensor(name, per_channel, (d_inner,), x)
                _check.floating(name, per_channel)
        if h0 is not None:
            _check.tensor("h0", h0, (batch, d_inner, A.shape[1]), x)
            _check.floating("h0", h0, complex_ok=True)
        _check.flags("reset", reset, batch, length, x)
        _check.values(x=x, A=A, B=B, C=C, dt=dt, D=D, h0=h0)
        _check.not_positive("A", A)
    module = _module("lti_convolution", backend, x, A)
    if backend == "auto" and (reset is not None or length == 1) and backend_for("selective_scan", x, A) == "triton":
        module = _kernels("triton")
    with _check.full_precision(x):
        *needed, D, h0 = _widened(module, x, (x, A, B, C, dt, D, h0))
        y, h_T = module.lti_convolution(*needed, D=D, h0=h0, reset=reset)
    y = y.to(x.dtype)
    return (y, h_T) if return_final_state else y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The short depthwise convolution in front of a scan: y_t = act(Σ_j weight_j x_{t-width+1+j} + bias).

    x: (batch, length, d_inner)   weight: (d_inner, width), its last column meets the current token   bias: (d_inner,)
    activation: None or "silu"   initial: (batch, width - 1, d_inner), the tokens before x, oldest first
    reset: (batch, length) bool, such a token does not see what came before it.
    Returns y like x, and the last width - 1 tokens (as `initial` of what follows) if return_final_state.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("causal_conv1d"):
        _check.tensor("x", x, ("batch", "length", "d_inner"))
        batch, length, d_inner = x.shape
        _check.floating("x", x)
        if length == 0:
            raise ValueError("x has length 0")
        _check.tensor("weight", weight, (d_inner, None), x)
        _check.floating("weight", weight)
        if bias is not None:
            _check.tensor("bias", bias, (d_inner,), x)
            _check.floating("bias", bias)
        if activation not in (None, "silu"):
            raise ValueError(f"activation must be None or 'silu', got {activation!r}")
        if initial is not None:
            _check.tensor("initial", initial, (batch, weight.shape[1] - 1, d_inner), x)
            _check.floating("initial", initial)
        _check.flags("reset", reset, batch, length, x)
        _check.values(x=x, weight=weight, bias=bias, initial=initial)
    module = _module("causal_conv1d", backend, x, weight)
    with _check.full_precision(x):
        *needed, initial = _widened(module, x, (x, weight, bias, initial))
        y, last = module.causal_conv1d(*needed, activation=activation, initial=initial, reset=reset)
    y = y.to(x.dtype)
    # a view would keep the whole input alive as long as the state
    return (y, last.clone()) if return_final_state else y


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """What stands around the recurrence: x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019).

    x: (..., d)   weight: (d,), None for ones. Returns y like x.
    Raises ValueError or TypeError naming the argument whose shape, dtype or device is wrong."""
    with _check.naming("rms_norm"):
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError("x must be a tensor of shape (..., d), d at least 1")
        _check.floating("x", x)
        if weight is not None:
            _check.tensor("weight", weight, (x.shape[-1],), x)
            _check.floating("weight", weight)
        _check.values(x=x, weight=weight)
    module = _module("rms_norm", backend, x, weight)
    with _check.full_precision(x):
        wide, weight = _widened(module, x, (x, weight))
        y: Tensor = module.rms_norm(wide, weight, eps=eps)
    return y.to(x.dtype)
