"""Checkpoints, ours and other people's: `load` turns a directory or hub id into a model. No code from a checkpoint is ever run."""

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ssmlens.models  # noqa: F401  (makes transformers know our model_type)
from ssmlens.errors import UserError, nearest
from ssmlens.models.classifier import Classifier, ClassifierConfig
from ssmlens.models.pretrained import originals, pickled
from ssmlens.models.pretrained.families import FAMILIES, Unsupported, convert

__all__ = ["FAMILIES", "Unsupported", "convert", "load", "packaged"]

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Causal masks and angles that old checkpoints of GPT-NeoX, GPT-2 and Llama hold beside the weights.
MASKS = re.compile(r"\.(attention|attn)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")


def packaged() -> dict[str, Path]:
    """The checkpoints that ship with ssmlens, by name."""
    root = Path(__file__).resolve().parents[2] / "checkpoints"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()} if root.is_dir() else {}


def load(path: str | os.PathLike[str]) -> nn.Module:
    """A model from a local directory, the name of a packaged checkpoint, a hub id, a .pth or .ckpt (`pickled`) or a .gguf file; in eval mode, float32.

    Ours (a `LanguageModel`, or a `Classifier`) and the families of `FAMILIES`, in transformers' format or their authors', come back as a `LanguageModel`,
    other causal language models as transformers' own class. No code of a checkpoint is run: safetensors first, GGUF, and pickles
    (pytorch_model.bin) read with `weights_only=True`. Raises UserError, naming the path, for what cannot be loaded whole."""
    name = os.fspath(path)
    local = packaged().get(name, Path(name))
    try:
        is_directory, exists = local.is_dir(), local.exists()
    except OSError as e:
        raise UserError(f"no model at {name[:80]}: {e.strerror}") from None
    options: dict[str, Any] = {}
    if is_directory:
        if originals.is_mamba_ssm(_config(local)):
            return _finite(name, originals.load_mamba_ssm(local)).eval()
        _model_type(local)
        _no_code(_config(local), name)
        _inspect(local)
        source = str(local)
    elif exists and local.suffix in pickled.SUFFIXES:
        return _finite(name, pickled.load_pickled(local)).eval()
    elif exists and local.suffix == ".gguf":
        source, options = str(local.parent), {"gguf_file": local.name}
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{name} is a GGUF file, which needs the package gguf: pip install gguf")
    elif exists:
        raise UserError(
            f"{name} is a file; give the directory that holds config.json and model.safetensors, a .pth, .pt or .ckpt of a known kind, or a .gguf file"
        )
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and not local.parent.is_dir():
        source = name
    else:
        known = list(packaged())
        raise UserError(
            f"no model at {name}: no such directory, no packaged checkpoint (there are: {', '.join(known) or 'none'}), not a hub id"
            + nearest(name, known)
        )
    return _checked(name, *_read(name, source, options)).eval()


def _config(directory: Path) -> dict[str, Any]:
    """config.json. Raises UserError."""
    config = directory / "config.json"
    if not config.is_file():
        raise UserError(f"{directory} holds no config.json: not a model directory")
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{config} is not readable JSON: {e}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{config} is not readable JSON: it holds no mapping")
    return tree


def _model_type(directory: Path) -> str:
    """What config.json says the model is. Raises UserError where it does not say."""
    kind = _config(directory).get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{directory / 'config.json'} has no model_type")
    return kind


def _inspect(directory: Path) -> None:
    """Refuse, before anything is read, shards outside the directory and tensors that would lose something on the way to float32."""
    explicit = _config(directory).get("transformers_weights")
    if explicit is not None and (not isinstance(explicit, str) or Path(explicit).name != explicit):
        raise UserError(f"{directory / 'config.json'} asks for the weights {explicit!r}; they must lie beside it")
    if (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory} holds an adapter for another model: merge it into that one first")
    for index in directory.glob("*.safetensors.index.json"):
        _shards(index)
    tensors = _tensors(directory)
    for key, (kind, _) in tensors.items():
        if kind not in ("F64", "F32", "F16", "BF16") and not MASKS.search(key):
            raise UserError(f"cannot load {directory}: {key} has dtype {kind}; only floating-point weights can be read")
    if tensors:
        _plausible(directory, {key: shape for key, (_, shape) in tensors.items()})


def _tensors(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of every tensor in the files its dtype and shape, without reading it. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in _pickles(directory):
        for key, value in originals.read(path).items():
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"cannot load {path}: {key} describes more numbers than the file holds")
            found[key] = _DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape)
    if found:
        return found
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118  (not a dict)
                    part = f.get_slice(key)
                    found[key] = part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as e:
            raise UserError(f"cannot load {directory}: {path.name} is damaged ({e})") from None
    return found


def _pickles(directory: Path) -> list[Path]:
    """The files of transformers' weights, where they are pickled and there are none as safetensors. Raises UserError."""
    if any((directory / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return []
    one, index = directory / "pytorch_model.bin", directory / "pytorch_model.bin.index.json"
    return [one] if one.is_file() else _shards(index) if index.is_file() else []


def _shards(index: Path) -> list[Path]:
    """The files that an index names: all there, and beside it. Raises UserError."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{index} is not a list of shards: {e}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index} names the shard {shard!r}; shards must lie beside it")
        if not (index.parent / shard).is_file():
            raise UserError(f"cannot load {index.parent}: the shard {shard} is missing")
    return [index.parent / shard for shard in shards]


def _plausible(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a configuration that describes a far larger model than the files hold, before memory is asked for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = _config(directory).get("num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(shapes):
        raise UserError(
            f"cannot load {directory}: the configuration says {layers} layers, the files hold {len(shapes)} tensors"
        )
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
            with torch.device("meta"):
                if isinstance(config, ClassifierConfig):
                    model = Classifier(config)
                else:
                    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception:  # whatever it is, `_read` meets it again and says so
            return
    described, held = sum(p.numel() for p in model.parameters()), sum(math.prod(shape) for shape in shapes.values())
    if described <= 2 * held and not _pickles(
        directory
    ):  # of pickles, transformers' own comparison may fail on tied weights
        return
    for key, p in model.state_dict().items():
        if key in shapes and shapes[key] != tuple(p.shape):
            raise UserError(
                f"cannot load {directory}: {key} has shape {shapes[key]}, the configuration says {tuple(p.shape)}"
            )
    if described > 2 * held:
        raise UserError(
            f"cannot load {directory}: the configuration describes {described:,} weights, the files hold {held:,}"
        )


def _no_code(tree: Any, name: str) -> None:
    """Refuse a configuration that asks for kernels of somebody: transformers would fetch and run them."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if "implementation" in str(key) and "/" in str(value):
            raise UserError(
                f"{name} asks for code from elsewhere ({key}: {str(value)[:80]}), which is never run: remove that key"
            )
        _no_code(value, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without warnings and bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read(name: str, source: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    with _quiet():  # what a warning would say of missing keys, `_checked` raises
        try:
            kind: Any = AutoModelForCausalLM
            if not options:
                config = PreTrainedConfig.get_config_dict(source)[0]
                _no_code(config, name)
                kind = Classifier if config.get("model_type") == ClassifierConfig.model_type else kind
            return kind.from_pretrained(
                source, use_safetensors=None if options else not _pickles(Path(source)), weights_only=True, output_loading_info=True,
                trust_remote_code=False, dtype=torch.float32,
                ignore_mismatched_sizes=True,  # `_checked` refuses them, by name
                **options,
            )  # fmt: skip
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        except Exception as e:  # transformers, safetensors and the hub raise a dozen kinds: this cannot be loaded
            reason = f"it lacks {e}" if isinstance(e, KeyError) else " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"cannot load {name}: {reason[:300]}") from e


def _checked(name: str, model: nn.Module, info: dict[str, Any]) -> nn.Module:
    unknown = [key for key in info.get("unexpected_keys") or () if not MASKS.search(key)]
    for what, keys in (("lacks", info.get("missing_keys")), ("has unknown", unknown)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise UserError(f"cannot load {name}: the checkpoint {what} {some}")
    if info.get("mismatched_keys"):
        key, got, want = next(iter(info["mismatched_keys"]))
        raise UserError(f"cannot load {name}: {key} has shape {tuple(got)}, the configuration says {tuple(want)}")
    _finite(name, model)
    try:
        return convert(model, share=True)
    except Unsupported:
        return model


def _finite(name: str, model: nn.Module) -> nn.Module:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"cannot load {name}: {key} contains NaN or infinity")
    return model
