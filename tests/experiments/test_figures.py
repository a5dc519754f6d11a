"""Figures 1, 5, 6 and 7: the published shapes, what is read, and that what is said follows from what was measured."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, Request
from ssmlens.experiments.figures import figure1, figure5, figure6, figure7
from ssmlens.experiments.figures.models import BESIDE, MAMBA, PYTHIA, Model, build, initial, tokens
from ssmlens.experiments.figures.runs import Done, estimates, every, joined, joined_smoothing
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
    assert claim.value == pytest.approx(0.03, abs=0.003)
    assert claim.stderr is not None
    assert claim.value > 10 * claim.stderr
    assert claim.outcome == "undecided", "of one training"


def test_training_and_initialisation_are_measured_alike() -> None:
    """Texts that forget at different rates: the slope of the pooled curve is not the mean of theirs."""
    rates = np.linspace(0.005, 0.04, 8)
    squares = np.exp(-2 * rates[:, None] * D)
    one = replace(
        influence_of("", STRAIGHT, n=8), by_depth=squares[None], fit=fit_decay(squares, np.ones_like(squares))
    )
    models = {"mine": Model("loaded", "mine"), "mine (at initialisation)": Model("fresh", "mine")}
    found = {"mine": [one], "mine (at initialisation)": [one] * 3}
    trained, fresh = (figure1.line(found[name]) for name in found)
    assert trained is not None
    assert fresh is not None
    assert trained.kappa.value == fresh.kappa.value == one.fit.kappa
    assert trained.kappa.value < 0.8 * rates.mean()
    assert (trained.kappa.n, fresh.kappa.n) == (8, 3)
    assert trained.kappa.stderr > 0
    assert figure1.claims_of(done(found, models), smoke=False)[-1].value == 0


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    one = influence_of("", STRAIGHT, n=6)
    (found,) = estimates(lambda p: (float(p.score[3]) ** 2,), [one])
    known = Value.mean(one.squares[:, 3])
    assert (found.value, found.stderr, found.n) == (pytest.approx(known.value), pytest.approx(known.stderr), 6)
    (alone,) = estimates(lambda p: (float(p.score[3]),), [influence_of("", STRAIGHT, n=1)])
    assert (alone.stderr, alone.n) == (None, 1)


def test_models_that_read_the_same_texts_are_compared_text_by_text() -> None:
    easy = np.exp(np.random.default_rng(3).normal(size=(6, 1)))
    one, other = (
        replace(r, by_depth=r.by_depth * easy) for r in (influence_of("", STRAIGHT, n=6, seed=s) for s in (0, 1))
    )
    (paired,) = estimates(lambda a, b: (float(np.log(a.score[9] / b.score[9])),), [one], [other])
    (apart,) = estimates(lambda a, b: (float(np.log(a.score[9] / b.score[9])),), [one], [other], paired=False)
    assert paired.value == apart.value
    assert paired.stderr is not None
    assert apart.stderr is not None
    assert paired.stderr < 0.2 * apart.stderr


def test_initialisations_are_the_samples_however_many_texts_they_read() -> None:
    parts = [influence_of("", STRAIGHT * (1 + s), n=4, seed=s) for s in range(3)]
    (found,) = estimates(lambda p: (float(p.score[0]),), parts)
    assert found.n == 3
    whole = joined("all", parts)
    assert whole.n_sequences == 3
    assert whole.score == pytest.approx(np.sqrt(np.mean([p.score**2 for p in parts], axis=0)))
    assert whole.fit is not None
    assert whole.fit.kappa == pytest.approx(np.mean([p.fit.kappa for p in parts if p.fit]))
    smooth = [smoothing_of(1 + s, 1, -1, seed=s) for s in range(3)]
    together = joined_smoothing("all", smooth)
    assert together.n_sequences == 3
    mean = np.mean([p.relative_by_sequence("b").mean(0) for p in smooth], axis=0)
    assert together.relative_by_sequence("b").mean(0) == pytest.approx(mean)


def test_one_layer_of_many_is_corrected_for() -> None:
    def value(t: float) -> Value:
        return Value(value=t, stderr=1.0, n=4)

    assert every([value(4.0)] * 24) == ("agrees", 24, 0)
    assert every([value(-5.0), value(4.0)]) == ("differs", 1, 1)
    assert every([value(-4.0), *[value(0.0)] * 23]) == ("undecided", 0, 0), "p = 0.03, of 24"
    assert every([value(-20.0), *[value(4.0)] * 23]) == ("differs", 23, 1)
    assert every([Value(value=1.0, n=1)]) == ("undecided", 0, 0)


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
    assert outcomes((2.0, 1.0, 1.0), 2.0) == ["agrees"] * 2 + ["differs"] * 4, "both rise"
    assert outcomes((2.0, 1.0, 0.0), 2.0) == ["agrees"] * 2 + ["undecided"] * 4, "neither falls nor rises"


def test_comparisons_of_models_trained_once_are_never_decided() -> None:
    mamba, other = Model("loaded", "mamba-default"), Model("trained transformer", "mamba-default")
    models = {m.name: m for m in (mamba, other)}
    smooth = {mamba.name: [smoothing_of(2, 1, -2)], other.name: [smoothing_of(1, 1, -1, seed=9)]}
    claims = figure5.claims_of(done(smooth, models), smoke=False)
    assert [c.outcome for c in claims] == ["agrees"] * 2 + ["undecided"] * 4
    assert all("One training" in c.why for c in claims[2:])
    assert all("n = 4" in c.ours and "the same for both" in c.why for c in claims[2:])
    scores = {mamba.name: [influence_of("", STRAIGHT)], other.name: [influence_of("", np.ones(200), seed=9)]}
    claims = figure7.claims_of(done(scores, models), smoke=False)
    assert [c.outcome for c in claims[1:]] == ["undecided"] * 3
    assert claims[2].value == pytest.approx(0.05, abs=0.003)


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
        fresh = done({"m": [part(low)] * 3}, {"m": Model("mamba", "130M")})
        claim = figure6._claim("m", fresh, smoke=False)
        assert claim.outcome == outcome
        assert ("As one would expect" in claim.why) == (outcome == "agrees")


def test_figure7_sees_both_ends_and_the_ratio() -> None:
    both = np.where(D > 180, 0.1, 0.01) * np.exp(-0.001 * D) + np.exp(-D)
    models = {"Mamba-130M": Model("mamba", "130M"), "Pythia-160M": Model("pythia", "160M")}
    found = {
        "Mamba-130M": [influence_of("", STRAIGHT, seed=s) for s in range(3)],
        "Pythia-160M": [influence_of("", both, seed=9 + s) for s in range(3)],
    }
    assert min(figure7.ends(found["Pythia-160M"][0])) > 1
    beginning, end = figure7.ends(found["Mamba-130M"][0])
    assert beginning < -1 < 1 < end
    assert figure7.claims_of(done(found, models), smoke=False)[0].outcome == "agrees"
    slope, r2, *_ = figure7.fall(influence_of("", STRAIGHT, n=1), influence_of("", np.ones(200), n=1, seed=5))
    assert slope == pytest.approx(0.05, abs=0.003)
    assert r2 > 0.98
    same = done(found | {"Mamba-130M": found["Pythia-160M"]}, models)
    assert figure7.claims_of(same, smoke=False)[2].outcome != "agrees"
    early = [influence_of("", STRAIGHT[::-1], seed=s) for s in range(3)]
    one_end, _, falls, exponential = figure7.claims_of(done(found | {"Pythia-160M": early}, models), smoke=False)
    assert one_end.outcome == "differs", "high at the beginning alone"
    assert (falls.outcome, exponential.outcome) == ("agrees", "agrees")
    turned = {"Mamba-130M": early, "Pythia-160M": found["Mamba-130M"]}
    _, _, falls, exponential = figure7.claims_of(done(turned, models), smoke=False)
    assert (falls.outcome, exponential.outcome) == ("differs", "differs"), "an exponential that rises"


def test_numbers_are_said_with_their_interval() -> None:
    from ssmlens.experiments.figures.runs import said

    assert said(Value(value=0.5, n=1)) == "0.5 (one sample, no interval)"
    assert said(Value(value=0.5, stderr=0.1, n=3), "%").startswith("0.5 % (95 % interval 0.0697 to 0.93, n = 3")
