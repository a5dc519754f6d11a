"""Two processes, as `accelerate launch` would start them: the same training, stopped together, resumed bitwise."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training_tiny
from test_resume import assert_same, content
from training_tiny import CONFIG, run


def launch(out_dir, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(training_tiny.__file__)), str(out_dir), "distributed", *arguments]
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            env={**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i), "ACCELERATE_USE_CPU": "true"},
        )
        for i in range(2)
    ]


def finish(processes):
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    return [process.returncode for process in processes], errors


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(tmp_path):
    codes, errors = finish(launch(tmp_path / "two"))
    assert codes == [0, 0], errors
    two = content(tmp_path / "two")

    model, result = run(tmp_path / "one", dropout=0.0)
    for name, tensor in two["model"].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert len(two["rows"]) == len(result.history) + len(result.evaluations)
    assert len(two["rng"]) == 2

    processes = launch(tmp_path / "stopped", "slow")
    end = time.monotonic() + 60
    while not (tmp_path / "stopped" / "checkpoints" / "step-00000014").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # only one of them hears it
    codes, errors = finish(processes)
    assert codes[1] == 143, errors
    assert codes[0] != 0, errors
    assert "stopped after step" in errors[0]
    assert content(tmp_path / "stopped")["state"]["finished"] is None
    codes, errors = finish(launch(tmp_path / "stopped"))
    assert codes == [0, 0], errors
    assert_same(two, content(tmp_path / "stopped"))
    assert two["step"] == f"step-{CONFIG.steps:08d}"
