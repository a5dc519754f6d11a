"""Depth against width: the paper's sizes, what a run reads and trains, what is said of the results."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, Request, depth, depth_runs, find, texts
from ssmlens.experiments.base import Claim, claims_table, side
from ssmlens.experiments.depth_claims import Effect, Runs
from ssmlens.experiments.depth_runs import SCALES, Part
from ssmlens.models import LanguageModel
from ssmlens.results import Value

NEOX = 50280


def request(out: Path, **options: object) -> Request:
    return Request(**({"scale": "smoke", "out": out, "processes": 0, "progress": False} | options))  # type: ignore[arg-type]


def test_the_paper_scale_is_the_papers() -> None:
    scale = SCALES["paper"]
    assert scale.depths == (16, 24, 32, 48, 64, 72)
    assert scale.contexts == (2048, 8192)
    assert scale.batch_tokens == 524_288
    sizes = scale.parts[0].sizes
    assert (min(sizes), max(sizes)) == (140_000_000, 550_000_000)
    tiers = {size: scale.tier(size) for size in sizes}
    assert [(tiers[s].steps, tiers[s].lr) for s in (140_000_000, 360_000_000, 550_000_000)] == [
        (4_800, 3e-3),
        (13_500, 1.5e-3),
        (20_000, 1.25e-3),
    ]
    tokens = [round(t.steps * scale.batch_tokens / 1e9, 1) for t in scale.tiers]
    assert tokens == [2.5, 7.1, 10.5], "2.5B, 7B, 10B"
    c = depth_runs.training(scale, "default", 360_000_000, 0)
    assert (c.clip, c.weight_decay, c.min_lr, c.schedule, c.precision, c.betas) == (
        1.0,
        0.1,
        1e-5,
        "cosine",
        "bf16",
        (0.9, 0.95),
    )
    assert c.grad_accumulation * scale.piece == scale.batch_tokens
    assert scale.batch_tokens % max(scale.contexts) == 0
    assert max(scale.contexts) <= scale.piece
    assert depth_runs.SCALES["paper"].variants == ("default",)


@pytest.mark.parametrize("layers", SCALES["paper"].depths)
def test_models_of_the_paper_scale_have_their_sizes(layers: int) -> None:
    scale = SCALES["paper"]
    for size in scale.parts[0].sizes:
        d = depth_runs.width(layers, size, NEOX, scale.multiple)
        assert d % 16 == 0
        assert abs(depth_runs.parameters(layers, d, NEOX) / size - 1) < 0.03
    with torch.device("meta"):
        lm = LanguageModel(depth_runs.model(scale, "default", size, layers, NEOX))
    assert sum(p.numel() for p in lm.parameters()) == depth_runs.parameters(layers, d, NEOX)
    mixer = lm.backbone.blocks[0].mixer
    assert (mixer.d_state, mixer.d_inner, mixer.dt_rank, len(lm.backbone.blocks)) == (16, 2 * d, d // 16, layers)


def test_models_of_the_laptop_scale_have_their_sizes() -> None:
    scale = SCALES["laptop"]
    assert scale.contexts == (128, 512)
    assert (min(scale.depths), max(scale.depths)) == (2, 32)
    for part in scale.parts:
        for size in part.sizes:
            for layers in part.depths:
                assert (
                    abs(
                        depth_runs.parameters(layers, depth_runs.width(layers, size, 256, scale.multiple), 256) / size
                        - 1
                    )
                    < 0.05
                )
    assert {part.variant for part in scale.parts} == {"default", "polarized", "half-rate"}
    rates = [depth_runs.training(scale, v, 204_000, 0).lr for v in ("default", "polarized", "half-rate")]
    assert rates[0] == rates[1] == 2 * rates[2]


def test_smoke_runs_resumes_and_is_found_by_both_names(tmp_path: Path) -> None:
    assert find("table4") is find("figure4") is ITEMS["figure4"]
    first = ITEMS["figure4"].run(request(tmp_path))
    assert [t.id for t in first.tables][:2] == ["claims", "loss-default"]
    assert {f.id for f in first.figures} == {"loss-context-16", "loss-context-32", "by-depth"}
    assert {c["outcome"] for c in first.config["claims"]} == {"not comparable"}
    assert len(first.figures[0].series) == 6, "a curve for every depth, default and polarized"
    json.dumps(first.config)
    assert str(tmp_path) not in first.to_json()
    config = json.loads((tmp_path / "runs" / "polarized-9k-depth3-context32-seed0" / "config.json").read_text())
    assert "parts" not in config["sizes"], "another number of seeds is no other run"
    assert config["text"]["name"] == "python-reference"
    with pytest.raises(UserError, match="--resume"):
        ITEMS["figure4"].run(request(tmp_path))
    again = ITEMS["figure4"].run(request(tmp_path, resume=True))
    assert again.tables == first.tables


def test_every_cell_comes_once_before_any_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def noted(jobs: object, *_: object, **__: object) -> dict[str, object]:
        seen.extend(config for _, config in jobs)  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(depth, "sweep", noted)
    with pytest.raises(KeyboardInterrupt):
        depth.run(request(tmp_path, scale="laptop"))
    order = [(config["seed"], config["size"]) for config in seen]
    assert order == sorted(order)
    count = {
        (v, size): sum((c["variant"], c["size"]) == (v, size) for c in seen)
        for v in ("default", "polarized", "half-rate")
        for size in (204_000, 600_000, 2_000_000)
    }
    assert list(count.values()) == [30, 16, 6, 18, 6, 0, 18, 0, 0]


def test_polarized_models_are_as_large_but_for_two_transitions() -> None:
    for layers in (2, 32):
        counts = {}
        for variant in ("default", "polarized"):
            c = depth_runs.model(SCALES["laptop"], variant, 204_000, layers, 256)
            lm = LanguageModel(c)
            counts[variant] = sum(p.numel() for p in lm.parameters())
            assert lm.backbone.blocks[0].mixer.d_state == 16
        assert counts["default"] - counts["polarized"] == layers * 2 * 2 * c.d_model


def test_a_text_is_known_by_its_contents(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat . " * 400)
    first = texts.identity(str(text), None)
    given = request(tmp_path / "out", data=str(text), variants=("half-rate",))
    ITEMS["figure4"].run(given)
    (tmp_path / "elsewhere").mkdir()
    moved = text.rename(tmp_path / "elsewhere" / "a.txt")
    assert texts.identity(str(moved), None) == first
    assert ITEMS["figure4"].run(replace(given, data=str(moved), resume=True)).notes
    moved.write_text("the dog sat on the mat . " * 400)  # as long
    with pytest.raises(UserError, match=r"text\.sha256 was"):
        ITEMS["figure4"].run(replace(given, data=str(moved), resume=True))
    assert texts.identity("datasets:a/b", "hub/name") == {
        "name": "datasets:a/b", "sha256": None, "tokenizer": "hub/name", "tokenizer_sha256": None,
    }  # fmt: skip


def test_both_contexts_are_judged_on_the_same_text(tmp_path: Path) -> None:
    scale = SCALES["smoke"]
    short, long = (depth_runs.text(scale, None, c, 0, tmp_path) for c in scale.contexts)
    assert torch.equal(short.heldout, long.heldout)
    lm = LanguageModel(depth_runs.model(scale, "default", 9_000, 1, 256))
    at = {c: depth_runs.evaluate(lm, long.heldout, long.targets, c, 64)["loss"] for c in scale.contexts}
    with torch.no_grad():
        assert at[32] == pytest.approx(float(lm(long.heldout, targets=long.targets).loss), rel=1e-5)
    assert at[16] != at[32]


def test_a_users_own_text_and_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "a.txt").write_text("the cat sat on the mat . " * 400)
    words = {w: i for i, w in enumerate(["the", "cat", "sat", "on", "mat", ".", "<|endoftext|>", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match="name a text beside the tokenizer"):
        ITEMS["figure4"].run(request(tmp_path / "none", data=f"tokenizer:{tmp_path / 'words.json'}"))
    named = f"{tmp_path / 'a.txt'},tokenizer:{tmp_path / 'words.json'}"
    found = depth_runs.text(SCALES["smoke"], named, 16, 0, tmp_path / "cache")
    assert (found.vocab_size, found.described["unit"], found.described["name"]) == (8, "tokens", "a.txt")
    assert found.stream.batch(0).tokens.max() < 8
    assert found.heldout.shape[1] == 32
    record = ITEMS["figure4"].run(request(tmp_path / "out", data=str(tmp_path / "a.txt"), variants=("default",)))
    assert any("a.txt" in note for note in record.notes)
    assert str(tmp_path) not in record.to_json()


def test_wrong_data_is_named(tmp_path: Path) -> None:
    assert texts.divided("datasets:a/b,tokenizer:t.json") == ("datasets:a/b", "t.json")
    assert texts.divided(None) == (None, None)
    for wrong in ("datasets:a,datasets:b", "a.txt,datasets:b", "tokenizer:a,tokenizer:b"):
        with pytest.raises(UserError, match="at most one tokenizer"):
            texts.divided(wrong)
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        texts.coding(str(tmp_path / "no.json"))
    with pytest.raises(UserError, match="no text file"):
        ITEMS["figure4"].run(request(tmp_path / "y", data=str(tmp_path / "absent.txt")))
    assert not (tmp_path / "y" / "runs").exists(), "named before anything runs"
    with pytest.raises(UserError, match="no half-rate models at paper scale"):
        ITEMS["figure4"].run(request(tmp_path / "z", scale="paper", variants=("half-rate",)))
    with pytest.raises(UserError, match="did you mean 'default'"):
        ITEMS["figure4"].run(request(tmp_path / "x", variants=("defalt",)))


def test_recomputing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    lm = LanguageModel(depth_runs.model(SCALES["smoke"], "polarized", 9_000, 3, 256))
    tokens = torch.randint(0, 256, (2, 16))

    def gradients() -> list[torch.Tensor]:
        lm.zero_grad()
        lm(tokens, targets=tokens).loss.backward()
        return [p.grad.clone() for p in lm.parameters() if p.grad is not None]

    plain, names = gradients(), list(lm.state_dict())
    depth_runs.recomputing(lm)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert list(lm.state_dict()) == names, "checkpoints keep their names"


# ---- what is said ----


def losses(
    rule: Callable[[str, int, int], float],
    parts: tuple[Part, ...] | None = None,
    noise: float = 0.002,
    blurs: float = 0.01,
) -> Runs:
    """Results of the laptop design, as its runs would leave them: loss by (variant, depth, context); sharpness lost a layer."""
    scale, draw = SCALES["laptop"], torch.Generator().manual_seed(0)

    def result(variant: str, size: int, d: int, context: int) -> dict[str, object]:
        wide = depth_runs.width(d, size, 256, 2)
        return {
            "loss": rule(variant, d, context) + noise * float(torch.randn((), generator=draw)) + size / 1e7, "blur": 1 - blurs * d + noise * float(torch.randn((), generator=draw)), "embedding": 256 * wide,
            "parameters": depth_runs.parameters(d, wide, 256) - 4 * wide * d * (variant == "polarized"), "width": wide, "steps": 800, "tokens": 819_200,
            "seconds": 60.0, "text": {"name": "a.txt", "sha256": "0" * 64, "tokens": 10**6, "unit": "bytes"}, "history": [],
        }  # fmt: skip

    keys = [
        (p.variant, size, d, c, s)
        for p in parts or scale.parts for size in p.sizes for d in p.depths for c in scale.contexts for s in range(p.seeds)
    ]  # fmt: skip
    return Runs(scale, {key: result(*key[:4]) for key in keys})


def papers(variant: str, d: int, context: int) -> float:
    """A valley, deeper at the longer context, and what polarization would bring."""
    far, near = {2: 0.3, 4: 0.15, 8: 0.0, 16: 0.1, 32: 0.2}, {2: 0.0, 4: 0.01, 8: 0.02, 16: 0.2, 32: 0.4}
    return 2 + (far if context == 512 else near)[d] - (0.1 if variant == "polarized" and d == 32 else 0)


def test_claims_follow_the_losses() -> None:
    claims = depth.claims_of(losses(papers))
    assert [c.outcome for c in claims] == ["agrees"] * 9
    assert claims[5].item == "Section 4"
    assert claims[5].ours.startswith("sharpness kept at 32 layers minus at 2, context 128: -0.3")
    opposite = depth.claims_of(losses(lambda variant, d, context: 2 - papers(variant, d, context), blurs=-0.01))
    assert [c.outcome for c in opposite] == ["differs"] * 4 + ["agrees"] + ["differs"] * 4, "a spread has no sign"
    assert [c.outcome for c in depth.claims_of(losses(papers), smoke=True)] == ["not comparable"] * 9
    first = claims[0]
    assert first.value == pytest.approx(0.4, abs=0.01)
    assert first.n == 4, "three seeds, two, one: three degrees of freedom"
    assert "seeds of 204k: 3, 600k: 2, 2M: 1; 3 degrees of freedom" in first.why
    assert "2, 8 and 32 layers stand in for the paper's 16, 32, 72" in first.why
    assert first.ours.count("+0.4") + first.ours.count("+0.39") >= 4, "the mean and each of the sizes"


def test_sizes_weigh_the_same_and_the_error_is_of_seeds() -> None:
    found = Effect({1: [1.0, 3.0, 2.0], 2: [10.0], 3: [5.0, 7.0]})
    value, pooled = found.mean(), (2.0 + 2.0) / 3
    assert (value.value, value.n, value.unit) == (pytest.approx((2 + 10 + 6) / 3), 4, "nats")
    assert value.stderr == pytest.approx((pooled * (1 / 3 + 1 + 1 / 2)) ** 0.5 / 3)
    assert found.mean(2).stderr == pytest.approx(pooled**0.5), "a size of one seed has the spread of the others"
    assert Effect({1: [1.0], 2: [3.0]}).mean() == Value(value=2.0, n=1, unit="nats")
    assert Effect({1: [1.0], 2: [3.0]}).outcome(True) == "undecided"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_of_one_size_it_is_the_usual_mean(numbers: list[float]) -> None:
    value, usual = Effect({7: numbers}).mean(), Value.mean(numbers, "nats")
    assert (value.value, value.stderr, value.n) == (
        pytest.approx(usual.value), pytest.approx(usual.stderr, abs=1e-9), usual.n,
    )  # fmt: skip


def test_sizes_that_surely_differ_in_sign_decide_nothing() -> None:
    apart = {1: [2.0, 2.02, 1.98], 2: [2.01], 3: [-0.5]}
    assert side(Effect(apart).mean()) == "agrees"
    assert Effect(apart).outcome(True) == Effect(apart).outcome(False) == "undecided"
    assert Effect(apart).against() == [3]
    assert Effect(apart | {3: [-0.05]}).outcome(True) == "agrees", "-0.05 is within the noise"
    assert Effect({size: [-x for x in each] for size, each in apart.items() if size < 3}).outcome(True) == "differs"


def test_the_size_that_leaves_a_statement_undecided_is_named() -> None:
    found = losses(papers)
    for (_, size, d, *_), result in found.results.items():
        result["loss"] -= 0.5 * (size == 204_000 and d == 32)  # lower than at 2 layers, in this size alone
    first = depth.claims_of(found)[0]
    assert first.outcome == "undecided"
    assert first.ours.count("surely") == 1
    assert re.search(r"204k -0\.\d+ \(surely below zero\), 600k \+", first.ours)


def test_the_record_of_the_laptop_design() -> None:
    record = depth.record("laptop", losses(papers), {})
    assert [t.id for t in record.tables] == [
        "claims",
        "loss-default",
        "loss-polarized",
        "loss-half-rate",
        "rates",
        "training",
    ]
    claims, default, polarized, _, rates, _ = record.tables
    assert (
        "(2.3 % more), 32 layers +2.0 % against 2; outside the embedding 86 % of them at 2 layers, 97 % at 32"
        in claims.method
    )
    assert "N stays 16" in polarized.method
    assert "-0.3 to -1.5 % of the parameters" in polarized.method
    names = [column.name for column in default.columns]
    rows = {(row[0], row[1]): dict(zip(names, row, strict=True)) for row in default.rows}
    assert len(rows) == 13
    counts = {key: row["against 2 layers, 512"].n for key, row in rows.items() if key[1] != 2}  # type: ignore[union-attr]
    assert (counts["204k", 16], counts["600k", 8], counts["600k", 16], counts["2M", 32]) == (3, 2, 1, 1), (
        "of the seeds that both depths have"
    )
    assert len(rates.rows) == 4
    assert {f.id for f in record.figures} == {"loss-context-128", "loss-context-512", "by-depth"}
    assert record.seeds == [0, 1, 2]
    assert sum(note.startswith("Learning rate, 204k") for note in record.notes) == 2
    assert any("default 600k at 4, 16 layers, 1 seed;" in note for note in record.notes)
    json.dumps(record.config)


def test_a_rate_that_mends_depth_is_told_from_one_that_does_not() -> None:
    def rule(variant: str, d: int, context: int) -> float:
        return {"half-rate": {2: 2.2, 8: 2.0, 32: 2.1}}.get(variant, {2: 2.0, 8: 2.1, 32: 2.5}).get(d, 2.0)

    table = depth.rates(losses(rule))
    assert table is not None
    size, layers, context, full, half, moved, best, which = table.rows[-1]
    assert (size, layers, context, which) == ("204k", 32, 512, "half, peak")
    assert [v.value for v in (full, half, moved, best)] == pytest.approx([0.5, -0.1, -0.6, 0.1], abs=0.01)  # type: ignore[union-attr]
    assert full.n == 3  # type: ignore[union-attr]
    alone = losses(rule, tuple(p for p in SCALES["laptop"].parts if p.variant == "default"))
    assert depth.rates(alone) is None


def test_without_polarized_runs_nothing_is_said_of_them() -> None:
    alone = losses(papers, tuple(replace(p, seeds=1) for p in SCALES["laptop"].parts if p.variant == "default"))
    claims = depth.claims_of(alone)
    assert [c.item for c in claims] == ["Figure 4"] * 5 + ["Section 4"] * 2
    assert {c.outcome for c in claims} == {"undecided"}, "one seed of each size has no spread"
    assert "no interval" in claims[0].ours
    half = losses(papers, tuple(p for p in SCALES["laptop"].parts if p.variant == "half-rate"))
    assert {c["outcome"] for c in depth.record("laptop", half, {}).config["claims"]} == {"not comparable"}


def test_sides_and_the_table_of_claims() -> None:
    assert side(Value(value=1.0, stderr=0.1, n=5)) == "agrees"
    assert side(Value(value=-1.0, stderr=0.1, n=5)) == "differs"
    assert side(Value(value=-1.0, stderr=0.1, n=5), above=False) == "agrees"
    assert side(Value(value=1.0, stderr=1.0, n=5)) == "undecided"
    assert side(Value(value=1.0, n=1)) == "undecided"
    assert side(Value(value=0.7, stderr=0.01, n=5), of=0.6) == "agrees"
    claim = Claim("Figure 6", "says", "over 60 %", "70 %", "agrees", "why", 0.7, 0.01, 5)
    row = claims_table([claim]).rows[0]
    assert row[:2] == ["Figure 6", "agrees"]
    assert row[-1] == Value(value=0.7, stderr=0.01, n=5)
    with pytest.raises(ValueError, match="outcome"):
        Claim("Figure 6", "says", "", "", "maybe", "")  # type: ignore[arg-type]
