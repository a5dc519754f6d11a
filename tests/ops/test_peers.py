"""The adapters to mamba-ssm and flash-linear-attention, with stand-ins of the documented signatures that compute by our
reference: layouts, dtypes, conditions, gradients. The packages themselves are measured by benchmarks/gpu_ops.py."""

import sys
import types

import pytest
import torch
from cases import close, doubled, gradients, selective

from ssmlens.ops import peers, reference


def stand_in_for_mamba_ssm(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """What the CUDA code checks, then our recurrence; (batch, d_inner, length), and no gradient through the last state."""
    batch, d_inner, length = u.shape
    n = A.shape[1]
    assert delta.dtype == u.dtype
    assert A.dtype == torch.float32
    for m in (B, C):
        assert m.shape == ((batch, n, length) if m.dim() == 3 else (d_inner, n))
        assert m.dtype == (u.dtype if m.dim() == 3 else torch.float32)
    assert z is None or (z.dtype == u.dtype and z.shape == u.shape)
    assert all(p is None or (p.dtype == torch.float32 and p.shape == (d_inner,)) for p in (D, delta_bias))
    assert all(m.stride(-1) == 1 or m.shape[-1] == 1 for m in (u, delta, B, C))

    def last(m):
        return None if m is None else m.float().transpose(1, 2) if m.dim() == 3 else m

    y, h = reference.selective_scan(
        last(u), last(delta), A, last(B), last(C), D=D, z=last(z), dt_bias=delta_bias, dt_softplus=delta_softplus, h0=None,
        reset=None,
    )  # fmt: skip
    out = y.to(u.dtype).transpose(1, 2)
    return (out, h.detach()) if return_last_state else out


def stand_in_for_fla(calls, name):
    def chunk(q, k, v, g, u=None, scale=None, initial_state=None, output_final_state=False):
        calls.append(name)
        assert q.shape == k.shape
        assert q.shape[:3] == v.shape[:3]
        assert g.shape == (q.shape[:3] if name == "chunk_simple_gla" else q.shape)
        assert initial_state is None or initial_state.dtype == torch.float32
        assert all(m.is_contiguous() for m in (q, k, v, g))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        log_a = g[..., None] if g.dim() == 3 else g
        y, h = reference.gated_linear_attention(
            q.float() * scale, k.float(), v.float(), log_a.float(), bonus=u, h0=initial_state, reset=None
        )
        return y.to(q.dtype), h if output_final_state else None

    return chunk


@pytest.fixture
def calls(monkeypatch):
    made: list[str] = []
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_cuda = object()
    interface.selective_scan_fn = stand_in_for_mamba_ssm
    modules = {"mamba_ssm": None, "mamba_ssm.ops": None, "mamba_ssm.ops.selective_scan_interface": interface}
    modules |= {"fla": None, "fla.ops": None}
    for family, name in (("gla", "chunk_gla"), ("simple_gla", "chunk_simple_gla"), ("rwkv6", "chunk_rwkv6")):
        module = types.ModuleType(f"fla.ops.{family}")
        setattr(module, name, stand_in_for_fla(made, name))
        modules[f"fla.ops.{family}"] = module
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    monkeypatch.setattr(peers, "on_gpu", lambda x: True)
    return made


def scan_arguments(dtype, **options):
    kw = selective(2, 9, 5, 4, dtype=dtype, pinned=False, **options)
    return {k: v for k, v in kw.items() if k not in ("h0", "reset")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"constant": True}, {"extras": False}])
def test_mamba_ssm(calls, dtype, options):
    kw = scan_arguments(dtype, **options)
    y, h = peers.selective_scan(**kw)
    exact = doubled(kw)
    rest = dict.fromkeys(("D", "z", "dt_bias", "h0", "reset")) | exact
    want_y, want_h = reference.selective_scan(**rest)
    slack = 5 if dtype == torch.bfloat16 else 1
    assert y.dtype == dtype
    close(y, want_y, dtype, "y", slack)
    close(h, want_h, torch.float32 if dtype == torch.float32 else dtype, "h", slack)
    got, want = gradients((y,), kw), gradients((want_y,), exact)
    for name, expected in want.items():
        close(got[name], expected, dtype, name, 10 * slack)
    with pytest.raises(RuntimeError, match="no gradient through the final state"):
        h.sum().backward()


def test_mixed_dtypes_are_widened(calls):
    kw = scan_arguments(torch.bfloat16)
    kw["dt"] = kw["dt"].detach().float()
    assert peers.selective_scan(**kw)[0].dtype == torch.bfloat16


def test_where_mamba_ssm_computes_another_function(calls, monkeypatch):
    kw = scan_arguments(torch.float32)
    x, A = kw["x"].detach(), kw["A"].detach()
    assert peers.why_not_selective_scan(x, A) is None
    pinned = A.clone()
    pinned[:, 0] = -torch.inf
    assert "infinite" in peers.why_not_selective_scan(x, pinned)
    assert "initial state" in peers.why_not_selective_scan(x, A, h0=torch.zeros(2, 5, 4))
    assert "resets" in peers.why_not_selective_scan(x, A, reset=torch.zeros(2, 9, dtype=torch.bool))
    assert "real A" in peers.why_not_selective_scan(x, A.to(torch.complex64))
    assert "float32" in peers.why_not_selective_scan(x.double(), A)
    assert "256" in peers.why_not_selective_scan(x, A.new_zeros(5, 257))
    long = torch.empty(1, 2**21, 2**10, device="meta")
    assert "overflow" in peers.why_not_selective_scan(long, A)
    monkeypatch.setattr(peers, "on_gpu", lambda x: False)
    with pytest.raises(ValueError, match=r"'mamba_ssm' cannot be used here: it needs a CUDA device"):
        peers.selective_scan(**kw)
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_cuda = None
    assert "without its CUDA scan" in peers.why_not_selective_scan(x, A)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    assert "cannot be imported" in peers.why_not_selective_scan(x, A)


def attention_arguments(by_key, bonus, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    kw = {"q": normal(2, 7, 2, 3), "k": normal(2, 7, 2, 3), "v": normal(2, 7, 4, 5)}
    kw["log_a"] = (-torch.rand(2, 7, 4, 3 if by_key else 1, generator=g)).requires_grad_()
    kw["h0"] = torch.randn(2, 4, 3, 5, generator=g).requires_grad_()
    if bonus:
        kw["bonus"] = torch.randn(4, 3, generator=g).requires_grad_()
    return kw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("by_key", "bonus", "name"),
    [
        (True, False, "chunk_gla"),
        (False, False, "chunk_simple_gla"),
        (True, True, "chunk_rwkv6"),
        (False, True, "chunk_rwkv6"),
    ],
)
def test_fla(calls, dtype, by_key, bonus, name):
    kw = attention_arguments(by_key, bonus, dtype)
    got = peers.gated_linear_attention(**kw)
    assert calls == [name]
    exact = doubled(kw)
    want = reference.gated_linear_attention(**({"bonus": None, "reset": None} | exact))
    slack = 5 if dtype == torch.bfloat16 else 1
    for p, q in zip(got, want, strict=True):
        close(p, q, dtype, "output", slack)
    expected = gradients(want, exact)
    for n, p in gradients(got, kw).items():
        close(p, expected[n], dtype, n, 10 * slack)


def test_where_fla_computes_another_function(calls, monkeypatch):
    kw = attention_arguments(True, False)
    k, v, log_a = (kw[n].detach() for n in ("k", "v", "log_a"))
    assert peers.why_not_gated_linear_attention(k, v, log_a) is None
    zero = log_a.clone()
    zero[0, 0, 0, 0] = -torch.inf
    assert "infinite" in peers.why_not_gated_linear_attention(k, v, zero)
    assert "resets" in peers.why_not_gated_linear_attention(k, v, log_a, reset=torch.zeros(2, 7, dtype=torch.bool))
    assert "float32" in peers.why_not_gated_linear_attention(k, v.double(), log_a)
    assert "256" in peers.why_not_gated_linear_attention(k.new_zeros(2, 7, 2, 257), v, log_a)
    long = torch.empty(1, 2**20, 32, 64, device="meta")
    assert "overflow" in peers.why_not_gated_linear_attention(long, long, log_a)
    monkeypatch.setattr(peers, "on_gpu", lambda x: False)
    with pytest.raises(ValueError, match=r"'fla' cannot be used here: it needs a CUDA device"):
        peers.gated_linear_attention(**kw)
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    assert "cannot be imported" in peers.why_not_gated_linear_attention(k, v, log_a)
