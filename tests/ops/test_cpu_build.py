"""The kernels' build: cache, damaged files, several processes, a killed build, no compiler, no place to write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import needs_compiler

from ssmlens.ops import cpu
from ssmlens.ops.cpu import build

pytestmark = needs_compiler

REPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from ssmlens.ops import cpu
    print(cpu.available(), cpu.available())
    print(cpu.why_unavailable())
    if cpu.available():
        x = torch.ones(1, 3, 2)
        print(cpu.linear_scan(x, x)[0][0, :, 0].tolist())
print(sum("CPU kernels" in str(w.message) for w in caught))
print(*[str(w.message) for w in caught])
"""
# A quick stand-in for a compiler: hands out, when it is to link, the library that this process has already compiled.
FAKE = """#!{python}
import shutil, sys, time
if "--version" in sys.argv:
    print("a compiler")
elif "-c" not in sys.argv:
    {before}
    data = open({library!r}, "rb").read()[:-32]
    open(sys.argv[sys.argv.index("-o") + 1], "wb").write(data)
    open({log!r}, "a").write("compiled\\n")
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache and a compiler that logs its runs into tmp_path/log."""
    return {"CXX": str(fake_compiler(tmp_path, "pass")), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def fake_compiler(directory: Path, before: str) -> Path:
    library = build.cache_directory() / f"{build.cache_key(build.find_compiler())}.so"
    path = directory / "compiler"
    text = FAKE.format(python=sys.executable, library=str(library), log=str(directory / "log"), before=before)
    path.write_text(text)
    path.chmod(0o700)
    return path


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", REPORT]
    return subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def lines(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


WORKS = ["True True", "None", "[1.0, 2.0, 3.0]", "0", ""]


def runs(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def libraries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "ssmlens").iterdir())


def test_compiles_once_and_repairs_a_damaged_file(fake: dict[str, str], tmp_path: Path) -> None:
    assert lines(start(fake)) == WORKS
    assert lines(start(fake)) == WORKS
    assert runs(tmp_path) == 1
    (library,) = libraries(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])  # loading this as it is would be a bus error
    assert lines(start(fake)) == WORKS
    assert library.read_bytes() == whole
    assert runs(tmp_path) == 2
    assert library.stat().st_mode & 0o077 == 0


def test_several_processes_at_once(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, "time.sleep(1)")
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    processes = [start(environment) for _ in range(3)]
    assert [lines(p) for p in processes] == [WORKS] * 3
    assert len(libraries(tmp_path)) == 1  # and no temporary files


def test_a_killed_build_breaks_nothing(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, 'open(sys.argv[sys.argv.index("-o") + 1], "wb").write(b"half"); time.sleep(60)')
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = start(environment)
    deadline = time.monotonic() + 60
    cache = tmp_path / "cache" / "ssmlens"
    while not any(p.stat().st_size for p in (cache.iterdir() if cache.exists() else [])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    environment["CXX"] = str(fake_compiler(tmp_path, "pass"))
    assert lines(start(environment)) == WORKS
    assert len(libraries(tmp_path)) == 1  # what the dead one left is gone


def test_no_compiler_is_one_warning() -> None:
    answer = lines(start({"CXX": "/nowhere/g++"}))
    assert answer[:3] == ["False False", "the compiler named by $CXX, '/nowhere/g++', is not there", "1"]
    assert "install a C++ compiler" in answer[3]


def test_no_compiler_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.find_compiler()


def test_a_failing_compiler_is_reported(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, 'sys.exit("scan.cpp:1: error: no such thing")')
    answer = lines(start({"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}))
    assert answer[0] == "False False"
    assert "error: no such thing" in answer[1]
    assert libraries(tmp_path) == []


@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null"])
def test_a_cache_that_cannot_be_written(fake: dict[str, str], tmp_path: Path, cache: str) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert lines(start(fake | {"XDG_CACHE_HOME": cache, "TMPDIR": str(scratch)})) == WORKS
    assert runs(tmp_path) == 1
    assert list(scratch.iterdir()) == []  # the private directory went with the process


def test_the_key_depends_on_the_compiler_and_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.cache_key(build.find_compiler())
    assert build.cache_key([str(fake_compiler(tmp_path, "pass"))]) != real
    monkeypatch.setattr(build, "processor", lambda: "another one")
    assert build.cache_key(build.find_compiler()) != real


def test_where_there_is_a_compiler_the_kernels_are_there():
    assert cpu.available(), cpu.why_unavailable()
