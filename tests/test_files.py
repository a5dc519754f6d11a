"""Whole or not at all: whatever a process dies of, readers see the old or the new, and the next writer tidies up."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from ssmlens import files
from ssmlens.errors import UserError

DEAD = 2**22 + 1  # more than the largest process number of Linux and macOS


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def names(directory):
    return sorted(os.listdir(directory))


def left(name, kind="tmp", machine=None, pid=DEAD):
    return f".{name}.{kind}-{machine or files._machine()}-{pid}-0"


@pytest.mark.usefixtures("umask")
def test_a_file_is_written_with_its_directories_and_readable(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    assert files.write(str(path), "π\n") == path
    assert path.read_bytes() == "π\n".encode()
    assert mode(path) == 0o644
    files.write(path, b"\0")
    assert path.read_bytes() == b"\0"
    assert names(path.parent) == ["file.json"]
    with files.replace(path, mode=0o700) as temporary:
        temporary.write_text("x")
    assert mode(path) == 0o700


@pytest.mark.usefixtures("umask")
def test_a_directory_takes_the_place_of_another(tmp_path):
    path = tmp_path / "model"
    for content in ("old", "new"):
        with files.replace_directory(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "weights").write_text(content)
            (temporary / "sub" / "weights").chmod(0o600)  # as safetensors does
            (temporary / content).touch()
            assert temporary.parent == tmp_path
        assert names(path) == sorted([content, "sub"])
    assert (path / "sub" / "weights").read_text() == "new"
    assert [mode(p) for p in (path, path / "sub", path / "sub" / "weights")] == [0o755, 0o755, 0o644]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError("of the caller"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize("before", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, error, before):
    if before:
        files.write(tmp_path / "place" / "file", "old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:  # noqa: PT012, SIM117
        with files.replace_directory(tmp_path / "place") as temporary:
            (temporary / "file").write_text("half")
            raise error
    assert names(tmp_path) == (["place"] if before else [])
    assert not before or (tmp_path / "place" / "file").read_text() == "old"
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot write {tmp_path / 'place'}: No space left; make room there"


def test_a_full_disk(tmp_path):
    files.write(tmp_path / "file", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system fails as it does for a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*file: File too large"):
            files.write(tmp_path / "file", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    for path, call in [
        (tmp_path / "file" / "x", lambda path: files.write(path, "")),
        (tmp_path / "full", lambda path: files.write(path, "")),
        (tmp_path / ("n" * 300), lambda path: files.write(path, "")),
        (tmp_path / "file" / "x", files.make_directory),
        (tmp_path / "file", files.make_directory),
        (tmp_path / "file" / "x", lambda path: files.locked(path, "here").__enter__()),
    ]:
        with pytest.raises(UserError) as caught:
            call(path)
        assert str(path) in str(caught.value)
        assert "choose another place (--out)" in str(caught.value)
    assert names(tmp_path) == ["file", "full"]


def test_what_the_dead_left_is_tidied_and_the_living_are_left_alone(tmp_path):
    other = "0" * 8
    gone = [left("a"), left("a", machine=other, pid=3)]
    kept = [left("a", pid=os.getpid()), left("a", machine=other), left("b"), left("a.b"), ".a.tmp-mine", ".a"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    os.utime(tmp_path / gone[1], (0, 0))
    files.write(tmp_path / "a", "")
    assert names(tmp_path) == sorted([*kept, "a"])
    files.clean(tmp_path)
    assert names(tmp_path) == [".a", ".a.tmp-mine", "a"]


@pytest.mark.parametrize("next_one", [files.clean, lambda directory: files.write(directory / "a" / "b", "new")])
def test_a_directory_that_had_only_stepped_aside_comes_back(tmp_path, next_one):
    """Killed between the two renames: the worst moment."""
    files.write(tmp_path / "a" / "file", "old")
    program = """
import os, signal, sys
from ssmlens import files
rename, calls = os.rename, []
def rename_or_die(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.rename = rename_or_die
with files.replace_directory(sys.argv[1]) as temporary:
    (temporary / "file").write_text("new")
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert [name.split("-")[0] for name in names(tmp_path)] == [".a.old", ".a.tmp"]
    if next_one is files.clean:
        next_one(tmp_path)
        assert names(tmp_path) == ["a"]
    else:
        with files.replace_directory(tmp_path / "a") as temporary:
            assert (tmp_path / "a" / "file").read_text() == "old"
            (temporary / "file").write_text("newer")
        assert (tmp_path / "a" / "file").read_text() == "newer"
        assert names(tmp_path) == ["a"]


def test_killed_at_some_moment_readers_see_the_old_or_the_new(tmp_path):
    program = """
import sys
from ssmlens import files
for i in range(10**6):
    files.write(sys.argv[1], str(i % 10) * 300_000)
"""
    path = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    for _ in range(50):
        text = path.read_text()
        assert (len(text), len(set(text))) == (300_000, 1)
    process.kill()
    process.wait()
    text = path.read_text()
    assert (len(text), len(set(text))) == (300_000, 1)
    files.write(path, "end")
    assert names(tmp_path) == ["file"]


def test_threads_do_not_disturb_each_other(tmp_path):
    def work(digit):
        for _ in range(20):
            files.write(tmp_path / "file", digit * 1000)

    threads = [threading.Thread(target=work, args=(digit,)) for digit in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "file").read_text())) == 1
    assert names(tmp_path) == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from ssmlens import files
with files.locked(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_holds_against_others_and_ends_with_its_process(tmp_path):
    place = tmp_path / "new" / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another process is training in {place}"), files.locked(place, "training"):
        raise AssertionError
    with files.locked(tmp_path, "training"):
        pass
    process.kill()
    process.communicate()
    with files.locked(place, "training"):
        with pytest.raises(UserError, match="another process is running"), files.locked(place, "running"):
            raise AssertionError
        files.clean(place)
    with files.locked(place, "training"):
        pass


def test_where_there_are_no_locks_one_works_without(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with files.locked(tmp_path, "training"), files.locked(tmp_path, "training"):
        pass
