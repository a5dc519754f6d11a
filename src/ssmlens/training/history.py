"""The history of a run: one JSON object per line, and the window of steps that becomes its next row.

{"step": 40, "loss": 2.31, "accuracy": 0.21, "lr": 0.001, "tokens_per_second": 81234.5}   since the last row
{"step": 500, "evaluation": {"accuracy": 0.93}}
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import UserError

Row = dict[str, Any]


class History:
    """An append-only JSONL file that can be cut back to where a checkpoint was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._file: Any = None

    def start(self, size: int = 0) -> bool:
        """Opens the file with its first `size` bytes kept; False if so many are not there (someone cut it)."""
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed by close())
        there = os.fstat(self._file.fileno()).st_size
        self._file.truncate(min(size, there))
        self._file.seek(0)
        whole = self._file.read().rpartition(b"\n")[0]
        try:
            self.rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:  # not JSON, or not even text
            raise UserError(f"{self.path} is damaged ({error}); delete the run's directory to begin again") from None
        return there >= size

    def append(self, row: Row) -> None:
        """Writes a row; it survives the death of the process (not of the machine: see `sync`)."""
        self.rows.append(row)
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Forces everything to disk and says how many bytes it is."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Window:
    """Losses since the last row. `add` never waits for the device; `drain` does.

    Values are kept per step, so that a NaN can be traced to its step, and so that a window cut in two by a
    checkpoint adds up to the same bits.
    """

    def __init__(self, entries: list[list[float]] | None = None) -> None:
        self.entries = entries or []  # per step: [sum of the loss over its targets, correct, targets]
        self._pending: list[list[tuple[Tensor, Any, int]]] = []

    def add(self, pieces: list[tuple[Tensor, Any, int]]) -> None:
        """One step of this process: (mean loss, number correct, number of targets) for each piece."""
        self._pending.append(pieces)

    def drain(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Fetches what is pending. `reduce` sums a (steps, 3) float64 tensor over all processes."""
        if not self._pending:
            return
        pieces = [piece for step in self._pending for piece in step]
        losses = torch.stack([loss for loss, _, _ in pieces]).cpu().double()
        corrects = torch.stack([torch.as_tensor(n) for _, n, _ in pieces]).cpu().double()
        targets = torch.tensor([n for _, _, n in pieces], dtype=torch.float64)
        each = torch.stack([losses * targets, corrects, targets], dim=1)
        index = torch.tensor([i for i, step in enumerate(self._pending) for _ in step])
        table = torch.zeros(len(self._pending), 3, dtype=torch.float64).index_add_(0, index, each)
        self._pending = []
        self.entries += reduce(table).tolist()

    def bad(self) -> int | None:
        """Index of the first step whose loss is not finite."""
        return next((i for i, entry in enumerate(self.entries) if not math.isfinite(entry[0])), None)

    def close(self) -> tuple[float, float]:
        """(loss, accuracy) over the window's targets; the window is then empty. Drain first."""
        loss, correct, targets = (math.fsum(column) for column in zip(*self.entries, strict=True))
        self.entries = []
        return loss / max(1.0, targets), correct / max(1.0, targets)

    def __len__(self) -> int:
        return len(self.entries) + len(self._pending)
