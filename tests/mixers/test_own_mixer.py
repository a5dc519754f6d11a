"""The mixer of docs/mixers.md, exactly as it stands there: under 40 lines, and every tool works on it."""

import re
from pathlib import Path

import pytest
import torch
from cases import close
from typer.testing import CliRunner

from ssmlens import mixers
from ssmlens.cli import app
from ssmlens.polarization import Polarization
from ssmlens.results import Record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mixers.md"
CODE = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]


@pytest.fixture
def average(monkeypatch):
    monkeypatch.setattr(mixers, "_REGISTRY", dict(mixers._REGISTRY))
    exec(compile(CODE, "docs/mixers.md", "exec"), {"__name__": "docs"})


def test_it_is_short():
    assert sum(bool(line.strip()) for line in CODE.splitlines()) < 40


@pytest.mark.usefixtures("average")
@pytest.mark.parametrize("polarization", [None, Polarization(ones=2), Polarization(mode="replace")], ids=str)
def test_it_is_a_mixer(polarization):
    torch.manual_seed(0)
    mixer = mixers.build("average", 10, polarization=polarization).double()
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    y, last = mixer(x)
    c = mixer.coefficients(x)
    close(mixer.decode(c.states(), x), y, torch.float64)
    first, state = mixer(x[:, :4])
    close(torch.cat([first, mixer(x[:, 4:], state)[0]], 1), y, torch.float64)
    padded = torch.cat([torch.ones(2, 3, 10, dtype=x.dtype), x], 1)
    close(mixer(padded, mask=(torch.arange(12) >= 3).expand(2, -1))[0][:, 3:], y, torch.float64)
    reset = (torch.arange(9) == 5).expand(2, -1)
    close(mixer(x, reset=reset)[0][:, 5:], mixer(x[:, 5:])[0], torch.float64)
    state = None
    for t in range(9):
        out, state = mixer.step(x[:, t], state)
    close(out, y[:, -1], torch.float64)
    close(state.h, last.h, torch.float64)
    assert bool((c.a[..., c.ones] == 1).all())
    assert bool((c.a[..., c.zeros] == 0).all())


@pytest.mark.usefixtures("average")
def test_it_trains_saves_and_is_diagnosed(tmp_path):
    (tmp_path / "average.toml").write_text(
        """
        [model]
        vocab_size = 256
        d_model = 16
        n_layers = 2
        mixer = "average"
        [model.mixer_config]
        slowest = 0.99
        [model.polarization]
        ones = 1
        [data]
        task = "corpus"
        text = "python-reference"
        length = 32
        batch_size = 2
        [training]
        steps = 3
        """
    )
    run = CliRunner().invoke(app.app, ["train", str(tmp_path / "average.toml"), "--out", str(tmp_path / "run")])
    assert run.exit_code == 0, run.output
    model = next(p.parent for p in (tmp_path / "run").rglob("model.safetensors"))
    arguments = [str(model), "--length", "40", "--sequences", "2", "--probes", "2", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app.app, ["diagnose", *arguments])
    assert run.exit_code == 0, run.output
    record = Record.read(tmp_path / "out" / "results.json")
    assert {"sharpness-states", "transition-values"} <= {f.id for f in record.figures}
    assert "average" in CliRunner().invoke(app.app, ["list", "mixers"]).output
