"""Where a command computes: `--device auto` is CUDA, else Apple's MPS, else the CPU."""

from ssmlens.errors import UserError


def chosen(name: str) -> str:
    """auto, cpu, cuda (or cuda:1) or mps → a device of PyTorch's. Raises UserError for what this machine does not have."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, is_there in there.items() if is_there)
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdecimal()):
        raise UserError(f"unknown device {name!r}: give auto, cpu, cuda or mps")
    if not there[kind]:
        raise UserError(f"this machine has no {kind} that PyTorch can use; give --device auto or cpu")
    if kind == "cuda" and index and int(index) >= (count := torch.cuda.device_count()):
        raise UserError(f"there is no {name}: this machine has {count} GPU(s), counted from cuda:0")
    return name
