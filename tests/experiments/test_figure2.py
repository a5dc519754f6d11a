import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from ssmlens.errors import UserError
from ssmlens.experiments import Request, figure2, find

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("model", figure2.MODELS)
def test_the_recipes_are_the_committed_ones(model):
    with (CONFIGS / f"needle-{model}.toml").open("rb") as file:
        assert figure2.recipe(figure2.SCALES["laptop"], model, 0) == tomllib.load(file)


def _runs(first, last, seeds=4):
    """Trainings that find so many % of needles in the first half of the depths and in the rest."""
    lengths = len(figure2.SCALES["laptop"].measured)
    row = [first if d < 0.5 else last for d in figure2.DEPTHS]
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
    other = figure2.record("laptop", {"mamba": _runs(80, 20), "transformer": _runs(80, 80)}, [0, 1, 2, 3], {})
    assert {c["outcome"] for c in other.config["claims"]} == {"differs"}
    lost = figure2.record("laptop", {"mamba": _runs(20, 80), "transformer": _runs(5, 5)}, [0, 1, 2, 3], {})
    assert [c["outcome"] for c in lost.config["claims"]] == ["agrees", "not comparable"] * 2


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


def test_a_transformer_that_finds_all_alike_agrees():
    def asked(name, first, last):
        from ssmlens.experiments.needle import Needle, Scores

        cells = {
            (8, d): Scores([1, 1, 0, 1] if (first if d < 0.5 else last) else [0, 0, 1, 0])
            for d in (0.0, 0.25, 0.75, 1.0)
        }
        return Needle(name, (8,), (0.0, 0.25, 0.75, 1.0), cells, kinds=("a", "a", "b", "b"))

    mamba, level = figure2._claims_of_statements([asked("m", False, True), asked("t", True, True)])
    assert mamba.value == 50
    assert (level.outcome, level.value) == ("agrees", 0)
    assert figure2._claims_of_statements([asked("m", False, True), asked("t", False, True)])[1].outcome != "agrees"
