"""The bars of everything that takes long. On stderr: stdout belongs to results."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def bars(middle: str, *, elapsed: bool = True, memory: float = 120.0) -> "Progress":
    """What it is, a bar, `middle`, the time so far (`elapsed`) and the time left.

    middle: rich's format, such as "{task.percentage:>3.0f}%" or "{task.fields[numbers]}"
    memory: the time left is estimated from the last so many seconds
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),  # what the rest leaves: 80 columns must do
        TextColumn(middle, markup=False),
        *([TimeElapsedColumn()] if elapsed else []),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        expand=True,
        refresh_per_second=4,
        speed_estimate_period=memory,
    )
