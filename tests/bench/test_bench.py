"""The benchmark measures what it says: contenders compute the same thing, turns are taken, and what is printed is what was timed.
No test looks at how fast anything is."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from cases import close, needs_compiler
from typer.testing import CliRunner

from ssmlens import bench, mixers
from ssmlens.bench import every, layer, memory, parts, profiling, scan, timing
from ssmlens.bench.parts import length
from ssmlens.cli import app
from ssmlens.cli import bench as cli_bench
from ssmlens.errors import UserError
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
    m = mixers.build("mamba", 48)
    weights = [p.weight.shape for p in (m.in_proj, m.x_proj, m.dt_proj, m.out_proj)]
    pairs = layer.products(layer.Size(2, 9, 48))
    assert [w.shape for _, w in pairs] == weights
    assert all(x.shape == (18, w.shape[1]) for x, w in pairs)


def test_contenders_take_turns_and_the_slow_one_sits_out():
    order, told = [], []
    quick = timing.Contender("quick", lambda: order.append("quick"))
    slow = timing.Contender("slow", lambda: (order.append("slow"), time.sleep(0.02)))
    times = timing.in_turns([quick, slow], rounds=4, budget=0.03, report=told.append)
    assert order[:6] == ["quick", "slow", "quick", "slow", "quick", "slow"]
    assert len(times["quick"]) == 4
    assert len(times["slow"]) == 2
    assert told == sorted(told), "what is done only grows"
    assert (told[0], told[-1]) == (0.1, 1.0)
    order.clear()
    too_slow = timing.in_turns([slow], rounds=4, budget=0.001)
    assert (len(too_slow["slow"]), order) == (1, ["slow"]), "its only call is the measurement"


def test_a_slow_contender_is_called_once_and_ours_beside_it():
    order = []
    own = timing.Contender("own", lambda: order.append("own"))
    slow = timing.Contender("slow", lambda: order.append("slow"))
    times = timing.beside(own, slow, rounds=3)
    assert order == ["slow", "own", "own", "own", "own"]
    assert (len(times["slow"]), len(times["own"])) == (1, 3)


def test_statistics():
    value = timing.median([1.0, 2.0, 3.0, 4.0, 100.0], "ms", 10)
    assert value.value == 30
    assert value.stderr == pytest.approx(1.2533 * 1.4826 * 1.0 / 5**0.5 * 10)
    assert timing.median([2.0]).stderr is None
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0)


def test_a_ratio_is_taken_within_a_round_and_a_single_call_says_so():
    times = {"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 2.0, 7.0], "once": [100.0]}
    assert timing.ratio(times, "a", "b") == timing.Ratio(3.0, 2.5, 3.5, 3), "of 2, 4, 3"
    single = timing.ratio(times, "once", "b")
    assert (single.value, single.calls) == (pytest.approx(100 * (1 / 2 + 1 / 7) / 2), 1)
    assert "from a single call" in str(single)
    assert single.cell() == "32.1 (a single call)"
    assert str(timing.Ratio(47.4, 44.0, 48.2, 9)) == "47 times (quartiles 44 to 48)"
    assert timing.Ratio(47.4, 44.0, 48.26, 9).cell() == "47.4 (44 to 48.3)"
    assert timing.Ratio(1.0, 1.0, 1.0, 9).cell() == "1"


def test_the_floor_does_the_same_work_every_time():
    """In place, exp(exp(...)) would be at infinity after a few rounds, which takes another time."""
    run = scan.torch_exp(SHAPE)
    assert torch.equal(run().clone(), run())


@pytest.mark.skipif(not memory._STATUS.exists(), reason="peak memory is read from /proc, which this system has not")
def test_memory_is_the_peak_beyond_the_arguments():
    kept = torch.ones(1_000_000)
    extra = memory.extra(lambda: (kept + torch.ones(25_000_000)[:1_000_000]).sum())
    if extra is None:
        pytest.skip("the peak of a process cannot be reset here")
    assert 95e6 < extra < 130e6


def test_every_operator_is_in_one_group_and_shares_add_up():
    for operator, group in {
        "aten::addmm": profiling.PRODUCTS,
        "ssmlens::selective_scan_backward": profiling.SCAN,
        "ssmlens::causal_conv1d": "short convolution",
        "aten::_fused_adamw_": "optimizer",
        "Optimizer.step#AdamW.step": "optimizer",
        "autograd::engine::evaluate_function: MmBackward0": profiling.OUTSIDE,
        "aten::silu_backward": "element-wise and sums",
        "aten::tanh": "element-wise and sums",
        "aten::transpose": "shapes and dispatch",
        "aten::never_heard_of": profiling.REST,
    }.items():
        assert profiling.group(operator) == group, operator
    weight = torch.randn(64, 64, requires_grad=True)
    measured = profiling.measure(lambda: (weight @ weight).sum().backward(), 2)
    shares = profiling.shares(measured)
    assert [sum(each) for each in zip(*shares.values(), strict=True)] == pytest.approx([1.0, 1.0])
    assert {profiling.PRODUCTS, profiling.OUTSIDE} <= set(shares)
    assert "mm (3×)" in profiling.largest(measured, profiling.PRODUCTS)


def test_every_mixer_has_one_kind():
    listed = [name for names in every.KINDS.values() for name in names]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) <= set(mixers.names())
    assert sorted(name for names in every.kinds().values() for name in names) == mixers.names()
    assert set(every.kinds()) <= set(every.MEANINGS)


# ---- plan, interruption, resumption ----


def test_the_plan_gives_calls_of_minutes_a_process_and_a_place_of_their_own():
    """transformers' backward pass takes time with the square of the length: at these sizes minutes a call."""
    units = {unit.id: unit.seconds for unit in bench.plan(list(bench.PARTS), "laptop")}
    assert {
        "scan-both-transformers",
        "scan-both-ssmlens-reference",
        "layer-both-transformers",
        "step-transformers",
    } <= set(units)
    assert sum(units.values()) < 25 * 60
    assert all(seconds > 0 for seconds in units.values())
    slower = {unit.id: unit.seconds for unit in bench.plan(list(bench.PARTS), "laptop", threads=1)}
    assert sum(slower.values()) > 1.5 * sum(units.values())
    s = bench.SCALES["laptop"]
    at = {x: set(length._calls(s, x)) for x in s.lengths}
    assert set(scan.scans()) == at[100]
    assert {scan.TRANSFORMERS, scan.REFERENCE, scan.LOOP}.isdisjoint(at[100_000])
    assert {next(iter(scan.scans()))} == at[1_000_000]
    assert "transformers from length 10,000 on" in " ".join(length._left_out(s, list(s.lengths)))


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, monkeypatch):
    kept, measured = [], []
    real = parts.PARTS["length"].measure

    def measure(unit, s, report):
        if unit == "100" and not measured.count("100"):
            measured.append("100")
            raise KeyboardInterrupt
        measured.append(unit)
        return real(unit, s, report)

    monkeypatch.setattr(parts.PARTS["length"], "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.run(["length"], "smoke", threads=1, out=tmp_path, keep=kept.append)
    assert measured == ["10", "100"]
    assert not kept[-1].complete
    assert "Not measured yet: length, 100." in kept[-1].notes
    assert [c.name for c in kept[-1].tables[0].columns] == ["contender", "length 10"]

    with pytest.raises(UserError, match="resume"):
        bench.run(["length"], "smoke", threads=1, out=tmp_path)
    with pytest.raises(UserError, match=r"threads was 1, is now 2"):
        bench.run(["length"], "smoke", threads=2, out=tmp_path, resume=True)
    assert measured == ["10", "100"], "a refused run measures nothing"

    record = bench.run(["length"], "smoke", threads=1, out=tmp_path, resume=True, keep=kept.append)
    assert measured == ["10", "100", "100"]
    assert record.complete
    assert [c.name for c in record.tables[0].columns] == ["contender", "length 10", "length 100"]
    first = [row[1] for row in kept[-1].tables[0].rows]
    assert first == [row[1] for row in record.tables[0].rows], "what was measured before is not measured again"


def test_a_killed_run_leaves_a_record(tmp_path):
    """kill -9 after the first unit: its page and record are there, whole."""
    code = f"""
import os, signal
from pathlib import Path
from ssmlens import bench
def keep(record):
    record.write({str(tmp_path / "results.json")!r})
    if record.tables:
        os.kill(os.getpid(), signal.SIGKILL)
bench.run(["length"], "smoke", threads=1, out=Path({str(tmp_path)!r}), keep=keep)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    record = Record.read(tmp_path / "results.json")
    assert not record.complete
    assert bench.run(["length"], "smoke", threads=1, out=tmp_path, resume=True).complete


def test_a_unit_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    def measure(unit, s, report):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(parts.PARTS["long"], "measure", measure)
    with pytest.raises(UserError, match=r"1 measurement\(s\) failed: long-sequence: RuntimeError: no such luck"):
        cli_bench.run(["long", "length"], "smoke", 1, tmp_path, json=False)
    record = Record.read(tmp_path / "results.json")
    assert not record.complete
    assert [f.id for f in record.figures] == ["length"]
    assert "Failed: long-sequence: RuntimeError: no such luck" in record.notes


@needs_compiler
def test_everything_at_smoke_scale(tmp_path):
    result = CliRunner().invoke(app.app, ["bench", "--scale", "smoke", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "results.json")
    assert record.complete
    tables = {t.id: t for t in record.tables}
    assert list(tables) == ["scan", "lengths", "layer", "step", "shares", "mixers", "long"]
    assert [f.id for f in record.figures] == ["length", "mixers-speed"]
    rows = {row[0]: row for row in tables["scan"].rows}
    assert set(scan.PROMISED) | {scan.FLOOR, scan.TORCH_EXP} == set(rows)
    assert rows[scan.OURS][2] == "1"
    assert all(row[1].value > 0 for row in rows.values())
    *groups, outside = tables["shares"].rows
    assert sum(row[1].value for row in groups) == pytest.approx(100, abs=0.2)
    inside = sum(row[1].value for row in groups if row[0] in (profiling.PRODUCTS, profiling.SCAN))
    assert outside[1].value == pytest.approx(100 - inside, abs=0.2)
    every_mixer = tables["mixers"].rows
    assert {row[0] for row in every_mixer} == set(mixers.names())
    counts = [row[-1] for row in every_mixer]
    assert max(counts) < 1.01 * min(counts), "equal parameters"
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "length.png").exists()


@needs_compiler
def test_slow_contenders_and_memory_as_at_laptop_scale():
    """Every unit of a scale that calls the slow ones once and measures memory, at sizes where nothing is slow."""
    s = dataclasses.replace(bench.SCALES["smoke"], slow=1e-3, apart=True)
    found = {}
    for name in ("scan", "layer", "step", "long"):
        units = parts.PARTS[name].units(s)
        results = {unit: parts.PARTS[name].measure(unit, s, lambda fraction: None) for unit in units}
        found[name] = parts.PARTS[name].found(s, json.loads(json.dumps(results)))
    rows = {row[0]: row for row in found["scan"].tables[0].rows}
    assert {name for name, row in rows.items() if row[3] is not None and row[3].n == 1} == {
        scan.TRANSFORMERS, scan.LOOP, scan.REFERENCE,
    }  # fmt: skip
    assert rows[scan.TRANSFORMERS][4].endswith("(a single call)")
    measured = memory.extra(lambda: None) is not None
    assert all((rows[name][5] is not None) is measured for name in scan.scans())
    layers = [(row[0], row[1], row[2].n) for row in found["layer"].tables[0].rows]
    assert ("forward + backward", "transformers", 1) in layers
    assert ("forward + backward", "ssmlens", s.rounds) in layers
    assert [row[1].n for row in found["step"].tables[0].rows] == [s.rounds, 1]
    assert "single call" in found["step"].expectations[0].measured
    assert (found["long"].tables[0].rows[0][2] is not None) is (sys.platform == "linux")


def test_what_is_promised_is_held_against_what_was_measured(tmp_path):
    """A record of made-up measurements at laptop scale: every promise has a row, and one that is broken says so."""
    s = bench.SCALES["laptop"]
    times = {
        "ssmlens, C++": [1.0, 1.0],
        "mambapy pscan": [40.0, 40.0],
        scan.FLOOR: [0.7, 0.7],
        scan.TORCH_EXP: [5.0, 5.0],
    }
    found = parts.PARTS["scan"].found(s, {"forward": {"times": times}, "both": {"times": times}})
    assert [(e.asked, e.holds) for e in found.expectations] == [
        ("at least 50 times faster", False), ("at most 1.6 times", True), ("slower", True),
    ]  # fmt: skip
    profile = {"aten::mm": [[4, 0.3]] * 2, "ssmlens::selective_scan": [[1, 0.3]] * 2, profiling.STEP: [[1, 0.4]] * 2}
    alone = {"transformers": [9.0], "ssmlens, polarized": [1.0, 1.0]}
    turns = {"ssmlens, polarized": [1.0, 1.0]}
    found = parts.PARTS["step"].found(
        s, {"ours": {"times": turns}, "transformers": {"times": alone}, "shares": {"profile": profile}}
    )
    assert [(e.asked, e.holds) for e in found.expectations] == [("at least 10 times faster", False), ("at most half", True)]  # fmt: skip
    assert "40.0" in found.expectations[1].measured
    found = parts.PARTS["long"].found(s, {"sequence": {"seconds": 35.0, "peak": 4_100_000_000}})
    assert [e.holds for e in found.expectations] == [False]


def test_one_part_as_json_and_unknown_parts(tmp_path):
    result = CliRunner().invoke(
        app.app, ["bench", "length", "--scale", "smoke", "--json", "--threads", "1", "--out", str(tmp_path)]
    )
    record = json.loads(result.stdout)
    assert {k: record["config"][k] for k in ("parts", "scale", "threads")} == {"parts": ["length"], "scale": "smoke", "threads": 1}  # fmt: skip
    assert record["provenance"]["threads"] == 1
    wrong = CliRunner().invoke(app.app, ["bench", "scam"])
    assert wrong.exit_code != 0
    assert set(bench.PARTS) == {"scan", "length", "layer", "step", "mixers", "long"}
