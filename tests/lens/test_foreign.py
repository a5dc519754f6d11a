"""Hybrids of transformers: the layers that we know, as ours."""

import pytest
import torch
import transformers

import ssmlens
from ssmlens.lens import transitions
from ssmlens.lens.foreign import recurrent
from ssmlens.lens.subject import Subject

SMALL = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
HEADS = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 10, "mamba_n_groups": 2, "mamba_chunk_size": 16}


def model(family):
    torch.manual_seed(0)
    if family == "jamba":
        config = transformers.JambaConfig(
            **SMALL,
            mamba_dt_rank=2,
            mamba_d_state=6,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=1,
            use_mamba_kernels=False,
        )
    elif family == "bamba":
        config = transformers.BambaConfig(**SMALL, **HEADS, attn_layer_indices=[1])
    elif family == "granite":
        config = transformers.GraniteMoeHybridConfig(
            **SMALL, **HEADS, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=32
        )
    elif family == "falcon_h1":
        config = transformers.FalconH1Config(
            **SMALL, **HEADS | {"mamba_n_heads": 4}, mamba_d_ssm=32, mamba_rms_norm=True, mamba_norm_before_gate=False,
            ssm_multipliers=[0.5, 2.0, 0.25, 1.5, 3.0], ssm_in_multiplier=0.5, ssm_out_multiplier=0.25,
        )  # fmt: skip
    else:
        config = transformers.NemotronHConfig(
            vocab_size=32, hidden_size=24, mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=10, n_groups=2, chunk_size=16,
            layers_block_type=["mamba", "attention"], num_attention_heads=2, num_key_value_heads=2, head_dim=12, time_step_min=0.01,
        )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


@pytest.mark.parametrize("family", ["jamba", "bamba", "granite", "falcon_h1", "nemotron_h"])
def test_the_recurrent_layers_of_a_hybrid_show_their_transitions(family):
    subject = Subject("hybrid", model(family))
    assert subject.recurrent == ([0, 1] if family == "falcon_h1" else [0])
    tokens = torch.randint(0, 32, (2, 40), generator=torch.Generator().manual_seed(1))
    outputs = {}

    def visit(seen):
        if seen.index in subject.recurrent:
            states = seen.mixer.coefficients(seen.x).states()
            outputs[seen.index] = (seen.mixer.decode(states, seen.x), seen.y)

    subject.walk(tokens, visit)
    for got, want in outputs.values():
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), "theirs, from our a_t, Δ_t b_t and h_t"
    found = transitions.measure(subject, tokens)
    assert len(found.tables()[0].rows) == len(subject.recurrent)


def test_a_layer_that_computes_something_else_stays_unknown():
    inside = model("bamba").model.layers[0].mamba
    assert recurrent(inside) is not None
    inside.act = torch.nn.Tanh()  # it has the same parts
    inside.activation = "tanh"
    assert recurrent(inside) is None
    assert recurrent(model("bamba").model.layers[1].self_attn) is None
    assert recurrent(None) is None


def test_what_is_ours_stays_as_it_is():
    own = ssmlens.load("mamba-default")
    subject = Subject("own", own)
    assert all(mixer is block.mixer for mixer, block in zip(subject.mixers, own.backbone.blocks, strict=True))


def test_looking_changes_nothing():
    """No layer is frozen, none put into another mode, and one that differs in the state alone is not believed."""
    hybrid = model("jamba").train()
    hybrid.model.layers[0].mamba.conv1d.eval()
    before = [(p.requires_grad, m.training) for m in hybrid.modules() for p in m.parameters(recurse=False)]
    assert Subject("hybrid", hybrid).recurrent
    assert before == [(p.requires_grad, m.training) for m in hybrid.modules() for p in m.parameters(recurse=False)]
    inside = model("bamba").model.layers[0].mamba
    right = inside.forward

    def wrong(x, **options):
        inside.A_log.data += 0.7
        try:
            return right(x, **options)
        finally:
            inside.A_log.data -= 0.7

    inside.forward = wrong
    assert recurrent(inside) is None
