"""Polarizing a trained model changes nothing until it is trained, and then only what is new."""

import pytest
import torch

import ssmlens
from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.models.retrofit import READ_OUT, new_entries, polarize
from ssmlens.polarization import Polarization

OPTIONS = {
    "mamba": [{}, {"bcdt_norm": "weighted"}, {"bcdt_norm": "plain"}],
    "mamba2": [{"d_head": 8, "d_state": 8}, {"d_head": 8, "d_state": 8, "n_groups": 2, "bias": True}, {"d_head": 8, "gated_norm": False}],
    "retnet": [{"n_heads": 3, "decay": "learned"}, {"n_heads": 2}],
    "gla": [{"n_heads": 3}],
    "rwkv5": [{"d_head": 8}], "rwkv6": [{"d_head": 8}], "hgrn2": [{"d_head": 8}], "griffin": [{"width": 16, "n_blocks": 4}],
}  # fmt: skip
CASES = [(name, given) for name in READ_OUT for given in OPTIONS.get(name, [{}])]


def trained(mixer, given, dtype=torch.float64, **fields):
    """Random weights, away from the zeros and ones that some initialisations hold."""
    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(vocab_size=30, d_model=24, n_layers=2, mixer=mixer, mixer_config=given, **fields)
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.to(dtype).eval()


def tokens():
    return torch.randint(0, 30, (2, 50), generator=torch.Generator().manual_seed(1))


def test_every_mixer_that_can_be_polarized_is_known_or_refused_on_purpose():
    assert {n for n in mixers.names() if mixers.polarizable(n)} - set(READ_OUT) == {"linear_attention"}


@pytest.mark.parametrize(("mixer", "given"), CASES)
@pytest.mark.parametrize(("ones", "zeros"), [(1, 1), (2, 0), (0, 3)])
def test_outputs_are_unchanged_and_the_new_read_out_is_alive(mixer, given, ones, zeros):
    model = trained(mixer, given)
    new = polarize(model, Polarization(ones=ones, zeros=zeros))
    x = tokens()
    want, got = model(x).logits, new(x).logits
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    entries = new_entries(new)
    sizes = sum(int(m.sum()) for m in entries.values())
    assert sizes == sum(p.numel() for p in new.parameters()) - sum(p.numel() for p in model.parameters()) > 0
    new(x, labels=x).loss.backward()
    for i in range(2):
        name = f"backbone.blocks.{i}.mixer.{READ_OUT[mixer]}"
        assert new.get_parameter(name).grad[entries[name]].abs().max() > 0, name


@pytest.mark.parametrize(("mixer", "given"), CASES)
def test_in_float32_the_change_is_rounding(mixer, given):
    model = trained(mixer, given, torch.float32)
    want, got = model(tokens()).logits, polarize(model)(tokens()).logits
    # products over more key dimensions add up in another order; HGRN2's keys come from a sigmoid, so their sums are the largest
    assert (got - want).abs().max() <= (3e-6 if mixer == "hgrn2" else 1e-6) * want.abs().max()


@pytest.mark.parametrize(("mixer", "given"), CASES)
def test_one_step_on_the_new_entries_makes_them_speak_and_leaves_the_old(mixer, given):
    model = trained(mixer, given)
    new = polarize(model)
    entries, before = new_entries(new), {k: v.clone() for k, v in new.state_dict().items()}
    for _ in range(2):
        new.zero_grad()
        new(tokens(), labels=tokens()).loss.backward()
        with torch.no_grad():
            for name, mask in entries.items():
                p = new.get_parameter(name)
                p -= 0.5 * p.grad * mask
    assert (new(tokens()).logits - model(tokens()).logits).abs().max() > 1e-6
    for name, value in new.state_dict().items():
        changed = value != before[name]
        assert not (changed & ~entries.get(name, torch.zeros_like(changed))).any(), name


def test_it_saves_its_polarization_loads_back_and_generates(tmp_path):
    new = polarize(trained("mamba", {}, torch.float32), Polarization(ones=2, zeros=1))
    new.save_pretrained(tmp_path / "m")
    again = ssmlens.load(tmp_path / "m")
    assert again.config.architecture.polarization == Polarization(ones=2, zeros=1)
    assert torch.equal(again(tokens()).logits, new(tokens()).logits)
    prompt = tokens()[:1, :9]
    assert torch.equal(again.generate(prompt, max_new_tokens=8), new.generate(prompt, max_new_tokens=8))


def test_hybrids_shells_and_half_precision():
    model = trained(
        ["griffin", "attention"], {}, mlp="geglu", norm="layer", parallel=True, logit_cap=5.0, embedding_norm=True
    )
    new = polarize(model)
    assert torch.allclose(new(tokens()).logits, model(tokens()).logits, atol=1e-12)
    half = trained("mamba", {}, torch.bfloat16)
    assert next(polarize(half).parameters()).dtype == torch.bfloat16
    assert torch.equal(polarize(half)(tokens()).logits, half(tokens()).logits)


def test_the_same_seed_gives_the_same_model_and_the_global_generator_is_left_alone():
    model = trained("gla", {})
    state = torch.random.get_rng_state()
    a, b, c = polarize(model, seed=3), polarize(model, seed=3), polarize(model, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    same = [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    other = [torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_what_cannot_be_polarized_is_refused_by_name():
    model = trained("mamba", {})
    for subject, given, message in (
        (torch.nn.Linear(2, 2), None, "Linear cannot be polarized"),
        (polarize(model), None, "polarized already"),
        (model, Polarization(mode="replace"), "replace"),
        (trained("attention", {}), None, "nothing to polarize: attention"),
        (trained("linear_attention", {}), None, "trained linear_attention cannot"),
    ):
        with pytest.raises(UserError, match=message):
            polarize(subject, given)
    assert new_entries(model) == {}
