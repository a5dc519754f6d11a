"""One recurrent layer of a model that runs through transformers, as our mixer: so that hybrids show their transitions too.

A layer is known by its parts, not by its name: Mamba's has a projection of Δ, B and C (`x_proj`), Mamba-2's a bias of Δ for every head. What ours
then computes is compared with what theirs does on random input; one that differs stays unknown.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens import mixers
from ssmlens.errors import UserError
from ssmlens.mixers import Mixer

AGREES = 1e-4  # relative to the largest output, in float32
LEFT = 1e-2  # relative to the most that the first token leaves
_LENGTH, _ROUNDING = 16, 1e-6


@torch.no_grad()
def recurrent(layer: nn.Module | None) -> Mixer | None:
    """Our mixer with the weights of a Mamba or Mamba-2 layer of transformers (the same memory where they need no change), else None."""
    kind: Any = layer
    if layer is None or not all(hasattr(layer, part) for part in ("A_log", "D", "in_proj", "conv1d", "out_proj")):
        return None
    try:
        if kind.A_log.dim() == 2 and isinstance(getattr(kind, "x_proj", None), nn.Linear):
            made = _mamba(kind)
        elif kind.A_log.dim() == 1 and hasattr(kind, "dt_bias"):
            made = _mamba2(kind)
        else:
            return None
        return made.train(layer.training) if _agrees(kind, made) else None
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, UserError):
        return None  # parts of these names that are something else


def _mamba(layer: Any) -> Mixer:
    d_inner, d_state = layer.A_log.shape
    norms = {
        f"{ours}_norm_weight": layer.get_parameter(f"{theirs}_layernorm.weight")
        for theirs, ours in (("dt", "dt"), ("b", "B"), ("c", "C"))
        if hasattr(layer, f"{theirs}_layernorm")
    }
    config: dict[str, Any] = {
        "d_state": d_state, "expand": _ratio(d_inner, layer.in_proj.in_features), "dt_rank": layer.dt_proj.in_features,
    }  # fmt: skip
    if norms:
        config |= {"bcdt_norm": "weighted", "bcdt_eps": layer.b_layernorm.variance_epsilon}
    names = ("in_proj.weight", "in_proj.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
    return _made("mamba", layer, config, {n: layer.get_parameter(n) for n in names if _there(layer, n)} | norms)


def _mamba2(layer: Any) -> Mixer:
    d_inner, n_heads = layer.out_proj.in_features, layer.A_log.numel()
    low, high = (float(x) for x in getattr(layer, "time_step_limit", (0.0, float("inf"))))
    norm: Any = getattr(layer, "norm", None)
    gated = norm is not None and hasattr(norm, "weight")
    config: dict[str, Any] = {
        "d_state": layer.ssm_state_size, "d_head": d_inner // n_heads, "n_groups": layer.n_groups, "expand": _ratio(d_inner, layer.in_proj.in_features),
        "dt_lower": low, "dt_upper": None if high == float("inf") else high, "gated_norm": gated,
    }  # fmt: skip
    state = {
        name: layer.get_parameter(name) for name in ("in_proj.weight", "in_proj.bias", "dt_bias") if _there(layer, name)
    }
    if gated:
        config["norm_eps"] = norm.variance_epsilon
        state["norm_weight"] = norm.weight.unflatten(0, (n_heads, -1))
    if isinstance(
        multipliers := getattr(layer, "mup_vector", None), Tensor
    ):  # Falcon-H1's, on its way in and on what comes of it
        factor = multipliers.flatten() * float(getattr(layer, "ssm_in_multiplier", 1.0))
        state["in_proj.weight"] = state["in_proj.weight"] * factor.to(state["in_proj.weight"])[:, None]
    return _made("mamba2", layer, config, state)


def _made(name: str, layer: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Mixer:
    conv, out = layer.conv1d, layer.out_proj
    config |= {"d_conv": conv.kernel_size[0], "conv_bias": conv.bias is not None, "bias": out.bias is not None}
    state |= {"conv_weight": conv.weight.squeeze(1), "out_proj.weight": out.weight, "A_log": layer.A_log, "D": layer.D}
    if conv.bias is not None:
        state["conv_bias"] = conv.bias
    if out.bias is not None:
        state["out_proj.bias"] = out.bias
    with torch.device("meta"):
        made = mixers.build(name, layer.in_proj.in_features, **config)
    # detached: a parameter is assigned as the object that it is, and the model's own must go on learning
    made.load_state_dict({key: value.detach() for key, value in state.items()}, assign=True)
    return made.requires_grad_(False)


def _ratio(inner: int, model: int) -> int | float:
    return inner // model if inner % model == 0 else inner / model


def _there(layer: nn.Module, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    return getattr(layer.get_submodule(module), parameter, None) is not None


def _agrees(layer: Any, made: Mixer) -> bool:
    """On random input, and in what its first token leaves behind the convolution: that is the state's alone, which D and the convolution outweigh."""
    p = layer.in_proj.weight
    if p.is_meta:
        return False
    if p.dtype in (torch.float16, torch.bfloat16):  # whose rounding would hide a wrong transition
        layer, made = copy.deepcopy(layer).float(), copy.deepcopy(made).float()
    x = torch.randn(1, _LENGTH, layer.in_proj.in_features, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.cat([-x[:, :1], x[:, 1:]], 1)]).to(layer.in_proj.weight)
    training = [m for m in layer.modules() if m.training]
    layer.eval()
    try:
        want, (got, _) = layer(x), made(x)
    finally:
        for m in training:
            m.training = True
    want = want[0] if isinstance(want, tuple) else want
    largest = want.abs().max()
    behind = layer.conv1d.kernel_size[0]
    theirs, ours = (y[0, behind:] - y[1, behind:] for y in (want, got))
    if not (largest > 0 and (got - want).abs().max() <= AGREES * largest):
        return False
    return bool((ours - theirs).abs().max() <= LEFT * theirs.abs().max() + _ROUNDING * largest)
