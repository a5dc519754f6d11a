import math

import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, Request, recall, recall_gain, table2
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
    assert set(scale.lr.values()) == {1e-3}
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


def _made(accuracy, scale="laptop", variants=("corrected", "released")):
    """The record of a world that is made up: accuracy(variant, configuration, seed), a share."""
    results = {}
    sizes = recall.SCALES[scale]
    for v in variants:
        for c in recall.CONFIGURATIONS:
            for s in range(5):
                shares = {str(k): accuracy(v, c, s) for k in sizes.pairs}
                results[f"{v}-{c.id}-seed{s}"] = {
                    "accuracy": shares,
                    "seconds": 1.0,
                    "parameters": 1,
                    "finished": "steps",
                }
    return table2.record(scale, variants, list(range(5)), results, {})


def _pinned(c):
    return bool(c.ones or c.zeros)


def test_what_helps_agrees_and_what_does_not_differs():
    def accuracy(v, c, s):
        return 0.7 + 0.02 * (s % 2) + (0.1 + 0.01 * s) * (c.id == "both-2") + 0.001 * s * _pinned(c)

    made = _made(accuracy, variants=("corrected",))
    assert made.verdict[0] == "corrected: channels at 1 and 0 at 2 layers helps."
    claims = {c["claim"]: c for c in made.config["claims"]}
    outcomes = {c["claim"].split(":")[0]: c["outcome"] for c in made.config["claims"]}
    assert len(claims) == 4
    assert outcomes["With 2 layers, channels at 1 and 0"] == "agrees"
    assert outcomes["With 4 layers, channels at 1 and 0"] == "differs", "less than a point, and surely so"
    assert all(c["why"].endswith("others than the paper's") for c in claims.values())
    assert "share their default runs" in made.tables[0].meaning


def test_an_outcome_never_stands_beside_may_be_chance():
    """Gains that each alone would count."""

    def accuracy(v, c, s):
        return 0.7 + (0.05 + 0.02 * (s - 2)) * _pinned(c) * (1 if c.ones else -1)

    made = _made(accuracy, variants=("corrected",))
    assert any("alone it would count" in s for s in made.verdict)
    for claim in made.config["claims"]:
        assert "may be chance" in claim["ours"]
        assert claim["outcome"] == "undecided"


@pytest.mark.parametrize(("level", "reason"), [(0.15, "neither arm found"), (0.98, "ceiling")])
def test_guessing_and_the_ceiling_are_not_compared(level, reason):
    made = _made(lambda v, c, s: level + 0.0001 * s + 0.009 * _pinned(c))
    assert {c["outcome"] for c in made.config["claims"]} == {"not comparable"}
    assert all(reason in c["ours"] for c in made.config["claims"])
    assert all("no gain or loss" in s for s in made.verdict[:2])


def test_how_many_found_it_is_said():
    made = _made(lambda v, c, s: 0.9 if (s < 4 if _pinned(c) else s == 4) else 0.15, variants=("corrected",))
    table = next(t for t in made.tables if t.id == "found-corrected")
    row = next(r for r in table.rows if r[:2] == ["both", 2])
    assert row[2:4] == ["1 of 5", "4 of 5"]
    assert row[5].value == row[6].value == pytest.approx(90)
    assert "found by 1 of 5 runs without, 4 of 5 with" in "".join(made.verdict)
    assert any(note.startswith("14 of 40 runs had not found") for note in made.notes)


def test_at_paper_scale_the_papers_number_is_looked_for_in_the_interval():
    made = _made(lambda v, c, s: 0.7 + (0.11 + 0.002 * s) * _pinned(c), "paper", ("corrected",))
    why = {c["claim"].split(":")[0]: c["why"] for c in made.config["claims"]}
    assert "lies in our 95 % interval" in why["With 2 layers, one channel at 1"]  # +11.57
    assert "lies outside our 95 % interval" in why["With 4 layers, channels at 1 and 0"]  # +21.82
    assert not any("others than" in w for w in why.values())
    assert "other sizes" not in next(f for f in made.figures if f.id == "gain").meaning
    method = next(t for t in made.tables if t.id == "accuracy-corrected").method
    assert "bfloat16" in method
    assert "bfloat16" not in next(t for t in _made(lambda v, c, s: 0.7).tables if t.id == "accuracy-corrected").method


def test_which_examples_a_run_stopped_on_is_said_by_variant():
    made = {}
    for v in ("corrected", "released"):
        for c in recall.CONFIGURATIONS:
            made[f"{v}-{c.id}-seed0"] = {
                "accuracy": {str(k): 0.995 for k in recall.SCALES["laptop"].pairs}, "seconds": 1.0, "parameters": 1, "finished": "early_stop",
            }  # fmt: skip
    notes = table2.record("laptop", ("corrected", "released"), [0], made, {}).notes
    assert any(n.startswith("corrected: 8 runs ended early, above 99 % of validation examples") for n in notes)
    assert any(n.startswith("released: 8 runs ended early, above 99 % of the test set") for n in notes)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.5}) == {"a": 0.03, "b": 0.08, "c": 0.5}


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        ITEMS["table2"].run(Request(scale="lapotp", out=tmp_path))
    with pytest.raises(UserError, match="did you mean 'released'"):
        ITEMS["table2"].run(Request(scale="smoke", out=tmp_path, variants=("release",)))


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"fingerprint": "x", "result": {}}'])
def test_a_damaged_result_is_named(tmp_path, content, monkeypatch):
    quick = {"accuracy": {"2": 0.5, "4": 0.5, "8": 0.5}, "seconds": 1.0, "parameters": 1, "finished": "steps"}
    monkeypatch.setattr(recall_gain, "work", lambda *_: quick)  # in place of training
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    ITEMS["table2"].run(request)
    (tmp_path / "runs" / "corrected-one-2-seed0" / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"damaged|another configuration"):
        ITEMS["table2"].run(recall.replace(request, resume=True))
