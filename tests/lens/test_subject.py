"""The adapter: our models and transformers' look the same through it."""

import pytest
import torch
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens import diagnose, influence, smoothing
from ssmlens.lens import subject as subject_module
from ssmlens.lens.subject import Access, Subject

from .models import hybrid, model, tokens


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=3)).eval()


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("build", [model, mamba, neox])
def test_embed_run_and_logits_are_the_models_own(build):
    m, x = build(), tokens(2, 20)
    subject = Subject("m", m)
    with torch.no_grad():
        hidden = subject.run(subject.embed(x))
        torch.testing.assert_close(subject.logits(hidden), m(input_ids=x).logits)
    assert hidden.shape == (2, 20, 16)


@pytest.mark.parametrize("build", [mamba, neox])
def test_blocks_of_transformers_models_are_the_hidden_states(build):
    m, x = build(), tokens(2, 20)
    subject = Subject("m", m)
    seen = []
    subject.walk(x, seen.append)
    assert [s.index for s in seen] == [0, 1, 2]
    assert subject.recurrent == ([] if build is neox else [0, 1, 2]), "a Mamba of transformers is looked into as ours"
    with torch.no_grad():
        states = m(input_ids=x, output_hidden_states=True).hidden_states
    first = (
        1 if build is neox else 0
    )  # theirs begin with the embeddings, except Mamba's; the last is kept after the final norm
    for index in (0, 1):
        torch.testing.assert_close(seen[index].out, states[first + index])
    assert all(s.y.shape == (2, 20, 16) for s in seen)
    assert all(s.x.shape == (2, 20, 16) for s in seen)


def test_blocks_of_our_model():
    m, x = model(), tokens(2, 20)
    seen = []
    Subject("m", m).walk(x, seen.append)
    assert len(seen) == 2
    with torch.no_grad():
        for s, block in zip(seen, m.backbone.blocks, strict=True):
            torch.testing.assert_close(block.mixer(s.x)[0], s.y)
        torch.testing.assert_close(seen[0].out + seen[1].y, seen[1].out)
        torch.testing.assert_close(m.backbone.norm(seen[1].out), m(input_ids=x).last_hidden_state)


def test_recurrent_blocks_are_those_with_a_diagonal_transition():
    assert Subject("m", model()).recurrent == [0, 1]
    assert Subject("m", hybrid(1)).recurrent == [0, 2]
    assert Subject("m", hybrid(0, 1, 2)).recurrent == []


def test_nothing_is_left_behind():
    m = model().train()
    m.backbone.norm.weight.requires_grad_(False)
    subject = Subject("m", m)
    with pytest.raises(RuntimeError, match="stop"):
        subject.walk(tokens(1, 10), lambda seen: (_ for _ in ()).throw(RuntimeError("stop")))
    assert all(not module._forward_hooks for module in m.modules())
    assert m.training
    assert [name for name, p in m.named_parameters() if not p.requires_grad] == ["backbone.norm.weight"]


@pytest.mark.parametrize("build", [model, mamba, neox])
def test_influence_is_the_jacobian_that_autograd_computes(build):
    m, x = build(), tokens(1, 12)
    subject = Subject("m", m)
    embeddings = subject.embed(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda e: subject.run(e)[0, -1], embeddings)  # d, 1, length, d
    norms = jacobian[:, 0].square().sum((0, 2)).sqrt().flip(0)
    found = influence.measure(subject, x, method="exact")
    torch.testing.assert_close(torch.from_numpy(found.score).float(), norms, rtol=2e-3, atol=0)


@pytest.mark.parametrize("build", [mamba, neox])
def test_transformers_models_can_be_measured(build):
    m, x = build(), tokens(2, 24)
    assert influence.measure(m, x, probes=2).score.min() > 0
    found = smoothing.measure(m, x)
    assert set(found.distance) == ({"mixer", "block"} if build is neox else {"b", "h", "mixer", "block"})
    assert found.n_layers == 3


def test_at_initialisation_is_another_draw_of_the_same_model():
    subject = Subject("m", model(polarization={"ones": 1, "zeros": 1}))
    before = torch.get_rng_state()
    fresh, again, other = (subject.at_initialisation(s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are its own"
    named = dict(subject.model.named_parameters())
    assert {n: p.shape for n, p in fresh.model.named_parameters()} == {n: p.shape for n, p in named.items()}
    weight = "backbone.blocks.0.mixer.in_proj.weight"
    assert torch.equal(fresh.model.get_parameter(weight), again.model.get_parameter(weight))
    assert not torch.equal(fresh.model.get_parameter(weight), other.model.get_parameter(weight))
    assert not torch.equal(fresh.model.get_parameter(weight), named[weight])
    assert fresh.name == "m (at initialisation)"
    with pytest.raises(UserError, match="no configuration"):
        Subject("s", nn.Linear(2, 2), Access(lambda m, t: t, lambda m, x: x)).at_initialisation(0)


def test_double_leaves_the_original_alone():
    subject = Subject("m", model())
    assert subject.in_double().dtype == torch.float64
    assert subject.dtype == torch.float32


def test_other_models_are_refused():
    with pytest.raises(UserError, match="neither a ssmlens model nor"):
        Subject("linear", nn.Linear(2, 2))
    from transformers import T5Config, T5ForConditionalGeneration

    tiny = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1)
    with pytest.raises(UserError, match="only causal"):
        Subject("t5", T5ForConditionalGeneration(tiny))


@pytest.mark.parametrize("bad", [[[1, 2, 99] * 4], [[1, -1] * 6]])
def test_tokens_outside_the_vocabulary(bad):
    with pytest.raises(UserError, match=r"knows 0\.\.31"):
        Subject("m", model()).tokens(bad)


def test_what_is_remembered_is_what_was_seen(monkeypatch):
    made = Subject("m", model())
    runs, seen = [], []
    handle = made.model.backbone.register_forward_hook(lambda *args: runs.append(1))
    try:
        with made.remembering():
            for x in (tokens(1, 12), tokens(1, 12), tokens(1, 12, seed=1)):
                made.walk(x, seen.append)
            assert len(runs) == 2
            monkeypatch.setattr(subject_module, "_REMEMBERED", 10)
            for _ in range(2):
                made.walk(tokens(1, 12, seed=2), seen.append)
            assert len(runs) == 4, "too much to be remembered"
        made.walk(tokens(1, 12), seen.append)
        assert len(runs) == 5
    finally:
        handle.remove()
    assert [one.index for one in seen[:4]] == [0, 1, 0, 1]
    for one, same in zip(seen[:2], seen[2:4], strict=True):
        assert one.out is same.out
        assert not one.out.requires_grad


def test_a_walk_that_was_broken_off_is_not_remembered():
    made = Subject("m", model())

    def stop(one):
        raise KeyboardInterrupt

    seen = []
    with made.remembering():
        with pytest.raises(KeyboardInterrupt):
            made.walk(tokens(1, 12), stop)
        made.walk(tokens(1, 12), seen.append)
    assert [one.index for one in seen] == [0, 1]


@pytest.mark.parametrize("causal", [True, False])
def test_who_reads_later_tokens_is_refused(causal):
    def run(m, x):
        seen = x if causal else x + x.mean(1, keepdim=True)
        return seen @ m.weight

    table = nn.Embedding(32, 4)
    made = nn.Linear(4, 4)
    subject = Subject("looks ahead", made, Access(embed=lambda m, x: table(x).detach(), run=run))
    assert subject.is_causal(tokens(1, 20)) is causal
    if not causal:
        with pytest.raises(UserError, match="looks ahead reads later tokens"):
            diagnose(subject, tokens(1, 20), measures=["influence"])
