"""An interrupted diagnosis goes on where it was, and only where it may."""

import io

import numpy as np
import pytest

from ssmlens.errors import UserError
from ssmlens.lens import MEASURES, diagnose, store

from .models import model, tokens
from .test_diagnosis import StopAfter


class Counting(StopAfter):
    def __init__(self):
        super().__init__(10**6)
        self.begun = []

    def begin(self, what, steps):
        self.begun.append(what)


def test_what_is_finished_is_not_done_again(tmp_path):
    models, x = {"one": model(), "two": model(1)}, tokens(2, 40)
    whole = diagnose(models, x, probes=1)
    stopped = diagnose(models, x, probes=1, progress=StopAfter(5), out_dir=tmp_path)
    assert len(stopped.missing) == 9
    again = Counting()
    resumed = diagnose(models, x, probes=1, progress=again, out_dir=tmp_path, resume=True)
    assert resumed.complete
    assert len(again.begun) == 9
    assert again.begun[0] == "two: sharpness"
    assert resumed.record().tables == whole.record().tables
    assert resumed.record().figures == whole.record().figures
    assert resumed.record().verdict == whole.record().verdict
    assert len(resumed.maps()) == len(whole.maps())
    nothing = Counting()
    diagnose(models, x, probes=1, progress=nothing, out_dir=tmp_path, resume=True)
    assert nothing.begun == []


def test_measures_may_be_added(tmp_path):
    diagnose(model(), tokens(2, 40), probes=1, measures=["context"], out_dir=tmp_path)
    again = Counting()
    found = diagnose(model(), tokens(2, 40), probes=1, measures=["context", "smoothing"], progress=again, out_dir=tmp_path, resume=True)  # fmt: skip
    assert again.begun == ["model: sharpness"]
    assert found.context
    assert found.smoothing


def test_without_resume_everything_is_done_anew(tmp_path):
    for _ in range(2):
        again = Counting()
        diagnose(model(), tokens(2, 40), probes=1, measures=["context"], progress=again, out_dir=tmp_path)
        assert again.begun == ["model: context"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"probes": 2}, "probes was 1, now it is 2"),
        ({"seed": 5}, "seed was 0, now it is 5"),
        ({"inputs": tokens(2, 40, seed=9)}, "tokens was"),
        ({"models": model(3)}, "parameters was"),
        ({"models": model(n_layers=3)}, "models was"),
    ],
)
def test_another_configuration_is_refused_by_name(changes, named, tmp_path):
    given = {"models": model(), "inputs": tokens(2, 40), "probes": 1, "measures": ["transitions"], "out_dir": tmp_path}
    diagnose(**given)
    with pytest.raises(UserError, match=f"cannot resume in .*: {named}"):
        diagnose(**{**given, **changes}, resume=True)
    with pytest.raises(UserError, match="resume needs out_dir"):
        diagnose(model(), tokens(1, 40), resume=True)


def test_a_damaged_part_is_named(tmp_path):
    given = {"models": model(), "inputs": tokens(2, 40), "measures": ["transitions"], "out_dir": tmp_path}
    diagnose(**given)
    (tmp_path / "measured" / "transitions-1.npz").write_bytes(b"PK but no archive")
    with pytest.raises(UserError, match=r"transitions-1\.npz cannot be read"):
        diagnose(**given, resume=True)
    (tmp_path / "measured" / "identity.json").write_text("{")
    with pytest.raises(UserError, match=r"identity\.json cannot be read"):
        diagnose(**given, resume=True)


def test_every_measurement_survives_its_file():
    def same(a, b):
        if isinstance(a, np.ndarray):
            return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return same(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b or a != a

    found = diagnose({"mamba": model(), "s4d": model(mixer="s4d")}, tokens(2, 40), probes=1)
    for measure in MEASURES:
        for one in getattr(found, measure).values():
            fields = {k: v for k, v in vars(one).items() if k in type(one).__dataclass_fields__}
            read = store.unpack(store.pack(one))
            assert type(read) is type(one)
            assert same(fields, {k: v for k, v in vars(read).items() if k in fields}), measure


def test_only_what_measurements_are_made_of_is_read():
    file = io.BytesIO()
    np.savez(file, tree=np.frombuffer(b'{"is": "os.system", "of": {}}', dtype=np.uint8))
    with pytest.raises(KeyError, match=r"os\.system"):
        store.unpack(file.getvalue())
    np.savez(file, tree=np.array([print]))
    with pytest.raises(ValueError, match="allow_pickle"):
        store.unpack(file.getvalue())
