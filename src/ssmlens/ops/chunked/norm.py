"""rms_norm in plain torch."""

from torch import Tensor
from torch.nn import functional as F

from ssmlens.ops import _check


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """`ssmlens.ops.rms_norm`."""
    if weight is not None and weight.dtype != x.dtype:
        return F.rms_norm(x.to(wide := _check.state_dtype(x)), x.shape[-1:], weight.to(wide), eps).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps)  # half precision is widened inside
