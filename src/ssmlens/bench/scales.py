"""How large, how often, how long: the sizes of `ssmlens bench`.

Seconds are for two cores with AVX2 and nothing else to do; on others the plan of a run is off by a factor, its order is not."""

from dataclasses import dataclass

from ssmlens.bench.layer import Size
from ssmlens.bench.scan import Shape


@dataclass(frozen=True)
class Scale:
    """rounds: turns that contenders take. budget: seconds after which one sits out the rest of the rounds. slow: one whose call is
    expected to take longer gets a process of its own and a single call, or is left out of the sweep over lengths.
    apart: every unit in a process of its own, which is what memory can be measured in."""

    scan: Shape
    layer: Size
    step: Size
    mixers: Size
    long: Size
    lengths: tuple[int, ...]
    width: tuple[int, int]  # d_inner, d_state of the sweep over lengths
    rounds: int
    budget: float
    slow: float
    apart: bool


SCALES = {
    "smoke": Scale(
        scan=Shape(1, 24, 8, 4), layer=Size(1, 16, 16), step=Size(1, 16, 16, layers=1), mixers=Size(1, 16, 64, layers=1),
        long=Size(1, 300, 16, layers=1), lengths=(10, 100), width=(8, 4), rounds=2, budget=1.0, slow=10.0, apart=False,
    ),
    "laptop": Scale(
        scan=Shape(8, 1024, 256, 16), layer=Size(8, 1024, 128), step=Size(8, 1024, 128, layers=4), mixers=Size(4, 1024, 128, layers=2),
        long=Size(1, 1_000_000, 128, layers=4), lengths=(100, 1000, 10_000, 100_000, 1_000_000), width=(64, 16), rounds=9,
        budget=8.0, slow=10.0, apart=True,
    ),
}  # fmt: skip
