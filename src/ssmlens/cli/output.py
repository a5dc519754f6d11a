"""How every measuring verb ends: results.json, pictures, report.html, and a summary on the terminal."""

import sys
from pathlib import Path

from ssmlens.results import Record


def directory(out: Path | None, default: str) -> Path:
    """The output directory, made and proved writable before any work is done. Raises UserError."""
    from ssmlens import files

    chosen = out if out is not None else Path("ssmlens-out") / default
    probe = files.write(chosen / ".writable", "")
    probe.unlink(missing_ok=True)
    return chosen


def finish(record: Record, out: Path, json: bool) -> None:
    """Write everything into `out`; print the record alone (json) or a summary and the page to open."""
    from rich.console import Console

    from ssmlens.report import terminal

    page = write(record, out)
    if json:
        sys.stdout.write(record.to_json())
        return
    console = Console()
    terminal.show(record, console)
    console.print(f"\nOpen the page: {page}", highlight=False, markup=False, soft_wrap=True)


def write(record: Record, out: Path) -> Path:
    """results.json, pictures and report.html into `out`; returns the page."""
    from ssmlens import report
    from ssmlens.report import plots

    record.write(out / "results.json")
    plots.save_all(record, out)
    return report.write([record], out / "report.html")
