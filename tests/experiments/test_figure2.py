import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from ssmlens.errors import UserError
from ssmlens.experiments import Request, figure2, figure2_runs, find
from ssmlens.experiments.needle import Needle, Scores
from ssmlens.experiments.needle_statements import memory
from ssmlens.models import LanguageModel, LanguageModelConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("model", figure2_runs.MODELS)
def test_the_recipes_are_the_committed_ones(model):
    with (CONFIGS / f"needle-{model}.toml").open("rb") as file:
        assert figure2_runs.recipe(figure2_runs.SCALES["laptop"], model, 0) == tomllib.load(file)


def _runs(first, last, seeds=4):
    """Trainings that find so many % of needles in the first half of the depths and in the rest."""
    lengths = len(figure2_runs.SCALES["laptop"].measured)
    row = [first if d < 0.5 else last for d in figure2_runs.DEPTHS]
    return [
        {"accuracy": [[x + s for x in row] for _ in range(lengths)], "parameters": 1, "seconds": 60.0}
        for s in range(seeds)
    ]


def test_a_model_that_forgets_agrees_with_the_paper_and_one_that_does_not_differs():
    found = {"mamba": _runs(20, 80), "polarized": _runs(50, 80), "transformer": _runs(80, 80)}
    for run, more in zip(found["mamba"], (-3, 1, 2, 0), strict=True):
        run["accuracy"][0][-1] += more  # or all trainings would be the same
    made = figure2.record("laptop", found, [0, 1, 2, 3], {})
    assert [c["outcome"] for c in made.config["claims"]] == ["agrees"] * 4
    index = made.tables[1].rows[0][4]
    assert index.value == pytest.approx(60, abs=1)
    assert "recency index +30 points (+30 to +30), -30 points (-30 to -30) from Mamba's" in made.verdict[-1]
    assert "finds 68 % where Mamba finds 55 %" in made.verdict[-1]
    other = figure2.record("laptop", {"mamba": _runs(80, 20), "transformer": _runs(80, 80)}, [0, 1, 2, 3], {})
    assert {c["outcome"] for c in other.config["claims"]} == {"differs"}
    lost = figure2.record("laptop", {"mamba": _runs(20, 80), "transformer": _runs(5, 5)}, [0, 1, 2, 3], {})
    assert [c["outcome"] for c in lost.config["claims"]] == ["agrees", "not comparable"] * 2


@pytest.mark.parametrize(
    ("mamba", "transformer", "outcomes"),
    [
        ((5, 7), (97, 97), ["not comparable", "not comparable"]),
        ((5, 60), (97, 97), ["agrees", "agrees"]),
        ((97, 97), (97, 97), ["differs", "differs"]),
        ((90, 94), (97, 97), ["differs", "differs"]),
        ((97, 97), (60, 97), ["differs", "differs"]),
    ],
)
def test_what_is_lost_is_not_compared_and_what_is_alike_differs(mamba, transformer, outcomes):
    found = {"mamba": _runs(*mamba), "transformer": _runs(*transformer)}
    made = figure2.record("laptop", found, [0, 1, 2, 3], {})
    assert [c["outcome"] for c in made.config["claims"]] == outcomes * 2


def test_a_wide_interval_decides_nothing():
    found = {"mamba": [_runs(50, 50 + gain)[0] for gain in (-40, 40, 60, 0)]}
    made = figure2.record("laptop", found, [0, 1, 2, 3], {})
    assert [c["outcome"] for c in made.config["claims"]] == ["undecided"] * 2


def test_smoke_runs_and_resumes(tmp_path):
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    first = find("figure9").run(request)
    assert [p.name for p in first.maps[0].panels] == ["Mamba", "Mamba, polarized", "transformer"]
    again = find("figure2").run(Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False, resume=True))
    assert again.maps == first.maps
    assert first.config["claims"] == []


def test_trained_models_are_asked_for_statements(tmp_path):
    request = Request(scale="smoke", out=tmp_path, progress=False, models=("mamba-default",))
    made = figure2.run(request)
    assert made.config["item"] == "figure2"
    assert [t.id for t in made.tables] == ["needle", "needle-generated"]
    assert (tmp_path / "cells.json").exists()
    assert figure2.run(replace(request, resume=True)).tables == made.tables
    for unused in ({"variants": ("mamba",)}, {"seeds": 2}):
        with pytest.raises(UserError, match="asked as they are"):
            figure2.run(replace(request, **unused))


def _asked(name, first, last, without=False):
    """Four statements of two kinds, found (or not) near the beginning and near the end; without: what is said with no needle."""
    cells = {(8, d): Scores([int(first if d < 0.5 else last)] * 4) for d in (0.0, 0.25, 0.75, 1.0)}
    control = {8: Scores([int(without)] * 4)}
    return Needle(name, (8,), (0.0, 0.25, 0.75, 1.0), cells, control, kinds=("a", "a", "b", "b"))


@pytest.mark.parametrize(
    ("first", "last", "without", "recurrent", "attention"),
    [
        (False, True, False, "agrees", "differs"),
        (True, True, False, "differs", "agrees"),
        (True, False, False, "differs", "differs"),
        (False, False, False, "not comparable", "not comparable"),
        (True, True, True, "not comparable", "not comparable"),
    ],
)
def test_statements_are_held_against_the_paper_by_kind(first, last, without, recurrent, attention):
    found = [_asked("a", first, last, without), _asked("b", first, last, without)]
    for kinds, outcomes in (
        (("recurrent", "attention"), [recurrent, attention]),
        (("attention", "recurrent"), [attention, recurrent]),
        (("recurrent", "recurrent"), [recurrent, recurrent]),
        (("both", "unknown"), ["not comparable"] * 2),
    ):
        claims = figure2._claims_of_statements(found, dict(zip("ab", kinds, strict=True)))
        assert [c.outcome for c in claims] == outcomes


def test_a_model_remembers_by_its_layers():
    def made(mixer):
        return LanguageModel(LanguageModelConfig(vocab_size=16, d_model=8, n_layers=2, mixer=mixer))

    mamba, attention = made("mamba"), made("attention")
    assert (memory(mamba), memory(attention), memory(made("s4"))) == ("recurrent", "attention", "recurrent")
    mamba.backbone.blocks[1] = attention.backbone.blocks[1]
    assert memory(mamba) == "both"
