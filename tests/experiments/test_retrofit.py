"""The worked example of a retrofit: its smallest run from end to end, and what its page says of results that are known."""

import pytest

from ssmlens.experiments import retrofit
from ssmlens.experiments.base import Request
from ssmlens.results import Value


def fabricated(gain):
    """Three seeds; `gain` is what polarization brings, beside differences between the seeds that are larger."""

    def run(seed, bits, trace, needle):
        return {
            "bits": bits + seed, "seen": 1.0, "trace": trace + seed, "context": 6.0, "needle": [needle + seed] * 5,
            "curve": [1.0] * 512, "seconds": 60.0, "parameters": 10,
        }  # fmt: skip

    return {
        f"seed{s}": {
            "before": run(s, 2.0, 0.1, 0.0), "plain": run(s, 2.1 + 0.001 * s, 0.1, 0.0),
            "polarized": run(s, 2.1 - gain + 0.002 * s, 0.1 + gain + 0.001 * s, gain + 0.001 * s),
            "new": run(s, 2.1 + 0.01 * (-1) ** s, 0.1 + 0.01 * (-1) ** s, 0.01 * (-1) ** s),
        }
        for s in range(3)
    }  # fmt: skip


def test_what_was_found_is_said_seed_by_seed_and_no_more():
    record = retrofit.record("laptop", [0, 1, 2], fabricated(0.5), {})
    before, polarized, new = record.verdict
    assert "loss +0.1 bits/byte" in before
    assert "worse" in before
    assert all(word in polarized for word in ("-0.5 bits/byte", "better", "stronger", "worth more"))
    assert new.count("no difference that these seeds can show") == 3
    gains = {row[0]: row[1:] for row in record.tables[1].rows}
    assert gains["polarized"][0].value == pytest.approx(-0.499)
    assert gains["polarized"][0].stderr < 0.01  # paired: the seeds themselves are a whole bit apart
    assert isinstance(record.tables[0].rows[0][1], Value)
    assert [row[:2] for row in record.tables[2].rows[:3]] == [["before", s] for s in range(3)]
    assert [f.id for f in record.figures] == ["influence", "needle"]
    assert [s.name for s in record.figures[1].series] == list(retrofit.WAYS.values())


def test_the_smallest_run_resumes_and_has_every_part(tmp_path):
    request = Request("smoke", tmp_path, seeds=1, resume=True, processes=0, progress=False)
    record = retrofit.run(request)
    assert "mean nothing" in record.verdict[0]
    assert all(len(s.y) == len(s.x) > 0 for f in record.figures for s in f.series)
    (tmp_path / "runs" / "seed0" / "result.json").unlink()  # as if killed before the end
    assert retrofit.run(request).tables[0].rows == record.tables[0].rows
