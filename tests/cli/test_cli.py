"""The command line as a user meets it: every call is a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ssmlens.models import LanguageModel, LanguageModelConfig

COMMAND = [sys.executable, "-m", "ssmlens"]


def ssmlens(*args, cwd, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(
        [*COMMAND, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **kw
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    LanguageModel(LanguageModelConfig(vocab_size=256, d_model=8, n_layers=2, polarization={})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def odd_vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "odd"
    LanguageModel(LanguageModelConfig(vocab_size=100, d_model=8, n_layers=1)).save_pretrained(path)
    return path


def test_help_imports_nothing_heavy(tmp_path):
    """Half a second is not to be tested on a shared machine; what costs seconds is: torch, transformers, matplotlib."""
    code = "import sys; sys.argv = ['ssmlens', '--help']\nfrom ssmlens.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\nprint(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'matplotlib', 'numpy', 'accelerate', 'pydantic'}))"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("[]")
    for verb in ("diagnose", "reproduce", "train", "list"):
        assert verb in run.stdout


def test_import_is_light(tmp_path):
    code = "import sys, ssmlens, ssmlens.ops, ssmlens.mixers; print('transformers' in sys.modules, 'matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_diagnose_writes_everything(model, tmp_path):
    run = ssmlens("diagnose", model, "--length", 48, "--sequences", 2, "--probes", 2, "--out", "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"results.json", "report.html"} <= files
    assert sum(name.endswith(".png") for name in files) >= 4
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["complete"] is True
    assert record["config"]["text"]["sha256"]
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    assert "report.html" in run.stdout.strip().splitlines()[-1]


def test_json_alone_on_stdout(model, tmp_path):
    run = ssmlens("diagnose", model, "--length", 32, "--sequences", 2, "--probes", 1, "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["kind"] == "diagnosis"


def test_same_seed_same_numbers(model, tmp_path):
    runs = [
        ssmlens("diagnose", model, "--length", 32, "--sequences", 2, "--probes", 2, "--json", cwd=tmp_path)
        for _ in range(2)
    ]
    first, second = (json.loads(r.stdout) for r in runs)
    assert first["figures"] == second["figures"]
    assert first["tables"] == second["tables"]


def test_token_ids(odd_vocabulary, tmp_path):
    (tmp_path / "ids.txt").write_text(" ".join(str(i % 100) for i in range(200)))
    run = ssmlens(
        "diagnose", odd_vocabulary, "--token-ids", "ids.txt", "--length", 40, "--probes", 1, "--json", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    (tmp_path / "bad.json").write_text("[1, 2, 300]")
    run = ssmlens("diagnose", odd_vocabulary, "--token-ids", "bad.json", cwd=tmp_path)
    assert_refused(run, "token 300", "vocabulary of 100")


def assert_refused(run, *words):
    assert run.returncode not in (0, None), run.stdout
    assert "Traceback" not in run.stderr, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_bad_input_is_one_clear_line(model, odd_vocabulary, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    broken = tmp_path / "broken"
    broken.mkdir()
    for p in model.iterdir():
        (broken / p.name).write_bytes(p.read_bytes())
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:500])
    cases = [
        (("diagnose", "nowhere"), ["no model at nowhere"]),
        (("diagnose", broken), ["cannot load", "broken"]),
        (("diagnose", model, "--text", "short.txt"), ["shorter than the length"]),
        (("diagnose", model, "--text", "missing.txt"), ["missing.txt"]),
        (("diagnose", model, "--text", "binary.bin"), ["binary.bin"]),
        (("diagnose", model, "--text", "empty.txt"), ["empty.txt"]),
        (("diagnose", model, "--text", "short.txt", "--token-ids", "x"), ["not both"]),
        (("diagnose", odd_vocabulary), ["no tokenizer", "--token-ids"]),
        (("diagnose", model, "--out", "file/deeper"), ["cannot write", "--out"]),
        (("diagnose", model, "--length", "many"), ["--length"]),
        (("diagnos",), ["diagnos"]),
        (("reproduce", "table9"), ["unknown item", "table2"]),
        (("reproduce", "table2", "--scale", "huge"), ["unknown scale"]),
        (("train", "missing.toml"), ["missing.toml"]),
        (("list", "mixer"), ["did you mean 'mixers'"]),
    ]
    for args, words in cases:
        assert_refused(ssmlens(*args, cwd=tmp_path), *words)


CONFIG = """
[model]
vocab_size = 256
d_model = 16
n_layers = 2
[model.polarization]
ones = 1
zeros = 1
[data]
task = "corpus"
text = "text.txt"
length = 32
batch_size = 4
[training]
steps = {steps}
lr = 1e-3
checkpoint_every = 10
log_every = 5
"""


def write_config(path, steps=30, extra=""):
    (path / "text.txt").write_text("a small text about nothing in particular, repeated until it is long. " * 80)
    (path / "run.toml").write_text(CONFIG.format(steps=steps) + extra)


def test_train_then_diagnose(tmp_path):
    write_config(tmp_path)
    run = ssmlens("train", "run.toml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "bits" in run.stdout
    assert (tmp_path / "runs" / "run" / "model" / "model.safetensors").exists()
    run = ssmlens(
        "diagnose",
        "runs/run/model",
        "--text",
        "text.txt",
        "--length",
        32,
        "--sequences",
        2,
        "--probes",
        1,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert_refused(ssmlens("train", "run.toml", cwd=tmp_path), "--resume")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("stepz = 3\n", ["stepz", "did you mean 'steps'"]),
        ("[modle]\n", ["modle", "did you mean 'model'"]),
        ("= 3", ["not TOML"]),
    ],
)
def test_wrong_training_files_are_named(tmp_path, extra, words):
    write_config(tmp_path, extra=extra)
    assert_refused(ssmlens("train", "run.toml", cwd=tmp_path), *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("vocab_size = 256", "vocab_size = 64", ["256 different tokens", "model.vocab_size"]),
        ("ones = 1", 'ones = 16\nmode = "replace"', ["leave none to learn"]),
        ("n_layers = 2", "n_layers = 2\nmixer_config = { d_stat = 3 }", ["did you mean 'd_state'"]),
        ("text.txt", "nowhere.txt", ["nowhere.txt"]),
        ("length = 32", "length = 32000", ["shorter"]),
    ],
)
def test_impossible_training_files_are_refused(tmp_path, old, new, words):
    write_config(tmp_path)
    text = (tmp_path / "run.toml").read_text()
    assert old in text
    (tmp_path / "run.toml").write_text(text.replace(old, new))
    assert_refused(ssmlens("train", "run.toml", cwd=tmp_path), *words)


def test_a_killed_run_resumes_bitwise(tmp_path):
    """kill -9 in the middle, --resume, and the weights are those of a run that nobody disturbed."""
    write_config(tmp_path, steps=300)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*COMMAND, "train", "run.toml", "--out", "killed"], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.is_dir() and any(p.name >= "step-00000020" for p in checkpoints.glob("step-????????"))):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model").exists(), "the run ended before it was killed"
    assert ssmlens("train", "run.toml", "--out", "killed", "--resume", cwd=tmp_path).returncode == 0
    assert ssmlens("train", "run.toml", "--out", "whole", cwd=tmp_path).returncode == 0
    killed, whole = (tmp_path / d / "model" / "model.safetensors" for d in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


def test_ctrl_c_keeps_what_is_finished(model, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*COMMAND, "diagnose", str(model), str(model), "--length", "1024", "--sequences", "8", "--probes", "512",
                                "--out", "out"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "out" / "results.json").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "what was finished is kept" in err
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["complete"] is False
    assert record["figures"]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_killed_diagnosis_resumes(model, tmp_path):
    """kill -9 after the first measurement, --resume: what was finished is not measured again, and the record is that of an undisturbed run."""
    asked = ["diagnose", model, "--length", 256, "--sequences", 2, "--probes", 4]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*COMMAND, *map(str, asked), "--out", "killed"], cwd=tmp_path, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    finished = tmp_path / "killed" / "measured" / "influence-1.npz"
    deadline = time.monotonic() + 240
    while not finished.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "report.html").exists(), "the run ended before it was killed"
    written = finished.stat().st_mtime_ns

    other = ssmlens("diagnose", model, "--length", 128, "--out", "killed", "--resume", cwd=tmp_path)
    assert_refused(other, "inputs", "--resume")
    run = ssmlens(*asked, "--out", "killed", "--resume", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert finished.stat().st_mtime_ns == written
    assert ssmlens(*asked, "--out", "whole", cwd=tmp_path).returncode == 0
    killed, whole = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("killed", "whole"))
    assert killed["complete"] is True
    assert killed["verdict"] == whole["verdict"]
    assert killed["figures"] == whole["figures"]
