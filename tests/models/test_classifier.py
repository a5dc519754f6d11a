"""The classifier: any mixer, pooling, norms; save and load; gradients; and that it is not a second copy of the language model."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ssmlens
from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.models import Classifier, ClassifierConfig

SMALL = {
    "mamba": {"d_state": 4}, "s4d": {"d_state": 4}, "s4": {"d_state": 4}, "h3": {"d_state": 4}, "mamba2": {"d_state": 4, "d_head": 8},
    "attention": {"positions": "none", "n_heads": 2},
}  # fmt: skip


def model(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {
        "d_input": 3,
        "n_classes": 5,
        "d_model": 16,
        "n_layers": 2,
        "mixer_config": SMALL.get(changes.get("mixer", "mamba"), {}),
    }
    return Classifier(ClassifierConfig(**{**fields, **changes})).eval()


def data(batch=4, length=20, d_input=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, d_input, generator=g), torch.randint(0, 5, (batch,), generator=g)


@pytest.mark.parametrize("mixer", mixers.names())
def test_every_mixer_classifies_and_learns(mixer):
    m, (x, y) = model(mixer=mixer).train(), data()
    out = m(x, y)
    assert out.logits.shape == (4, 5)
    assert out.last_hidden_state.shape == (4, 21, 16)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, y))
    assert out.n_correct == (out.logits.argmax(-1) == y).sum()
    assert out.n_targets == 4
    out.loss.backward()
    dead = [name for name, p in m.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not dead


@pytest.mark.parametrize("pooling", ["class_token", "mean", "last"])
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("mlp", ["none", "gelu", "channel_mix"])
def test_it_is_what_it_says(pooling, position, mlp):
    """Against the same steps written out."""
    m = model(
        pooling=pooling, norm_position=position, mlp=mlp, positions=30, mean=(0.5, 0.4, 0.3), std=(0.2,), norm="layer"
    )
    x, _ = data()
    h = F.linear((x - torch.tensor([0.5, 0.4, 0.3])) / 0.2, m.embedding.linear.weight, m.embedding.linear.bias)
    if pooling == "class_token":
        h = torch.cat([h, m.embedding.class_token.expand(4, 1, 16)], 1)
    h = h + m.embedding.positions[: h.shape[1]]
    for block in m.backbone.blocks:
        if position == "pre":
            h = h + block.mixer(block.norm(h))[0]
        else:
            h = block.norm(h + block.mixer(h)[0])
        if block.mlp is not None:
            seen = block.mlp_norm(h) if position == "pre" else h
            z = block.mlp(seen)[0] if mlp == "channel_mix" else block.mlp(seen)
            h = h + z if position == "pre" else block.mlp_norm(h + z)
    if position == "pre":
        h = m.backbone.norm(h)
    else:
        assert isinstance(m.backbone.norm, nn.Identity)
    pooled = h.mean(1) if pooling == "mean" else h[:, -1]
    torch.testing.assert_close(m(x).logits, F.linear(pooled, m.head.weight, m.head.bias), rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    m, (x, _) = model(polarization={"ones": 1, "zeros": 1}, mean=(0.5,), std=(0.2,), positions=21, dropout=0.1), data()
    m.save_pretrained(tmp_path)
    for again in (Classifier.from_pretrained(tmp_path).eval(), ssmlens.load(tmp_path)):
        assert isinstance(again, ssmlens.Classifier)
        assert torch.equal(again(x).logits, m(x).logits)
        assert again.config.architecture == m.config.architecture
    assert not again.training
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "ssmlens_classifier"
    assert config["mixer_config"]["d_conv"] == 4  # defaults are saved


@pytest.mark.parametrize("harm", ["lacks", "surplus", "shape", "nan", "key"])
def test_what_is_broken_is_refused_by_name(tmp_path, harm):
    from safetensors.torch import load_file, save_file

    model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if harm == "lacks":
        del state["head.weight"]
    elif harm == "surplus":
        state["head.gate"] = torch.ones(3)
    elif harm == "shape":
        state["head.weight"] = torch.ones(5, 15)
    elif harm == "nan":
        state["head.weight"][0, 0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    if harm == "key":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "n_clases": 3}))
    wanted = {"surplus": "head.gate", "key": "no key 'n_clases'; did you mean 'n_classes'"}
    with pytest.raises(UserError, match=wanted.get(harm, "head.weight")):
        ssmlens.load(tmp_path)


def test_dropout_is_only_in_training():
    m, (x, _) = model(dropout=0.5), data()
    assert torch.equal(m(x).logits, m(x).logits)
    m.train()
    assert not torch.equal(m(x).logits, m(x).logits)
    assert not any(isinstance(module, nn.Dropout) for module in model().modules())


def test_without_gradients_it_goes_in_segments(monkeypatch):
    from ssmlens.models import backbone

    m, (x, _) = model(norm_position="post", positions=21), data()
    whole = m(x).logits
    monkeypatch.setattr(backbone, "SEGMENT", 8)
    with torch.no_grad():
        torch.testing.assert_close(m(x).logits, whole)


def test_hidden_states_are_the_residual_stream():
    m, (x, _) = model(), data()
    out = m(x, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], m.embed(x))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(m(inputs_embeds=m.embed(x)).logits, out.logits)


def test_weight_decay_spares_what_the_mixers_and_vectors_ask_for():
    m = model(positions=21)
    decayed, free = m.parameter_groups(0.1)
    names = {id(p): name for name, p in m.named_parameters()}
    assert free["weight_decay"] == 0
    assert {names[id(p)] for p in free["params"]} >= {
        "embedding.class_token",
        "head.bias",
        "backbone.blocks.0.mixer.A_log",
        "backbone.blocks.0.mixer.D",
    }
    assert {names[id(p)] for p in decayed["params"]} >= {"head.weight", "embedding.linear.weight"}
    assert len(names) == len(decayed["params"]) + len(free["params"])
    assert len(m.parameter_groups(0.1, "released")) == 1


def test_the_class_token_is_last_and_sees_everything():
    m, (x, _) = model(), data()
    changed = x.clone()
    changed[:, 0] += 1
    assert not torch.equal(m(x).logits, m(changed).logits)
    assert m.embed(x).shape[1] == 21
    assert torch.equal(m.embed(x)[:, -1], m.embedding.class_token.expand(4, -1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers; give 3"),
        ({"std": (0.0,)}, "std must be above zero"),
        ({"pooling": "max"}, "pooling"),
        ({"mixer": "mamba3"}, "unknown mixer 'mamba3'; did you mean"),
        ({"d_inputs": 3}, "no key 'd_inputs'; did you mean 'd_input'"),
        ({"parallel": True, "norm_position": "post", "mlp": "gelu"}, "norms before them"),
        ({"mixer": "attention", "mixer_config": {}, "polarization": {"ones": 1}}, "cannot be polarized"),
    ],
)
def test_wrong_configurations_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        model(**fields)


def test_wrong_inputs_are_named():
    m, (x, y) = model(positions=10), data()
    with pytest.raises(ValueError, match="exactly one of"):
        m()
    with pytest.raises(ValueError, match=r"\(batch, length, 3\)"):
        m(x[..., :2])
    with pytest.raises(UserError, match="10 positions, the input 21"):
        m(x, y)
