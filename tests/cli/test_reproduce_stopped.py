"""Ctrl-C in the middle of `reproduce table2`: what is finished has a page, and --resume goes on."""

import json
import signal
import subprocess
import sys
import time

from ssmlens.results import Record


def test_a_stopped_table_leaves_a_page_of_what_is_finished(tmp_path):
    command = [
        sys.executable, "-m", "ssmlens", "reproduce", "table2", "--scale", "smoke", "--seeds", "1", "--processes", "0", "--out", str(tmp_path),
    ]  # fmt: skip
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for _ in range(600):
        if len(list(tmp_path.glob("runs/*/result.json"))) > 1 or stopped.poll() is not None:
            break
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, err
    assert "Traceback" not in err
    found = Record.read(tmp_path / "results.json")
    assert not found.complete
    assert any(note.startswith("Incomplete: ") for note in found.notes)
    assert (tmp_path / "report.html").exists()
    done = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/result.json")}
    assert 1 < len(done) < 8

    again = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["complete"]
    assert all((tmp_path / "runs" / name / "result.json").read_text() == text for name, text in done.items())
