import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.results import Column, Figure, Map, Panel, Record, Series, Table, Value, provenance


def record(values, cell=1.5):
    return Record(
        kind="test",
        title="a/b~c",
        config={"a/b~c": {"rate": values[0] if values else None}},
        figures=[Figure(id="f", title="t", x_label="x", y_label="y",
                        series=[Series(name="s", x=[float(i) for i in range(len(values))], y=values)])],
        tables=[Table(id="t", title="t", columns=[Column(name="c")], rows=[[Value(value=cell, stderr=math.inf, n=3)], ["x"], [None]])],
        provenance=provenance(),
    )  # fmt: skip


@given(st.lists(st.floats(), max_size=5))
def test_every_float_survives_writing_and_reading(values):
    before = record(values)
    text = before.to_json()
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    after = Record.from_json(text)
    assert repr(after.figures[0].series[0].y) == repr(values)  # repr: NaN equals NaN, -0.0 differs from 0.0
    assert after.tables[0].rows[0][0].stderr == math.inf
    assert after.tables[0].rows[1:] == [["x"], [None]]


def test_infinities_are_null_with_a_flag():
    tree = json.loads(record([1.0, math.inf, math.nan]).to_json())
    assert tree["figures"][0]["series"][0]["y"] == [1.0, None, None]
    assert tree["nonfinite"]["/figures/0/series/0/y/1"] == "inf"
    assert tree["nonfinite"]["/figures/0/series/0/y/2"] == "nan"


def test_blank_cells_of_a_map_are_null_without_a_flag_each():
    panel = Panel(name="p", values=[[math.nan, 1.0], [math.inf, 2.0]], stderr=[[math.nan, 0.1], [0.2, 0.3]])
    heat = Map(id="m", title="t", x_label="x", y_label="y", unit="", x=[0.0, 1.0], y=["a", "b"], panels=[panel])
    before = record([1.0], cell=2.0).model_copy(update={"maps": [heat]})
    tree = json.loads(before.to_json())
    assert tree["maps"][0]["panels"][0]["values"] == [[None, 1.0], [None, 2.0]]
    assert [k for k in tree["nonfinite"] if k.startswith("/maps")] == ["/maps/0/panels/0/values/1/0"]
    after = Record.from_json(before.to_json())
    assert repr(after.maps) == repr(before.maps)
    with pytest.raises(ValidationError, match="not of shape"):
        Map(**{**heat.model_dump(), "x": [0.0]})


def test_a_record_of_the_first_schema_is_still_read():
    tree = json.loads(record([1.0]).to_json())
    tree["schema_version"] = 1
    del tree["maps"]
    assert Record.from_json(json.dumps(tree)).maps == []


def test_write_is_atomic(tmp_path, monkeypatch):
    path = record([1.0]).write(tmp_path / "deep" / "results.json")
    before = path.read_bytes()

    def killed(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(UserError, match="No space left"):
        record([2.0]).write(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_what_is_not_a_record_is_refused_by_name(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=r"results\.json"):
        Record.read(path)
    for text, message in [("{", "not a results file"), ("[]", "schema_version"), ('{"schema_version": 99}', "version 99"),
                          ('{"schema_version": 1, "kind": 3}', "kind"),
                          ('{"schema_version": 1, "nonfinite": {"/a/0": "nan"}}', "/a/0")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Record.read(path)


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.write(tmp_path / "file" / "results.json", "x")


def test_provenance_names_versions_but_no_machine_paths(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/ssmlens", "diagnose", "/home/me/model", "--length", "3"])
    p = provenance()
    assert p.command == ["ssmlens", "diagnose", "model", "--length", "3"]
    assert "torch" in p.versions
    given = {
        "/data/a.txt,/data/b/c.txt": "a.txt,c.txt",
        "pixels=/data/cifar.tar.zst": "pixels=cifar.tar.zst",
        "figure4=/data/a.txt,tokenizer:/home/me/t.json": "figure4=a.txt,tokenizer:t.json",
        "datasets:owner/name": "datasets:owner/name",
        "runs/mine": "runs/mine",
        "2/255": "2/255",
        "https://host/file": "https://host/file",
    }
    monkeypatch.setattr("sys.argv", ["ssmlens", *given])
    assert provenance().command[1:] == list(given.values())


def test_a_series_whose_parts_differ_in_length_is_refused():
    with pytest.raises(ValidationError, match="stderr has 1 values, x has 2"):
        Series(name="s", x=[1.0, 2.0], y=[1.0, 2.0], stderr=[0.1])
    with pytest.raises(ValidationError, match="both low and high"):
        Series(name="s", x=[1.0], y=[1.0], low=[0.5])


def test_means_and_intervals():
    v = Value.mean([1.0, 2.0, 3.0])
    assert (v.value, v.n) == (2.0, 3)
    assert v.stderr == pytest.approx(1 / math.sqrt(3))
    assert v.interval() == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4)
    assert v.p_value() == pytest.approx(0.0742, abs=1e-4)  # t = 2√3 at 2 degrees of freedom
    one = Value.mean([1.0])
    assert (one.stderr, one.interval(), one.p_value()) == (None, None, None)
