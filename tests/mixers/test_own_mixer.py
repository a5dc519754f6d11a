"""The mixer of docs/mixers.md, exactly as it stands there: under 40 lines, and every tool works on it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssmlens.results import Record

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mixers.md"


def block(kind):
    """The first of the page's blocks of this kind."""
    return re.search(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]


CODE, MAIN = block("python"), block("python main")


@pytest.fixture
def folder(tmp_path):
    """With what the page says to save."""
    (tmp_path / "average.py").write_text(f"{CODE}\n{MAIN}", encoding="utf-8")
    (tmp_path / "average.toml").write_text(block("toml"), encoding="utf-8")
    return tmp_path


def run(command, cwd, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_is_short():
    assert sum(bool(line.strip()) for line in (CODE + MAIN).splitlines()) < 40


def test_it_does_all_that_mixers_must(folder):
    """The tests that every mixer must pass, with it registered."""
    tests = ["-m", "pytest", "-p", "average", "-q", "tests/mixers/test_mixers.py", "-k", "average"]
    assert (
        int(re.search(r"(\d+) passed", run([*tests, "-p", "no:cacheprovider"], ROOT, PYTHONPATH=str(folder)))[1]) > 50
    )


def test_the_commands_of_the_page(folder):
    """With its last lines the file takes the place of `ssmlens`: list, train, diagnose and bench know the mixer."""
    output = {}
    for line in block("console").splitlines():
        _, *command = line.split()
        verb = command[1]
        output[verb] = run(command + (["--out", verb] if verb in ("diagnose", "bench") else []), folder)
    assert output.keys() == {"list", "train", "diagnose", "bench"}
    (listed,) = (line for line in output["list"].splitlines() if "average" in line)
    assert "128" in listed, "the size of its state"
    diagnosis = Record.read(folder / "diagnose" / "results.json")
    assert {"sharpness-states", "transition-values"} <= {f.id for f in diagnosis.figures}
    (table,) = Record.read(folder / "bench" / "results.json").tables
    assert "average" in [row[0] for row in table.rows]
