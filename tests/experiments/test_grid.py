import pytest

from ssmlens.experiments import ITEMS, Request, recall
from ssmlens.experiments.grid_design import Cell, parts, variant
from ssmlens.experiments.grid_record import record


def test_a_factor_changes_one_thing_from_either_end():
    corrected, released = recall.VARIANTS["corrected"], recall.VARIANTS["released"]
    for factor, field in (("decay", "decay"), ("zero", "zero"), ("order", "order")):
        assert variant(f"corrected+{factor}") == recall.replace(corrected, **{field: getattr(released, field)})
        assert variant(f"released-{factor}") == recall.replace(released, **{field: getattr(corrected, field)})
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
        made.add((str(recall.model(size, configuration, chosen).to_dict()), training, chosen.order, chosen.decay))
    assert len(made) == len(cells), "no two cells are the same experiment"


def test_a_longer_sequence_has_room_for_its_pairs():
    scale = recall.sized(recall.SCALES["laptop"], 256)
    assert scale.lengths == (8, 16, 32, 64, 128, 256)
    assert recall.data(scale, recall.VARIANTS["corrected"], 0).test[-1].pairs == 64
    assert recall.half_life(scale, recall.VARIANTS["rescaled"]) == pytest.approx(693.1 / 4, rel=1e-3)
    assert recall.half_life(scale, recall.VARIANTS["released"]) == pytest.approx(1.0)


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


def _results(scale, grid, accuracy):
    out = {}
    for part in grid.values():
        for cell in part.cells:
            for seed in range(part.seeds):
                a = accuracy(cell, seed)
                out[cell.job(scale, seed)[0]] = {
                    "accuracy": {"1": a, "2": a, "4": a},
                    "found": 0.5 if a > 0.5 else None,
                    "seconds": 1.0,
                }
    return out  # fmt: skip


def test_the_record_finds_the_factor_that_was_put_in():
    """Δ's start alone makes the gain: 0.3 where its bias is zeroed, 0 elsewhere; polarization pays from four times the range on."""
    grid = parts("laptop")

    def accuracy(cell, seed):
        chosen = variant(cell.variant)
        noise = 0.002 * ((seed * 7 + len(cell.id)) % 5)
        zeroed = chosen.initialization in ("released", "released_dt") or (chosen.dt_scale or 1) >= 4
        return 0.5 + noise + (0.3 if zeroed and "default" not in cell.configuration else 0)

    made = record("laptop", grid, _results("laptop", grid, accuracy), {})
    said = {s.split(":")[0]: s for s in made.verdict}
    assert "beyond chance" in made.verdict[0]
    assert made.verdict[0].startswith("2 of 10")
    assert "changes what polarization adds" in said["corrected, with Δ's bias zeroed"]
    assert "changes what polarization adds" in said["released, without Δ's bias zeroed"]
    assert "cannot be told" in said["corrected, with data in order"]
    assert "begins to pay at a recall distance of" in said["both, 2 layers"]
    (claim,) = made.config["claims"]
    assert (claim["outcome"], claim["paper"]) == ("agrees", "+11.11 points at 1.5 half-lives")


def test_smoke_runs_and_shares_its_corners_with_table2(tmp_path):
    request = Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False)
    ITEMS["table2"].run(request)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    assert len(before) == 8
    made = ITEMS["table2-grid"].run(
        Request(scale="smoke", out=tmp_path, seeds=1, processes=0, progress=False, resume=True)
    )
    assert all(p.stat().st_mtime_ns == when for p, when in before.items()), "what is there is not trained again"
    assert {t.id for t in made.tables} == {"factors", "half-life", "length", "mode", "rates"}
