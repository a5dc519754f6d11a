"""What `ssmlens bench` can measure, a module each: units of measurement in, tables, figures and sentences out."""

from ssmlens.bench.parts import layer, length, long, mixers, scan, step
from ssmlens.bench.parts.base import Expectation, Found, Part, expectations

PARTS: dict[str, Part] = {
    "scan": scan, "length": length, "layer": layer, "step": step, "mixers": mixers, "long": long,
}  # fmt: skip

__all__ = ["PARTS", "Expectation", "Found", "Part", "expectations"]
