"""The finished runs of a sweep in one file, small enough to publish: with it a copy of DIR goes on where the original ended.

    DIR/runs.jsonl    the result.json of each finished run on a line, in the order of their ids

What a run leaves beside its result (checkpoints, weights, logs) is not in it.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.training.identity import fingerprint

NAME = "runs.jsonl"


def pack(out_dir: Path) -> None:
    """Writes DIR/runs.jsonl from all that is finished under DIR/runs; of runs that are only in the file, their lines stay."""
    lines = {record["id"]: record for record in _read(out_dir / NAME)}
    for path in (out_dir / "runs").glob("*/result.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one is the sweep's to name
            record = json.loads(path.read_text(encoding="utf-8"))
            lines[record["id"]] = record
    if lines:
        files.write(out_dir / NAME, "".join(json.dumps(lines[id_]) + "\n" for id_ in sorted(lines)))


def unpack(out_dir: Path, ids: set[str]) -> None:
    """Puts the runs of these ids that DIR/runs.jsonl has, and DIR/runs has not, where `sweep` finds them.

    Raises UserError where the file is damaged, or a line does not hold what its fingerprint says."""
    for record in _read(out_dir / NAME):
        directory = out_dir / "runs" / record["id"]
        if record["id"] in ids and not (directory / "config.json").exists():
            files.make_directory(directory)
            files.write(directory / "result.json", json.dumps(record, indent=1) + "\n")
            files.write(directory / "config.json", json.dumps(record["config"], indent=1) + "\n")


def _read(path: Path) -> list[Mapping[str, Any]]:
    if not path.exists():
        return []
    records = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line)
            if record["fingerprint"] != fingerprint(record["config"]) or not isinstance(record["id"], str):
                raise ValueError(f"line {number} is of another configuration than it says")
            records.append(record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run its runs again") from None
    return records
