"""Classifiers and other models of vectors under the lens: the same measurements as for tokens, and what moves their answer."""

import numpy as np
import pytest
import torch
from torch import nn

from ssmlens.errors import UserError
from ssmlens.lens import MEASURES, Access, Subject, diagnose, influence, reading, smoothing
from ssmlens.models import Classifier, ClassifierConfig

from .models import model as language_model
from .models import tokens


def classifier(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {
        "d_input": 2,
        "n_classes": 4,
        "d_model": 8,
        "n_layers": 2,
        "mixer": "mamba",
        "mixer_config": {"d_state": 4},
        "mean": (0.5,),
    }
    return Classifier(ClassifierConfig(**{**fields, **changes})).eval()


def vectors(n=3, length=16, d=2, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((n, length, d), np.float32))


POOLINGS = ["class_token", "mean", "last"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_numbers_stand_for_vectors(pooling):
    m, x = classifier(pooling=pooling, positions=20), vectors()
    subject = Subject("m", m)
    numbers = subject.tokens(x)
    tail = int(pooling == "class_token")
    assert numbers.shape == (3, 16 + tail)
    with torch.no_grad():
        whole = m.embed(x)
        assert torch.equal(subject.embed(numbers), whole)
        torch.testing.assert_close(subject.embed(numbers[1:2, :5]), whole[1:2, :5])
        torch.testing.assert_close(subject.read(subject.run(whole)), m(x).logits)
    assert torch.equal(subject.tokens(numbers), numbers)
    assert torch.equal(Subject("other", classifier(1, pooling=pooling)).tokens(x), numbers)  # the same vectors
    changed = x.clone()
    changed[0, 0, 0] += 1e-3
    assert not set(Subject("m", m).tokens(changed).flatten().tolist()) & set(numbers.flatten().tolist())


def test_numbers_go_with_copies():
    subject = Subject("m", classifier())
    numbers = subject.tokens(vectors())
    for twin in (subject.in_double(), subject.at_initialisation(3)):
        with torch.no_grad():
            x = twin.embed(numbers)
        assert x.dtype == twin.dtype
        assert torch.isfinite(x).all()


def jacobian(m, x, what):
    """(n, outputs, tokens, d_model) by autograd, one sequence at a time."""
    found = []
    for one in x:
        e = m.embed(one[None]).detach()
        found.append(torch.autograd.functional.jacobian(lambda e: what(m.backbone(e)[0])[0], e)[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("position", ["pre", "post"])
def test_reading_is_the_jacobian_of_the_logits(pooling, position):
    m, x = classifier(pooling=pooling, norm_position=position, norm="layer"), vectors()
    found = reading.measure(m, x, batch_size=2)
    J = jacobian(m, x, lambda h: m.head(m.pool(h)))[:, :, :16]
    torch.testing.assert_close(torch.from_numpy(found.squares), J.double().square().sum((1, 3)), rtol=1e-3, atol=1e-12)
    assert found.outputs == 4
    share = (found.squares.sum(0)[8:].sum() / found.squares.sum()).item()
    assert found.last_share(0.5).value == pytest.approx(share)
    assert found.share(0, 16).value == pytest.approx(1)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_influence_is_that_on_the_last_hidden_state(pooling):
    m, x = classifier(pooling=pooling), vectors()
    found = influence.measure(m, x, method="exact", floor=0.0)
    J = jacobian(m, x, lambda h: h[:, -1]).double().square().sum((1, 3)).flip(1)  # by distance
    torch.testing.assert_close(torch.from_numpy(found.squares), J, rtol=1e-3, atol=1e-12)
    assert found.length == 16 + (pooling == "class_token")


def test_an_even_mean_is_read_evenly_and_a_gate_at_the_end_is_not():
    """Without any mixing a mean over positions reads them all alike; the last hidden state alone reads the last."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3, bias=False)

    def subject(pool):
        access = Access(
            embed=lambda m, x: x, run=lambda m, x: x @ m.linear.weight.T, vectors=True, read=lambda m, h: pool(h)
        )
        return Subject("alone", Alone(), access)

    even = reading.measure(subject(lambda h: h.mean(1)), vectors(length=30))
    assert np.allclose(even.score, even.score[0])
    assert even.recency_index.value == pytest.approx(0, abs=1e-9)
    assert "alike" in reading.says(even)
    last = reading.measure(subject(lambda h: h[:, -1]), vectors(length=30))
    assert last.recency_index.value == pytest.approx(1)
    assert "late inputs more than" in reading.says(last)
    first = reading.measure(subject(lambda h: h[:, 0]), vectors(length=30))
    assert "early inputs more than" in reading.says(first)
    nothing = reading.measure(subject(lambda h: 0 * h.mean(1)), vectors(length=30))
    assert "no input moves the answer" in reading.says(nothing)
    assert nothing.figures() == nothing.maps() == []


def test_two_functions_are_enough():
    torch.manual_seed(0)
    gru = nn.GRU(2, 8, batch_first=True)
    subject = Subject("gru", gru, Access(embed=lambda m, x: x, run=lambda m, x: m(x)[0], vectors=True))
    found = influence.measure(subject, vectors(length=24))
    assert found.length == 24
    assert found.score[0] > found.score[12] > 0


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mixer", ["mamba", "s4d", "attention"])
def test_all_that_applies_is_measured(pooling, mixer, tmp_path):
    given = {"attention": {"positions": "none"}}.get(mixer, {"d_state": 4})
    m = classifier(pooling=pooling, mixer=mixer, mixer_config=given, norm_position="post" if mixer == "s4d" else "pre")
    x = vectors(length=36)
    d = diagnose(
        {"m": m}, x, probes=2, at_initialisation=mixer == "mamba", transformer=mixer == "mamba", out_dir=tmp_path
    )
    record = d.record()
    assert d.complete
    assert "m" in d.reading
    assert not d.context
    assert any("it predicts no next token: context" in note for note in record.notes)
    assert {"reading", "influence"} <= {f.id for f in record.figures}
    assert any(one.id == "reading" for one in record.maps)  # 36 pixels are a square
    assert any("of the squared influence on the logits" in sentence for sentence in record.verdict)
    assert any("ssmlens polarize" in sentence for sentence in record.verdict) == (mixer != "attention")
    if mixer == "mamba":
        assert len(d.reading) == 3
    left = [name for name in MEASURES if not getattr(d, name)]
    assert left == (["context"] if mixer != "attention" else ["context", "transitions", "bounds", "hidden_attention"])
    again = diagnose(
        {"m": m},
        x,
        probes=2,
        at_initialisation=mixer == "mamba",
        transformer=mixer == "mamba",
        out_dir=tmp_path,
        resume=True,
    )
    np.testing.assert_array_equal(again.reading["m"].squares, d.reading["m"].squares)
    with pytest.raises(UserError, match="cannot resume"):
        diagnose({"m": m}, x + 0.1, probes=2, out_dir=tmp_path, resume=True)


def test_models_on_the_same_vectors_are_paired():
    d = diagnose(
        {"a": classifier(0), "b": classifier(1)}, vectors(), probes=2, measures=["influence", "reading", "smoothing"]
    )
    assert d.paired("a", "b")
    assert d.reading["a"].length == 16
    assert d.smoothing["a"].length == 17


def test_a_dead_mixer_is_named():
    m = classifier()
    with torch.no_grad():
        for block in m.backbone.blocks:
            block.mixer.out_proj.weight.zero_()
    d = diagnose({"m": m}, vectors(), probes=2, measures=["influence"])
    assert "No token but the last moves it" in d.verdict()[0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.long), "reads vectors of shape"),
        (torch.rand(2, 9, 3), "d_input 2, the inputs have 3"),
        (torch.rand(9, 2), "reads vectors of shape"),
        (torch.rand(1, 2, 2), "4 of them at least"),
        (torch.full((1, 9, 2), torch.nan), "NaN or infinity"),
        ("text", "reads vectors of shape"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(UserError, match=message):
        smoothing.measure(classifier(), inputs)


def test_what_is_no_classifier_has_no_reading():
    with pytest.raises(UserError, match="no classifier"):
        reading.measure(language_model(), tokens(2, 16))
    d = diagnose(language_model(), tokens(2, 16), measures=["reading"])
    assert any("it answers at every token" in note for note in d.record().notes)
    assert not any("reading" in note for note in diagnose(language_model(), tokens(2, 16), probes=1).record().notes)
    with pytest.raises(UserError, match="token numbers"):
        influence.measure(language_model(), vectors())
