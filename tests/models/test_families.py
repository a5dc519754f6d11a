"""Other people's families as our LanguageModel: the same logits, the same text, in their formats and their authors'."""

import json
import math

import pytest
import torch
import transformers
from torch import nn

import ssmlens
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel
from ssmlens.models.pretrained import FAMILIES, Unsupported, convert

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZE = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 3, **NO_TOKENS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 100}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**SIZE, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 192}
KINDS = {
    "mamba": ("Mamba", {**SIZE, "state_size": 8}),
    "mamba, biases, untied": ("Mamba", {**SIZE, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}),
    "falcon_mamba": ("FalconMamba", {**SIZE, "state_size": 8}),
    "mamba2": ("Mamba2", {**SIZE, "num_heads": 16, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "rwkv": ("Rwkv", {**SIZE, "num_hidden_layers": 8, "rescale_every": 3}),
    "recurrent_gemma": ("RecurrentGemma", {**GEMMA, "attention_window_size": 20}),
    "gpt_neox": ("GPTNeoX", {**SIZE, "num_attention_heads": 4, "intermediate_size": 100}),
    "gpt_neox, sequential": ("GPTNeoX", {**SIZE, "num_attention_heads": 4, "intermediate_size": 100, "use_parallel_residual": False}),
    "llama": ("Llama", {**SIZE, **HEADS}),
    "llama 3": ("Llama", {**SIZE, **HEADS, "tie_word_embeddings": True, "attention_bias": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**SIZE, **HEADS, "sliding_window": 16}),
}  # fmt: skip


def theirs(kind):
    family, config = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).eval()
    for p in model.parameters():  # away from the tidy values of an initialisation
        p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(batch=2, length=70):
    return torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(1))


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def logits(model, x):
    return model(x, use_cache=False).logits


def test_every_family_is_tried():
    assert {FAMILIES[c.model_type].model_type for c in (theirs(k).config for k in KINDS)} == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_text_agree(kind):
    model, x = theirs(kind), tokens()
    ours = convert(model)
    assert isinstance(ours, LanguageModel)
    # transformers halves RWKV's stream every few layers, under norms whose ε it does not halve
    assert relative(logits(ours, x), logits(model, x)) <= (1e-4 if kind == "rwkv" else 1e-5)
    for prompt in (x[:1, :30], x[1:, :9]):
        options = {"max_new_tokens": 16, "do_sample": False}
        assert torch.equal(ours.generate(prompt, **options), model.generate(prompt, **options))
    again = convert(model)  # also of a model that has run, which RWKV does not survive unchanged
    assert torch.equal(logits(again, x), logits(ours, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_is_loaded_and_saved_as_ours(kind, tmp_path):
    model, x = theirs(kind), tokens()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    loaded = ssmlens.load(tmp_path / "theirs")
    assert isinstance(loaded, LanguageModel)
    want = logits(model, x)
    assert relative(logits(loaded, x), want) <= 1e-4
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(ssmlens.load(tmp_path / "ours"), x), logits(loaded, x))


def test_half_precision_is_read_as_float32(tmp_path):
    model, x = theirs("mamba").bfloat16(), tokens()
    model.save_pretrained(tmp_path)
    assert relative(logits(ssmlens.load(tmp_path), x), logits(model.float(), x)) <= 1e-5


def test_a_converted_model_has_memory_of_its_own_unless_shared():
    model = theirs("llama")
    ours, shared = convert(model), convert(model, share=True)
    before = ours.backbone.norm.weight.clone()
    model.model.norm.weight.data += 1
    assert torch.equal(ours.backbone.norm.weight, before)
    assert torch.equal(shared.backbone.norm.weight, before + 1)


def test_training_mode_and_gradients_are_there():
    ours = convert(theirs("mistral").train())
    assert ours.training
    ours(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_what_ours_cannot_be_stays_with_transformers(tmp_path):
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    for name, model in (
        ("gpt2", transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, **NO_TOKENS))),
        ("yarn", transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, **HEADS, rope_parameters=yarn))),
        ("relu", transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE, num_attention_heads=4, hidden_act="relu"))),
    ):  # fmt: skip
        with pytest.raises(Unsupported):
            convert(model)
        model.save_pretrained(tmp_path / name)
        assert type(ssmlens.load(tmp_path / name)) is type(model)


# ------------------------------------------------------------------------------------------------ the authors' formats


def write_mamba_ssm(model, directory, **fields):
    """A transformers Mamba or Mamba-2 as mamba_ssm would save it."""
    c = model.config
    inner = {"layer": "Mamba1", "d_state": c.state_size}
    if c.model_type == "mamba2":
        inner = {"layer": "Mamba2", "d_state": c.state_size, "headdim": c.head_dim, "ngroups": c.n_groups}
    directory.mkdir(exist_ok=True)
    config = {
        "d_model": c.hidden_size, "n_layer": c.num_hidden_layers, "vocab_size": 53, "ssm_cfg": inner, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config | fields))
    state = {k.replace("embeddings", "embedding"): v for k, v in model.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, directory / "pytorch_model.bin")
    return state


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_the_format_of_mamba_ssm(kind, tmp_path):
    family, config = KINDS[kind]
    config = config | {"tie_word_embeddings": True}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)).eval()
    write_mamba_ssm(model, tmp_path / "m")
    x = tokens()
    assert relative(logits(ssmlens.load(tmp_path / "m"), x), logits(model, x)) <= 1e-5


def test_wrong_files_of_mamba_ssm_are_refused_by_name(tmp_path):
    model = theirs("mamba")
    for fields, message in (
        ({"attn_layer_idx": [1]}, "attn_layer_idx has no equal"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer has no equal"),
        ({"ssm_cfg": {"d_stat": 8}}, "unknown key ssm_cfg.d_stat"),
        ({"ssm_cfg": {"d_state": 9}}, r"A_log has shape \(128, 8\), the configuration says \(128, 9\)"),
        ({"n_layer": 4}, r"lacks backbone.layers.3"),
        ({"n_layer": 2}, r"weights that our mamba does not: backbone.layers.2"),
    ):
        write_mamba_ssm(model, tmp_path / "m", **fields)
        with pytest.raises(UserError, match=message) as error:
            ssmlens.load(tmp_path / "m")
        assert str(tmp_path / "m") in str(error.value)
    state = write_mamba_ssm(model, tmp_path / "m")
    state["backbone.layers.0.mixer.D"][0] = math.nan
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="contains NaN"):
        ssmlens.load(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no pytorch_model\.bin"):
        ssmlens.load(tmp_path / "m")


@pytest.mark.parametrize(
    "fields",
    [{"d_model": "x"}, {"d_model": None}, {"d_model": 10**9}, {"n_layer": None}, {"n_layer": 10**9}, {"ssm_cfg": [1]}, {"ssm_cfg": "a"},
     {"ssm_cfg": {"dt_rank": None}}, {"ssm_cfg": {"expand": 1.5}}, {"ssm_cfg": {"layer": "Mamba2", "dt_limit": 5}}],
)  # fmt: skip
def test_a_malformed_configuration_of_mamba_ssm_names_its_directory(fields, tmp_path):
    write_mamba_ssm(theirs("mamba"), tmp_path / "m", **fields)
    with pytest.raises(UserError, match="cannot load") as error:
        ssmlens.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("backbone.embedding.weight", torch.zeros(5)), ("backbone.layers.0.mixer.conv1d.weight", torch.zeros(())),
     ("backbone.norm_f.weight", torch.zeros(64).to_sparse()), ("backbone.norm_f.weight", torch.zeros(64, device="meta"))],
)  # fmt: skip
def test_malformed_weights_name_their_file(name, value, tmp_path):
    state = write_mamba_ssm(theirs("mamba"), tmp_path / "m")
    torch.save(state | {name: value}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load") as error:
        ssmlens.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


class Evil:
    def __reduce__(self):
        return print, ("code of the checkpoint ran",)


@pytest.mark.parametrize("name", ["m/pytorch_model.bin", "x.pth"])
def test_pickled_code_does_not_run(name, tmp_path, capsys):
    write_mamba_ssm(theirs("mamba"), tmp_path / "m")
    file = tmp_path / name
    for content in ({"emb.weight": Evil()}, [1, 2], {"emb.weight": 3}):
        torch.save(content, file)
        with pytest.raises(UserError, match=r"more than tensors|other things"):
            ssmlens.load(file if file.suffix == ".pth" else file.parent)
    file.write_bytes(b"\x80\x04 nothing of the kind")
    with pytest.raises(UserError, match="damaged"):
        ssmlens.load(file if file.suffix == ".pth" else file.parent)
    assert "ran" not in capsys.readouterr().out


SHORT = {"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r", "rwkv.": "",
         "embeddings.": "emb.", "pre_ln": "ln0", "attention.": "att.", "feed_forward.": "ffn."}  # fmt: skip


def test_rwkv4_as_its_author_saves_it(tmp_path):
    model, x = theirs("rwkv"), tokens()
    state = {}
    for name, value in model.state_dict().items():
        for theirs_, short in SHORT.items():
            name = name.replace(theirs_, short)
        state[name] = value.clone()
    torch.save(state, tmp_path / "RWKV-4.pth")
    ours = ssmlens.load(tmp_path / "RWKV-4.pth")
    assert relative(logits(ours, x), logits(model, x)) <= 1e-4
    assert ours.config.mixer == "rwkv4"


def rwkv56(version, d=64, layers=3, d_head=16, vocab=60, ffn=112):
    """Random weights under the names of RWKV-LM."""
    torch.manual_seed(version)
    heads = d // d_head

    def normal(*shape, std=0.3):
        return std * torch.randn(*shape)

    state = {"emb.weight": normal(vocab, d), "head.weight": normal(vocab, d)}
    norms = ["ln_out", "blocks.0.ln0"] + [f"blocks.{i}.{n}" for i in range(layers) for n in ("ln1", "ln2", "att.ln_x")]
    for norm in norms:
        state |= {f"{norm}.weight": 1 + normal(d), f"{norm}.bias": normal(d)}
    for i in range(layers):
        a, f = f"blocks.{i}.att", f"blocks.{i}.ffn"
        for part in ("receptance", "key", "value", "gate", "output"):
            state[f"{a}.{part}.weight"] = normal(d, d, std=0.15)
        word, parts = ("maa", "xwkvrg") if version == 6 else ("mix", "kvrg")
        for part in parts:
            state[f"{a}.time_{word}_{part}"] = torch.rand(1, 1, d)
        for part in "kr":
            state[f"{f}.time_{word}_{part}"] = torch.rand(1, 1, d)
        state[f"{a}.time_faaaa"] = normal(heads, d_head)
        if version == 6:
            state |= {f"{a}.time_maa_w1": normal(d, 5 * 8), f"{a}.time_maa_w2": normal(5, 8, d), f"{a}.time_decay": normal(1, 1, d) - 1,
                      f"{a}.time_decay_w1": normal(d, 12), f"{a}.time_decay_w2": normal(12, d)}  # fmt: skip
        else:
            state[f"{a}.time_decay"] = normal(heads, d_head) - 1
        state |= {f"{f}.key.weight": normal(ffn, d, std=0.15), f"{f}.value.weight": normal(d, ffn, std=0.15),
                  f"{f}.receptance.weight": normal(d, d, std=0.15)}  # fmt: skip
    return state


@pytest.mark.parametrize("version", [5, 6])
def test_rwkv5_and_6_agree_with_their_authors_package(version, tmp_path, monkeypatch):
    pytest.importorskip("rwkv", reason="the authors' package rwkv is not installed")
    for name in ("RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setenv(name, "0")
    from rwkv.model import RWKV

    torch.save(rwkv56(version), tmp_path / "m.pth")
    want, _ = RWKV(model=str(tmp_path / "m"), strategy="cpu fp32").forward(
        tokens(1)[0].tolist(), None, full_output=True
    )
    ours = ssmlens.load(tmp_path / "m.pth")
    assert ours.config.mixer == f"rwkv{version}"
    assert relative(logits(ours, tokens(1))[0], want) <= 1e-5


def test_other_rwkv_files_are_refused_by_name(tmp_path):
    file = tmp_path / "m.pth"
    for change, message in (
        (lambda s: s.pop("emb.weight"), "has no emb.weight"),
        (lambda s: s.update({k.replace("time_faaaa", "r_k"): s.pop(k) for k in list(s) if "faaaa" in k}), "is an RWKV-7"),
        (lambda s: s.update({k.replace("time_faaaa", "u"): s.pop(k) for k in list(s) if "faaaa" in k}), "is no RWKV-4, 5 or 6"),
        (lambda s: s.update({"blocks.0.att.time_faaaa": torch.zeros(9)}), "malformed"),
        (lambda s: s.update({"emb.weight": torch.zeros(9)}), "malformed"),
        (lambda s: s.pop("blocks.0.att.time_decay"), "lacks blocks.0.att.time_decay"),
        (lambda s: s.update({"blocks.999999999.att.x": torch.zeros(1)}), "less than or equal to 1000"),
        (lambda s: s.update({k: s[k][:, :1] for k in s if k.endswith("time_decay")}), "before 5.2"),
        (lambda s: s.pop("blocks.1.att.gate.weight"), "lacks blocks.1.att.gate.weight"),
        (lambda s: s.update({"emb.weight": torch.zeros(3, 3, dtype=torch.int8)}), "emb.weight has dtype torch.int8"),
    ):  # fmt: skip
        state = rwkv56(5)
        change(state)
        torch.save(state, file)
        with pytest.raises(UserError, match=message):
            ssmlens.load(file)


def test_channel_mixing_carries_its_state_masks_and_resets():
    ours = convert(theirs("rwkv")).double()
    x = tokens(2, 24)
    whole = ours(x).logits
    first = ours(x[:, :10], use_cache=True)
    rest = ours(x[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-9)
    packed = ours(x.reshape(1, 48), reset=torch.arange(48).eq(24)[None]).logits
    assert torch.allclose(packed.reshape(2, 24, -1), whole, atol=1e-9)
    padded = nn.functional.pad(x, (5, 0), value=7)
    mask = nn.functional.pad(torch.ones_like(x), (5, 0))
    assert torch.allclose(ours(padded, attention_mask=mask).logits[:, 5:], whole, atol=1e-9)
