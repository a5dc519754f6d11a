import numpy as np
import pytest

from ssmlens.experiments import ITEMS, Request, grid, recall, recall_gain
from ssmlens.experiments.base import Stopped
from ssmlens.experiments.grid_design import FIRST, Cell, factors, in_order, parts, variant
from ssmlens.experiments.grid_parts import chosen, crossing, shared
from ssmlens.experiments.grid_record import record
from ssmlens.experiments.recall_gain import Arm


def test_a_factor_changes_one_thing_from_either_end():
    corrected, released = recall.VARIANTS["corrected"], recall.VARIANTS["released"]
    for factor in ("decay", "zero", "order", "mix"):
        assert variant(f"corrected+{factor}") == recall.replace(corrected, **{factor: getattr(released, factor)})
        assert variant(f"released-{factor}") == recall.replace(released, **{factor: getattr(corrected, factor)})
    assert variant("corrected+dt").initialization == "released_dt"
    assert variant("corrected+weights").initialization == "released_weights"
    assert variant("released-dt").initialization == "released_weights"
    assert variant("released-weights").initialization == "released_dt"
    assert variant("released,replace").mode == "replace"
    assert variant("corrected,dt16").dt_scale == 16


def test_the_corners_are_the_cells_of_table2():
    corners = parts("laptop")["corners"]
    assert len(corners.cells) == 16
    assert corners.seeds >= 5, "they carry the claims"
    name, config = Cell("corrected", "both-2").job("laptop", 3)
    assert name == "corrected-both-2-seed3"
    both = next(c for c in recall.CONFIGURATIONS if c.id == "both-2")
    assert config == recall.job("laptop", recall.VARIANTS["corrected"], both, 3)


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_every_cell_can_be_built(scale):
    cells = {cell.id: cell for part in parts(scale).values() for cell in part.cells}
    made = set()
    for cell in cells.values():
        _, config = cell.job(scale, 0)
        size = recall.sized(recall.SCALES[scale], config["length"])
        chosen = recall.Variant(**config["variant"])
        configuration = next(c for c in recall.CONFIGURATIONS if c.id == cell.configuration)
        recall.data(size, chosen, 0)
        training = recall.training(size, chosen, configuration.layers, 0, 10, cell.rate)
        made.add(
            (str(recall.model(size, configuration, chosen).to_dict()), training, chosen.order, chosen.mix, chosen.decay)
        )
    assert len(made) == len(cells), "no two cells are the same experiment"


def test_the_recall_distance_is_that_of_the_sequences():
    scale = recall.SCALES["smoke"]
    stream = recall.mqar.MqarStream(recall.data(scale, recall.VARIANTS["corrected"], 0))
    mean = sum(
        sum(
            row.index(row[2 * i], 2 * b.group.pairs) - 2 * i - 1
            for row in b.tokens.tolist()
            for i in range(b.group.pairs)
        )
        / (len(b.tokens) * b.group.pairs)
        for b in stream.test()
    )
    groups = sum(1 for _ in stream.test())
    assert recall.recall_distance(scale) == pytest.approx(mean / groups, rel=0.1)


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_factors_are_all_that_the_ends_differ_in(scale):
    """But for the stop on the test set, which only changes when a run ends."""
    released = recall.VARIANTS["released"]
    both = "corrected"
    changed = recall.VARIANTS[both]
    for factor in factors(recall.SCALES[scale]):
        one = variant(f"{both}+{factor}")
        field = "initialization" if factor in ("dt", "weights") else factor
        assert getattr(one, field) != getattr(recall.VARIANTS[both], field)
        changed = recall.replace(changed, **{field: getattr(released, field)})
    assert ("mix" in factors(recall.SCALES[scale])) == (scale == "paper")
    ends = [recall.replace(v, test_stop=False, mix="text") for v in (changed, released)]
    assert ends[0] == ends[1]


def test_what_matters_most_is_run_first():
    grid = parts("laptop")
    runs = in_order(grid)
    assert len(set(runs)) == len(runs)
    assert set(runs) == {(cell, seed) for p in grid.values() for cell in p.cells for seed in range(p.seeds)}
    first = {cell.id: grid[name].seeds for name in ("corners", "factors") for cell in grid[name].cells}
    among = [seed < first.get(cell.id, 0) for cell, seed in runs]
    assert among == sorted(among, reverse=True)
    seeds = [seed for (_, seed), there in zip(runs, among, strict=True) if there]
    assert seeds == sorted(seeds)
    assert [c.configuration for c, _ in runs[: sum(c.configuration in FIRST for c, s in runs if s == 0 and c.id in first)]] == sorted(
        (c.configuration for c, s in runs if s == 0 and c.id in first and c.configuration in FIRST), key=FIRST.index
    )  # fmt: skip


# ---- the record, of worlds that are made up: accuracy(cell, seed), a share ----


def _made(accuracy, scale="laptop", keep=lambda name: True):
    grid = parts(scale)
    results = {}
    for cell, seed in in_order(grid):
        a = accuracy(cell, seed)
        name = f"{cell.id}-seed{seed}"
        if keep(name):
            results[name] = {"accuracy": {"4": a, "8": a, "16": a}, "seconds": 36.0}
    return record(scale, grid, results, {})


def _noise(cell, seed, size=0.004):
    return size * (np.random.default_rng([seed, *cell.id.encode()]).random() - 0.5)


def _has(cell, factor):
    """Whether a cell has it as the released code has it."""
    one = variant(cell.variant)
    if factor in ("dt", "weights"):
        return one.initialization in ("released", f"released_{factor}")
    return getattr(one, factor) == getattr(recall.VARIANTS["released"], factor)


def _table(made, name):
    return next(t for t in made.tables if t.id == name)


def _said(made, start):
    return next(s for s in made.verdict if s.startswith(start))


def test_additive_factors_are_found_with_their_signs_and_sizes():
    points = {"dt": 0.16, "decay": 0.08, "order": -0.04}

    def accuracy(cell, seed):
        gain = sum(size for f, size in points.items() if _has(cell, f)) if "both" in cell.configuration else 0
        return 0.7 + gain + _noise(cell, seed)

    made = _made(accuracy)
    assert made.complete
    assert made.verdict[0].startswith("3 of 5 comparable factors")
    assert "adds to the gain" in _said(made, "Δ's bias zeroed:")
    assert "takes from the gain" in _said(made, "data in order:")
    assert "no difference of 1 point or more" in _said(made, "small first weights:")
    for row in _table(made, "factors").rows:
        factor = next(f for f, words in factors(recall.SCALES["laptop"]).items() if words == row[0])
        want = 100 * points.get(factor, 0)
        assert [v.value for v in row[1:4]] == pytest.approx([want] * 3, abs=0.5), "the same sign from both ends"
        assert row[5].value == pytest.approx(want / 20 * 100, abs=3)
        assert row[5].stderr > 0
    rests = [row[3].value for row in _table(made, "factors-ends").rows if row[1] == "unexplained rest"]
    assert rests == pytest.approx([0, 0], abs=1)
    assert made.config["claims"] == []
    design = {row[0]: row[1:] for row in _table(made, "design").rows}
    assert design["factors"] == [18, 5, 90, 90, pytest.approx(0.9)]


def test_what_acts_together_is_left_over():
    """0.2 only where both are there: half of it is a main effect of each, from the released end, nothing is from the corrected."""

    def accuracy(cell, seed):
        gain = 0.2 if "both" in cell.configuration and _has(cell, "dt") and _has(cell, "decay") else 0
        return 0.7 + gain + _noise(cell, seed)

    made = _made(accuracy)
    rests = [row[3].value for row in _table(made, "factors-ends").rows if row[1] == "unexplained rest"]
    assert rests == pytest.approx([20, -20], abs=1)
    effects = {row[0]: [v.value for v in row[1:4]] for row in _table(made, "factors").rows}
    assert effects["Δ's bias zeroed"] == pytest.approx([0, 20, 10], abs=0.5)


def test_an_effect_that_only_one_end_shows_is_told_with_what_it_does_to_either_arm():
    def accuracy(cell, seed):
        low = _has(cell, "dt") and "default" in cell.configuration
        noise = 0.8 if cell.variant.startswith("released") else 0.001
        return 0.6 - 0.1 * low + _noise(cell, seed, noise)

    made = _made(accuracy)
    said = _said(made, "Δ's bias zeroed:")
    assert "no difference that these seeds can show; from corrected alone by +10.0 points" in said
    assert "(default 60.0 % without it and 50.0 % with it, both channels 60.0 % and 60.0 %)" in said
    assert "alone" not in _said(made, "small first weights:")


def test_where_nothing_is_learned_nothing_is_said():
    made = _made(lambda cell, seed: 0.15 + _noise(cell, seed) + 0.02 * ("both" in cell.configuration))
    assert made.verdict[0].startswith("0 of ")
    for row in _table(made, "factors").rows:
        assert row[-1].startswith("not comparable: from corrected, neither arm found")
        assert row[4] is None
        assert row[5] == "not reproduced here"
    assert "left out: neither arm found" in _said(made, "both, 2 layers:")
    assert not any("adds to the gain" in s or "helps" in s or "begins" in s for s in made.verdict)
    assert _said(made, "Replaced").endswith("(0 of 6 comparable).")


def test_at_the_ceiling_nothing_is_said():
    made = _made(lambda cell, seed: 0.985 + _noise(cell, seed, 0.001) + 0.009 * ("both" in cell.configuration))
    assert made.verdict[0].startswith("0 of ")
    assert all("ceiling" in row[-1] for row in _table(made, "factors").rows)
    assert "not comparable: ceiling" in _said(made, "corrected, both channels")


def test_runs_that_find_it_by_chance_make_no_effect():
    made = _made(lambda cell, seed: 0.9 if np.random.default_rng([1, seed, *cell.id.encode()]).random() < 0.6 else 0.15)
    assert made.verdict[0].startswith("0 of ")
    assert _table(made, "factors").rows[0][5] == "not reproduced here"
    counts = [row[4] for row in _table(made, "factors-runs").rows]
    assert [c.split()[2] for c in counts].count("15") == 3, (
        "corrected, with Δ as in the released code, with its zero (the same default)"
    )
    assert {c.split()[2] for c in counts} == {"5", "15"}
    assert len(set(counts)) > 1
    for row in _table(made, "factors-runs").rows:
        if row[7]:
            assert row[7].value == pytest.approx(90)
    for configuration in ("one channel at 1", "both"):
        assert "begins to pay" not in _said(made, f"{configuration}, 2 layers:")


def _ratio(cell):
    return 1 / recall.half_life(recall.SCALES["laptop"], variant(cell.variant))


def test_where_it_begins_to_pay():
    """4 points for each doubling from the second point of the series on."""
    start = _ratio(Cell("corrected,dt4", "both-2"))

    def accuracy(cell, seed):
        doublings = max(0, np.log2(_ratio(cell) / start)) if cell.configuration in ("both-2", "one-2") else 0
        return 0.65 + 0.04 * min(doublings, 8) + _noise(cell, seed)

    made = _made(accuracy)
    said = _said(made, "both, 2 layers:")
    assert "begins to pay" in said
    distance = recall.recall_distance(recall.SCALES["laptop"])
    at = float(said.split("recall distance of ")[1].split()[0])
    assert at == pytest.approx(distance * start * 2**0.25, rel=0.1)
    assert any("15 seeds in the corrected variant at every half-life; those beyond 5" in note for note in made.notes)
    assert "± 0.0 points at" in said
    rows = _table(made, "half-life").rows
    assert [row[0] for row in rows][-1] == "corrected+dt"
    assert rows[-1][3] == pytest.approx(distance, rel=1e-6), "Δ = ln 2: a half-life of one token"
    assert rows[-1][6] is None, "one channel alone is not trained there"
    assert "points" in _said(made, "With Mamba's own start")
    assert "paper" not in _said(made, "With Mamba's own start")


def test_what_is_far_is_shown_apart_from_what_is_near():
    """Both channels add 20 points to what is asked for after a half-life, nothing before."""
    grid = parts("laptop")
    results = {}
    for cell, seed in in_order(grid):
        far = 90 if "both" in cell.configuration else 70
        life = recall.half_life(recall.SCALES["laptop"], variant(cell.variant))
        counts = {str(d): [(90 if d < life else far) + seed % 2, 100] for d in (1, 4, 16, 32)}
        results[f"{cell.id}-seed{seed}"] = {
            "accuracy": {"4": far / 100}, "seconds": 1.0, "by_distance": {"4": counts, "8": counts | {"48": [3, 9]}},
        }  # fmt: skip
    figure = next(f for f in record("laptop", grid, results, {}).figures if f.id == "by-distance")
    assert len(figure.series) == 5
    for series in figure.series:
        assert len(series.x) == 4, "48 was asked for too seldom"
        assert all(y == pytest.approx(20 if x >= 1 else 0) for x, y in zip(series.x, series.y, strict=True))


def test_where_it_never_pays_and_where_it_falls():
    flat = _made(lambda cell, seed: 0.7 + _noise(cell, seed))
    assert "nowhere between" in _said(flat, "both, 2 layers:")

    def falling(cell, seed):
        gain = (
            {"corrected": 0.04, "corrected,dt4": 0.2}.get(cell.variant, 0.08)
            if "default" not in cell.configuration
            else 0
        )
        return 0.7 + gain + _noise(cell, seed)

    assert "do not rise all the way" in _said(_made(falling), "both, 2 layers:")


def test_the_crossing_is_that_of_the_rising_fit():
    assert crossing([0, 1, 2], [0, 0, 2], 1) == pytest.approx(1.5)
    assert crossing([0, 1, 2], [3, 2, 4], 1) == -np.inf
    assert crossing([0, 1, 2], [0, 0.5, 0.2], 1) == np.inf
    assert crossing([0, 1, 2, 3], [0, 3, 1, 4], 1) == pytest.approx(0.5)  # 3 and 1 are fitted by 2


def test_a_rate_is_not_chosen_by_the_run_that_is_counted():
    """Seed 0 is best at rate b, the others at a: seed 0 is counted at a, where the others send it."""

    def arm(*scores):
        return Arm({s: {"accuracy": {"4": a}} for s, a in enumerate(scores)}, 0.1)

    a, b = arm(0.2, 0.9, 0.9, 0.9), arm(0.8, 0.6, 0.6)  # seed 3 has not been run at b
    assert chosen(shared([a, b])) == {0: pytest.approx(20), 1: pytest.approx(60), 2: pytest.approx(60)}
    assert chosen([arm(0.5), arm(0.6)]) == {}


def test_rescaled_at_the_own_length_is_a_run_of_the_half_lives():
    scale = recall.SCALES["laptop"]
    same = f"corrected,dt{recall.PAPER_LENGTH / scale.length:g}"
    made = _made(lambda cell, seed: 0.7 + _noise(cell, seed) + 0.1 * (cell.id == f"{same}-both-2"))
    gains = {(row[0], row[1]): row[-1] for row in _table(made, "length").rows}
    assert ("rescaled", 4 * scale.length) in gains
    if any(cell.variant == same for cell in parts("laptop")["half-life"].cells):
        assert recall.dt_range(scale, variant(same)) == recall.dt_range(scale, variant("rescaled"))
        assert gains["rescaled", scale.length].value == pytest.approx(10, abs=0.5)


def test_a_record_of_what_is_finished():
    made = _made(
        lambda cell, seed: 0.7 + _noise(cell, seed), keep=lambda name: name.endswith("seed0") and ",dt" not in name
    )
    assert not made.complete
    assert "corrected,dt4-default-2 (0 of 15)" in made.notes[0]
    assert "corrected-default-2 (1 of 15)" in made.notes[0]
    assert "too few runs" in _said(made, "both, 2 layers:")
    assert _made(lambda cell, seed: 0.7, "paper", lambda name: name == "corrected-default-2-seed0").complete is False


def _quick(config, directory, report):
    """In place of training."""
    return {"accuracy": {"2": 0.5, "4": 0.5, "8": 0.5}, "seconds": 1.0, "parameters": 1, "finished": "steps"}


def test_seeds_may_extend_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "trained", lambda jobs, *_: {name: _quick(None, None, None) for name, _ in jobs})
    made = ITEMS["table2-grid"].run(Request(scale="laptop", out=tmp_path, seeds=7))
    assert made.complete
    assert {part["seeds"] for part in made.config["design"].values()} == {7}
    assert all(row[3] == row[4] == 7 * row[1] for row in _table(made, "design").rows)


@pytest.mark.parametrize("item", ["table2", "table2-grid"])
def test_what_is_stopped_leaves_a_record_of_what_was_finished(tmp_path, monkeypatch, item):
    done = []

    def stopped(config, directory, report):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(config["configuration"])
        return _quick(config, directory, report)

    monkeypatch.setattr(recall_gain, "work", stopped)
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    with pytest.raises(Stopped) as caught:
        ITEMS[item].run(request)
    assert not caught.value.record.complete
    assert "3 of " in caught.value.record.notes[0]
    assert set(done) <= set(FIRST)


def test_smoke_runs_and_shares_its_corners_with_table2(tmp_path, monkeypatch):
    """Of the grid, what is replaced and what is longer is really trained, with both channels."""

    def work(config, directory, report):
        real = config["configuration"] == "both-2" and (config["variant"]["mode"] == "replace" or config["length"])
        return recall.work(config, directory, report) if real else _quick(config, directory, report)

    monkeypatch.setattr(recall_gain, "work", work)
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    ITEMS["table2"].run(request)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    assert len(before) == 8
    made = ITEMS["table2-grid"].run(recall.replace(request, resume=True))
    assert all(p.stat().st_mtime_ns == when for p, when in before.items()), "what is there is not trained again"
    assert {t.id for t in made.tables} == {
        "factors", "factors-ends", "factors-runs", "half-life", "length", "mode", "rates", "design"
    }  # fmt: skip
    assert made.complete
