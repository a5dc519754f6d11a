"""The authors' own formats: a directory of mamba_ssm (config.json and pytorch_model.bin), a .pth file of RWKV-LM.

Both are pickles: they are read with `weights_only=True`, which builds tensors and runs nothing, and mapped into memory.
What a .pth file is, its names and shapes say; it has no configuration.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ssmlens.errors import UserError
from ssmlens.models.language_model import LanguageModel
from ssmlens.models.pretrained.families import FAMILIES, Family, State, Unsupported, _linear, _taken, build


def is_mamba_ssm(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of mamba_ssm, which names no model_type."""
    return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= set(config)


def load_mamba_ssm(directory: Path) -> LanguageModel:
    """Raises UserError for a file that is damaged, lacks weights, or holds a model that ours cannot be."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    file = directory / "pytorch_model.bin"
    if not file.is_file():
        raise UserError(f"{directory} holds a configuration of mamba_ssm, but no pytorch_model.bin")
    state = as_float32(read(file))
    if "backbone.embedding.weight" not in state:
        raise UserError(f"{file} holds no backbone.embedding.weight: not a model of mamba_ssm")
    with sound(str(directory)):
        family, theirs = _mamba_ssm(config, state, str(directory))
        state["backbone.embeddings.weight"] = state.pop("backbone.embedding.weight")
        return build(family, theirs, state)


def load_rwkv(file: Path) -> LanguageModel:
    """RWKV-4, 5 (5.2) or 6. Raises UserError, naming the file, for any other."""
    state = as_float32(read(file))
    if any(name.rpartition(".")[2] in ("r_k", "k_a", "x_r") for name in state):
        raise UserError(
            f"{file} is an RWKV-7, whose state is not of a kind that ours have; RWKV-4, 5.2 and 6 can be loaded"
        )
    if "emb.weight" not in state or "blocks.0.ln1.weight" not in state:
        raise UserError(f"{file} is not a model of RWKV-LM: it has no emb.weight or no blocks.0.ln1.weight")
    with sound(str(file)):
        return build(*_rwkv(file, state))


def _rwkv(file: Path, state: State) -> tuple[Family, Any, State]:
    """The family, its configuration as far as the weights' shapes say it, and the weights under its names."""
    config = SimpleNamespace(
        vocab_size=state["emb.weight"].shape[0],
        hidden_size=state["emb.weight"].shape[1],
        num_hidden_layers=1 + max(int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))),
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
    )
    names = {k.removeprefix("blocks.0.att.") for k in state if k.startswith("blocks.0.att.")}
    if "time_first" in names:
        config.attention_hidden_size = state["blocks.0.att.key.weight"].shape[0]
        config.intermediate_size = state["blocks.0.ffn.key.weight"].shape[0]
        return FAMILIES["rwkv"], config, _as_transformers(state)
    if "time_faaaa" not in names:
        raise UserError(f"{file} is no RWKV-4, 5 or 6 (its first layer has {', '.join(sorted(names)[:4])} ...)")
    decay, config.d_head = state["blocks.0.att.time_decay"], state["blocks.0.att.time_faaaa"].shape[1]
    if decay.numel() != config.hidden_size:
        raise UserError(f"{file} is an RWKV-5 before 5.2: one decay for each head, which is not supported")
    config.intermediate_size = state["blocks.0.ffn.key.weight"].shape[0]
    if "time_maa_w1" in names:
        config.mix_rank = state["blocks.0.att.time_maa_w2"].shape[1]
        config.decay_rank = state["blocks.0.att.time_decay_w1"].shape[1]
        return RWKV6, config, state
    return RWKV5, config, state


def read(file: Path) -> State:
    """The tensors of a pickled file, without running what else is in it. Raises UserError."""
    return tensors(file, unpickled(file))


def unpickled(file: Path) -> Any:
    """What a pickled file holds, mapped into memory where its format allows that. Raises UserError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # a pickle of another kind, an older format that cannot be mapped, a cut file
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise UserError(f"cannot load {file}: it is damaged, or holds more than tensors ({reason})") from None


def tensors(file: Path, found: Any) -> State:
    """Checked to be named plain tensors. Raises UserError, naming the file."""
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"cannot load {file}: it holds other things than named tensors")
    for name, value in found.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"cannot load {file}: {name} is not a plain tensor with its numbers in it")
    return found


def as_float32(state: State) -> State:
    for name, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{name} has dtype {value.dtype}; only floating-point weights can be read")
    return {k: v.float().contiguous() for k, v in state.items()}


@contextmanager
def sound(name: str) -> Iterator[None]:
    """Whatever a configuration or weights of the wrong kind lead to, the error names the file."""
    try:
        yield
    except UserError as e:
        raise e if name in str(e) else UserError(f"cannot load {name}: {e}") from None
    except Unsupported as e:
        raise UserError(f"cannot load {name}: {e}") from None
    except KeyError as e:
        raise UserError(f"cannot load {name}: the checkpoint lacks {e.args[0]}") from None
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"cannot load {name}: its configuration or its weights are malformed ({reason})") from e


def _mamba_ssm(config: dict[str, Any], state: State, name: str) -> tuple[Family, Any]:
    """The family, and the configuration in transformers' words, with mamba_ssm's defaults."""
    inner = dict(config.get("ssm_cfg") or {})
    layer = inner.pop("layer", "Mamba1")
    refused = {
        "attn_layer_idx": bool(config.get("attn_layer_idx")), "d_intermediate": bool(config.get("d_intermediate")),
        "rms_norm": not config.get("rms_norm", True), "ssm_cfg.layer": layer not in ("Mamba1", "Mamba2"),
    }  # fmt: skip
    if wrong := [key for key, bad in refused.items() if bad]:
        raise UserError(f"cannot load {name}: its {wrong[0]} has no equal among our models")
    d_model = int(config["d_model"])
    common = {
        # rows are padded to a multiple, which the configuration does not count
        "vocab_size": state["backbone.embedding.weight"].shape[0], "hidden_size": d_model, "num_hidden_layers": int(config["n_layer"]),
        "hidden_act": "silu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": bool(config.get("tie_embeddings", True)),
        "conv_kernel": inner.pop("d_conv", 4), "expand": inner.pop("expand", 2), "time_step_min": inner.pop("dt_min", 0.001),
        "time_step_max": inner.pop("dt_max", 0.1), "time_step_floor": inner.pop("dt_init_floor", 1e-4),
        "use_conv_bias": inner.pop("conv_bias", True), "use_bias": inner.pop("bias", False),
    }  # fmt: skip
    if layer == "Mamba1":
        rank = inner.pop("dt_rank", "auto")
        theirs = common | {
            "model_type": "mamba", "state_size": inner.pop("d_state", 16), "intermediate_size": common["expand"] * d_model,
            "time_step_rank": math.ceil(d_model / 16) if rank == "auto" else rank,
        }  # fmt: skip
    else:
        head = inner.pop("headdim", 64)
        theirs = common | {
            "model_type": "mamba2", "state_size": inner.pop("d_state", 128), "head_dim": head, "n_groups": inner.pop("ngroups", 1),
            "time_step_limit": inner.pop("dt_limit", (0.0, math.inf)),
        }  # fmt: skip
        for key, wanted in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False)):
            if inner.pop(key, wanted) != wanted:
                raise UserError(f"cannot load {name}: its ssm_cfg.{key} has no equal among our models")
    for harmless in ("dt_init", "dt_scale", "use_fast_path", "use_mem_eff_path", "chunk_size", "A_init_range"):
        inner.pop(harmless, None)
    if inner:
        raise UserError(f"cannot load {name}: unknown key ssm_cfg.{next(iter(inner))}")
    return FAMILIES[theirs["model_type"]], SimpleNamespace(**theirs)


def _as_transformers(state: State) -> State:
    """RWKV-4's names in transformers' words."""
    starts = {"blocks": "rwkv.blocks", "emb": "rwkv.embeddings", "ln_out": "rwkv.ln_out"}
    inside = {
        "ln0": "pre_ln", "att": "attention", "ffn": "feed_forward", "time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value",
        "time_mix_r": "time_mix_receptance",
    }  # fmt: skip
    renamed = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        renamed[".".join([starts.get(first, first), *(inside.get(word, word) for word in rest)])] = value
    return renamed


def _rwkv56(config: Any) -> dict[str, Any]:
    v6 = hasattr(config, "mix_rank")
    ranks = {"mix_rank": config.mix_rank, "decay_rank": config.decay_rank} if v6 else {}
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "n_layers": config.num_hidden_layers, "mixer": "rwkv6" if v6 else "rwkv5",
        "mixer_config": {"d_head": config.d_head, **ranks}, "mlp": "channel_mix", "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm": "layer", "norm_eps": config.layer_norm_epsilon, "embedding_norm": True, "tie_word_embeddings": False,
    }  # fmt: skip


def _rwkv56_weights(state: State, config: Any) -> State:
    v6 = hasattr(config, "mix_rank")
    names = {"emb.weight": "backbone.embedding.weight", "head.weight": "lm_head.weight"}
    names |= _linear("ln_out", "backbone.norm", True) | _linear("blocks.0.ln0", "backbone.embedding_norm", True)
    ours: State = {}
    for i in range(config.num_hidden_layers):
        a, b = f"blocks.{i}", f"backbone.blocks.{i}"
        names |= _linear(f"{a}.ln1", f"{b}.norm", True) | _linear(f"{a}.ln2", f"{b}.mlp_norm", True)
        linears = (("receptance", "r"), ("key", "k"), ("value", "v"), ("gate", "g"), ("output", "out"))
        for theirs, mine in linears:
            names |= _linear(f"{a}.att.{theirs}", f"{b}.mixer.{mine}_proj", False)
        for part in ("key", "value", "receptance"):
            names |= _linear(f"{a}.ffn.{part}", f"{b}.mlp.{part}", False)
        names[f"{a}.att.time_faaaa"] = f"{b}.mixer.bonus"
        if v6:
            names |= {f"{a}.att.time_maa_w1": f"{b}.mixer.mix_down", f"{a}.att.time_maa_w2": f"{b}.mixer.mix_up",
                      f"{a}.att.time_decay_w1": f"{b}.mixer.decay_down", f"{a}.att.time_decay_w2": f"{b}.mixer.decay_up"}  # fmt: skip
        heads = (-1, config.d_head)
        ours[f"{b}.mixer.decay"] = state.pop(f"{a}.att.time_decay").reshape(heads)
        for part in ("weight", "bias"):
            ours[f"{b}.mixer.norm_{part}"] = state.pop(f"{a}.att.ln_x.{part}").reshape(heads)
        word = "maa" if v6 else "mix"
        for part in ("x", "w", "k", "v", "r", "g") if v6 else ("k", "v", "r", "g"):
            ours[f"{b}.mixer.mix.{part}"] = state.pop(f"{a}.att.time_{word}_{part}").flatten()
        for part, name in (("k", "key"), ("r", "receptance")):
            mix = state.pop(f"{a}.ffn.time_{word}_{part}").flatten()
            ours[f"{b}.mlp.time_mix_{name}"] = (
                1 - mix if v6 else mix
            )  # 6 says how much of the token before, 5 of this one
    return ours | _taken(state, names)


RWKV5 = Family("rwkv5", _rwkv56, _rwkv56_weights)
RWKV6 = Family("rwkv6", _rwkv56, _rwkv56_weights)
