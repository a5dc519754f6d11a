"""Every mixer through every measure that applies, and every result at home in a notebook."""

import pytest

from ssmlens import mixers
from ssmlens.lens import MEASURES as ALL
from ssmlens.lens import diagnose
from ssmlens.results import Record

from .models import model, tokens

MEASURES = [name for name in ALL if name != "reading"]  # that one is for classifiers: test_vectors.py
POLARIZED = [name for name in mixers.names() if mixers.polarizable(name)]


def checked(found, tmp_path):
    assert found.complete
    record = Record.read(found.record().write(tmp_path / "results.json"))
    assert len({f.id for f in record.figures}) == len(record.figures)
    for figure in record.figures:
        assert figure.meaning
        assert figure.method
        assert all(s.y for s in figure.series)
    for table in record.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert all(m.meaning and m.method and m.unit for m in record.maps)
    return record


@pytest.mark.parametrize("name", mixers.names())
def test_a_mixer_through_all_that_applies(name, tmp_path):
    made = model(mixer=name, d_model=8)
    found = diagnose({name: made}, tokens(2, 40), probes=1)
    record = checked(found, tmp_path)
    diagonal = mixers.get(name).diagonal
    for measure in MEASURES:
        applies = diagonal or measure in ("influence", "context", "smoothing", "filters")
        assert bool(getattr(found, measure)) == applies, measure
    assert all(name in sentence or sentence.startswith("One sequence") for sentence in record.verdict)
    if not diagonal:
        assert (
            f"{name}: not measured because none of its layers has a diagonal transition: transitions, bounds, hidden attention."
            in record.notes
        )
    if name == "rwkv4":
        assert "Theorem 3.1 does not speak of rwkv4" in str(found)
    if name in ("s4", "s4d", "h3"):
        assert "Its learned filters pass less than 10 % beyond" in str(found)


@pytest.mark.parametrize("name", POLARIZED)
def test_polarized_too(name, tmp_path):
    found = diagnose(
        {name: model(mixer=name, d_model=8, polarization={"ones": 1, "zeros": 1})}, tokens(2, 40), probes=1,
        measures=["transitions", "bounds", "hidden_attention"],
    )  # fmt: skip
    checked(found, tmp_path)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_result_shows_itself(measure):
    found = diagnose({"a <b>": model(d_model=8)}, tokens(2, 40), probes=1, measures=[measure])
    one = getattr(found, measure)["a <b>"]
    page = one._repr_html_()
    assert "<table>" in page
    assert "data:image/png;base64," in page
    assert "<b>" not in page
    assert "a &lt;b&gt;" in page
    assert one.plot().axes
    assert found._repr_html_()
