"""The worked example of a retrofit: its smallest run from end to end, and what its page says of results that are known."""

from dataclasses import replace

import pytest

from ssmlens.errors import UserError
from ssmlens.experiments import retrofit
from ssmlens.experiments.base import Request
from ssmlens.results import Value
from ssmlens.tasks import corpus


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
    record = retrofit.record("laptop", [0, 1, 2], fabricated(0.5), {}, corpus.python_reference())
    before, polarized, new, nothing = record.verdict
    assert (
        "none of the four is a far needle worth anything" in nothing
    )  # 0 to 2 over three seeds, give or take the gain
    assert "up to 4 nats, or cost up to 1.5" in nothing, "little is known, which is not that there is little"
    assert "loss +0.1 bits/byte" in before
    assert "worse" in before
    assert all(word in polarized for word in ("-0.5 bits/byte", "better", "stronger", "worth more"))
    assert new.count("no difference that these seeds can show") == 3
    assert "Against before: loss +0.1" in new  # no better than before, whatever the other continuation is
    gains = {row[0]: row[1:] for row in record.tables[1].rows}
    assert gains["polarized"][0].value == pytest.approx(-0.499)
    assert gains["polarized"][0].stderr < 0.01  # paired: the seeds themselves are a whole bit apart
    assert isinstance(record.tables[0].rows[0][1], Value)
    assert [row[:2] for row in record.tables[2].rows[:3]] == [["before", s] for s in range(3)]
    assert [f.id for f in record.figures] == ["influence", "influence-ratio", "needle"]
    assert all(y == pytest.approx(1) for s in record.figures[1].series for y in s.y)
    assert [s.name for s in record.figures[2].series] == list(retrofit.WAYS.values())


def test_what_alone_would_count_may_be_chance_among_six_comparisons():
    found = fabricated(0.5)
    for s, gain in enumerate((0.03, 0.04, 0.06)):  # p = 0.04
        found[f"seed{s}"]["polarized"]["bits"] = found[f"seed{s}"]["plain"]["bits"] - gain
    polarized = retrofit.record("laptop", [0, 1, 2], found, {}, corpus.python_reference()).verdict[1]
    assert (
        "loss -0.043 bits/byte, 95 % interval -0.081 to -0.0054: seems better (alone it would count, among 6"
        in polarized
    )
    assert "worth more;" not in polarized.split("far needle")[0]
    assert "seems" not in polarized.split("trace")[1].split(".")[0]


def test_the_smallest_run_resumes_and_has_every_part(tmp_path):
    request = Request("smoke", tmp_path, seeds=1, resume=True, processes=0, progress=False)
    record = retrofit.run(request)
    assert "mean nothing" in record.verdict[0]
    assert all(len(s.y) == len(s.x) > 0 for f in record.figures for s in f.series)
    (tmp_path / "runs" / "seed0" / "result.json").unlink()  # as if killed before the end
    assert retrofit.run(request).tables[0].rows == record.tables[0].rows


def test_another_text_is_known_by_its_contents(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"The {i}th of all sentences says {i * i}. " for i in range(1200)))
    given = Request("smoke", tmp_path / "out", seeds=1, resume=True, processes=0, progress=False, data=str(text))
    record = retrofit.run(given)
    assert record.config["text"]["name"] == "a.txt"
    assert str(tmp_path) not in record.to_json()
    moved = text.rename(tmp_path / "b.txt")
    with pytest.raises(UserError, match="another configuration"):
        retrofit.run(replace(given, data=str(moved)))  # its name stands on the page
    moved.rename(text)
    text.write_text("Something else altogether. " * 1000)
    with pytest.raises(UserError, match="another configuration"):
        retrofit.run(given)
