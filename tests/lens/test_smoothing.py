"""Sharpness against brute force, where it is easy and where floating point makes it hard."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.lens import smoothing
from ssmlens.lens.smoothing import sharpness
from ssmlens.lens.subject import Access, Subject

from .models import hybrid, model, tokens
from .systems import ACCESS, Recurrence


def brute(z):
    z = np.asarray(z, dtype=np.longdouble)
    t = len(z)
    total = sum(np.sqrt(np.square(z[i] - z[j]).sum()) for i in range(t) for j in range(t) if i != j)
    return float(total / (t * (t - 1)))


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(2, 20),
    width=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    scale=st.sampled_from([1.0, 1e-3, 1e6]),
    seed=st.integers(0, 99),
)
def test_exact_is_brute_force(length, width, offset, scale, seed):
    z = torch.from_numpy(np.random.default_rng(seed).normal(offset, scale, (length, width))).float()
    found = sharpness(z)
    assert found.mean_distance == pytest.approx(brute(z), rel=1e-6)
    assert found.mean_norm == pytest.approx(np.linalg.norm(z.double().numpy(), axis=1).mean())
    assert found.sampling_error == 0
    assert found.tokens == length


def test_more_tokens_than_a_block():
    z = torch.randn(700, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sharpness(z).mean_distance == pytest.approx(float(torch.cdist(z, z).sum() / (700 * 699)), rel=1e-9)


def test_identical_tokens_do_not_differ_at_all():
    z = torch.full((50, 7), 0.1) * torch.arange(1, 8)
    assert sharpness(z).mean_distance == 0
    assert sharpness(z).relative == 0
    assert sharpness(torch.zeros(5, 3)).relative == 0


def test_a_large_common_offset_does_not_drown_small_differences():
    """Float32 values near 1000 that differ in the fourth decimal: the textbook expansion in float32 gives garbage here."""
    z = 1000 + 1e-3 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    assert sharpness(z).mean_distance == pytest.approx(brute(z), rel=1e-6)
    naive = (z.square().sum(1)[:, None] + z.square().sum(1) - 2 * z @ z.T).clamp_min(0).sqrt().sum() / (40 * 39)
    assert abs(float(naive) / brute(z) - 1) > 0.5


def test_twins_among_strangers():
    """Pairs of equal tokens lose precision in the expansion, by no more than its bound says."""
    z = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    z[1::2] = z[::2]
    assert sharpness(z).mean_distance == pytest.approx(brute(z), rel=1e-7)


def test_complex_vectors_have_both_parts():
    z = torch.tensor([[3 + 4j], [0j]])
    assert sharpness(z).mean_distance == pytest.approx(5)


def test_drawn_tokens_agree_within_their_error():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 5, generator=generator) * torch.rand(400, 1, generator=generator)
    exact = sharpness(z).mean_distance
    drawn = [sharpness(z, exact_up_to=60, seed=s) for s in range(200)]
    scores = np.array([(d.mean_distance - exact) / d.sampling_error for d in drawn])
    assert abs(scores.mean()) < 0.3
    assert 0.8 < scores.std() < 1.25, "the stated error must be the real one, neither too small nor too large"
    assert {d.tokens for d in drawn} == {60}
    assert drawn[0] == sharpness(z, exact_up_to=60, seed=0)


def test_bad_sequences_are_named():
    with pytest.raises(UserError, match="at least two"):
        sharpness(torch.ones(1, 3))
    with pytest.raises(UserError, match="NaN"):
        sharpness(torch.tensor([[1.0], [math.nan]]))


@pytest.mark.parametrize("polarization", [None, {"ones": 1, "zeros": 2}])
def test_every_stream_is_what_the_layer_computed(polarization):
    """b, h, mixer and block of each layer, against a forward pass done by hand."""
    m, x = model(polarization=polarization), tokens(2, 150)
    found = smoothing.measure(m, x)
    assert set(found.distance) == {"b", "h", "mixer", "block"}
    with torch.no_grad():
        stream = m.backbone.embedding(x)
        for layer, block in enumerate(m.backbone.blocks):
            inside = block.norm(stream)
            coefficients = block.mixer.coefficients(inside)
            y = block.mixer(inside)[0]
            stream = stream + y
            for name, z in {"b": coefficients.b, "h": coefficients.states(), "mixer": y, "block": stream}.items():
                for i in range(2):
                    expected = sharpness(z[i].flatten(1))
                    assert found.distance[name][i, layer] == pytest.approx(expected.mean_distance, rel=1e-4)
                    assert found.norm[name][i, layer] == pytest.approx(expected.mean_norm, rel=1e-4)


def test_drawing_tokens_of_a_model():
    m, x = model(), tokens(2, 150)
    exact, drawn = smoothing.measure(m, x), smoothing.measure(m, x, exact_up_to=80)
    assert drawn.tokens == 80
    for stream in ("b", "h", "mixer", "block"):
        z = (drawn.distance[stream] - exact.distance[stream]) / drawn.sampling_error[stream]
        assert 0 < np.abs(z).max() < 5
    assert "80 tokens drawn" in smoothing.table([drawn]).method


def test_values_and_their_errors():
    found = smoothing.measure(model(), tokens(3, 40))
    relative = found.distance["block"] / found.norm["block"]
    value = found.relative("block")[1]
    assert value.value == pytest.approx(relative[:, 1].mean())
    assert value.stderr == pytest.approx(relative[:, 1].std(ddof=1) / math.sqrt(3))
    assert found.change_over_depth().value == pytest.approx((relative[:, -1] / relative[:, 0]).mean())
    assert smoothing.measure(model(), tokens(1, 40)).relative("block")[0].stderr is None
    assert {f.id for f in found.figures()} == {"sharpness-block", "sharpness-mixer", "sharpness-states"}
    assert len(found.table_rows()) == 2


def test_averaging_tokens_is_seen_as_blur():
    """Blocks that mix every token with the mean of those before make a sequence more alike, layer by layer."""

    class Mean(torch.nn.Module):
        def forward(self, x):
            return 0.3 * x + 0.7 * x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    layers = torch.nn.Sequential(*[Mean() for _ in range(4)])
    table = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    access = Access(
        embed=lambda m, t: table[t], run=lambda m, x: m(x), blocks=lambda m: list(m.children()), mixer=lambda b: None
    )
    found = smoothing.measure(Subject("mean", layers, access), tokens(3, 60, 16))
    falling = [v.value for v in found.relative("block")]
    assert falling == sorted(falling, reverse=True)
    assert found.change_over_depth().value < 0.5
    assert found.memories_smoother() is None


def test_inputs_and_memories_of_a_hybrid_are_those_of_its_recurrent_layers():
    m, x = hybrid(1), tokens(3, 40)
    found = smoothing.measure(m, x)
    assert found.layers == {"b": [1, 3], "h": [1, 3], "mixer": [1, 2, 3], "block": [1, 2, 3]}
    assert found.distance["b"].shape == (3, 2)
    assert found.memories_smoother()[2] == 2
    rows = found.table_rows()
    assert [row[1] for row in rows] == [1, 2, 3]
    assert rows[1][2:6] == [None] * 4
    assert rows[2][2].value == pytest.approx(found.distance["b"][:, 1].mean())
    assert rows[2][4].value == pytest.approx(found.distance["h"][:, 1].mean())
    states = next(f for f in found.figures() if f.id == "sharpness-states")
    assert [s.x for s in states.series] == [[1, 3], [1, 3]]


def test_memories_are_called_smoother_only_where_the_sequences_agree():
    def of(differences):
        b, h = np.ones((len(differences), 1)), 1 + np.array(differences, dtype=float)[:, None]
        one = np.ones_like(b)
        streams = {"b": b, "h": h, "block": one}
        layers = {stream: [1] for stream in streams}
        return smoothing.Smoothing("s", 9, 9, streams, dict.fromkeys(streams, one), {}, layers).memories_smoother()

    assert of([-0.2, -0.21, -0.19, -0.2]) == (1, 1, 1)
    assert of([-0.5, 0.1, -0.4, 0.2]) == (0, 0, 1), "smaller on average, but not surely"
    assert of([-0.2]) is None


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no blocks"):
        smoothing.measure(Subject("s", Recurrence(torch.ones(2), np.eye(2)), ACCESS), tokens(1, 10, 16))


def test_large_models_are_measured_in_fewer_layers(monkeypatch):
    monkeypatch.setattr(smoothing, "large", lambda subject, length: True)
    monkeypatch.setattr(smoothing, "_LARGE_LAYERS", 2)
    found = smoothing.measure(model(n_layers=4), tokens(2, 24))
    assert found.layers == {"b": [1, 4], "h": [1, 4], "mixer": [1, 2, 3, 4], "block": [1, 2, 3, 4]}
    all_of_them = smoothing.measure(model(n_layers=4), tokens(2, 24), states=True)
    assert all_of_them.layers["b"] == [1, 2, 3, 4]
    np.testing.assert_allclose(found.distance["h"], all_of_them.distance["h"][:, [0, 3]])
    assert "b" not in smoothing.measure(model(), tokens(2, 24), states=False).distance
