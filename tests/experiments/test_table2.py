import math

import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, Request, recall, table2
from ssmlens.experiments.base import holm
from ssmlens.models import LanguageModel
from ssmlens.results import Record, Value


def test_the_eight_configurations_and_the_papers_numbers():
    assert len(recall.CONFIGURATIONS) == 8
    missing = [c for c in recall.CONFIGURATIONS if c.paper is None]
    assert [(c.ones, c.zeros, c.layers) for c in missing] == [(1, 0, 4)]
    averages = {c.id: round(sum(c.paper) / 3, 2) for c in recall.CONFIGURATIONS if c.paper}
    assert averages == {"default-2": 72.06, "default-4": 71.61, "one-2": 83.63, "zero-2": 72.1, "zero-4": 81.38,
                        "both-2": 83.17, "both-4": 93.43}  # fmt: skip


def test_the_paper_scale_is_the_papers():
    scale = recall.SCALES["paper"]
    assert (scale.length, scale.vocab_size, scale.d_model, scale.batch_size, scale.epochs) == (1024, 8192, 128, 128, 64)
    assert set(scale.lr.values()) == set(scale.released_lr.values()) == {1e-3}
    assert scale.pairs == (64, 128, 256)
    released = recall.data(scale, recall.VARIANTS["released"], 0)
    assert [(s.length, s.pairs, s.examples) for s in released.train][:2] == [(64, 4, 100_000), (128, 8, 20_000)]
    assert released.order == "released"
    corrected = recall.data(scale, recall.VARIANTS["corrected"], 0)
    assert len(corrected.train) == 15
    assert {s.length for s in corrected.train} == {64, 128, 256, 512, 1024}
    assert not corrected.on_the_fly
    training = recall.training(scale, recall.VARIANTS["released"], 2, 0, 2500)
    assert (training.steps, training.schedule, training.early_stop, training.early_stop_on) == (
        64 * 2500,
        "cosine_epoch",
        0.99,
        "released",
    )


@pytest.mark.parametrize("name", recall.VARIANTS)
def test_what_a_variant_changes(name):
    variant = recall.VARIANTS[name]
    scale = recall.SCALES["laptop"]
    both = next(c for c in recall.CONFIGURATIONS if c.id == "both-2")
    torch.manual_seed(0)
    mixer = LanguageModel(recall.model(scale, both, variant)).backbone.blocks[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert mixer.d_state == 18
    if name == "released":
        assert torch.allclose(dt, torch.full_like(dt, math.log(2)))
        assert (mixer.A()[:, -1] == -100).all()
    else:
        assert torch.isneginf(mixer.A()[:, -1]).all()
        low, high = (0.001, 0.1) if name == "corrected" else (0.016, 0.8)
        assert 0.9 * low < dt.min() < dt.max() < 1.1 * high
    training = recall.training(scale, variant, 2, 0, 10)
    assert training.early_stop_on == ("released" if name == "released" else "validation")
    paper = recall.training(recall.SCALES["paper"], variant, 2, 0, 10)
    assert paper.early_stop == (0.99 if name == "released" else None)


def test_smoke_runs_resumes_and_repeats(tmp_path):
    request = Request(scale="smoke", out=tmp_path / "a", seeds=1, processes=0, progress=False)
    first = ITEMS["table2"].run(request)
    assert isinstance(first, Record)
    table = first.tables[0]
    assert len(table.rows) == 8
    names = [c.name for c in table.columns]
    assert {"2 pairs", "4 pairs", "8 pairs", "gain over default", "paper: average"} <= set(names)
    for row in table.rows:
        accuracy = row[names.index("average")]
        assert isinstance(accuracy, Value)
        assert 0 <= accuracy.value <= 100
    with pytest.raises(UserError, match="--resume"):
        ITEMS["table2"].run(request)
    again = ITEMS["table2"].run(
        Request(scale="smoke", out=tmp_path / "a", seeds=1, processes=0, progress=False, resume=True)
    )
    assert again.tables[0] == table
    fresh = ITEMS["table2"].run(Request(scale="smoke", out=tmp_path / "b", seeds=1, processes=0, progress=False))
    assert fresh.tables[0] == table, "same seed, same result"


def test_gains_are_paired_by_seed():
    def run(a):
        return {"accuracy": {"1": a, "2": a}}

    gain = table2._gain([run(0.5), run(0.9)], [run(0.4), run(0.8)])
    assert gain.value == pytest.approx(10)
    assert gain.stderr == pytest.approx(0, abs=1e-9), "what a seed has in common cancels"


def test_a_claim_must_survive_all_the_others():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.5}) == {"a": 0.03, "b": 0.08, "c": 0.5}
    clear = Value(value=10.0, stderr=0.1, n=3)
    weak = Value(value=10.0, stderr=2.2, n=3)  # p = 0.045 alone
    assert weak.p_value() == pytest.approx(0.045, abs=0.002)
    gains = {"corrected": {c.id: weak for c in recall.CONFIGURATIONS if c.ones or c.zeros} | {"both-2": clear}}
    lead, *each = table2._sentences(gains)
    assert lead == "corrected: both at 2 layers helps."
    said = {s.split(":")[0]: s for s in each}
    nothing = {"corrected": dict.fromkeys(gains["corrected"], weak)}
    assert "can be told from chance" in table2._sentences(nothing)[0]
    assert "helps" in said["corrected, 2 layers, channels at 1 and 0"]
    assert "it may be chance" in said["corrected, 4 layers, one channel at 1"]


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        ITEMS["table2"].run(Request(scale="lapotp", out=tmp_path))
    with pytest.raises(UserError, match="did you mean 'released'"):
        ITEMS["table2"].run(Request(scale="smoke", out=tmp_path, variants=("release",)))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"fingerprint": "x", "result": {}}'])
def test_a_damaged_result_is_named(tmp_path, content):
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    ITEMS["table2"].run(request)
    (tmp_path / "runs" / "corrected-one-2-seed0" / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"damaged|another configuration"):
        ITEMS["table2"].run(Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False, resume=True))
