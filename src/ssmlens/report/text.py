"""Numbers and names for a reader: 81.4 ± 1.3, (3.1 ± 0.2)×10⁻⁷, ∞; names without control characters."""

import math
import re
import unicodedata

from ssmlens.results import Cell, Value

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOT_MEASURED = "–"


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def number(value: float, stderr: float | None = None) -> str:
    """`value` to four significant digits or, with a standard error, both to the error's second digit."""
    if not math.isfinite(value):
        return _nonfinite(value)
    if stderr is not None and not math.isfinite(stderr):
        return f"{number(value)} ± {_nonfinite(stderr)}"
    if not stderr:
        plain = _significant(value)
        return plain if stderr is None else f"{plain} ± 0"
    if abs(stderr) < 1e-9 * abs(value):  # to its second digit would be a long way
        return f"{number(value)} ± {number(stderr)}"
    scale = max(abs(value), abs(stderr))
    exponent = math.floor(math.log10(scale))
    if -4 < exponent < 6:
        places = _places(stderr)
        return f"{fixed(value, places)} ± {fixed(stderr, places)}"
    # Scaled by decimal notation, not by a division: 1e-320 / 1e-320 would do, 1e300 * 1e300 would not.
    value, stderr = _shift(value, -exponent), _shift(stderr, -exponent)
    places = _places(stderr)
    return f"({fixed(value, places)} ± {fixed(stderr, places)})×{power_of_ten(exponent)}"


def cell(content: Cell) -> str:
    """What stands in a table's cell; the unit is the column's unless the value has its own."""
    if content is None:
        return NOT_MEASURED
    if isinstance(content, str):
        return clean(content)
    if isinstance(content, Value):
        shown = number(content.value, content.stderr)
        return f"{shown} {clean(content.unit)}" if content.unit else shown
    if isinstance(content, int):
        return _minus(str(content))
    return number(content)


def clean(name: str, length: int | None = None) -> str:
    """One line without control or formatting characters; shortened in the middle to `length`."""
    kept = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c for c in name)
    kept = "".join(c for c in kept if unicodedata.category(c) != "Cf")  # e.g. a right-to-left override
    kept = " ".join(kept.split())
    if length is None or len(kept) <= length:
        return kept
    head = (length - 1) // 2
    return f"{kept[:head]}…{kept[len(kept) - (length - 1 - head) :]}"


def file_name(id: str) -> str:
    """An id as the stem of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", id).strip("-")[:80] or "unnamed"


def _nonfinite(value: float) -> str:
    return "undefined" if math.isnan(value) else "∞" if value > 0 else "−∞"


def _significant(value: float) -> str:
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e6:
        return _minus(str(int(value)))
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    if -4 < int(exponent) < 6:
        shown = f"{value:.{max(0, 3 - int(exponent))}f}"
        return _minus(shown.rstrip("0").rstrip(".") if "." in shown else shown)
    return f"{_minus(mantissa.rstrip('0').rstrip('.'))}×{power_of_ten(int(exponent))}"


def _places(stderr: float) -> int:
    """Decimals that show two significant digits of the error, no more than twelve."""
    return min(12, max(0, 1 - math.floor(math.log10(float(f"{abs(stderr):.1e}")))))


def _shift(value: float, places: int) -> float:
    mantissa, _, exponent = repr(float(value)).partition("e")
    return float(f"{mantissa}e{int(exponent or 0) + places}")


def fixed(value: float, places: int) -> str:
    """With so many decimals, a minus sign that is one, and no negative zero."""
    return _minus(f"{value:.{places}f}")


def _minus(shown: str) -> str:
    if shown.startswith("-") and not shown.strip("-0."):
        return shown[1:]  # -0.00
    return shown.replace("-", "−")
