"""Every command and every piece of Python in the README and the docs is run, in order, in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    return [(info.strip(), body) for info, body in FENCE.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_the_docs_say_works(page, tmp_path):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    text, python = page.read_text(encoding="utf-8"), ""
    for info, body in blocks(page):
        if info == "toml":  # named by the "Saved as `NAME`" after it
            name = re.search(r"Saved as `([^`]+)`", text[text.index(body) :])
            assert name, f"{page.name}: a TOML block that is not saved"
            (tmp_path / name[1]).write_text(body)
        elif info in ("python", "python continued"):
            python = body if info == "python" else python + body
            run = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, env=env, capture_output=True, text=True)
            assert run.returncode == 0, f"{python}\n{run.stderr}"
        elif info == "sh":
            for line in filter(None, (line.split("#")[0].strip() for line in body.splitlines())):
                run = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
                assert run.returncode == 0, f"{line}\n{run.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_results_page_is_what_the_records_say():
    run = subprocess.run([sys.executable, ROOT / "tools" / "results_doc.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "## " in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
