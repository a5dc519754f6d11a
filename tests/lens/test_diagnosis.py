"""The measurements together: records, verdicts, interruption."""

import math

import numpy as np
import pytest
import torch

from ssmlens.errors import UserError
from ssmlens.lens import MEASURES, Subject, diagnose, verdict
from ssmlens.lens.comparison import comparisons, sign
from ssmlens.lens.context import Context
from ssmlens.lens.progress import Silent
from ssmlens.lens.smoothing import Smoothing
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.results import Record

from .models import hybrid, model, tokens
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
    for measure in MEASURES:
        assert list(getattr(pair, measure)) == (names if measure != "reading" else [])  # which is for classifiers
    assert pair.complete
    assert pair.pairs(pair.influence) == [
        ("default", "polarized"), ("default (at initialisation)", "default"), ("polarized (at initialisation)", "polarized"),
    ]  # fmt: skip


def test_the_record_survives_its_file(pair, tmp_path):
    record = pair.record()
    read = Record.read(record.write(tmp_path / "results.json"))
    assert read.model_copy(update={"maps": []}) == record.model_copy(
        update={"maps": []}
    )  # these hold NaN, which equals nothing
    assert read.to_json() == record.to_json()
    assert read.complete
    assert read.config["text"] == "random"
    assert read.config["models"]["polarized"]["polarization"]["ones"] == 1
    assert read.notes[0] == "a note"
    assert "Two trainings of the same configuration would differ too" in read.notes[-1]
    assert read.seeds == [0]
    assert {t.id for t in read.tables} == {
        "influence", "influence-by-layer", "context", "sharpness", "transitions", "bounds-recency", "bounds-smoothing", "filters-measured",
        "hidden-attention", "comparisons", "models",
    }  # fmt: skip
    ids = [f.id for f in read.figures]
    assert len(set(ids)) == len(ids)
    assert ids[:3] == ["influence", "loss-by-context", "loss-by-position"]
    assert {
        "influence-by-layer",
        "influence-ratio",
        "bounds-decay",
        "bounds-rates",
        "bounds-smoothing",
        "filters-measured",
    } < set(ids)
    assert "hidden-attention" not in ids
    assert [m.id for m in read.maps] == [
        "transition-values-by-layer", "transition-ranges-by-layer", "transition-horizons-by-layer", "hidden-attention",
    ]  # fmt: skip
    assert any(note.startswith("Influence of default was expected to take about") for note in read.notes)
    for figure in read.figures:
        assert figure.meaning
        assert figure.x_label
        if figure.id not in ("influence-ratio", "bounds-decay", "bounds-rates", "bounds-smoothing"):
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
        assert f"In {name} the median learned state channel" in text
        assert f"{name} uses text more than 4 tokens" in text or f"{name} does not use text more than 4 tokens" in text
    assert "Of all 1,152, 64 are held at one and 64 at zero" in text
    assert str(pair) == "\n".join(pair.record().verdict)


def verdict_of(*systems, **options):
    subjects = [Subject(name, system, ACCESS) for name, system in systems]
    found = diagnose(subjects, tokens(6, 80, 16), measures=["influence"], **options)
    return found.record().verdict


def test_the_verdict_is_right_where_the_truth_is_known():
    fast = Recurrence(torch.full((4,), 0.5 ** (1 / 5)), np.eye(4))
    slow = Recurrence(torch.full((4,), 0.5 ** (1 / 20)), np.eye(4))
    never = Recurrence(torch.ones(4), np.eye(4))
    one, two, first, second, third = verdict_of(("fast", fast), ("slow", slow), ("never", never))
    assert one.startswith("slow forgets more slowly than fast: a token's influence halves every 20 tokens, in fast")
    assert one.endswith("it halves every 5 tokens.")
    assert two.startswith("never forgets more slowly than fast")
    assert first.startswith("fast forgets: the influence of a token halves every 5 tokens")
    assert second.startswith("slow forgets: the influence of a token halves every 20 tokens")
    assert third.startswith("never keeps a trace that does not clearly decay")
    assert third.endswith("comes from the last 72 tokens of 80.")


def test_the_verdict_does_not_claim_what_it_cannot_see():
    comparison, *_ = verdict_of(("a", Gated(seed=0, vocab_size=16)), ("b", Gated(seed=0, vocab_size=16)))
    assert comparison.startswith("Which of b and a forgets more slowly cannot be told")
    only_now = verdict_of(("now", Recurrence(torch.zeros(4), np.eye(4))))[0]
    assert "forgets within a few tokens" in only_now
    assert "comes from the last token of 80." in only_now


def test_one_sequence_claims_nothing():
    fast, slow = (Recurrence(torch.full((4,), 0.5 ** (1 / life)), np.eye(4)) for life in (5, 20))
    found = diagnose(
        [Subject("fast", fast, ACCESS), Subject("slow", slow, ACCESS)], tokens(1, 80, 16), measures=["influence", "context"]
    )  # fmt: skip
    warning, comparison, *_ = found.record().verdict
    assert warning.startswith("One sequence says nothing about chance")
    assert comparison.startswith("slow on this one sequence: a token's influence halves every 20 tokens")
    assert found.record().verdict[-1].endswith("bits per token on this one sequence.")
    assert {row[4] for t in found.tables() if t.id == "comparisons" for row in t.rows} == {None}
    both = diagnose({"one": model(), "two": model(1)}, tokens(1, 16), measures=["smoothing"]).record().verdict
    assert all("this one sequence" in sentence for sentence in both[1:-1])
    assert both[-1].startswith("one and two have no state channel held")  # which is no measurement


def test_comparisons_are_paired_where_the_sequences_are_the_same():
    """Two nearly equal models on texts that differ much: only the paired difference can be seen."""
    a, b = Gated(seed=0, offset=2.0), Gated(seed=0, offset=2.05)
    subjects, text = [Subject("a", a, ACCESS), Subject("b", b, ACCESS)], tokens(6, 60)
    same = diagnose(subjects, text, measures=["influence"], probes=4)
    swapped = diagnose(subjects, {"a": text, "b": text.flip(0)}, measures=["influence"], probes=4)
    (paired,), (apart,) = comparisons(same), comparisons(swapped)
    assert paired.paired
    assert not apart.paired
    assert sign(paired.difference) == -1
    assert sign(apart.difference) == 0
    assert paired.difference.stderr < 0.2 * apart.difference.stderr
    assert same.record().verdict[0].startswith("b forgets more slowly than a")
    row = dict(
        zip(("what", "model", "against", "difference", "interval", "p", "read"), same.tables()[1].rows[0], strict=True)
    )
    assert (row["model"], row["against"], row["read"]) == ("b", "a", "the same sequences")
    assert row["p"] < 0.05


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([0.5, 0.6, 0.4, 0.5], "m uses text more than 4 tokens back: without it, it loses 0.500 bits per token"),
        ([-0.5, -0.6, -0.4, -0.5], "Text more than 4 tokens back hurts m: without it, it gains 0.500 bits"),
        ([0.01, -0.01, 0.002, -0.002], "m does not use text more than 4 tokens back: without it, it loses at most 0.013"),
        ([0.5, -0.3, 0.2, 0.1], "Whether m uses text more than 4 tokens back cannot be told: without it, its loss changes by −0.40 to +0.65"),
        ([0.5], "Seeing only the last 4 tokens changes the loss of m by +0.50 bits per token on this one sequence."),
    ],
)  # fmt: skip
def test_what_is_said_of_distant_text(costs, said):
    costs = np.array(costs)
    found = Context("m", 32, 1, np.array([1, 2, 4, 8]), 2 + np.tile(costs[:, None], 4), np.full(len(costs), 2.0), np.zeros((len(costs), 31)), np.zeros((len(costs), 31)))  # fmt: skip
    assert verdict.behaviour(found).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([0.6, 0.62, 0.58, 0.6], "Depth blurs m: its tokens become 40 % more alike"),
        ([1.4, 1.42, 1.38, 1.4], "Depth does not blur m: its tokens become 40 % more different"),
        ([0.99, 0.98, 1.0, 1.0], "Depth hardly changes how different the tokens of m are"),
        ([0.5, 1.4, 0.7, 1.1], "Whether depth blurs m cannot be told"),
        ([0.6], "m on this one sequence: relative sharpness 1.00 after layer 1, 0.60 after layer 2"),
    ],
)
def test_what_is_said_of_blur(changes, said):
    assert verdict.blurring(blur("m", changes)).startswith(said)


def blur(name, changes):
    z = np.stack([np.ones(len(changes)), np.array(changes)], 1)
    one, layers = {"block": np.ones_like(z)}, {"block": [1, 2]}
    return Smoothing(name, 9, 9, {"block": z}, one, {"block": np.zeros_like(z)}, layers)


def test_which_blurs_less():
    easy_and_hard = np.array([0.5, 0.9, 0.6, 0.8])
    a, b = blur("a", easy_and_hard), blur("b", easy_and_hard + 0.1)
    assert verdict._blurs_less(a, b, True).startswith("b blurs less with depth than a")
    assert verdict._blurs_less(b, a, True).startswith("a blurs more with depth than b")
    assert verdict._blurs_less(a, b, False).startswith("Which of b and a blurs less cannot be told")
    assert verdict._blurs_less(a, blur("c", easy_and_hard + 0.01), True).startswith("c and a blur alike")


@pytest.mark.parametrize("averages", [(1,), (0, 1, 2)])
def test_hybrids_and_models_without_recurrence(averages, tmp_path):
    found = diagnose(
        {"mamba": model(n_layers=3), "other": hybrid(*averages)}, tokens(3, 32), probes=1, out_dir=tmp_path
    )
    assert found.complete
    record = Record.read(tmp_path / "results.json")
    notes = " ".join(record.notes)
    if len(averages) == 3:
        assert list(found.transitions) == ["mamba"]
        assert (
            "other: not measured because none of its layers has a diagonal transition: transitions, bounds, hidden attention."
            in notes
        )
    else:
        assert found.transitions["other"].numbers == [1, 3]
        assert "other: transitions were measured in layers 1, 3; the others have no diagonal transition." in notes
        assert "other: sharpness of inputs and memories was measured in layers 1, 3" in notes
        assert "of 2 layers" in " ".join(s for s in record.verdict if "other" in s)
    models = next(t for t in record.tables if t.id == "models")
    assert models.rows[1][4] == ("Average" if len(averages) == 3 else "Mamba, Average")
    found.plot()


class StopAfter(Silent):
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
    done = [(m, n) for m in MEASURES for n in getattr(found, m)]
    assert done == [("influence", "one"), ("influence", "two"), ("context", "one")][:finished]
    assert not found.complete
    assert len(found.missing) == 12 - finished  # 16 tokens are too few for filters
    assert "too few for a frequency" in " ".join(found.skipped)
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
    assert {t.id for t in record.tables} >= {"influence", "influence-by-layer", "models"}
    assert {p.name for p in (tmp_path / "measured").glob("*.npz")} == {"influence-1.npz", "context-1.npz"}


def test_what_does_not_apply_is_skipped_and_said():
    found = diagnose(Subject("bare", Gated(vocab_size=16), ACCESS), tokens(2, 20, 16), probes=1)
    assert found.complete
    assert list(found.influence) == ["bare"]
    assert not found.transitions
    notes = " ".join(found.record().notes)
    assert "does not show its transitions: transitions" in notes
    assert "its blocks were not found: smoothing" in notes


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
    assert len(canvas.axes) == len(pair.figures())
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


def test_layers_that_only_keep_or_have_no_transition_are_said_so():
    found = diagnose({name: model(mixer=name) for name in ("linear_attention", "s4")}, tokens(2, 16), probes=1)
    assert "In linear_attention the median learned state channel loses nothing;" in str(found)
    assert (
        "s4: not measured because none of its layers has a diagonal transition: transitions, bounds, hidden attention."
        in found.record().notes
    )


def test_a_transformer_of_the_same_size_beside_it():
    found = diagnose(
        {"mamba": model(n_layers=6)}, tokens(3, 32), probes=1, measures=["smoothing", "transitions"], at_initialisation=True, transformer=True
    )  # fmt: skip
    mamba, fresh, beside = (s for s in found.subjects)
    assert (fresh.name, beside.name) == ("mamba (at initialisation)", "transformer (at initialisation)")
    sizes = [sum(p.numel() for block in s.blocks for p in block.parameters()) for s in (mamba, beside)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert list(found.smoothing) == ["mamba", fresh.name, beside.name]
    assert found.pairs(found.smoothing) == [(fresh.name, "mamba"), (beside.name, fresh.name)]
    said = found.record().verdict
    assert any(
        s.startswith(f"{fresh.name} and {beside.name} blur") or f"than {beside.name}" in s or beside.name in s
        for s in said
    )
    assert not any(s.startswith("Depth") and beside.name in s for s in said), "nothing is said of the untrained alone"
    assert all(panel.group == "mamba" for m in found.maps() for panel in m.panels)


def test_the_verdict_says_what_polarization_changed_or_would():
    def built(polarization, **more):
        torch.manual_seed(0)
        fields = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "mixer": "mamba"} | more
        return LanguageModel(LanguageModelConfig(**fields, polarization=polarization))

    x = torch.randint(0, 20, (4, 32), generator=torch.Generator().manual_seed(0))
    both = {"plain": built(None), "polarized": built({"ones": 1, "zeros": 1})}
    options = {"measures": ("influence", "smoothing"), "probes": 2}
    first = diagnose(both, x, **options).verdict()[0]
    assert first.startswith("What polarization changed, polarized against plain (one training of each): ")
    assert "What polarization changed" not in " ".join(diagnose(both, x[:1], **options).verdict())
    alone = diagnose({"plain": both["plain"]}, x, **options).verdict()[-1]
    assert alone.startswith("plain has no state channel held at one or zero.")
    said = " ".join(diagnose({"polarized": both["polarized"]}, x, **options).verdict())
    assert "What polarization changed" not in said
    assert "no state channel held" not in said
    other = {"a": built(None, d_model=8), "polarized": both["polarized"]}  # they differ in more than that
    assert "What polarization changed" not in " ".join(diagnose(other, x, **options).verdict())
    attention = diagnose({"t": built(None, mixer="attention")}, x, **options).verdict()
    assert "no state channel held" not in " ".join(attention)
