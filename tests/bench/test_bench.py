"""The benchmark measures what it says: contenders compute the same thing, turns are taken, and what is printed is what was timed.
No test looks at how fast anything is."""

import functools
import json
import time

import pytest
import torch
from cases import close, needs_compiler
from typer.testing import CliRunner

from ssmlens import bench, mixers
from ssmlens.bench import layer, memory, parts, scan, timing
from ssmlens.cli import app
from ssmlens.results import Record

SHAPE = scan.Shape(2, 13, 5, 3)


def test_contenders_compute_the_same_function_and_gradients():
    names = list(scan.scans())
    assert {scan.CHUNKED, scan.LOOP, scan.REFERENCE, scan.MAMBAPY, scan.TRANSFORMERS} <= set(names)
    wanted = [a.double().requires_grad_() for a in scan.inputs(SHAPE)]
    y = scan.scans()[scan.REFERENCE](*wanted)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad(y, wanted, dy)
    for name in names:
        close(scan.forward(name, SHAPE)(), y, torch.float32, name)
        # pscan of mambapy pads to a power of two; its gradients are held to a looser line
        mine = [a.requires_grad_() for a in scan.inputs(SHAPE)]
        for got, want in zip(torch.autograd.grad(scan.scans()[name](*mine), mine, dy.float()), gradients, strict=True):
            close(got, want, torch.float32, name, slack=10)
        assert len(scan.both(name, SHAPE)()) == len(wanted)


def test_layers_have_the_same_weights():
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    both = layer.layers(layer.Size(2, 9, 16))
    close(both["ssmlens"](x), both["transformers"](x), torch.float32)


def test_the_products_are_those_of_the_layer():
    """Their widths are read off a real layer, not assumed."""
    from ssmlens import mixers

    m = mixers.build("mamba", 48)
    weights = [p.weight.shape for p in (m.in_proj, m.x_proj, m.dt_proj, m.out_proj)]
    pairs = layer.products(layer.Size(2, 9, 48))
    assert [w.shape for _, w in pairs] == weights
    assert all(x.shape == (18, w.shape[1]) for x, w in pairs)


def test_contenders_take_turns_and_the_slow_one_sits_out():
    order = []
    quick = timing.Contender("quick", lambda: order.append("quick"))
    slow = timing.Contender("slow", lambda: (order.append("slow"), time.sleep(0.02)))
    times = timing.in_turns([quick, slow], rounds=4, budget=0.03)
    assert order[:6] == ["quick", "slow", "quick", "slow", "quick", "slow"]
    assert len(times["quick"]) == 4
    assert len(times["slow"]) == 2
    too_slow = timing.in_turns([slow], rounds=4, budget=0.001)
    assert len(too_slow["slow"]) == 1, "its only call is the measurement"


def test_statistics():
    value = timing.median([1.0, 2.0, 3.0, 4.0, 100.0], "ms", 10)
    assert value.value == 30
    assert value.stderr == pytest.approx(1.2533 * 1.4826 * 1.0 / 5**0.5 * 10)
    assert timing.median([2.0]).stderr is None
    times = {"a": [1.0, 4.0], "b": [1.0, 2.0, 3.0]}
    assert timing.ratios(times, "a", "b") == [1.0, 2.0]
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0)


@pytest.mark.skipif(not memory._STATUS.exists(), reason="peak memory is read from /proc, which this system has not")
def test_memory_is_the_peak_beyond_the_arguments():
    extra = memory.extra(functools.partial, torch.ones, 25_000_000, threads=1)
    assert 95e6 < extra < 130e6


@needs_compiler
def test_everything_at_smoke_scale(tmp_path):
    result = CliRunner().invoke(app.app, ["bench", "--scale", "smoke", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "results.json")
    assert [t.id for t in record.tables] == ["scan", "layer", "step", "shares", "mixers", "long"]
    assert [f.id for f in record.figures] == ["length"]
    rows = {row[0]: row for row in record.tables[0].rows}
    assert set(scan.PROMISED) | {parts.FLOOR, parts.TORCH_EXP} == set(rows)
    assert rows[scan.OURS][3] == 1.0
    assert all(row[1].value > 0 for row in rows.values())
    assert sum(row[1] for row in record.tables[3].rows) == pytest.approx(100, abs=0.2)
    every = record.tables[4].rows
    assert {row[0] for row in every} == set(mixers.names())
    counts = [row[2] for row in every]
    assert max(counts) < 1.01 * min(counts), "equal parameters"
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "length.png").exists()


def test_one_part_as_json_and_unknown_parts(tmp_path):
    result = CliRunner().invoke(
        app.app, ["bench", "length", "--scale", "smoke", "--json", "--threads", "1", "--out", str(tmp_path)]
    )
    record = json.loads(result.stdout)
    assert record["config"] == {"parts": ["length"], "scale": "smoke", "threads": 1}
    wrong = CliRunner().invoke(app.app, ["bench", "scam"])
    assert wrong.exit_code != 0
    assert set(bench.PARTS) == {"scan", "length", "layer", "step", "mixers", "long"}
