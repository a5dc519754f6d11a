"""Checkpoints that are not ours, and broken ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

import ssmlens
from ssmlens.errors import UserError
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.models.pretrained import convert


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=3,
        state_size=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MambaForCausalLM(config).eval()
    for p in model.parameters():  # away from the tidy values of an initialisation
        p.data += 0.1 * torch.randn_like(p)
    return model


def test_logits_agree_with_transformers_mamba(theirs):
    ours = convert(theirs)
    x = torch.randint(0, 60, (2, 70))
    with torch.no_grad():
        want, got = theirs(x).logits, ours(x).logits
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5
    for prompt in (x[:1, :9], x[1:, :20]):
        assert torch.equal(
            ours.generate(prompt, max_new_tokens=24, do_sample=False),
            theirs.generate(prompt, max_new_tokens=24, do_sample=False),
        )


def test_gradients_agree_with_transformers_mamba(theirs):
    ours = convert(theirs)
    x = torch.randint(0, 60, (2, 30))
    theirs(x, labels=x).loss.backward()
    ours(x, labels=x).loss.backward()
    want, got = theirs.backbone.layers[1].mixer, ours.backbone.blocks[1].mixer
    for name in ("A_log", "D", "dt_proj.bias", "x_proj.weight", "in_proj.weight"):
        a, b = got.get_parameter(name).grad, want.get_parameter(name).grad
        assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-4, name
    theirs.zero_grad()


def test_load_a_saved_transformers_mamba(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = ssmlens.load(tmp_path)
    assert isinstance(ours, LanguageModel)
    x = torch.randint(0, 60, (1, 20))
    assert torch.allclose(ours(x).logits, theirs(x).logits, atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    LanguageModel(LanguageModelConfig(vocab_size=20, d_model=8, n_layers=1)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def breakages():
    def truncated(path):
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])

    def missing(path):
        state = load_file(path / "model.safetensors")
        del state["backbone.blocks.0.mixer.D"]
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})

    def nan(path):
        state = load_file(path / "model.safetensors")
        state["backbone.blocks.0.mixer.D"][0] = float("nan")
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})

    def unknown(path):
        state = load_file(path / "model.safetensors")
        save_file({**state, "backbone.surprise": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})

    def integers(path):
        state = load_file(path / "model.safetensors")
        save_file(
            {k: v.to(torch.int8) for k, v in state.items()}, path / "model.safetensors", metadata={"format": "pt"}
        )

    def shard(path):
        (path / "model.safetensors").rename(path.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"backbone.norm.weight": "../outside.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))

    return {
        "truncated": (truncated, "cannot load"),
        "missing": (missing, "lacks backbone.blocks.0.mixer.D"),
        "nan": (nan, "mixer.D contains NaN"),
        "unknown": (unknown, "backbone.surprise"),
        "shape": (lambda p: edit(p, vocab_size=21), r"has shape \(20, 8\), the configuration says \(21, 8\)"),
        "dtype": (integers, "dtype I8"),
        "shard": (shard, "must lie beside it"),
        "key": (lambda p: edit(p, n_layer=1), "did you mean 'n_layers'"),
        "vocabulary": (
            lambda p: edit(p, vocab_size=10**10),
            r"has shape \(20, 8\), the configuration says \(10000000000, 8\)",
        ),
        "width": (lambda p: edit(p, d_model=10**6), r"the configuration says \((20, )?1000000"),
        "kernels": (lambda p: edit(p, attn_implementation="someone/kernel"), "asks for code from elsewhere"),
        "nested kernels": (
            lambda p: edit(p, text_config={"_attn_implementation_internal": "a/b"}),
            "asks for code from elsewhere",
        ),
        "type": (lambda p: edit(p, model_type="nonesuch"), "nonesuch"),
        "json": (lambda p: (p / "config.json").write_text("{"), "not readable JSON"),
        "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
        "no weights": (lambda p: (p / "model.safetensors").unlink(), "cannot load"),
    }


@pytest.mark.parametrize("kind", breakages())
def test_broken_checkpoints_are_refused_by_name(saved, kind):
    breaks, message = breakages()[kind]
    breaks(saved)
    with pytest.raises(UserError, match=message) as error:
        ssmlens.load(saved)
    assert "model" in str(error.value)


def test_more_layers_than_tensors_are_refused_before_they_are_built(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, num_hidden_layers=10**9)
    with pytest.raises(UserError, match=r"says 1000000000 layers, the files hold 32 tensors"):
        ssmlens.load(tmp_path)


def test_masks_that_old_checkpoints_hold_are_passed_over(tmp_path):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for i in range(2):
        start = f"gpt_neox.layers.{i}.attention"
        state |= {
            f"{start}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            f"{start}.masked_bias": torch.tensor(-1e9),
            f"{start}.rotary_emb.inv_freq": torch.ones(2),
        }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, x = ssmlens.load(tmp_path), torch.randint(0, 60, (1, 20))
    assert isinstance(ours, LanguageModel)
    assert torch.allclose(ours(x).logits, model(x).logits, atol=1e-5)


def test_a_missing_directory_is_not_sought_on_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    with pytest.raises(UserError, match="no such directory"):
        ssmlens.load("model/model")


@pytest.fixture
def pickled(theirs, tmp_path):
    """As older versions of transformers left a model: no safetensors, two pickles and their index."""
    theirs.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    names, shards = list(theirs.state_dict()), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        part = {k: v.half() for k, v in theirs.state_dict().items() if weight_map[k] == shard}
        torch.save(part, tmp_path / "model" / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tmp_path / "model"


def whole(pickled):
    state = {k: v for shard in sorted(pickled.glob("*.bin")) for k, v in torch.load(shard).items()}
    for file in pickled.glob("pytorch_model*"):
        file.unlink()
    torch.save(state, pickled / "pytorch_model.bin")


@pytest.mark.parametrize("make", [lambda path: None, whole], ids=["shards", "one file"])
def test_pickles_of_tensors_are_read(theirs, pickled, make):
    make(pickled)
    torch.save({"lr": 1e-3}, pickled / "training_args.bin")  # not weights: not looked at
    ours, x = ssmlens.load(pickled), torch.randint(0, 60, (1, 20))
    assert isinstance(ours, LanguageModel)
    assert next(ours.parameters()).dtype == torch.float32
    want = theirs(x).logits
    assert (ours(x).logits - want).abs().max() <= 2e-2 * want.abs().max()  # of half precision


def test_safetensors_come_before_pickles(saved):
    torch.save({"x": torch.ones(1)}, saved / "pytorch_model.bin")
    ssmlens.load(saved)


class Harm:
    """What a hostile pickle is: at loading it calls a function of its choice."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (open, (self.place, "w"))


def pickled_breakages():
    shard = "pytorch_model-00001-of-00002.bin"

    def alter(path, change):
        torch.save(change(torch.load(path / shard)), path / shard)

    def elsewhere(path):
        (path / shard).rename(path.parent / "outside.bin")
        index = json.loads((path / "pytorch_model.bin.index.json").read_text())
        index["weight_map"] = {k: "../outside.bin" if v == shard else v for k, v in index["weight_map"].items()}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    def cut(path):
        data = (path / shard).read_bytes()
        (path / shard).write_bytes(data[: len(data) // 2])

    name = "backbone.embeddings.weight"
    return {
        "code": (lambda p: alter(p, lambda s: s | {"x": Harm(str(p / "harm"))}), "holds more than tensors"),
        "no tensors": (lambda p: alter(p, lambda s: s | {"x": 3}), "other things than named tensors"),
        "path": (elsewhere, "must lie beside it"),
        "missing": (lambda p: (p / shard).unlink(), f"the shard {shard} is missing"),
        "cut": (cut, "damaged"),
        "nan": (lambda p: alter(p, lambda s: {k: v * float("nan") for k, v in s.items()}), "contains NaN"),
        "dtype": (lambda p: alter(p, lambda s: {k: v.to(torch.int8) for k, v in s.items()}), "dtype torch.int8"),
        "shape": (lambda p: edit(p, vocab_size=61), r"the configuration says \(61, 48\)"),
        "lacks": (lambda p: alter(p, lambda s: {k: v for k, v in s.items() if "A_log" not in k}), "lacks .*A_log"),
        "bomb": (
            lambda p: alter(p, lambda s: s | {name: torch.zeros(1).expand(10**9, 48)}) or edit(p, vocab_size=10**9),
            "more numbers than the file holds",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", pickled_breakages())
def test_broken_and_hostile_pickles_are_refused_by_name(pickled, kind):
    breaks, message = pickled_breakages()[kind]
    breaks(pickled)
    with pytest.raises(UserError, match=message) as error:
        ssmlens.load(pickled)
    assert "model" in str(error.value)
    assert not (pickled / "harm").exists()


def test_weights_of_another_place_are_not_followed(saved):
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    with pytest.raises(UserError, match="adapter for another model"):
        ssmlens.load(saved)
    (saved / "adapter_config.json").unlink()
    edit(saved, transformers_weights="../other/model.safetensors")
    with pytest.raises(UserError, match="must lie beside it"):
        ssmlens.load(saved)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        ssmlens.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="did you mean 'mamba-default'"):
        ssmlens.load("mamba-defalt")
    with pytest.raises(UserError, match="no model at"):
        ssmlens.load("x" * 5000)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        ssmlens.load(tmp_path / "file")
