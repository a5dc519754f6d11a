import pytest
import torch
from cases import close
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers import attention
from ssmlens.polarization import Polarization

FORMS = {
    "rope": {"n_heads": 2},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "d_head": 3},
    "learned": {"positions": "learned", "max_length": 64},
    "none": {"positions": "none", "n_heads": 4, "bias": True},
    "window": {"n_heads": 2, "window": 5},
    "odd": {"d_head": 5},
    "alone": {"window": 1},
}


def build(d_model=8, dtype=torch.float64, **config):
    """With weights wide enough that the softmax is not flat."""
    torch.manual_seed(0)
    m = mixers.build("attention", d_model, **config)
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return m.to(dtype)


def tokens(batch=2, length=20, d_model=8):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(m, x):
    """Token by token and head by head; a rotation as a product of complex numbers."""
    c = m.config
    batch, length, _ = x.shape
    if m.position is not None:
        x = x + m.position[:length].double()
    heads, groups, d = c.n_heads, m.kv_heads, m.d_head
    q, k, v = (proj(x).detach().view(batch, length, -1, d) for proj in (m.q_proj, m.k_proj, m.v_proj))
    if c.positions == "rope":
        half = d // 2
        theta = c.rope_base ** (-2 * torch.arange(half).double() / d)
        turn = torch.polar(torch.ones(length, half).double(), torch.arange(length)[:, None] * theta)[:, None]

        def rotate(z):
            plane = torch.complex(z[..., :half], z[..., half : 2 * half]) * turn
            return torch.cat([plane.real, plane.imag, z[..., 2 * half :]], -1)

        q, k = rotate(q), rotate(k)
    out = torch.zeros(batch, length, heads, d).double()
    for h in range(heads):
        g = h // (heads // groups)
        for t in range(length):
            past = slice(max(0, t - (c.window or length) + 1), t + 1)
            scores = (k[:, past, g] * q[:, t : t + 1, h]).sum(-1) / d**0.5
            out[:, t, h] = (torch.softmax(scores, 1)[..., None] * v[:, past, g]).sum(1)
    return m.o_proj(out.flatten(2)).detach()


@pytest.fixture(params=[attention.BLOCK, 4], ids=["whole", "blocks"])
def _blocks(request, monkeypatch):
    """Inputs as short as these, in one block of queries or in several."""
    monkeypatch.setattr(attention, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_written_out_sum(form):
    m, x = build(**FORMS[form]), tokens()
    close(m(x)[0], written_out(m, x), torch.float32)  # rotations are float32, as transformers' are
    m.float()
    close(m(x.float())[0], written_out(m.double(), x), torch.float32)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("form", FORMS)
def test_padding_resets_and_cache_together(form):
    """Packed sequences behind padding of different lengths, in uneven pieces."""
    m, x = build(**FORMS[form]), tokens(batch=1, length=40)[0]
    rows = [[(0, 9), (9, 12), (12, 25)], [(3, 4), (20, 40)]]
    streams, masks, resets, wanted = [], [], [], []
    junk = torch.full((36, 8), 3.0).double()
    for row in rows:
        y = torch.cat([m(x[None, a:b])[0][0] for a, b in row])
        parts = torch.cat([x[a:b] for a, b in row])
        first = torch.zeros(len(parts), dtype=torch.bool)
        first[torch.tensor([0] + [b - a for a, b in row])[:-1].cumsum(0)] = True
        keep = torch.arange(36) >= 36 - len(parts)
        stream = junk.clone()
        stream[keep] = parts
        flag = torch.zeros(36, dtype=torch.bool)
        flag[keep] = first
        want = torch.zeros(36, 8).double()
        want[keep] = y
        streams.append(stream), masks.append(keep), resets.append(flag), wanted.append(want)
    x, mask, reset, want = (torch.stack(z) for z in (streams, masks, resets, wanted))
    ys, state = [], None
    for part in (slice(0, 4), slice(4, 13), slice(13, 16), slice(16, 30), slice(30, 36)):
        y, state = m(x[:, part], state, mask=mask[:, part], reset=reset[:, part])
        ys.append(y)
    close(torch.cat(ys, 1)[mask], want[mask], torch.float32)
    if m.config.window:
        assert state.k.shape[1] <= m.config.window - 1


def test_agrees_with_transformers_llama_attention():
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, attn_implementation="sdpa"
    )
    theirs = LlamaAttention(config, layer_idx=0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = mixers.build("attention", 48, n_heads=6, n_kv_heads=2, d_head=8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 60, 48)
    position = LlamaRotaryEmbedding(config)(x, torch.arange(60)[None])
    want = theirs(x, position_embeddings=position, attention_mask=None)[0]
    close(ours(x)[0], want, torch.float32, slack=0.5)  # 1e-5
    first, state = ours(x[:, :33])
    close(torch.cat([first, ours(x[:, 33:], state)[0]], 1), want, torch.float32, slack=0.5)


def test_agrees_with_transformers_sliding_window():
    import transformers
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, sliding_window=70, attn_implementation="eager"
    )  # fmt: skip
    theirs = MistralAttention(config, layer_idx=0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = mixers.build("attention", 48, n_heads=6, n_kv_heads=2, d_head=8, window=70)
    ours.load_state_dict(theirs.state_dict())
    x, at = torch.randn(2, 300, 48), torch.arange(300)[None]
    mask = create_sliding_window_causal_mask(
        config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=at
    )
    want = theirs(x, position_embeddings=MistralRotaryEmbedding(config)(x, at), attention_mask=mask)[0]
    close(ours(x)[0], want, torch.float32, slack=0.5)  # 1e-5
    first, state = ours(x[:, :133])
    close(torch.cat([first, ours(x[:, 133:], state)[0]], 1), want, torch.float32, slack=0.5)


class Largest(TorchDispatchMode):
    """The most numbers that one array has while this is active."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size() if x._base is None else 0)
        return out


@pytest.mark.parametrize(
    ("window", "flags"), [(3, False), (3, True), (100, False), (100, True), (None, True)],
    ids=["3", "3 packed", "100", "100 packed", "packed"],
)  # fmt: skip
def test_memory_of_a_window_and_of_short_sequences_is_linear_in_length(window, flags):
    """What is kept for the backward pass grows with length, and no array has the size of length²."""
    m = build(16, torch.float32, n_heads=2, window=window)
    kept = {}
    for length in (1024, 2048):
        x = torch.randn(1, length, 16, requires_grad=True)
        mask = torch.arange(length) >= 5
        given = {"mask": mask[None], "reset": (torch.arange(length) % 100 == 5)[None]} if flags else {}
        sizes = {}

        def pack(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Largest() as largest:
            m(x, **given)[0].sum().backward()
        kept[length] = sum(sizes.values())
        assert largest.most < length**2 / 8
    assert kept[2048] < 2.2 * kept[1024]


def test_rope_depends_on_distance_alone():
    m, x = build(**FORMS["rope"]), tokens(length=8)
    _, state = m(x)
    shifted = state._replace(position=state.position + 1000)
    moved = m(x[:, :1], shifted)[0]
    assert (moved - m(x[:, :1], state)[0]).abs().max() > 1e-3, "the cached keys are now farther away"
    empty = torch.zeros_like(state.visible)
    alone = m(x, state._replace(visible=empty, position=state.position + 1000))[0]
    close(alone, m(x)[0], torch.float32, slack=10)


def test_learned_positions_have_an_end():
    with pytest.raises(UserError, match="max_length"):
        build(positions="learned")
    with pytest.raises(UserError, match="max_length"):
        build(max_length=4)
    m, x = build(positions="learned", max_length=10), tokens(length=16)
    m(x[:, :10])
    with pytest.raises(UserError, match="16 tokens, but max_length is 10"):
        m(x)
    _, state = m(x[:, :10])
    with pytest.raises(UserError, match="11 tokens"):
        m.step(x[:, 10], state)
    mask = (torch.arange(16) >= 8).expand(2, -1)
    m(x, mask=mask)  # 8 tokens behind padding
    reset = (torch.arange(16) == 8).expand(2, -1)
    m(x, mask=torch.ones_like(mask), reset=reset)
    close(m(x, reset=reset)[0][:, 8:], m(x[:, 8:])[0], torch.float32)  # each packed sequence counts alone


def test_refusals_and_sizes():
    with pytest.raises(UserError, match="cannot be polarized"):
        mixers.build("attention", 8, polarization=Polarization())
    with pytest.raises(UserError, match="n_kv_heads"):
        build(n_heads=4, n_kv_heads=3)
    with pytest.raises(UserError, match="n_heads"):
        build(n_heads=3)
    assert build(n_heads=2, window=5).state_size() == 2 * 4 * 8
    with pytest.raises(ValueError, match="every token"):
        build().state_size()
    with pytest.raises(ValueError, match="no transition"):
        build().coefficients(tokens())


def test_initialisation():
    m = mixers.build("attention", 256, n_heads=4, n_residuals=16, positions="learned", max_length=128, bias=True)
    assert m.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert m.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert m.position.std().item() == pytest.approx(0.02, rel=0.02)
    assert not m.q_proj.bias.any()


def test_one_head_over_everything_is_the_softmax_mean():
    m, x = build(positions="none"), tokens()
    q, k, v = (p(x) for p in (m.q_proj, m.k_proj, m.v_proj))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    close(m(x)[0], m.o_proj(F.softmax(scores, -1) @ v), torch.float64)
