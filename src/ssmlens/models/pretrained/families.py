"""Other people's models as ours: for each family its configuration in our terms, and where each of its weights goes.

A family is two functions: `architecture(config)` → the fields of `Architecture`, and `weights(state, config)` → our state dict, by name.
`state` holds their tensors and loses each one that is used, so that none is forgotten: what is left over is an error.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.models.language_model import LanguageModel, LanguageModelConfig

State = dict[str, Tensor]


class Unsupported(Exception):
    """This configuration of a family has no equal among our models; it runs through transformers instead."""


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name. mixers: ours that stand in its blocks."""

    model_type: str
    architecture: Callable[[Any], dict[str, Any]]
    weights: Callable[[State, Any], State]


@torch.no_grad()
def convert(model: nn.Module, *, share: bool = False) -> LanguageModel:
    """A causal language model of transformers as our LanguageModel with the same weights: the same function of the tokens.

    share: weights that need no change stay in the same memory, for a `model` that is given up afterwards.
    Raises Unsupported where there is no such model of ours."""
    config: Any = model.config
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        raise Unsupported(f"{getattr(config, 'model_type', type(model).__name__)} is not among {', '.join(FAMILIES)}")
    theirs = dict(model.state_dict())
    if getattr(getattr(model, "rwkv", None), "layers_are_rescaled", False):
        _undo_rescaling(theirs, config)
    kept = set() if share else {p.untyped_storage().data_ptr() for p in model.parameters()}
    ours = build(family, config, theirs, kept)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours.generation_config, name, getattr(config, name, None))
    return ours.train(model.training)


@torch.no_grad()
def build(family: Family, config: Any, theirs: State, kept: Collection[int] = ()) -> LanguageModel:
    """Our model with their weights, of which `theirs` is emptied. kept: storages that stay theirs and are copied."""
    ours_config = LanguageModelConfig(**family.architecture(config))
    with torch.device("meta"):  # its weights come from `theirs`, not from an initialiser
        ours = LanguageModel(ours_config)
    try:
        state = family.weights(theirs, config)
    except KeyError as e:
        raise UserError(f"the checkpoint lacks {e.args[0]}") from None
    if config.tie_word_embeddings:
        for head in ("lm_head.weight", "head.weight", "embed_out.weight"):
            theirs.pop(head, None)
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    if theirs:
        raise Unsupported(f"it has weights that our {family.model_type} does not: {', '.join(sorted(theirs)[:3])}")
    for name, p in ours.state_dict().items():
        if name in state and state[name].shape != p.shape:
            raise UserError(f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(p.shape)}")
    state = {k: t.clone() if t.untyped_storage().data_ptr() in kept else t for k, t in state.items()}
    ours.load_state_dict(state, assign=True)
    for p in ours.parameters():
        p.requires_grad_(True)
    ours.tie_weights()
    return ours


def _taken(state: State, names: Mapping[str, str]) -> State:
    """{our name: their tensor} of {their name: our name}."""
    return {ours: state.pop(theirs) for theirs, ours in names.items()}


def _shell(
    state: State, embedding: str, norm: str, kind: str, head: str = "lm_head.weight", tied: bool = False
) -> State:
    """What every model has: embedding, final norm, head."""
    names = {f"{embedding}.weight": "backbone.embedding.weight", f"{norm}.weight": "backbone.norm.weight"}
    if kind == "layer":
        names[f"{norm}.bias"] = "backbone.norm.bias"
    if not tied:
        names[head] = "lm_head.weight"
    return _taken(state, names)


def _linear(theirs: str, ours: str, bias: bool) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in (("weight", "bias") if bias else ("weight",))}


def _require(what: str, found: Any, *allowed: Any) -> None:
    if found not in allowed:
        raise Unsupported(f"its {what} is {found!r}; ours is {allowed[0]!r}")


# ------------------------------------------------------------------------------------------------------------- Mamba


def _mamba(config: Any) -> dict[str, Any]:
    _require("activation", config.hidden_act, "silu", "swish")
    mixer = {
        "d_state": config.state_size, "d_conv": config.conv_kernel, "expand": int(config.expand),
        "dt_rank": int(config.time_step_rank), "dt_min": config.time_step_min, "dt_max": config.time_step_max,
        "dt_floor": config.time_step_floor, "conv_bias": config.use_conv_bias, "bias": config.use_bias,
    }  # fmt: skip
    if config.model_type == "falcon_mamba":
        mixer |= {"bcdt_norm": "plain", "bcdt_eps": config.mixer_rms_eps}
    _require("width inside", config.intermediate_size, mixer["expand"] * config.hidden_size)
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "mamba",
        "mixer_config": mixer, "norm_eps": config.layer_norm_epsilon, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _mamba_weights(state: State, config: Any) -> State:
    ours = _shell(state, "backbone.embeddings", "backbone.norm_f", "rms", tied=config.tie_word_embeddings)
    for i in range(config.num_hidden_layers):
        a, b = f"backbone.layers.{i}", f"backbone.blocks.{i}"
        names = {
            f"{a}.norm.weight": f"{b}.norm.weight",
            f"{a}.mixer.A_log": f"{b}.mixer.A_log",
            f"{a}.mixer.D": f"{b}.mixer.D",
        }
        for part in ("in_proj", "out_proj"):
            names |= _linear(f"{a}.mixer.{part}", f"{b}.mixer.{part}", config.use_bias)
        names |= _linear(f"{a}.mixer.x_proj", f"{b}.mixer.x_proj", False)
        names |= _linear(f"{a}.mixer.dt_proj", f"{b}.mixer.dt_proj", True)
        ours |= _taken(state, names) | _convolution(state, f"{a}.mixer.conv1d", f"{b}.mixer", config.use_conv_bias)
    return ours


def _convolution(state: State, theirs: str, ours: str, bias: bool) -> State:
    found = {f"{ours}.conv_weight": state.pop(f"{theirs}.weight").squeeze(1)}
    return found | ({f"{ours}.conv_bias": state.pop(f"{theirs}.bias")} if bias else {})


def _mamba2(config: Any) -> dict[str, Any]:
    _require("activation", config.hidden_act, "silu", "swish")
    low, high = (float(x) for x in config.time_step_limit)
    mixer = {
        "d_state": config.state_size, "d_head": config.head_dim, "n_groups": config.n_groups, "d_conv": config.conv_kernel,
        "expand": int(config.expand), "dt_min": config.time_step_min, "dt_max": config.time_step_max, "dt_floor": config.time_step_floor,
        "dt_lower": low, "dt_upper": None if high == float("inf") else high, "norm_eps": config.layer_norm_epsilon,
        "conv_bias": config.use_conv_bias, "bias": config.use_bias,
    }  # fmt: skip
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "mamba2",
        "mixer_config": mixer, "norm_eps": config.layer_norm_epsilon, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _mamba2_weights(state: State, config: Any) -> State:
    ours = _shell(state, "backbone.embeddings", "backbone.norm_f", "rms", tied=config.tie_word_embeddings)
    for i in range(config.num_hidden_layers):
        a, b = f"backbone.layers.{i}", f"backbone.blocks.{i}"
        names = {f"{a}.norm.weight": f"{b}.norm.weight"} | {
            f"{a}.mixer.{part}": f"{b}.mixer.{part}" for part in ("A_log", "D", "dt_bias")
        }
        for part in ("in_proj", "out_proj"):
            names |= _linear(f"{a}.mixer.{part}", f"{b}.mixer.{part}", config.use_bias)
        ours |= _taken(state, names) | _convolution(state, f"{a}.mixer.conv1d", f"{b}.mixer", config.use_conv_bias)
        ours[f"{b}.mixer.norm_weight"] = state.pop(f"{a}.mixer.norm.weight").unflatten(0, (-1, config.head_dim))
    return ours


# -------------------------------------------------------------------------------------------------------------- RWKV


def _rwkv(config: Any) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "rwkv4",
        "mixer_config": {"width": config.attention_hidden_size}, "mlp": "channel_mix", "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm": "layer", "norm_eps": config.layer_norm_epsilon, "embedding_norm": True, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _rwkv_weights(state: State, config: Any) -> State:
    ours = _shell(state, "rwkv.embeddings", "rwkv.ln_out", "layer", head="head.weight", tied=config.tie_word_embeddings)
    ours |= _taken(state, _linear("rwkv.blocks.0.pre_ln", "backbone.embedding_norm", True))
    for i in range(config.num_hidden_layers):
        a, b = f"rwkv.blocks.{i}", f"backbone.blocks.{i}"
        names = _linear(f"{a}.ln1", f"{b}.norm", True) | _linear(f"{a}.ln2", f"{b}.mlp_norm", True)
        for part in ("key", "value", "receptance", "output"):
            names |= _linear(f"{a}.attention.{part}", f"{b}.mixer.{part}", False)
        for part in ("key", "value", "receptance"):
            names |= _linear(f"{a}.feed_forward.{part}", f"{b}.mlp.{part}", False)
        names |= {f"{a}.attention.{part}": f"{b}.mixer.{part}" for part in ("time_decay", "time_first")}
        ours |= _taken(state, names)
        for half, parts in (("attention", ("key", "value", "receptance")), ("feed_forward", ("key", "receptance"))):
            for part in parts:
                name = f"{b}.{'mixer' if half == 'attention' else 'mlp'}.time_mix_{part}"
                ours[name] = state.pop(f"{a}.{half}.time_mix_{part}").flatten()
    return ours


def _undo_rescaling(state: State, config: Any) -> None:
    """transformers halves weights in place every so many layers when it evaluates, and the stream with them."""
    for i in range(config.num_hidden_layers):
        for name in (f"rwkv.blocks.{i}.attention.output.weight", f"rwkv.blocks.{i}.feed_forward.value.weight"):
            state[name] = state[name] * 2 ** (i // config.rescale_every)


# ------------------------------------------------------------------------------------------------ with attention in them


def _rope(config: Any, d_head: int) -> dict[str, Any]:
    """Our keys for their rotary positions. Raises Unsupported for angles that depend on the length of the text."""
    given = dict(config.rope_parameters or {})
    kind, fraction = given.get("rope_type", "default"), float(given.get("partial_rotary_factor", 1.0))
    base = float(given.get("rope_theta", 10_000.0))
    if int(d_head * fraction) % 2:
        raise Unsupported(f"it rotates an odd number of dimensions of a head, {int(d_head * fraction)}")
    if kind == "default":
        return {"rope_base": base, "rope_fraction": fraction}
    if kind not in ("linear", "llama3"):
        raise Unsupported(f"its rotary positions are of type {kind!r}")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if scale != 1:
        raise Unsupported(f"its rotary positions are scaled by {scale}")
    return {"rope_base": base, "rope_fraction": fraction, "rope_frequencies": tuple(frequencies.double().tolist())}


def _llama(config: Any) -> dict[str, Any]:
    _require("activation", config.hidden_act, "silu", "swish")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    mixer = {
        "n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads, "d_head": d_head, "bias": bias,
        "window": getattr(config, "sliding_window", None), **_rope(config, d_head),
    }  # fmt: skip
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "attention",
        "mixer_config": mixer, "mlp": "swiglu", "mlp_ratio": config.intermediate_size / config.hidden_size,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)), "norm_eps": config.rms_norm_eps, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _llama_weights(state: State, config: Any) -> State:
    ours = _shell(state, "model.embed_tokens", "model.norm", "rms", tied=config.tie_word_embeddings)
    bias, mlp_bias = bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))
    for i in range(config.num_hidden_layers):
        a, b = f"model.layers.{i}", f"backbone.blocks.{i}"
        names = {
            f"{a}.input_layernorm.weight": f"{b}.norm.weight",
            f"{a}.post_attention_layernorm.weight": f"{b}.mlp_norm.weight",
        }
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names |= _linear(f"{a}.self_attn.{part}", f"{b}.mixer.{part}", bias)
        ours |= _taken(state, names) | _gated(state, f"{a}.mlp", f"{b}.mlp", mlp_bias)
    return ours


def _gated(state: State, theirs: str, ours: str, bias: bool) -> State:
    """gate_proj over up_proj, and down_proj."""
    found = _taken(state, _linear(f"{theirs}.down_proj", f"{ours}.out_proj", bias))
    for part in ("weight", "bias") if bias else ("weight",):
        found[f"{ours}.in_proj.{part}"] = torch.cat(
            [state.pop(f"{theirs}.gate_proj.{part}"), state.pop(f"{theirs}.up_proj.{part}")]
        )
    return found


def _gpt_neox(config: Any) -> dict[str, Any]:
    _require("activation", config.hidden_act, "gelu")
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "attention",
        "mixer_config": {"n_heads": config.num_attention_heads, "bias": bool(config.attention_bias), **_rope(config, d_head)},
        "mlp": "gelu", "mlp_ratio": config.intermediate_size / config.hidden_size, "mlp_bias": True, "parallel": bool(config.use_parallel_residual),
        "norm": "layer", "norm_eps": config.layer_norm_eps, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _gpt_neox_weights(state: State, config: Any) -> State:
    head = "embed_out.weight" if "embed_out.weight" in state else "lm_head.weight"
    ours = _shell(state, "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "layer", head, config.tie_word_embeddings)
    for i in range(config.num_hidden_layers):
        a, b = f"gpt_neox.layers.{i}", f"backbone.blocks.{i}"
        names = _linear(f"{a}.input_layernorm", f"{b}.norm", True)
        names |= _linear(f"{a}.post_attention_layernorm", f"{b}.mlp_norm", True)
        names |= _linear(f"{a}.attention.dense", f"{b}.mixer.o_proj", config.attention_bias)
        names |= _linear(f"{a}.mlp.dense_h_to_4h", f"{b}.mlp.in_proj", True)
        names |= _linear(f"{a}.mlp.dense_4h_to_h", f"{b}.mlp.out_proj", True)
        ours |= _taken(state, names)
        for part in ("weight", "bias") if config.attention_bias else ("weight",):
            # q, k and v of a head lie together
            each = state.pop(f"{a}.attention.query_key_value.{part}").unflatten(0, (config.num_attention_heads, 3, -1))
            for j, name in enumerate("qkv"):
                ours[f"{b}.mixer.{name}_proj.{part}"] = each[:, j].flatten(0, 1).contiguous()
    return ours


def _recurrent_gemma(config: Any) -> dict[str, Any]:
    _require("activation", config.hidden_activation, "gelu_pytorch_tanh")
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers,
        "mixer": tuple("griffin" if kind == "linear_attention" else "attention" for kind in config.layers_block_type),
        "mixer_config": {
            kind: given for kind, given in (
                ("griffin", {"width": config.lru_width, "n_blocks": config.num_attention_heads, "d_conv": config.conv1d_width}),
                ("attention", {
                    "n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads, "window": config.attention_window_size,
                    "bias": True if config.attention_bias else "output", **_rope(config, config.head_dim),
                }),
            ) if ("linear_attention" if kind == "griffin" else "sliding_attention") in config.layers_block_type
        },
        "mlp": "geglu", "mlp_ratio": config.intermediate_size // 2 / config.hidden_size, "mlp_bias": True, "norm_eps": config.rms_norm_eps,
        # their factor is a bfloat16 number
        "embedding_scale": float(torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16)),
        "tie_word_embeddings": config.tie_word_embeddings, "logit_cap": config.logits_soft_cap,
    }  # fmt: skip


def _recurrent_gemma_weights(state: State, config: Any) -> State:
    ours = _shell(state, "model.embed_tokens", "model.final_norm", "rms", tied=config.tie_word_embeddings)
    for i, kind in enumerate(config.layers_block_type):
        a, b = f"model.layers.{i}", f"backbone.blocks.{i}"
        t, m = f"{a}.temporal_block", f"{b}.mixer"
        names = {
            f"{a}.temporal_pre_norm.weight": f"{b}.norm.weight",
            f"{a}.channel_pre_norm.weight": f"{b}.mlp_norm.weight",
        }
        if kind == "linear_attention":
            for part in ("linear_x", "linear_y", "linear_out"):
                names |= _linear(f"{t}.{part}", f"{m}.{part}", True)
            names[f"{t}.rg_lru.recurrent_param"] = f"{m}.Lambda"
            ours |= _convolution(state, f"{t}.conv_1d", m, True)
            for gate in (
                "input_gate",
                "recurrent_gate",
            ):  # theirs hold a block's input first, ours a row for every output
                ours[f"{m}.{gate}_weight"] = state.pop(f"{t}.rg_lru.{gate}_weight").mT.flatten(0, 1).contiguous()
                ours[f"{m}.{gate}_bias"] = state.pop(f"{t}.rg_lru.{gate}_bias").flatten()
        else:
            for part in ("q_proj", "k_proj", "v_proj"):
                names |= _linear(f"{t}.{part}", f"{m}.{part}", config.attention_bias)
            names |= _linear(f"{t}.o_proj", f"{m}.o_proj", True)
        ours |= _taken(state, names) | _gated(state, f"{a}.mlp_block", f"{b}.mlp", True)
    for name in ours:  # their norms multiply by 1 + weight
        if name.endswith("norm.weight"):
            ours[name] = 1 + ours[name]
    return ours


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("mamba", _mamba, _mamba_weights),
        Family("falcon_mamba", _mamba, _mamba_weights),
        Family("mamba2", _mamba2, _mamba2_weights),
        Family("rwkv", _rwkv, _rwkv_weights),
        Family("recurrent_gemma", _recurrent_gemma, _recurrent_gemma_weights),
        Family("gpt_neox", _gpt_neox, _gpt_neox_weights),
        Family("llama", _llama, _llama_weights),
        Family("mistral", _llama, _llama_weights),
    )
}
