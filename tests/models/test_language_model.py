import json

import pytest
import torch
from cases import close

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel, LanguageModelConfig, backbone


def make(polarized=True, **fields):
    torch.manual_seed(0)
    fields = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "polarization": {} if polarized else None, **fields}
    return LanguageModel(LanguageModelConfig(**fields)).eval()


def tokens(batch=2, length=12, vocab=40, seed=1):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("polarized", [False, True])
def test_save_and_load(tmp_path, polarized):
    model = make(polarized)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["n_layers"] == 2
    if polarized:
        assert saved["polarization"]["zero"] == "-inf"
    again = LanguageModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.lm_head.weight is again.backbone.embedding.weight


def test_untied_head_and_partial_checkpoint_keep_what_was_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    state = load_file(tmp_path / "model.safetensors")
    del state["backbone.blocks.0.mixer.D"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    partial = LanguageModel.from_pretrained(tmp_path)
    got, want = partial.backbone.blocks[0].mixer, model.backbone.blocks[0].mixer
    assert torch.equal(got.D, torch.ones(32)), "what was missing begins as a new one"
    assert torch.equal(got.dt_proj.bias, want.dt_proj.bias), "what was there stays"


@pytest.mark.parametrize("name", mixers.names())
def test_what_a_checkpoint_lacks_begins_as_a_new_one(tmp_path, name):
    """Whatever it lacks: a parameter of the mixer itself, or of a layer inside it, or of the MLP."""
    from safetensors.torch import load_file, save_file

    config = {"feature_map": "performer"} if name == "linear_attention" else {}
    model = make(mixers.polarizable(name), mixer=name, mixer_config=config, mlp="swiglu")
    model.save_pretrained(tmp_path)
    full = load_file(tmp_path / "model.safetensors")
    inside = [key for key in full if "blocks.0." in key]
    for part in (inside[::2], inside[1::2]):
        state = {key: value + 7 for key, value in full.items() if key not in part}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        got = LanguageModel.from_pretrained(tmp_path).state_dict()
        for key in part:
            fresh = full[key]
            assert got[key].isfinite().all(), key
            assert got[key].abs().max() <= 3 * fresh.abs().max() + 0.1, key
            if fresh.numel() > 100:
                assert fresh.std() / 3 <= got[key].std() <= 3 * fresh.std(), key
        assert all(torch.equal(got[key], value) for key, value in state.items()), "what was there stays"
    model.initialize_weights()
    assert all(torch.equal(value, full[key]) for key, value in model.state_dict().items() if key in full)


def test_transformers_does_not_touch_the_initialisation():
    model = make(d_model=64)
    dt = torch.nn.functional.softplus(model.backbone.blocks[0].mixer.dt_proj.bias)
    assert dt.min() >= 0.0009
    assert dt.max() <= 0.11
    assert dt.std() > 0.005
    assert 0.018 < model.backbone.embedding.weight.std() < 0.022


def test_cached_steps_equal_one_pass_and_the_cache_does_not_grow():
    model, x = make(), tokens()
    want = model(x).logits
    cache, logits, sizes = None, [], set()
    for t in range(x.shape[1]):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        sizes.add(cache.numbers())
    close(torch.cat(logits, 1), want, torch.float32)
    assert len(sizes) == 1
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("cuts", [[5], [1, 2], [4, 8]])
def test_chunked_prefill_is_exact(cuts):
    model, x = make(), tokens()
    cache, logits = None, []
    for part in x.tensor_split(cuts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, 1), model(x).logits, torch.float32)


def test_generate_equals_greedy_by_hand_and_ignores_left_padding():
    model, x = make(), tokens(1, 6)
    by_hand = x
    for _ in range(8):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    got = model.generate(x, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, by_hand)
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False, use_cache=False), by_hand)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 6)], 1).long()
    both = model.generate(torch.cat([padded, tokens(1, 10, seed=3)]), attention_mask=torch.cat([mask, torch.ones(1, 10).long()]),
                          max_new_tokens=8, do_sample=False)  # fmt: skip
    assert torch.equal(both[:1, 4:], by_hand)


def test_beam_search_follows_its_beams():
    model, x = make(), tokens(2, 6)
    cached = model.generate(x, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(cached, model.generate(x, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False))


def test_loss_only_where_there_is_a_target():
    model, x = make(), tokens()
    targets = torch.full_like(x, -100)
    targets[0, 3], targets[1, 7] = 5, 6
    out = model(x, targets=targets)
    assert out.logits.shape == (2, 40)
    full = model(x).logits
    want = torch.nn.functional.cross_entropy(torch.stack([full[0, 3], full[1, 7]]), torch.tensor([5, 6]))
    close(out.loss, want, torch.float32)
    assert out.n_targets == 2
    best = model(x, targets=torch.where(targets == -100, targets, full.argmax(-1)))
    assert best.n_correct == 2
    none = model(x, targets=torch.full_like(x, -100))
    assert none.loss == 0
    none.loss.backward()


def test_labels_follow_transformers_convention():
    model, x = make(), tokens()
    shifted = torch.cat([x[:, 1:], torch.full((2, 1), -100)], 1)
    assert torch.equal(model(x, labels=x).loss, model(x, targets=shifted).loss)


def test_packed_sequences():
    model, x = make(), tokens()
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 5] = True
    want = torch.cat([model(x[:, :5]).logits, model(x[:, 5:]).logits], 1)
    close(model(x, reset=reset).logits, want, torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 3}, "did you mean 'n_layers'"),
        ({"mixer": "mambo"}, "did you mean 'mamba'"),
        ({"mixer_config": {"d_stat": 3}}, "did you mean 'd_state'"),
        ({"polarization": {"one": 1.0}}, "must be ≤ 0"),
        ({"polarization": {"ones": 0, "zeros": 0}}, "no polarization"),
        ({"polarization": {"zeross": 1}}, "did you mean 'zeros'"),
        ({"d_model": 0}, "d_model"),
        ({"mixer_config": {"dt_min": 1.0}}, "above dt_max"),
    ],
)
def test_wrong_configurations_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        LanguageModelConfig(**fields)


def test_wrong_calls_are_named():
    model, x = make(), tokens()
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="not both"):
        model(x, targets=x, labels=x)
    right = torch.ones_like(x)
    right[0, -2:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model(x, attention_mask=right)


def test_weight_decay_groups():
    model = make()
    names = {id(p): n for n, p in model.named_parameters()}
    decay, free = ({names[id(p)] for p in g["params"]} for g in model.parameter_groups(0.1))
    for word in ("A_log", ".D", "dt_proj.bias", "conv_bias", "norm.weight"):
        assert any(word in n for n in free), word
        assert not any(word in n for n in decay), word
    assert any("in_proj" in n for n in decay)
    assert len(decay | free) == len(list(model.parameters()))
    (released,) = model.parameter_groups(0.1, "released")
    assert len(released["params"]) == len(list(model.parameters()))
    assert released["weight_decay"] == 0.1


def test_padding_after_carried_tokens_is_refused():
    """It would push real tokens out of the convolution's window."""
    model, x = make(), tokens(1, 12)
    cache = model(x[:, :5], use_cache=True).past_key_values
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x[:, 5:]], 1)
    for mask in ([1] * 5 + [0] * 3 + [1] * 7, [0] * 3 + [1] * 7):
        with pytest.raises(ValueError, match="pad on the left"):
            model(padded, attention_mask=torch.tensor([mask]), past_key_values=cache)
    with pytest.raises(ValueError, match="covers 20 tokens"):
        model(padded, attention_mask=torch.ones(1, 20), past_key_values=cache)
    # left padding that began in an earlier piece is fine
    left = torch.cat([torch.zeros(1, 6, dtype=torch.long), x], 1)
    mask = torch.tensor([[0] * 6 + [1] * 12])
    first = model(left[:, :3], attention_mask=mask[:, :3], use_cache=True)
    rest = model(left[:, 3:], attention_mask=mask, past_key_values=first.past_key_values)
    close(rest.logits[:, 3:], model(x).logits, torch.float32)


def test_a_mistyped_argument_is_not_swallowed():
    with pytest.raises(TypeError, match="target"):
        make()(tokens(), target=tokens())


def test_defaults_are_saved_and_transformers_knows_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    make().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mixer_config"]["d_state"] == 16
    assert saved["mixer_config"]["n_residuals"] == 2
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), LanguageModel)


def test_meta_device():
    model = make().to("meta")
    assert model(torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, 40)


def test_long_inputs_go_through_in_segments(monkeypatch):
    """Without gradients; the numbers are those of one pass, padding, packing and kept hidden states included."""
    model, x = make(), tokens(length=37)
    mask, reset = torch.ones(2, 37), torch.zeros(2, 37, dtype=torch.bool)
    mask[0, :11] = 0
    reset[1, 20] = True
    call = {"input_ids": x, "attention_mask": mask, "reset": reset, "output_hidden_states": True, "use_cache": True}
    lengths = []
    with torch.no_grad():
        whole = model(**call)
        monkeypatch.setattr(backbone, "SEGMENT", 2 * 8)
        model.backbone.blocks[0].register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
        pieces = model(**call)
    assert lengths == [8, 8, 8, 8, 5]
    real = mask.bool()
    close(pieces.logits[real], whole.logits[real], torch.float32)
    for got, want in zip(pieces.hidden_states, whole.hidden_states, strict=True):
        close(got[real], want[real], torch.float32)
    for got, want in zip(pieces.past_key_values.states, whole.past_key_values.states, strict=True):
        for g, w in zip(got, want, strict=True):
            close(g, w, torch.float32)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_blocks_with_an_mlp(tmp_path, mlp):
    model, x = make(mlp=mlp, mlp_ratio=2.5), tokens()
    block = model.backbone.blocks[1]
    assert block.mlp.out_proj.weight.shape == (16, 40)
    assert block.mixer.config.n_residuals == 4, "the mixer and the MLP of each block write into the residual stream"
    assert block.mlp.out_proj.weight.abs().max() <= (1 / 40) ** 0.5 / 2
    with torch.no_grad():
        h = model.backbone.blocks[0](model.backbone.embed(x))[0]
        middle = h + block.mixer(block.norm(h))[0]
        close(block(h)[0], middle + block.mlp(block.mlp_norm(middle)), torch.float32)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)


def test_hybrids(tmp_path):
    """A pattern of mixers is repeated over the layers, each with its own configuration; it survives saving."""
    fields = {
        "n_layers": 5,
        "mixer": ["mamba", "attention"],
        "mixer_config": {"mamba": {"d_state": 3}, "attention": {"n_heads": 2}},
    }
    model = make(**fields)
    kinds = [type(b.mixer).__name__ for b in model.backbone.blocks]
    assert kinds == ["Mamba", "Attention", "Mamba", "Attention", "Mamba"]
    assert [b.mixer.polarization is not None for b in model.backbone.blocks] == [True, False, True, False, True]
    assert model.backbone.blocks[2].mixer.d_state == 5
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config.architecture == model.config.architecture
    x = tokens()
    assert torch.equal(again(x).logits, model(x).logits)
    cached = model.generate(x, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, model.generate(x, max_new_tokens=6, do_sample=False, use_cache=False))
    padded, mask = torch.cat([x[:, :3], x], 1), torch.ones(2, 15)
    mask[:, :3] = 0
    close(model(padded, attention_mask=mask).logits[:, 3:], model(x).logits, torch.float32)
    with pytest.raises(UserError, match="attention cannot be polarized"):
        make(mixer="attention")
    with pytest.raises(UserError, match="'d_state' is not among its mixers"):
        make(mixer=["mamba", "mamba"], mixer_config={"d_state": 3})
    with pytest.raises(UserError, match="names no mixer"):
        make(mixer=[])
