"""The kernels' own driver, without PyTorch: for narrower vectors than this machine's, and under the sanitizers."""

import platform
import subprocess
from pathlib import Path

import pytest
from cases import needs_compiler

from ssmlens.ops.cpu import build

pytestmark = needs_compiler
AVX2 = pytest.mark.skipif("avx2" not in build.processor() or platform.machine() != "x86_64", reason="no AVX2")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["-O1"], id="no vector instructions asked for"),
        pytest.param(["-O1", "-mavx2", "-mfma"], id="AVX2", marks=AVX2),
        pytest.param(
            ["-O1", "-march=native", "-DONLY_FLOAT", *SANITIZERS], id="sanitizers, float", marks=pytest.mark.slow
        ),
        pytest.param(
            ["-O1", "-march=native", "-DONLY_DOUBLE", *SANITIZERS], id="sanitizers, double", marks=pytest.mark.slow
        ),
    ],
)
def test_driver(flags: list[str], tmp_path: Path) -> None:
    program = str(tmp_path / "driver")
    source = str(Path(__file__).with_name("cpu_driver.cpp"))
    options = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    include = ["-I", str(Path(build.__file__).parent)]
    command = [*build.find_compiler(), *options, *flags, *include, source, "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if (
        compiled.returncode != 0
        and "sanitize" in compiled.stderr + " ".join(flags)
        and "cannot find" in compiled.stderr
    ):
        pytest.skip("this compiler has no sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "ok\n"), ran.stdout + ran.stderr[-3000:]
