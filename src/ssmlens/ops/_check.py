"""Arguments of the ops: shapes, dtypes and devices are always checked, values only under `checks(True)` (they would cost a
synchronisation on a GPU)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_values: ContextVar[bool] = ContextVar("ssmlens_value_checks", default=False)


class checks:
    """`checks(True)` turns value checks (A ≤ 0, no NaN) on for this thread and task; as `with checks(True):` for a block."""

    def __init__(self, on: bool) -> None:
        self._token = _values.set(on)

    def __enter__(self) -> "checks":
        return self

    def __exit__(self, *_: object) -> None:
        _values.reset(self._token)


def values_checked() -> bool:
    """Under torch.compile never: a check of values would break the graph."""
    return not torch.compiler.is_compiling() and _values.get()


@contextmanager
def naming(op: str) -> Iterator[None]:
    """Prefix an error with the function it arose in."""
    try:
        yield
    except (TypeError, ValueError) as e:
        raise type(e)(f"{op}: {e}") from None


def tensor(name: str, x: object, shape: tuple[int | str | None, ...], like: Tensor | None = None) -> None:
    """Check that x is a tensor of this shape (None: any size; a string is only shown) and on the device of `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    want = tuple(s if isinstance(s, int) else None for s in shape)
    if x.dim() != len(want) or any(w is not None and w != g for w, g in zip(want, x.shape, strict=True)):
        text = ", ".join("?" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({text}), got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the input on {like.device}")


def floating(name: str, x: Tensor, *, complex_ok: bool = False) -> None:
    if not (x.is_floating_point() or (complex_ok and x.is_complex())):
        kind = "floating or complex" if complex_ok else "floating"
        raise TypeError(f"{name} must have a {kind} dtype, got {x.dtype}")


def flags(name: str, x: Tensor | None, batch: int, length: int, like: Tensor) -> None:
    if x is None:
        return
    tensor(name, x, (batch, length), like)
    if x.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {x.dtype}")


def values(**named: Tensor | None) -> None:
    if not values_checked():
        return
    for name, x in named.items():
        if x is not None and bool(torch.isnan(x).any()):
            raise ValueError(f"{name} contains NaN")


def not_positive(name: str, x: Tensor) -> None:
    if values_checked() and bool(((x.real if x.is_complex() else x) > 0).any()):
        raise ValueError(f"{name} must be ≤ 0 (real part), its largest entry is {x.real.max().item():g}")


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off, where the device has one."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def state_dtype(x: Tensor) -> torch.dtype:
    """The real dtype of state and accumulation: float64 for float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def promoted(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in `dtype`, or in its complex counterpart where x is complex."""
    if x is None:
        return None
    return x.to(dtype.to_complex() if x.is_complex() else dtype)
