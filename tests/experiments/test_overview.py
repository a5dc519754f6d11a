from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from ssmlens import files
from ssmlens.cli.app import app
from ssmlens.errors import UserError
from ssmlens.experiments import ITEMS, overview
from ssmlens.experiments.base import Claim, Item, claims_counted
from ssmlens.results import Record, provenance


def _record(name, claims=()):
    return Record(
        kind="reproduce",
        title=f"Title of {name}",
        config={"claims": [asdict(c) for c in claims]},
        seeds=[1],
        provenance=provenance(),
    )


def _claim(outcome, item="Table 9"):
    return Claim(
        item=item,
        claim="It forgets.",
        paper="yes",
        ours="0.5",
        outcome=outcome,
        why="measured",
        value=0.5,
        stderr=0.1,
        n=3,
    )


def test_claims_are_gathered_and_counted():
    records = {
        "a": _record("a", [_claim("agrees"), _claim("differs")]),
        "b": _record("b", [_claim("agrees", "Figure 9a")]),
        "c": _record("c"),
    }
    made = overview.record("laptop", records, {"d": "no images"})
    assert made.verdict[0] == "1 of the items could not be run: d."
    assert "Agrees: 2 of 3 comparisons with the paper." in made.verdict
    assert claims_counted([_claim("agrees"), _claim("agrees"), _claim("differs")]).endswith(": 2 agree, 1 differs.")
    assert any(said.startswith("They belong to 2 of the paper's tables and figures") for said in made.verdict)
    assert "statements of the paper" not in made.to_json()
    assert [link.href for link in made.links] == ["a/report.html", "b/report.html", "c/report.html"]
    claims, items = made.tables
    assert len(claims.rows) == 3
    assert [row[:4] for row in items.rows] == [
        ["a", "Title of a", 1, 1], ["b", "Title of b", 1, 0], ["c", "Title of c", 0, 0], ["d", "missing", None, None],
    ]  # fmt: skip
    assert Record.from_json(made.to_json()) == made


@pytest.fixture
def two_items(monkeypatch):
    """One item that runs, one that lacks its images, one that shares the first one's runs."""
    asked = []

    def works(request):
        asked.append(request)
        return _record("first", [_claim("undecided")])

    def lacks(request):
        asked.append(request)
        if request.data is None:
            raise UserError("name the images with --data")
        return _record("second")

    items = {
        "first": Item("first", "t", "s", ("smoke", "laptop"), (), works),
        "second": Item("second", "t", "s", ("smoke", "laptop"), (), lacks, takes=("data", "model")),
        "third": Item("third", "t", "s", ("smoke", "laptop"), (), works, group="first"),
    }
    ITEMS_before = dict(ITEMS)
    ITEMS.clear()
    ITEMS.update(items)
    yield asked
    ITEMS.clear()
    ITEMS.update(ITEMS_before)


def test_all_runs_what_it_can_and_says_what_it_could_not(two_items, tmp_path):
    done = CliRunner().invoke(app, ["reproduce", "all", "--out", str(tmp_path), "--processes", "0"])
    assert done.exit_code != 0
    assert "name the images with --data" in str(done.exception)
    for name in ("first", "third", "."):
        assert (tmp_path / name / "report.html").exists()
        assert (tmp_path / name / "results.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert 'href="first/report.html"' in page
    assert [r.out.name for r in two_items] == ["first", "second", "first"]
    assert [r.resume for r in two_items] == [False, False, True], "the third goes on in the first one's directory"


def test_a_published_page_stands_where_its_runs_are_elsewhere(two_items, tmp_path):
    resumed = ["reproduce", "all", "--out", str(tmp_path), "--processes", "0", "--resume"]
    finished = _record("second", [_claim("agrees")])
    finished = finished.model_copy(update={"config": {**finished.config, "item": "second", "scale": "laptop"}})

    def run(record, *more):
        files.write(tmp_path / "second" / "results.json", record.to_json())
        two_items.clear()
        done = CliRunner().invoke(app, [*resumed, *more])
        return done.exit_code == 0, "second" in [r.out.name for r in two_items]

    assert run(finished) == (True, False), "kept, though there are no images to make it of"
    assert "Title of second" in (tmp_path / "second" / "report.html").read_text()
    assert Record.read(tmp_path / "second" / "results.json").provenance == finished.provenance
    assert run(finished, "--data", "second=x") == (True, True)
    assert run(finished, "--seeds", "3") == (False, True)
    assert run(finished.model_copy(update={"complete": False})) == (False, True)
    assert run(finished.model_copy(update={"config": {"item": "second", "scale": "smoke"}})) == (False, True)
    (tmp_path / "second" / "runs").mkdir()
    assert run(finished) == (False, True), "its runs are there: its page is made anew"


def test_data_goes_to_its_item(two_items, tmp_path):
    given = ["reproduce", "all", "--out", str(tmp_path), "--processes", "0", "--data", "second=a/b.tar"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert [r.data for r in two_items] == [None, "a/b.tar", None]
    for wrong, message in (
        ("a/b.tar", "which it is for"),
        ("first=x", "has its own data"),
        ("secnd=x", "did you mean 'second'"),
    ):
        refused = CliRunner().invoke(app, [*given[:-1], wrong])
        assert refused.exit_code != 0
        assert message in str(refused.exception)


def test_models_go_to_their_item(two_items, tmp_path):
    given = ["reproduce", "all", "--out", str(tmp_path), "--processes", "0", "--data", "second=x"]
    models = ["--model", "second=a=b.pth", "--model", "second=c", "--model", "second=c"]
    assert CliRunner().invoke(app, [*given, *models]).exit_code == 0
    assert [r.models for r in two_items] == [None, ("a=b.pth", "c"), None]
    for wrong, message in (
        ("c.pth", "--model pixels=CHECKPOINT, not --model c.pth"),
        ("first=c", "has its own model"),
        ("second=", "names no model"),
    ):
        refused = CliRunner().invoke(app, [*given, "--model", wrong])
        assert refused.exit_code != 0
        assert message in str(refused.exception)
