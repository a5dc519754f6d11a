"""CryptoMamba (Shahab Sepehri et al. 2025, arXiv 2501.01010): tomorrow's price from the days before it, by a Mamba that scans over features.

    x (batch, features, days) → for every stage: 4 × (x + Mamba(LayerNorm(x))), then a linear map days → width' → ... → 1
    ŷ = w · x + b over the features

    features: Timestamp (s), Open, High, Low, Close, Volume / 10⁹ (in the version with volume), each over `days` days, in this order

The order and the unit of the features are not in the checkpoint. Of all orders this one alone forecasts the test set that is published with it (RMSE
1,597, with volume; the next best is above 6,900: docs/models.md). A step of the recurrence is a feature: it is "a sequence" of five or six.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.models.backbone import Block
from ssmlens.models.pretrained.families import State, Unsupported, _linear, _taken

FEATURES = ("Timestamp", "Open", "High", "Low", "Close", "Volume")
_EPS = 1e-5
_NAME = re.compile(r"model\.blocks\.(\d{1,2})\.(\d{1,2})\.(.+)")


class Step(nn.Module):
    """A block, and behind the last one of a stage the linear map to the next one's width."""

    def __init__(self, width: int, out: int | None, config: dict[str, Any]) -> None:
        super().__init__()
        self.block = Block(mixers.build("mamba", width, **config), _EPS, norm_kind="layer")
        self.narrow = None if out is None else nn.Linear(width, out)

    def forward(self, x: Float[Tensor, "batch features width"]) -> Float[Tensor, "batch features out"]:
        x, _ = self.block(x)
        return x if self.narrow is None else self.narrow(x)


class CryptoMamba(nn.Module):
    """widths: of the stages, the number of days first. depth: blocks in a stage. forward: (batch, features, days) → (batch,)."""

    def __init__(self, features: int, widths: list[int], depth: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.length, self.d_input = features, widths[0]
        outs = [*widths[1:], 1]
        self.blocks = nn.ModuleList(
            Step(width, out if i == depth - 1 else None, config) for width, out in zip(widths, outs, strict=True) for i in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(features, 1)

    def forward(self, inputs: Float[Tensor, "batch features days"]) -> Float[Tensor, "batch"]:
        """Raises ValueError for another number of features or days."""
        if inputs.dim() != 3 or inputs.shape[1:] != (self.length, self.d_input):
            raise ValueError(
                f"inputs must have shape (batch, {self.length}, {self.d_input}), got {tuple(inputs.shape)}"
            )
        return self.read(self.run(inputs))[:, 0]

    def run(self, x: Float[Tensor, "batch features days"]) -> Float[Tensor, "batch features 1"]:
        for block in self.blocks:
            x = block(x)
        return x

    def read(self, hidden: Float[Tensor, "batch features 1"]) -> Float[Tensor, "batch 1"]:
        return self.head(hidden[..., 0])


def is_cryptomamba(state: State) -> bool:
    return {"model.post_process.1.weight", "model.blocks.0.0.op.A_log"} <= set(state)


@torch.no_grad()
def load_cryptomamba(state: State) -> CryptoMamba:
    """Of the weights, by their names there. Raises UserError, KeyError or Unsupported for any that are missing, surplus or misshapen."""
    places = [(int(m[1]), int(m[2])) for k in state if (m := _NAME.fullmatch(k))]
    stages, last = 1 + max(i for i, _ in places), max(j for _, j in places)  # the last of a stage is its linear map
    if len({*places}) != stages * (last + 1) or last < 1:
        raise UserError("its stages have different numbers of blocks, or some are missing")
    first = "model.blocks.0.0.op"
    inner, n = state[f"{first}.A_log"].shape
    widths = [state[f"model.blocks.{i}.0.norm.weight"].shape[0] for i in range(stages)]
    config: dict[str, Any] = {
        "d_state": n,
        "d_conv": state[f"{first}.conv1d.weight"].shape[2],
        "expand": inner // widths[0],
    }
    with torch.device("meta"):
        model = CryptoMamba(state["model.post_process.1.weight"].shape[1], widths, last, config)
    names = _linear("model.post_process.1", "head", True)
    ours: State = {}
    for i in range(stages):
        for j in range(last):
            theirs, step = f"model.blocks.{i}.{j}", f"blocks.{i * last + j}"
            names |= _linear(f"{theirs}.norm", f"{step}.block.norm", True) | _linear(
                f"{theirs}.op.dt_proj", f"{step}.block.mixer.dt_proj", True
            )
            names |= {f"{theirs}.op.{k}": f"{step}.block.mixer.{k}" for k in ("A_log", "D")}
            names |= {
                f"{theirs}.op.{k}.weight": f"{step}.block.mixer.{k}.weight" for k in ("in_proj", "x_proj", "out_proj")
            }
            names[f"{theirs}.op.conv1d.bias"] = f"{step}.block.mixer.conv_bias"
            ours[f"{step}.block.mixer.conv_weight"] = state.pop(f"{theirs}.op.conv1d.weight").squeeze(1)  # depthwise
        names |= _linear(f"model.blocks.{i}.{last}", f"blocks.{i * last + last - 1}.narrow", True)
    ours |= _taken(state, names)
    if state:
        raise Unsupported(f"it has weights that ours does not: {', '.join(sorted(state)[:3])}")
    for name, p in model.state_dict().items():
        if ours[name].shape != p.shape:
            raise UserError(f"{name} has shape {tuple(ours[name].shape)}, its other weights say {tuple(p.shape)}")
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(True)
