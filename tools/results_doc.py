"""Write docs/results.md from the records under results/. `--check`: only say whether it is up to date (exit code 1 if not).

python tools/results_doc.py [--check]
"""

import sys
from pathlib import Path

from ssmlens.report import text
from ssmlens.results import Cell, Record, Table, Value

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
HEAD = """# Results

Made by `python tools/results_doc.py` from the records under `results/`; do not edit. Each directory there holds the record
(`results.json`), its page (`report.html`) and its pictures; `runs.jsonl`, where there is one, every run behind it. ± is one standard error; over what, each table says.
"""


def page() -> str:
    records = [(p.parent, Record.read(p)) for p in sorted((ROOT / "results").glob("**/results.json"))]
    return "\n".join([HEAD, *(section(directory, record) for directory, record in records)])


def section(directory: Path, record: Record) -> str:
    p = record.provenance
    where = f"../{directory.relative_to(ROOT).as_posix()}"
    parts = [
        f"## {record.title}\n",
        *(f"- {sentence}" for sentence in record.verdict),
        "",
        *(table(t) for t in record.tables),
        *(f"![{f.title}]({where}/{f.id}.png)\n" for f in record.figures),
        *(f"- {note}" for note in record.notes),
        "",
        f"`{' '.join(p.command)}`, {p.created[:10]}, ssmlens {p.ssmlens} at {p.commit}, PyTorch {p.versions.get('torch')}, "
        f"{p.processor}. [Page]({where}/report.html), [record]({where}/results.json).\n",
    ]
    return "\n".join(parts)


def table(t: Table) -> str:
    heads = [f"{c.name} ({c.unit})" if c.unit else c.name for c in t.columns]
    rows = [heads, ["---"] * len(heads), *([cell(x) for x in row] for row in t.rows)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n".join(part for part in (f"### {t.title}\n", body, "", t.meaning, t.method, "") if part is not None)


def cell(x: Cell) -> str:
    if x is None:
        return ""
    if isinstance(x, Value):
        return text.number(x.value, x.stderr)
    return text.number(x) if isinstance(x, float) else str(x).replace("|", "\\|")


def main() -> None:
    written = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != written:
            sys.exit("docs/results.md is not what the records say; run: python tools/results_doc.py")
        return
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
