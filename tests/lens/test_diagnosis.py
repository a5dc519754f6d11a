"""The measurements together: records, verdicts, interruption."""

import math

import numpy as np
import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.lens import Subject, diagnose
from ssmlens.results import Record

from .models import model, tokens
from .systems import ACCESS, Gated, Recurrence


@pytest.fixture(scope="module")
def pair():
    return diagnose(
        {"default": model(), "polarized": model(polarization={"ones": 1, "zeros": 1})},
        tokens(3, 48),
        probes=2,
        at_initialisation=True,
        config={"text": "random"},
        notes=["a note"],
    )


def test_everything_is_measured_for_everyone(pair):
    names = ["default", "polarized", "default (at initialisation)", "polarized (at initialisation)"]
    for found in (pair.influence, pair.context, pair.smoothing, pair.transitions):
        assert list(found) == names
    assert pair.complete
    assert pair.pairs(pair.influence) == [
        ("default", "polarized"), ("default (at initialisation)", "default"), ("polarized (at initialisation)", "polarized"),
    ]  # fmt: skip


def test_the_record_survives_its_file(pair, tmp_path):
    record = pair.record()
    read = Record.read(record.write(tmp_path / "results.json"))
    assert read == record
    assert read.complete
    assert read.config["text"] == "random"
    assert read.config["models"]["polarized"]["polarization"]["ones"] == 1
    assert read.notes == ["a note"]
    assert read.seeds == [0]
    assert {t.id for t in read.tables} == {"influence", "context", "sharpness", "transitions", "models"}
    assert len({f.id for f in read.figures}) == len(read.figures) == 10
    for figure in read.figures:
        assert figure.meaning
        assert figure.x_label
        assert {s.group for s in figure.series} == set(pair.influence)
        for series in figure.series:
            lengths = {len(a) for a in (series.x, series.y, series.stderr) if a is not None}
            assert len(lengths) == 1
            assert figure.y_scale == "linear" or min(series.y) > 0
    for table in read.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_verdict_tells_of_every_model(pair):
    text = " ".join(pair.record().verdict)
    for name in ("default", "polarized"):
        assert f"In {name} the transitions of" in text
        assert f"{name} makes no measurable use" in text or f"{name} uses distant" in text or f"hurts {name}" in text
    assert "128 are held at one" not in text
    assert "64 are held at one and 64 at zero" in text
    assert str(pair) == "\n".join(pair.record().verdict)


def verdict_of(*systems, **options):
    subjects = [Subject(name, system, ACCESS) for name, system in systems]
    found = diagnose(subjects, tokens(6, 80, 16), measures=["influence"], **options)
    return found.record().verdict


def test_the_verdict_is_right_where_the_truth_is_known():
    fast = Recurrence(torch.full((4,), 0.5 ** (1 / 5)), np.eye(4))
    slow = Recurrence(torch.full((4,), 0.5 ** (1 / 20)), np.eye(4))
    never = Recurrence(torch.ones(4), np.eye(4))
    first, second, third, one, two = verdict_of(("fast", fast), ("slow", slow), ("never", never))
    assert first.startswith("fast forgets: the influence of a token halves every 5 tokens")
    assert second.startswith("slow forgets: the influence of a token halves every 20 tokens")
    assert third.startswith("never keeps a trace that does not clearly decay")
    assert "10 % from the last tenth of the 80-token context" in third
    assert "slow forgets more slowly than fast: half-life 20 tokens against 5 tokens" in one
    assert "never forgets more slowly than fast" in two


def test_the_verdict_does_not_claim_what_it_cannot_see():
    *_, comparison = verdict_of(("a", Gated(seed=0, vocab_size=16)), ("b", Gated(seed=0, vocab_size=16)))
    assert "cannot be told apart" in comparison
    only_now = verdict_of(("now", Recurrence(torch.zeros(4), np.eye(4))))[0]
    assert "forgets within a few tokens" in only_now
    assert "comes from the last token," in only_now


class StopAfter:
    """A progress that presses Ctrl-C when the n-th measurement begins."""

    def __init__(self, n):
        self.left = n

    def begin(self, what, steps):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def step(self, n=1):
        pass


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_ctrl_c_keeps_what_is_finished(finished, tmp_path):
    models = {"one": model(), "two": model(1)}
    found = diagnose(models, tokens(1, 16), probes=1, progress=StopAfter(finished), out_dir=tmp_path)
    done = [(m, n) for m in ("influence", "context", "smoothing", "transitions") for n in getattr(found, m)]
    assert done == [("influence", "one"), ("influence", "two"), ("context", "one")][:finished]
    assert not found.complete
    assert len(found.missing) == 8 - finished
    record = Record.read(tmp_path / "results.json")
    assert not record.complete
    assert record.verdict[0].startswith("Interrupted")
    assert record == found.record().model_copy(update={"provenance": record.provenance})


def test_a_kill_leaves_what_was_finished(tmp_path):
    class Killed(StopAfter):
        def begin(self, what, steps):
            try:
                super().begin(what, steps)
            except KeyboardInterrupt:
                raise SystemExit from None  # what nothing here catches

    with pytest.raises(SystemExit):
        diagnose(model(), tokens(1, 16), probes=1, progress=Killed(2), out_dir=tmp_path)
    record = Record.read(tmp_path / "results.json")
    assert not record.complete
    assert {t.id for t in record.tables} == {"influence", "context", "models"}


def test_what_does_not_apply_is_skipped_and_said():
    found = diagnose(Subject("bare", Gated(vocab_size=16), ACCESS), tokens(2, 20, 16), probes=1)
    assert found.complete
    assert list(found.influence) == ["bare"]
    assert not found.transitions
    notes = " ".join(found.record().notes)
    assert "transitions was not measured" in notes
    assert "smoothing was not measured" in notes


def test_names_and_inputs():
    by_list = diagnose([model(), model(1)], tokens(1, 16), measures=["transitions"])
    assert list(by_list.transitions) == ["model 1", "model 2"]
    each = diagnose(
        {"a": model(), "b": model(vocab_size=64)},
        {"a": tokens(1, 16), "b": tokens(1, 24, 64)},
        measures=["transitions"],
    )
    assert [t.length for t in each.transitions.values()] == [16, 24]
    with pytest.raises(UserError, match="did you mean 'smoothing'"):
        diagnose(model(), tokens(1, 16), measures=["smothing"])
    with pytest.raises(UserError, match="no model"):
        diagnose({}, tokens(1, 16))
    with pytest.raises(UserError, match="same name"):
        diagnose([Subject("a", model()), Subject("a", model())], tokens(1, 16))


def test_the_same_seed_gives_the_same_numbers():
    one, two = (diagnose(model(), tokens(2, 24), probes=2, seed=3).record() for _ in range(2))
    assert one.tables == two.tables
    assert one.figures == two.figures


def test_plot_draws_every_figure(pair):
    canvas = pair.plot()
    assert len(canvas.axes) == 10
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.lines for axes in canvas.axes)


def test_infinite_half_lives_can_be_recorded(tmp_path):
    found = diagnose(
        Subject("never", Recurrence(torch.ones(2), np.eye(2)), ACCESS), tokens(2, 40, 16), measures=["influence"]
    )
    table = Record.read(found.record().write(tmp_path / "results.json")).tables[0]
    value = table.rows[0][1].value
    assert math.isinf(value) or value > 1e4


def test_bars_go_to_stderr(capsys):
    diagnose(model(), tokens(1, 16), probes=1, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "influence" in captured.err
