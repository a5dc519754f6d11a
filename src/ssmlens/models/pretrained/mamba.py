"""transformers' Mamba (`MambaForCausalLM`, model_type "mamba"; the format of the state-spaces/mamba-*-hf checkpoints)."""

from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.models.language_model import LanguageModel, LanguageModelConfig

_MIXER = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias"}


def architecture(config: Any) -> dict[str, Any]:
    """Our configuration for theirs. Raises UserError for an activation that is not SiLU."""
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"this Mamba uses the activation {config.hidden_act!r}; only 'silu' can be converted")
    mixer_config = {
        "d_state": config.state_size, "d_conv": config.conv_kernel, "expand": int(config.expand),
        "dt_rank": int(config.time_step_rank), "dt_min": config.time_step_min, "dt_max": config.time_step_max,
        "dt_floor": config.time_step_floor, "conv_bias": config.use_conv_bias, "bias": config.use_bias,
    }  # fmt: skip
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "mamba",
        "mixer_config": mixer_config, "norm_eps": config.layer_norm_epsilon, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def rename(key: str) -> str:
    """Their parameter name → ours."""
    for theirs, ours in (("backbone.embeddings.", "backbone.embedding."), ("backbone.norm_f.", "backbone.norm."),
                         ("backbone.layers.", "backbone.blocks.")):  # fmt: skip
        key = key.replace(theirs, ours)
    for theirs, ours in _MIXER.items():
        key = key.replace(f"mixer.{theirs}", f"mixer.{ours}")
    return key


@torch.no_grad()
def from_transformers_mamba(model: nn.Module) -> LanguageModel:
    """A `transformers.MambaForCausalLM` as our LanguageModel with the same weights: the same function of the tokens."""
    config: Any = model.config
    ours = LanguageModel(LanguageModelConfig(**architecture(config)))
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        state[rename(key)] = value.squeeze(1) if key.endswith("conv1d.weight") else value
    ours.load_state_dict(state)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours.generation_config, name, getattr(config, name, None))
    return ours.to(next(model.parameters()).dtype).train(model.training)
