"""A run that was stopped, in whatever way, ends bitwise where the uninterrupted one ends."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_tiny
from training_tiny import CONFIG, Stream, evaluate, run

from ssmlens.errors import UserError
from ssmlens.training import checkpoints


def content(out_dir):
    """Everything that a run leaves, but the times."""
    path = checkpoints.latest(out_dir / "checkpoints")
    state = checkpoints.read_state(path)
    rows = (out_dir / "history.jsonl").read_text().splitlines()
    return {
        "step": path.name,
        "model": checkpoints.load_file(path / "model.safetensors"),
        "optimizer": torch.load(path / "optimizer.pt", weights_only=True),
        "rng": torch.load(path / "rng.pt", weights_only=True),
        "rows": [row.split(', "tokens_per_second"')[0] for row in rows],
        "state": {key: value for key, value in state.items() if key not in ("seconds", "history_bytes")},
    }


def assert_same(left, right, where=""):
    """Bitwise, all the way down."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out_dir = tmp_path_factory.mktemp("whole")
    _, result = run(out_dir)
    torch.set_num_threads(threads)
    return content(out_dir), result


def check(out_dir, whole, resumed_from=None):
    """Resumes what is in out_dir (None: starts again) and compares the end with the whole run."""
    expected, expected_result = whole
    # a resumed run gets another model, and generators that are somewhere else: all must come from the
    # checkpoint
    _, result = run(out_dir, seed=0 if resumed_from is None else 99, resume=True)
    assert_same(expected, content(out_dir))
    assert result.resumed_from == resumed_from
    assert result.metrics == expected_result.metrics
    assert result.tokens == expected_result.tokens
    assert len(result.history) == len(expected_result.history)


def program(out_dir, *arguments):
    path = str(Path(training_tiny.__file__))
    return subprocess.Popen([sys.executable, path, str(out_dir), *arguments], stderr=subprocess.PIPE)


def wait_for(condition, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_in_training_at_some_moment(tmp_path, whole):
    process = program(tmp_path)
    first = tmp_path / "checkpoints" / "step-00000007"
    wait_for(first.exists, process)
    time.sleep(random.SystemRandom().uniform(0.0, 0.3))  # 53 steps of 10 ms are left
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    step = checkpoints.read_state(checkpoints.latest(tmp_path / "checkpoints"))["step"]
    assert 7 <= step < CONFIG.steps
    check(tmp_path, whole, resumed_from=step)


def test_killed_while_a_checkpoint_is_written(tmp_path, whole):
    process = program(tmp_path, "kill-in-save", "10")  # 7 calls of sync per checkpoint: in the middle of the second
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left[1:] == ["step-00000007"]
    assert left[0].startswith(".step-00000014.tmp-")
    check(tmp_path, whole, resumed_from=7)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000056", "step-00000060"]


def interrupted(out_dir, step, number, expected, **options):
    """A run that gets a signal while it draws the batch of `step`."""
    stream = Stream(at={step: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(expected) as caught:
        run(out_dir, stream=stream, **options)
    return caught.value


@pytest.mark.parametrize("step", [0, 6, 11, 29, 58, 59])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path, whole, step, capfd):
    interrupted(tmp_path, step, signal.SIGINT, KeyboardInterrupt)
    assert checkpoints.latest(tmp_path / "checkpoints").name == f"step-{step + 1:08d}"
    assert f"stopped after step {step + 1}" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check(tmp_path, whole, resumed_from=step + 1)


def test_sigterm_does_the_same(tmp_path, whole):
    assert interrupted(tmp_path, 20, signal.SIGTERM, SystemExit).code == 143
    check(tmp_path, whole, resumed_from=21)


def test_two_processes_do_not_share_a_directory(tmp_path, whole):
    """And kill -9 frees it, with no lock left to remove by hand."""
    process = program(tmp_path)
    wait_for((tmp_path / "history.jsonl").exists, process)
    for resume in (True, False):
        with pytest.raises(UserError, match=f"another process is training in {tmp_path}"):
            run(tmp_path, resume=resume)
    wait_for((tmp_path / "checkpoints" / "step-00000007").exists, process)
    process.kill()
    process.communicate()
    check(tmp_path, whole, resumed_from=checkpoints.read_state(checkpoints.latest(tmp_path / "checkpoints"))["step"])


def test_twice_in_a_row(tmp_path, whole):
    interrupted(tmp_path, 16, signal.SIGINT, KeyboardInterrupt)
    interrupted(tmp_path, 33, signal.SIGINT, KeyboardInterrupt, resume=True)
    check(tmp_path, whole, resumed_from=34)


@pytest.mark.parametrize("step", [10, 60])
def test_ctrl_c_in_an_evaluation_stops_at_once_and_does_it_later(tmp_path, whole, step):
    def cut(model):
        values = evaluate(model)
        if model.calls == step:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the signal should have struck")
        return values

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, evaluate=cut)
    assert checkpoints.read_state(checkpoints.latest(tmp_path / "checkpoints"))["evaluated"] == step - 10
    check(tmp_path, whole, resumed_from=step)


def test_a_second_ctrl_c_strikes_at_once(tmp_path):
    def impatient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal should have struck")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream=Stream(at={9: impatient}))
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000007"


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, whole):
    (tmp_path / "checkpoints" / ".step-00000007.tmp-00000000-1-0").mkdir(parents=True)
    (tmp_path / "history.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"st')
    check(tmp_path, whole)


def test_a_damaged_last_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, whole):
    run(tmp_path)
    os.truncate(tmp_path / "checkpoints" / "step-00000060" / "optimizer.pt", 100)
    check(tmp_path, whole, resumed_from=56)


def test_a_finished_run_is_only_read(tmp_path, whole):
    run(tmp_path)
    before = (tmp_path / "history.jsonl").read_bytes()
    model, result = run(tmp_path, seed=99, resume=True, stream=None, evaluate=lambda model: 1 / 0)
    assert (tmp_path / "history.jsonl").read_bytes() == before
    assert result.finished == "steps"
    assert result.metrics == whole[1].metrics
    assert torch.equal(model.mix.weight, whole[0]["model"]["mix.weight"])


def test_another_configuration_is_refused_with_its_keys(tmp_path):
    interrupted(tmp_path, 8, signal.SIGINT, KeyboardInterrupt)
    other = CONFIG.model_copy(update={"lr": 0.5, "clip": None, "checkpoint_every": 1})
    with pytest.raises(UserError, match=r"training\.clip was 1\.0, is now None; training\.lr was 0\.03, is now 0\.5"):
        run(tmp_path, other, resume=True)
    with pytest.raises(UserError, match=r"model\.width was 8, is now 9"):
        run(tmp_path, resume=True, identity={"model": {"width": 9}})


def test_other_surroundings_are_noted(tmp_path, monkeypatch):
    interrupted(tmp_path, 8, signal.SIGINT, KeyboardInterrupt)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    said = []
    run(tmp_path, resume=True, log=said.append)
    assert said == ["note: threads was 1 and is now 2; the resumed run may differ in the last bits"]


def test_a_history_that_was_cut_is_noted(tmp_path):
    interrupted(tmp_path, 8, signal.SIGINT, KeyboardInterrupt)
    os.truncate(tmp_path / "history.jsonl", 30)
    said = []
    _, result = run(tmp_path, resume=True, log=said.append)
    assert "history.jsonl is shorter" in said[0]
    assert result.history[0]["step"] == 12


def test_damaged_checkpoints_are_not_overwritten_unasked(tmp_path):
    run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="holds a run already"):
        run(tmp_path)
    said = []
    run(tmp_path, resume=True, log=said.append)
    assert any("damaged; continuing from the start" in line for line in said)


@pytest.mark.parametrize("content", [b'x{"step": 1}\n', b"\xff\xfe\n"])
def test_a_damaged_history_is_named(tmp_path, content):
    run(tmp_path)
    path = tmp_path / "history.jsonl"
    whole = path.read_bytes()
    path.write_bytes(content + whole[len(content) :])
    with pytest.raises(UserError, match=r"history\.jsonl is damaged"):
        run(tmp_path, resume=True)


def test_a_killed_fine_tuning_of_the_command_line_ends_as_if_nothing_had_been(tmp_path):
    """`ssmlens train --from`, as a user types it, killed with a checkpoint behind it."""
    from typer.testing import CliRunner

    import ssmlens
    from ssmlens.cli.app import app
    from ssmlens.models import LanguageModel, LanguageModelConfig
    from ssmlens.models.retrofit import polarize

    torch.manual_seed(0)
    polarize(LanguageModel(LanguageModelConfig(vocab_size=256, d_model=16, n_layers=1))).save_pretrained(
        tmp_path / "new"
    )
    (tmp_path / "tune.toml").write_text(
        '[data]\ntask = "corpus"\nlength = 64\nbatch_size = 2\nvalidation_windows = 2\n'
        "[training]\nsteps = 100\nlr = 1e-2\nweight_decay = 0.1\ncheckpoint_every = 10\n"
    )

    def command(out, *more):
        return [
            "train",
            str(tmp_path / "tune.toml"),
            "--from",
            str(tmp_path / "new"),
            "--out",
            str(tmp_path / out),
            *more,
        ]

    assert CliRunner().invoke(app, command("whole")).exit_code == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "ssmlens", *command("cut")], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for((tmp_path / "cut" / "checkpoints" / "step-00000010").exists, process, 120.0)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model").exists()
    resumed = CliRunner().invoke(app, command("cut", "--resume"))
    assert resumed.exit_code == 0, resumed.output
    ends = [content(tmp_path / d) for d in ("whole", "cut")]
    for end in ends:
        del end["rng"]  # of generators that this training does not use, and that begin as each process has them
    assert_same(*ends)
    whole, cut = (ssmlens.load(tmp_path / d / "model").state_dict() for d in ("whole", "cut"))
    assert_same(dict(whole), dict(cut))
