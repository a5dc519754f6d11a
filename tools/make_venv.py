"""Make the virtual environment of the Makefile, with the standard library alone.

Debian and Ubuntu ship python3 without ensurepip; where that is so and we may, their package for it is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(target: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this has not installed ssmlens yet)
        sys.exit(f"ssmlens needs Python 3.11 or newer, this is {sys.version.split()[0]}; try: make PYTHON=python3.12")
    if importlib.util.find_spec("ensurepip") is None:
        get_ensurepip()
    print(f"==> Making a virtual environment in {target}", flush=True)
    # a new process: ensurepip may have come only now
    if subprocess.run([sys.executable, "-m", "venv", "--clear", target]).returncode:
        shutil.rmtree(Path(target), ignore_errors=True)
        sys.exit("could not make a virtual environment; the message above says why")


def get_ensurepip() -> None:
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(
            f"this Python has no ensurepip, which makes virtual environments; install {package} (sudo apt-get install {package})"
        )
    print(f"==> This Python has no ensurepip: installing {package}", flush=True)
    subprocess.run(["apt-get", "-qq", "update"], check=False)
    if subprocess.run(["apt-get", "-qq", "install", "-y", package]).returncode:
        sys.exit(f"could not install {package}")


if __name__ == "__main__":
    main(*sys.argv[1:])
