"""Every backend against the float64 reference, and the identities of a linear recurrence."""

import pytest
import torch
from cases import close, doubled, gradients, selective
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens import ops
from ssmlens.ops import (
    causal_conv1d,
    chunked,
    gated_linear_attention,
    linear_scan,
    lti_convolution,
    reference,
    rms_norm,
    rwkv4_attention,
    selective_scan,
)

FAST = ["chunked", "auto"]


def rand(*shape, seed=0, dtype=torch.float64, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(grad)


def agree(op, kw, backend, dtype, slack=1.0):
    want_kw = doubled(kw)
    want = op(**want_kw, return_final_state=True, backend="reference")
    got = op(**kw, return_final_state=True, backend=backend)
    close(got[0], want[0], dtype, "y", slack)
    close(got[1], want[1], torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype, "h_T", slack)
    want_grad, got_grad = gradients(want, want_kw), gradients(got, kw)
    for name in want_grad:
        finite = torch.isfinite(want_grad[name])
        assert finite.all(), f"reference gradient of {name} is not finite"
        close(got_grad[name], want_grad[name], dtype, f"gradient of {name}", 10 * slack)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selective_scan_agrees_with_the_reference(backend, dtype):
    slack = 5 if dtype in (torch.bfloat16, torch.float16) else 1  # inputs are rounded; outputs and gradients too
    agree(selective_scan, selective(dtype=dtype), backend, dtype, slack)
    agree(selective_scan, selective(dtype=dtype, extras=False, pinned=False, seed=3), backend, dtype, slack)


@pytest.mark.parametrize("backend", FAST)
def test_selective_scan_complex_and_time_invariant(backend):
    for constant in (False, True):
        agree(selective_scan, selective(complex_=True, constant=constant), backend, torch.float64)
        agree(selective_scan, selective(constant=constant), backend, torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_selective_scan_at_any_shape(batch, length, d_inner, d_state, extras, seed):
    for backend in FAST:
        kw = selective(batch, length, d_inner, d_state, extras=extras, seed=seed)
        agree(selective_scan, kw, backend, torch.float64)


def test_blocks_of_the_chunked_path_join_exactly(monkeypatch):
    monkeypatch.setattr(chunked.scan, "BLOCK", 16)
    agree(selective_scan, selective(length=70), "chunked", torch.float64)
    monkeypatch.setattr(chunked.scan, "WIDE", 1)
    agree(selective_scan, selective(length=70), "chunked", torch.float64)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_one_is_a_sum_and_zero_has_no_memory_exactly(backend):
    kw = selective(length=30, d_state=2, pinned=False, extras=False, dtype=torch.float32)
    kw["dt_softplus"] = False
    kw["dt"] = kw["dt"].detach().abs()
    kw["dt"][:, 3:9] = 0  # at dt = 0, -inf · 0 must still be a = 0
    kw["dt"].requires_grad_()
    A = torch.tensor([0.0, -torch.inf]).repeat(5, 1).requires_grad_()
    kw["A"] = A
    _, h = selective_scan(**kw, return_final_state=True, backend=backend)
    u = (kw["dt"] * kw["x"])[..., None] * kw["B"][:, :, None]
    want = torch.zeros_like(u[:, 0])
    for t in range(30):
        want = want + u[:, t]
    close(h[..., 0], want[..., 0], torch.float32)
    other_past = torch.cat([rand(2, 29, 5, seed=8, dtype=torch.float32), kw["x"][:, -1:]], 1)
    _, h_other = selective_scan(**{**kw, "x": other_past}, return_final_state=True, backend=backend)
    assert torch.equal(h[..., 1], h_other[..., 1]), "bitwise: nothing of the past is left"
    assert h[..., 1].abs().min() > 0
    grads = torch.autograd.grad(h.sum(), [A, kw["dt"]])
    assert torch.equal(grads[0][:, 1], torch.zeros(5)), "a channel at -inf gives no gradient to A"
    assert torch.isfinite(grads[0]).all()
    assert torch.isfinite(grads[1]).all()
    # gradient to A at 0 is the ordinary one: Σ dt_t h_{t-1}
    before = u[..., 0].cumsum(1) - u[..., 0]
    assert torch.allclose(grads[0][:, 0], (kw["dt"] * before).sum((0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_zero_step_leaves_the_state(backend):
    kw = selective(pinned=False, length=6)
    kw |= {"dt": torch.zeros(2, 6, 5, dtype=torch.float64), "dt_softplus": False, "dt_bias": None, "reset": None}
    _, h = selective_scan(**kw, return_final_state=True, backend=backend)
    assert torch.equal(h, kw["h0"])


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("cut", [1, 7, 12])
def test_two_halves_equal_the_whole(backend, cut):
    kw = selective()
    whole, h_T = selective_scan(**kw, return_final_state=True, backend=backend)
    halves = []
    h = kw["h0"]
    for part in (slice(0, cut), slice(cut, None)):
        now = {n: p[:, part] if n in ("x", "dt", "B", "C", "z", "reset") else p for n, p in kw.items()}
        y, h = selective_scan(**{**now, "h0": h}, return_final_state=True, backend=backend)
        halves.append(y)
    close(torch.cat(halves, 1), whole, torch.float64)
    close(h, h_T, torch.float64)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_reset_equals_sequences_alone(backend):
    kw = {k: v for k, v in selective(length=12).items() if k not in ("h0", "reset")}
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, [5, 9]] = True
    packed = selective_scan(**kw, reset=reset, backend=backend)
    alone = [
        selective_scan(
            **{n: p[:, a:b] if n in ("x", "dt", "B", "C", "z") else p for n, p in kw.items()}, backend=backend
        )
        for a, b in [(0, 5), (5, 9), (9, 12)]
    ]
    close(packed, torch.cat(alone, 1), torch.float64)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_causal_and_linear_in_x(backend):
    kw = selective(extras=False)
    y = selective_scan(**kw, backend=backend)
    (g,) = torch.autograd.grad(y[:, 5].sum(), kw["x"], retain_graph=True)
    assert not g[:, 6:].any()
    assert g[:, :6].abs().sum(-1).min() > 0
    other = rand(2, 13, 5, seed=9)
    both = selective_scan(**{**kw, "x": 2 * kw["x"] + other}, backend=backend)
    close(both, 2 * y + selective_scan(**{**kw, "x": other}, backend=backend), torch.float64)


def test_influence_is_the_product_of_transitions():
    a = torch.rand(1, 20, 3, dtype=torch.float64).requires_grad_()
    u = rand(1, 20, 3)
    for backend in ["reference", *FAST]:
        h = linear_scan(a, u, backend=backend)
        (g,) = torch.autograd.grad(h[0, 17, 1], u, retain_graph=True)
        want = torch.stack([a[0, s + 1 : 18, 1].prod() for s in range(18)])
        close(g[0, :18, 1], want, torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5), st.booleans(), st.booleans())
def test_linear_scan_at_any_shape(batch, length, width, complex_, reset):
    kw = {
        "a": rand(batch, length, width).detach().sigmoid(),
        "u": rand(batch, length, width, seed=1),
        "h0": rand(batch, width, seed=2),
    }
    if complex_:
        kw["a"] = torch.polar(kw["a"], rand(batch, length, width, seed=4, grad=False))
        kw["u"] = torch.complex(kw["u"].detach(), rand(batch, length, width, seed=5, grad=False)).requires_grad_()
        kw["h0"] = None
    kw["a"].requires_grad_()
    if reset:
        kw["reset"] = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.2
    for backend in FAST:
        agree(linear_scan, kw, backend, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_scan_of_real_beside_complex_numbers(dtype):
    """Gradients of what is real are real."""
    real, spun = (
        rand(2, 40, 9).detach().sigmoid(),
        torch.polar(rand(2, 40, 9).detach().sigmoid(), rand(2, 40, 9, seed=1).detach()),
    )
    pushed, start = torch.complex(rand(2, 40, 9, seed=2), rand(2, 40, 9, seed=3)).detach(), rand(2, 9, seed=4).detach()
    for a, u, h0 in (
        (real, pushed, start),
        (spun, pushed.real, start),
        (real, pushed, start + 1j),
        (spun, pushed, start),
    ):
        kw = {
            name: x.to(dtype.to_complex() if x.is_complex() else dtype).requires_grad_()
            for name, x in zip(("a", "u", "h0"), (a, u, h0), strict=True)
        }
        for backend in FAST:
            agree(linear_scan, kw, backend, dtype)


def test_linear_scan_broadcasts_and_differentiates_twice():
    a, u = rand(2, 9, 1, 3).detach().sigmoid().requires_grad_(), rand(2, 9, 4, 3, seed=1)
    agree(linear_scan, {"a": a, "u": u}, "chunked", torch.float64)
    small = (rand(1, 5, 2).detach().sigmoid().requires_grad_(), rand(1, 5, 2, seed=1))
    run = lambda a, u: linear_scan(a, u, backend="chunked")  # noqa: E731
    assert torch.autograd.gradcheck(run, small)
    assert torch.autograd.gradgradcheck(run, small)
    many = torch.func.vmap(run, in_dims=(None, 0))(a[:, :, 0], torch.stack([u[:, :, 0], u[:, :, 1]]))
    close(many[1], run(a[:, :, 0], u[:, :, 1]), torch.float64)


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("bonus", [False, True])
def test_gated_linear_attention(keys, bonus, monkeypatch):
    monkeypatch.setattr(chunked.pieces, "CHUNK", 8)  # five chunks
    monkeypatch.setattr(chunked.pieces, "PIECE", 400)  # in three pieces for each sequence
    log_a = -rand(2, 40, 4, keys, seed=3).detach().abs()
    log_a[:, 4:7], log_a[:, 9, :2] = 0, -torch.inf
    kw = {"q": rand(2, 40, 2, 3), "k": rand(2, 40, 2, 3, seed=1), "v": rand(2, 40, 4, 5, seed=2), "log_a": log_a,
          "h0": rand(2, 4, 3, 5, seed=5), "reset": torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.1}  # fmt: skip
    if bonus:
        kw["bonus"] = rand(4, 3, seed=4)
    for backend in FAST:
        agree(gated_linear_attention, kw, backend, torch.float64)


def test_rwkv4_attention():
    w = rand(3, seed=4).detach().abs()
    w[0], w[1] = 0, torch.inf  # holds everything; holds only the last token
    kw = {
        "r": rand(2, 30, 3),
        "k": 40 * rand(2, 30, 3, seed=1).detach(),
        "v": rand(2, 30, 3, seed=2),
        "w": w,
        "u": rand(3, seed=5),
    }
    kw["k"][0, :4] = -torch.inf
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[1, 11] = True
    want, _ = rwkv4_attention(**kw, reset=reset, return_final_state=True, backend="reference")
    got, _ = rwkv4_attention(**kw, reset=reset, return_final_state=True, backend="chunked")
    close(got, want, torch.float64)
    # the explicit weighted mean, for one channel that holds everything, after the reset
    k, v, u, r = kw["k"][1, 11:, 0], kw["v"][1, 11:, 0], kw["u"][0], kw["r"][1, 11:, 0]
    logits = torch.cat([k[:10], (u + k[10])[None]])
    close(got[1, 21, 0], torch.sigmoid(r[10]) * (logits.softmax(0) * v[:11]).sum(), torch.float64)
    half, carried = rwkv4_attention(
        **{n: p[:, :13] if n in "rkv" else p for n, p in kw.items()}, reset=reset[:, :13], return_final_state=True
    )
    rest = rwkv4_attention(
        **{n: p[:, 13:] if n in "rkv" else p for n, p in kw.items()}, reset=reset[:, 13:], state=carried
    )
    close(torch.cat([half, rest], 1), want, torch.float64)
    for p in ("v", "u"):
        gw, gg = (torch.autograd.grad((y * y).sum(), kw[p], retain_graph=True)[0] for y in (want, got))
        close(gg, gw, torch.float64, f"gradient of {p}")


@pytest.mark.parametrize("complex_", [False, True])
def test_lti_convolution(complex_):
    A = -torch.exp(rand(3, 4)).detach()
    if complex_:
        A = torch.complex(A, rand(3, 4, seed=7, grad=False))
    A[:, 0], A[:, 3] = 0, -torch.inf

    def mk(seed):
        m = rand(3, 4, seed=seed, grad=False)
        return (torch.complex(m, rand(3, 4, seed=seed + 10, grad=False)) if complex_ else m).requires_grad_()

    kw = {
        "x": rand(2, 50, 3),
        "A": A,
        "B": mk(1),
        "C": mk(2),
        "dt": rand(3, seed=3).detach().abs().requires_grad_(),
        "D": rand(3, seed=4),
    }
    kw["h0"] = (
        torch.complex(rand(2, 3, 4, grad=False), rand(2, 3, 4, seed=8, grad=False))
        if complex_
        else rand(2, 3, 4, grad=False)
    ).requires_grad_()
    agree(lti_convolution, kw, "chunked", torch.float64, slack=10)
    # zero-order hold, written out, and its limits where a channel is pinned
    a, b = reference.zero_order_hold(A, kw["B"], kw["dt"])
    close(a[:, 1], torch.exp(kw["dt"] * A[:, 1]), torch.float64)
    close(b[:, 1], (torch.exp(kw["dt"] * A[:, 1]) - 1) / A[:, 1] * kw["B"][:, 1], torch.float64)
    for pinned in (0, 3):
        close(b[:, pinned], kw["dt"] * kw["B"][:, pinned], torch.float64)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 4])
def test_causal_conv1d(activation, width):
    kw = {"x": rand(2, 15, 5), "weight": rand(5, width, seed=1), "bias": rand(5, seed=2), "activation": activation}
    want = torch.nn.functional.conv1d(kw["x"].mT, kw["weight"][:, None], kw["bias"], padding=width - 1, groups=5)[
        ..., :15
    ].mT
    want = torch.nn.functional.silu(want) if activation else want
    close(causal_conv1d(**kw, backend="reference"), want, torch.float64)
    if width > 1:
        kw["initial"] = rand(2, width - 1, 5, seed=3)
    kw["reset"] = torch.rand(2, 15, generator=torch.Generator().manual_seed(0)) < 0.2
    for backend in FAST:
        agree(causal_conv1d, kw, backend, torch.float64)


def test_non_contiguous_arguments():
    kw = selective(batch=3, length=8, d_inner=6)
    odd = {n: p.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() if isinstance(p, torch.Tensor) and p.is_floating_point() and p.dim() > 1 else p for n, p in kw.items()}  # fmt: skip
    assert not odd["x"].is_contiguous()
    for backend in FAST:
        agree(selective_scan, odd, backend, torch.float64)


def test_autocast_keeps_the_state_in_float32():
    kw = selective(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = selective_scan(**kw, return_final_state=True)
    assert (y.dtype, h.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, selective_scan(**kw))


BAD = [
    ({"x": torch.zeros(2, 13)}, ValueError, "x must have shape"),
    ({"dt": torch.zeros(2, 12, 5)}, ValueError, "dt must have shape"),
    ({"A": torch.zeros(4, 4)}, ValueError, "A must have shape"),
    ({"B": torch.zeros(2, 13, 3)}, ValueError, "B must have shape"),
    ({"C": None}, TypeError, "C must be a tensor"),
    ({"D": torch.zeros(4)}, ValueError, "D must have shape"),
    ({"z": torch.zeros(2, 13, 4)}, ValueError, "z must have shape"),
    ({"h0": torch.zeros(2, 5, 3)}, ValueError, "h0 must have shape"),
    ({"reset": torch.zeros(2, 13)}, TypeError, "reset must be bool"),
    ({"x": torch.zeros(2, 13, 5, dtype=torch.int64)}, TypeError, "x must have a floating dtype"),
    ({"x": torch.zeros(2, 0, 5)}, ValueError, "length 0"),
    ({"B": torch.zeros(2, 13, 4, device="meta")}, ValueError, "B is on meta"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**{**selective(dtype=torch.float32), **change})


def test_value_checks_name_the_argument():
    kw = selective(dtype=torch.float32, pinned=False)
    with ops.checks(True):
        with pytest.raises(ValueError, match="A must be ≤ 0"):
            selective_scan(**{**kw, "A": -kw["A"]}, backend="chunked")
        with pytest.raises(ValueError, match="z contains NaN"):
            selective_scan(**{**kw, "z": kw["z"] * torch.nan}, backend="chunked")
    selective_scan(**{**kw, "z": kw["z"] * torch.nan}, backend="chunked")


def test_the_public_op_compiles_into_one_graph():
    kw = {k: v for k, v in selective(dtype=torch.float32).items() if k != "reset"}
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    close(compiled(**kw), selective_scan(**kw), torch.float32)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("batch", "d_inner", "d_state"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_in_nothing_out(backend, batch, d_inner, d_state):
    kw = selective(batch, 5, d_inner, d_state, pinned=False, extras=False, dtype=torch.float32)
    y, h = selective_scan(**kw, return_final_state=True, backend=backend)
    assert y.shape == (batch, 5, d_inner)
    assert h.shape == (batch, d_inner, d_state)
    y.sum().backward()
    x = torch.rand(batch, 5, d_inner, requires_grad=True)
    causal_conv1d(x, torch.rand(d_inner, 4), backend=backend).sum().backward()
    assert x.grad.shape == x.shape
    assert linear_scan(torch.rand(batch, 5, d_inner), torch.rand(batch, 5, d_inner), backend=backend).shape == (
        batch,
        5,
        d_inner,
    )


def test_imaginary_parts_are_not_dropped_silently():
    kw = selective(dtype=torch.float32)
    for name in ("dt", "D", "z", "dt_bias", "h0"):
        with pytest.raises(TypeError, match=name):
            selective_scan(**{**kw, name: kw[name].to(torch.complex64)})
    with pytest.raises(TypeError, match="dt"):
        selective_scan(**{**kw, "dt": torch.ones(2, 13, 5, dtype=torch.int64)})
    a, u = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    with pytest.raises(TypeError, match="h0"):
        linear_scan(a, u, h0=torch.zeros(2, 4, dtype=torch.complex64))


def test_a_broadcasts_over_time_in_every_backend():
    a, u = torch.rand(2, 1, 4, dtype=torch.float64), rand(2, 6, 4)
    want = linear_scan(a.expand(2, 6, 4), u, backend="reference")
    for backend in ["reference", *FAST]:
        close(linear_scan(a, u, backend=backend), want, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 37), (3, 2, 5, 8), (4, 7), (9,), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(dtype, shape, weighted):
    slack = 5 if dtype in (torch.bfloat16, torch.float16) else 1
    kw = {"x": rand(*shape, grad=False).to(dtype).requires_grad_()}
    if weighted:
        kw["weight"] = rand(shape[-1], seed=1, grad=False).to(dtype).requires_grad_()
    want_kw = doubled(kw)
    want = rms_norm(**want_kw, eps=0.1, backend="reference")
    by_hand = want_kw["x"] / (want_kw["x"].square().sum(-1, keepdim=True) / shape[-1] + 0.1).sqrt()
    close(want, by_hand * want_kw["weight"] if weighted else by_hand, torch.float64)
    for backend in FAST:
        got = rms_norm(**kw, eps=0.1, backend=backend)
        assert got.dtype == dtype
        close(got, want, dtype, "y", slack)
        want_gradients = gradients([want], want_kw)
        for name, g in gradients([got], kw).items():
            assert g.dtype == dtype
            close(g, want_gradients[name], dtype, f"gradient of {name}", 2 * slack)


def test_rms_norm_names_what_is_wrong():
    x = torch.rand(2, 3, 4)
    for wrong, message in [
        (torch.rand(3), r"weight must have shape \(4\)"),
        (torch.ones(4, dtype=torch.long), "floating"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            rms_norm(x, wrong)
    with pytest.raises(TypeError, match="rms_norm: x must have a floating"):
        rms_norm(x.long())
    for empty in (x[..., :0], torch.tensor(1.0), None):
        with pytest.raises(ValueError, match="d at least 1"):
            rms_norm(empty)
    with ops.checks(True), pytest.raises(ValueError, match="x contains NaN"):
        rms_norm(x / 0 * 0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rwkv4_forgets_all_but_the_last_token_even_if_that_is_hidden(backend):
    """w = inf: what is read is the token before, and nothing where that one has no weight."""
    r, k, v, u = (rand(1, 5, 3, seed=i).detach().requires_grad_() for i in range(4))
    k = k.detach().clone()
    k[0, 2] = -torch.inf
    k[0, 3] = -torch.inf
    k.requires_grad_()
    w, u = torch.tensor([torch.inf, 0.5, 0.0], dtype=torch.float64), u[0, 0]
    y, (p, s, m) = rwkv4_attention(r, k, v, w, u, return_final_state=True, backend=backend)
    assert (y[0, 3, 0], s[0, 0] > 0) == (0, True)
    assert y[0, 3, 1:].abs().min() > 0, "others still remember"
    close(y[0, 4, 0], (r[0, 4, 0].sigmoid() * v[0, 4, 0]), torch.float64)
    close(p[0, 0] * m[0, 0].exp(), k[0, 4, 0].exp() * v[0, 4, 0], torch.float64)
    found = torch.autograd.grad(y[:, :, 0].square().sum(), (r, k, v, u))
    assert all(g.isfinite().all() for g in found)
    again = rwkv4_attention(r[:, 2:4], k[:, 2:4], v[:, 2:4], w, u, backend=backend,
                            state=rwkv4_attention(r[:, :2], k[:, :2], v[:, :2], w, u, return_final_state=True, backend=backend)[1])  # fmt: skip
    close(again, y[:, 2:4], torch.float64)
