"""Sweeps: nothing that was finished is lost or done twice, and no failure goes unnoticed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_tiny
from training_tiny import training_worker, worker

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.results import Provenance, provenance
from ssmlens.training import SweepError, schedulers, sweep, sweep_provenance
from ssmlens.training.schedulers import Event, execute

JOBS = [("b", {"n": 2}), ("a", {"n": 1, "fail": None})]
HERE = {"processes": 0, "progress": False}


def starts(out_dir, id_):
    path = out_dir / "runs" / id_ / "starts.txt"
    return len(path.read_text()) if path.exists() else 0


def test_results_come_in_the_order_of_the_jobs_and_stay(tmp_path):
    results = sweep(JOBS, tmp_path, worker, **HERE)
    assert [(id_, result["twice"]) for id_, result in results.items()] == [("b", 4), ("a", 2)]
    record = json.loads((tmp_path / "runs" / "a" / "result.json").read_text())
    assert record["config"] == {"n": 1, "fail": None}
    assert record["seconds"] >= 0

    more = sweep([*JOBS, ("c", {"n": 3})], tmp_path, worker, resume=True, **HERE)
    assert [more["b"], more["a"]] == list(results.values())
    assert [starts(tmp_path, id_) for id_ in "abc"] == [1, 1, 1]


def test_more_or_fewer_seeds_keep_what_is_finished(tmp_path):
    def seeds(n):
        return [(f"seed{i}", {"n": i}) for i in range(n)]

    first = sweep(seeds(2), tmp_path, worker, **HERE)
    more = sweep(seeds(4), tmp_path, worker, resume=True, **HERE)
    assert {id_: more[id_] for id_ in first} == first
    assert sweep(seeds(1), tmp_path, worker, resume=True, **HERE) == {"seed0": first["seed0"]}
    assert sweep(seeds(4), tmp_path, worker, resume=True, **HERE) == more
    assert [starts(tmp_path, f"seed{i}") for i in range(4)] == [1, 1, 1, 1]


def test_a_copy_goes_on_from_one_file(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    made = sweep(JOBS, first, worker, keep=True, **HERE)
    lines = (first / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]

    copy.mkdir()
    shutil.copy(first / "runs.jsonl", copy)
    with pytest.raises(UserError, match="holds runs already"):
        sweep(JOBS, copy, worker, **HERE)
    jobs = [*JOBS, ("c", {"n": 3})]
    more = sweep(jobs, copy, worker, resume=True, keep=True, **HERE)
    assert {id_: more[id_] for id_ in made} == made
    assert [starts(copy, id_) for id_ in "abc"] == [0, 0, 1]
    assert sweep_provenance(copy, ["a"]) == sweep_provenance(first, ["a"])
    assert len((copy / "runs.jsonl").read_text().splitlines()) == 3

    sweep(JOBS[:1], copy, worker, resume=True, keep=True, **HERE)
    assert len((copy / "runs.jsonl").read_text().splitlines()) == 3, "those of other jobs stay"
    with pytest.raises(UserError, match="another configuration"):
        sweep([("a", {"n": 2})], copy, worker, resume=True, **HERE)


def test_a_stopped_sweep_has_its_finished_runs_in_the_file(tmp_path):
    with pytest.raises(SweepError):
        sweep([*JOBS, ("x", {"n": 1, "fail": "bug"})], tmp_path, worker, keep=True, **HERE)
    assert [json.loads(line)["id"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    "break_", [lambda s: s[:-20], lambda s: s.replace('"n": 1', '"n": 5'), lambda s: "[]\n", lambda s: "{}\n"]
)
def test_a_damaged_file_is_named(tmp_path, break_):
    sweep(JOBS, tmp_path / "a", worker, keep=True, **HERE)
    files.write(tmp_path / "b" / "runs.jsonl", break_((tmp_path / "a" / "runs.jsonl").read_text()))
    with pytest.raises(UserError, match=r"runs\.jsonl is damaged .* remove it"):
        sweep(JOBS, tmp_path / "b", worker, resume=True, keep=True, **HERE)
    assert not (tmp_path / "b" / "runs" / "a" / "result.json").exists()


def test_every_run_notes_where_it_comes_from(tmp_path):
    sweep(JOBS, tmp_path, worker, processes=2, threads_per_process=2, progress=False)
    found = sweep_provenance(tmp_path, ["a", "b", "later"])
    assert list(found) == ["a", "b", "later"]
    assert found["later"] is None
    here = provenance()
    for id_ in "ab":
        noted = Provenance.model_validate(found[id_])
        assert noted.model_copy(update={"created": here.created}) == here.model_copy(update={"threads": 2})

    path = tmp_path / "runs" / "a" / "result.json"  # of a version that did not note it
    record = json.loads(path.read_text())
    del record["provenance"]
    path.write_text(json.dumps(record))
    assert sweep(JOBS, tmp_path, worker, resume=True, **HERE)["a"] == record["result"]
    assert sweep_provenance(tmp_path, ["a"]) == {"a": None}


def test_the_device_is_that_of_the_training(tmp_path, monkeypatch):
    from accelerate.state import PartialState

    sweep([("a", {"seed": 1, "delay": 0.0})], tmp_path, training_worker, **HERE)
    assert sweep_provenance(tmp_path, "a")["a"]["device"] == "cpu"
    monkeypatch.setitem(PartialState._shared_state, "device", "cuda:1")
    assert schedulers._device() == "cuda:1"


def test_a_failure_is_raised_at_the_end_and_only_it_runs_again(tmp_path):
    jobs = [("u", {"n": 1, "fail": "user"}), ("x", {"n": 1, "fail": "bug"}), ("y", {"n": 5})]
    with pytest.raises(SweepError, match="2 of 3 runs failed") as caught:
        sweep(jobs, tmp_path, worker, **HERE)
    error = caught.value
    assert isinstance(error, UserError)
    assert error.failures == {"u": "no such thing", "x": "RuntimeError: a bug of two lines"}
    assert error.results["y"]["twice"] == 10
    assert "\n" not in str(error)
    text = (tmp_path / "runs" / "x" / "error.txt").read_text()
    assert "Traceback" in text
    assert "in worker" in text
    with pytest.raises(SweepError, match="2 of 3"):
        sweep(jobs, tmp_path, worker, resume=True, **HERE)
    assert starts(tmp_path, "y") == 1


def test_resuming_with_another_configuration_is_refused(tmp_path):
    sweep(JOBS, tmp_path, worker, **HERE)
    with pytest.raises(UserError, match="holds runs already"):
        sweep(JOBS, tmp_path, worker, **HERE)
    with pytest.raises(UserError, match="n was 2, is now 3"):
        sweep([("b", {"n": 3})], tmp_path, worker, resume=True, **HERE)
    path = tmp_path / "runs" / "b" / "result.json"
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(UserError, match="belongs to another configuration"):
        sweep(JOBS, tmp_path, worker, resume=True, **HERE)
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        sweep(JOBS, tmp_path, worker, resume=True, **HERE)


@pytest.mark.parametrize("ids", [["../up"], ["a/b"], [""], [".hidden"], ["a", "a"], ["a", "A"]])
def test_ids_must_name_directories(tmp_path, ids):
    with pytest.raises(ValueError, match=r"directory|same id"):
        sweep([(id_, {"n": 1}) for id_ in ids], tmp_path, worker, **HERE)


def test_a_result_that_is_not_json_is_a_failure(tmp_path):
    with pytest.raises(SweepError, match="TypeError"):
        sweep(JOBS[:1], tmp_path, lambda config, directory, report: {1, 2}, **HERE)
    assert not (tmp_path / "runs" / "b" / "result.json").exists()


def test_another_scheduler_can_take_over_and_is_not_believed_blindly(tmp_path):
    class Forgetful:
        def run(self, tasks, worker):
            for task in tasks:
                if task.id == "b":
                    execute(task, worker, lambda fraction: None)
                yield Event(task.id, "ended", 1.0, None)

    with pytest.raises(SweepError, match=r"1 of 2 runs failed \(a: ended without a result"):
        sweep(JOBS, tmp_path, worker, scheduler=Forgetful(), progress=False)
    assert (tmp_path / "runs" / "a" / "error.txt").read_text() == "ended without a result\n"


def test_processes_have_their_threads_and_die_alone(tmp_path, capfd):
    jobs = [
        ("fine", {"n": 1}),
        ("killed", {"n": 2, "fail": "killed"}),
        ("bug", {"n": 3, "fail": "bug"}),
    ]
    with pytest.raises(SweepError) as caught:
        sweep(jobs, tmp_path, worker, processes=3, threads_per_process=2, title="three")
    assert caught.value.failures == {
        "killed": "killed by SIGKILL (out of memory?)",
        "bug": "RuntimeError: a bug of two lines",
    }
    fine = caught.value.results["fine"]
    assert fine["threads"] == 2
    assert fine["pid"] != os.getpid()
    out, err = capfd.readouterr()
    assert out == ""
    assert "killed failed: killed by SIGKILL" in err
    assert "3/3, 2 failed" in err
    assert "SIGKILL" in (tmp_path / "runs" / "killed" / "error.txt").read_text()
    assert "in worker" in (tmp_path / "runs" / "bug" / "error.txt").read_text()

    results = sweep(jobs[:2], tmp_path, worker, resume=True, **HERE)
    assert results["killed"]["twice"] == 4
    assert results["fine"] == fine
    assert not (tmp_path / "runs" / "killed" / "error.txt").exists()


def alive(group):
    """Whether a process of the group is left (zombies aside: they are reaped by their parent or by init)."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if _readable(path)]
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    return any(int(field[2]) == group and field[0] != "Z" for field in fields)


def _readable(path):
    try:
        return bool(path.read_text())
    except OSError:
        return False


def start_program(out_dir, which, ready):
    """The sweep `which` of training_tiny in a session of its own, once ready() is true."""
    command = [sys.executable, str(Path(training_tiny.__file__)), str(out_dir), which]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def all_gone(process):
    """Its error output, once no process of its session is left."""
    _, error = process.communicate(timeout=60)
    end = time.monotonic() + 60
    while alive(process.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    return error.decode()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_lets_the_workers_save_and_leaves_none_behind(tmp_path):
    runs = tmp_path / "runs"
    done, started = runs / "seed1" / "result.json", runs / "seed2" / "history.jsonl"
    process = start_program(tmp_path, "sweep", lambda: done.exists() and started.exists())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process gets it
    error = all_gone(process)
    assert process.returncode in (130, -signal.SIGINT)
    assert error.count("Traceback") == 1  # that of the program; none of the children's
    assert "stopped after step" in (runs / "seed2" / "log.txt").read_text()
    assert "hello from 1" in (runs / "seed1" / "log.txt").read_text()
    assert not list(runs.glob("*/error.txt"))

    before = done.read_bytes()
    results = sweep(training_tiny.SLOW_JOBS, tmp_path, faster, resume=True, **HERE)
    assert done.read_bytes() == before
    assert results["seed1"]["resumed_from"] is None
    assert results["seed2"]["resumed_from"] > 0


def faster(config, directory, report):
    return training_worker({**config, "delay": 0.0}, directory, report)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killing_the_sweep_takes_its_workers_with_it(tmp_path):
    process = start_program(tmp_path, "sleep", (tmp_path / "runs" / "one" / "asleep").exists)
    with pytest.raises(UserError, match=f"another process is running in {tmp_path}"):
        sweep([("one", {})], tmp_path, worker, resume=True, **HERE)
    process.kill()
    all_gone(process)
    with files.locked(tmp_path, "running"):  # no lock is left to remove by hand
        pass
    assert not list(tmp_path.glob("runs/*/result.json"))
