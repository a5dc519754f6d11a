"""Figures 1, 5, 6 and 7: the published shapes, what is read, and that what is said follows from what was measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, Request
from ssmlens.experiments.figures import figure1, figure5, figure6, figure7
from ssmlens.experiments.figures.models import BESIDE, MAMBA, PYTHIA, Model, build, initial, tokens
from ssmlens.experiments.figures.runs import Done, joined, samples
from ssmlens.experiments.figures.scales import SCALES
from ssmlens.lens import Subject
from ssmlens.lens.decay import fit_decay
from ssmlens.lens.floor import Floor
from ssmlens.lens.influence import Influence
from ssmlens.lens.smoothing import Smoothing
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.results import Record, Value


def request(out: Path, **options: Any) -> Request:
    return Request(**{"scale": "smoke", "out": out, "processes": 0, "progress": False, **options})


# ---- models and what they read ----


@pytest.mark.parametrize(
    ("size", "millions"), [("130M", 129.1), ("370M", 371.5), ("790M", 793.2), ("1.4B", 1372.2), ("2.8B", 2768.3)]
)
def test_mamba_has_the_published_numbers_of_parameters(size: str, millions: float) -> None:
    layers, width = MAMBA[size]
    with torch.device("meta"):
        lm = LanguageModel(LanguageModelConfig(vocab_size=50280, d_model=width, n_layers=layers))
    assert sum(p.numel() for p in lm.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
    ("size", "millions"), [("160M", 162.3), ("410M", 405.3), ("1B", 1011.8), ("1.4B", 1414.6), ("2.8B", 2775.2)]
)
def test_pythia_has_the_published_numbers_of_parameters(
    size: str, millions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssmlens.experiments.figures.models._as_gpt_neox", lambda *_: None)
    with torch.device("meta"):
        lm = initial("pythia", size, 0)
    assert sum(p.numel() for p in lm.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert size in BESIDE.values()
    assert len(lm.backbone.blocks) == PYTHIA[size][0]


def test_pythia_begins_as_gpt_neox_does() -> None:
    lm = initial("pythia", "160M", 0)
    d, layers = 768, 12
    block = lm.backbone.blocks[3]
    small, out = math.sqrt(2 / (5 * d)), 2 / (layers * math.sqrt(d))
    for weight, std in (
        (block.mixer.o_proj.weight, out),
        (block.mlp.out_proj.weight, out),
        (block.mlp.in_proj.weight, small),
        (lm.backbone.embedding.weight, small),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.02)
    assert not block.mlp.in_proj.bias.any()
    assert block.parallel
    again, other = initial("pythia", "tiny", 1), initial("pythia", "tiny", 2)
    assert torch.equal(initial("pythia", "tiny", 1).lm_head.weight, again.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, other.lm_head.weight)


def test_scales_are_what_the_paper_and_the_laptop_need() -> None:
    assert list(SCALES["paper"].sizes) == ["130M", "370M", "790M", "1.4B", "2.8B"]
    assert set(SCALES["laptop"].sizes) == {"130M", "370M"}
    assert all(length <= 2048 for scale in SCALES.values() for _, length in scale.sizes.values())
    assert "state-spaces/mamba-1.4b-hf" in SCALES["paper"].trained
    assert "EleutherAI/pythia-1.4b" in SCALES["paper"].trained


def test_untrained_models_read_words_and_trained_ones_their_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 50)
    mamba = Model("mamba", "tiny", 0)
    subject = build(mamba, tmp_path, lambda share: None)
    words = tokens(mamba, subject, str(tmp_path / "a.txt"), 24, 3)
    assert words.shape == (3, 24)
    assert words[0, 0] == words[0, 4] == words[0, 6], "the"
    assert len(words.unique()) == 5
    loaded = Model("loaded", "mamba-default")
    read = tokens(loaded, build(loaded, tmp_path, lambda share: None), str(tmp_path / "a.txt"), 23, 2)
    assert bytes(read[0].tolist()).decode() == "the cat sat on the mat "
    with pytest.raises(UserError, match="shorter than the length"):
        tokens(mamba, subject, str(tmp_path / "a.txt"), 5000, 1)
    with pytest.raises(UserError, match="give --data FILE"):
        tokens(mamba, subject, "datasets:some/thing", 8, 1)
    big = LanguageModel(LanguageModelConfig(vocab_size=300, d_model=8, n_layers=1))
    big.save_pretrained(tmp_path / "model")
    own = Model("loaded", str(tmp_path / "model"))
    with pytest.raises(UserError, match="tokenizer"):
        tokens(own, Subject("m", big), str(tmp_path / "a.txt"), 8, 1)


def test_a_transformer_is_trained_beside_a_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssmlens.experiments.figures.models._STEPS", 2)
    beside = Model("trained transformer", "mamba-default", 1)
    shares: list[float] = []
    made = build(beside, tmp_path, shares.append)
    untrained = build(Model("transformer", "mamba-default", 1), tmp_path, lambda share: None)
    mamba = build(Model("loaded", "mamba-default"), tmp_path, lambda share: None)
    sizes = [sum(p.numel() for b in s.blocks for p in b.parameters()) for s in (made, mamba)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert not made.recurrent
    weights = [s.model.backbone.embedding.weight for s in (made, untrained)]
    assert not torch.equal(*weights)
    assert shares[-1] == 1.0
    assert torch.equal(build(beside, tmp_path, lambda share: None).model.backbone.embedding.weight, weights[0]), (
        "resumed"
    )
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=8, n_layers=1)).save_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match="not known"):
        build(Model("trained transformer", str(tmp_path / "mine")), tmp_path, lambda share: None)


# ---- the four figures at smoke scale ----


@pytest.mark.parametrize("name", ["figure1", "figure5", "figure6", "figure7"])
def test_smoke_runs_and_resumes(tmp_path: Path, name: str) -> None:
    item = ITEMS[name]
    first = item.run(request(tmp_path))
    assert first.tables[0].id == "claims"
    assert first.figures
    claims = first.config["claims"]
    assert claims
    assert {c["outcome"] for c in claims} == {"not comparable"}
    assert all(set(c) == {"item", "claim", "paper", "ours", "value", "stderr", "n", "outcome", "why"} for c in claims)
    json.dumps(claims)
    assert str(tmp_path) not in first.to_json()
    assert Record.from_json(first.to_json()).tables == first.tables
    with pytest.raises(UserError, match="--resume"):
        item.run(request(tmp_path))
    kept = sorted(tmp_path.glob("runs/*/result.json"))
    kept[0].unlink()
    again = item.run(request(tmp_path, resume=True))
    assert again.config["claims"] == claims, "made again, the same"
    with pytest.raises(UserError, match="variant"):
        item.run(request(tmp_path / "x", variants=("default",)))


def test_figures_share_what_they_measure(tmp_path: Path) -> None:
    ITEMS["figure1"].run(request(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    ITEMS["figure7"].run(request(tmp_path, resume=True))
    after = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    assert before.items() <= after.items()
    assert len(after) > len(before), "the transformer beside the trained model"
    assert ITEMS["figure7"].group == ITEMS["figure5"].group == ITEMS["figure6"].group == "figure1"


# ---- what is said ----


def influence_of(name: str, curve: Any, n: int = 4, seed: int = 0) -> Influence:
    score = np.asarray(curve, dtype=float) * np.exp(0.05 * np.random.default_rng(seed).normal(size=(n, len(curve))))
    squares, counts = np.square(score), np.ones_like(score)
    return Influence(
        name=name, method="4 probes", output="last hidden state", length=len(curve), targets="the last position", seed=0, by_depth=squares[None],
        counts=counts, floor=Floor(0.0, "as given"), fit=fit_decay(squares, counts),
    )  # fmt: skip


def done(found: dict[str, list[Any]], models: dict[str, Model]) -> Done:
    told = {
        name: {"recurrent": "Pythia" not in name and "transformer" not in name, "parameters": 1, "layers": 3}
        for name in found
    }
    return Done(found, models, told, 1.0, [])


D = np.arange(200.0)
STRAIGHT, POWER = np.exp(-0.05 * D), (1 + D) ** -1.5


def test_figure1_tells_an_exponential_from_a_power_law() -> None:
    models = {"Mamba-130M": Model("mamba", "130M")}
    for curve, outcome in ((STRAIGHT, "agrees"), (POWER, "differs"), (STRAIGHT[::-1], "differs")):
        parts = [influence_of("Mamba-130M", curve, seed=s) for s in range(3)]
        claims = figure1.claims_of(done({"Mamba-130M": parts}, models), smoke=False)
        assert [c.outcome for c in claims] == [outcome]
    assert (
        "κ = 0.05"
        in figure1.claims_of(
            done({"Mamba-130M": [influence_of("", STRAIGHT, seed=s) for s in range(3)]}, models), False
        )[0].ours
    )


def test_figure1_compares_initialisation_with_training() -> None:
    models = {"mine": Model("loaded", "mine"), "mine (at initialisation)": Model("fresh", "mine")}
    found = {
        "mine": [influence_of("", np.exp(-0.02 * D))],
        "mine (at initialisation)": [influence_of("", STRAIGHT, seed=s) for s in range(3)],
    }
    claim = figure1.claims_of(done(found, models), smoke=False)[-1]
    assert claim.outcome == "agrees"
    assert claim.value == pytest.approx(0.03, abs=0.003)


def test_samples_are_initialisations_or_the_sequences_of_one_model() -> None:
    parts = [influence_of("", STRAIGHT, n=4, seed=s) for s in range(3)]
    assert samples(parts) == parts
    each = samples(parts[:1])
    assert len(each) == 4
    assert all(one.n_sequences == 1 for one in each)
    whole = joined("all", parts)
    assert whole.n_sequences == 12
    assert whole.score == pytest.approx(np.sqrt(np.mean([p.score**2 for p in parts], axis=0)))


def smoothing_of(b: float, h: float, fall: float, seed: int = 0, layers: int = 5) -> Smoothing:
    noise = np.random.default_rng(seed)

    def around(level: Any) -> np.ndarray:
        return np.asarray(level) * (1 + 0.01 * noise.normal(size=(4, layers)))

    distance = {"b": around(np.full(layers, b)), "h": around(np.full(layers, h))}
    distance |= {s: around(np.exp(fall * np.linspace(0, 1, layers))) for s in ("mixer", "block")}
    one = {s: np.ones((4, layers)) for s in distance}
    return Smoothing(
        "",
        64,
        64,
        distance,
        one,
        {s: np.zeros((4, layers)) for s in distance},
        {s: list(range(1, layers + 1)) for s in distance},
    )


def test_figure5_says_which_falls_faster_and_which_is_sharper() -> None:
    models = {"Mamba-130M": Model("mamba", "130M"), "Pythia-160M": Model("pythia", "160M")}

    def outcomes(mamba: tuple[float, float, float], pythia_falls: float) -> list[str]:
        found = {
            "Mamba-130M": [smoothing_of(*mamba, seed=s) for s in range(3)],
            "Pythia-160M": [smoothing_of(1, 1, pythia_falls, seed=9 + s) for s in range(3)],
        }
        return [c.outcome for c in figure5.claims_of(done(found, models), smoke=False)]

    assert outcomes((2.0, 1.0, -2.0), -1.0) == ["agrees"] * 6
    assert outcomes((1.0, 2.0, -1.0), -2.0) == ["differs"] * 6
    assert outcomes((1.0, 1.0, -1.0), -1.0)[2:] == ["undecided"] * 4


def test_figure6_holds_the_share_against_sixty_percent() -> None:
    thresholds = np.linspace(0, 1, 101)

    def part(low: float) -> dict[str, Any]:
        below = [(low + 0.01 * i + (1 - low - 0.01 * i) * thresholds**2).tolist() for i in range(4)]
        return {"below": below, "by_layer": [0.7], "median_range": [0.3] * 4, "channels": 10, "length": 64}

    for low, outcome in ((0.8, "agrees"), (0.2, "differs")):
        d = done({"mine": [part(low)]}, {"mine": Model("loaded", "mine")})
        claim = figure6._claim("mine", d, smoke=False)
        assert claim.outcome == outcome
        assert claim.value == pytest.approx(low + 0.015 + (1 - low - 0.015) / 4)


def test_figure7_sees_both_ends_and_the_ratio() -> None:
    both = np.where(D > 180, 0.1, 0.01) * np.exp(-0.001 * D) + np.exp(-D)
    models = {"Mamba-130M": Model("mamba", "130M"), "Pythia-160M": Model("pythia", "160M")}
    found = {
        "Mamba-130M": [influence_of("", STRAIGHT, seed=s) for s in range(3)],
        "Pythia-160M": [influence_of("", both, seed=9 + s) for s in range(3)],
    }
    assert figure7.both_ends(found["Pythia-160M"]).mean() > 1
    assert figure7.both_ends(found["Mamba-130M"]).mean() < -1
    assert [c.outcome for c in figure7.claims_of(done(found, models), smoke=False)][:1] == ["agrees"]
    slope, r2, _ = figure7.slopes([influence_of("", STRAIGHT, n=1)], [influence_of("", np.ones(200), n=1, seed=5)])
    assert slope[0] == pytest.approx(0.05, abs=0.003)
    assert r2[0] > 0.98
    same = done(found | {"Mamba-130M": found["Pythia-160M"]}, models)
    assert figure7.claims_of(same, smoke=False)[2].outcome != "agrees"


def test_numbers_are_said_with_their_interval() -> None:
    from ssmlens.experiments.figures.runs import said

    assert said(Value(value=0.5, n=1)) == "0.5 (one sample, no interval)"
    assert said(Value(value=0.5, stderr=0.1, n=3), "%").startswith("0.5 % (95 % interval 0.0697 to 0.93, n = 3")
