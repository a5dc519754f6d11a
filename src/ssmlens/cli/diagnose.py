"""`ssmlens diagnose [MODEL ...]`."""

import json as json_
import re
from pathlib import Path
from typing import Any

from ssmlens.errors import UserError
from ssmlens.models.pretrained import tokens as tokens_of


def run(
    models: list[str], text: Path | None, token_ids: Path | None, images: str | None, side: int | None, inputs: Path | None, length: int, sequences: int,
    probes: int, exact: bool, initial: bool, transformer: bool, measures: list[str] | None, seed: int, device: str, resume: bool,
    out: Path | None, json: bool,
) -> None:  # fmt: skip
    from ssmlens.cli import devices
    from ssmlens.cli.output import directory, finish
    from ssmlens.models.pretrained import load, packaged

    sources = {"--text": text, "--token-ids": token_ids, "--images": images, "--inputs": inputs}
    if len(given := [name for name, value in sources.items() if value is not None]) > 1:
        raise UserError(f"give one of {' and '.join(given)}, not both")
    if side is not None and images is None:
        raise UserError("--side makes images smaller: give --images SOURCE, or leave it away")
    if not models and not packaged():
        raise UserError("this installation has no packaged checkpoints; name a model")
    on = devices.chosen(device)
    from ssmlens.lens import MEASURES, diagnose
    from ssmlens.lens.diagnosis import check_measures

    check_measures(measures or [])  # before models are loaded, which may take long
    where = directory(out, "diagnose")
    chosen = models or list(packaged())
    names = tokens_of.names(chosen)
    loaded = {name: load(path).to(on) for name, path in zip(names, chosen, strict=True)}
    _same_kind(loaded, images is not None or inputs is not None)
    if images is not None:
        read, source = _images(loaded, chosen, images, side, sequences)
    elif inputs is not None:
        read, source = _vectors(inputs, sequences)
    else:
        read, source = _tokens(loaded, dict(zip(names, chosen, strict=True)), text, token_ids, length, sequences)
    kind = "images" if images is not None else "inputs" if inputs is not None else "text"

    diagnosis = diagnose(
        loaded, read, method="exact" if exact else "probes", probes=probes, at_initialisation=initial, transformer=transformer,
        measures=measures or list(MEASURES), seed=seed, progress=True, out_dir=where, resume=resume, config={kind: source},
        notes=[f"{kind.capitalize()}: {source['name']}, {source['what']}.", *_averaged(loaded)],
    )  # fmt: skip
    finish(diagnosis.record(), where, json)
    if not diagnosis.complete:
        raise KeyboardInterrupt


def _same_kind(models: dict[str, Any], vectors: bool) -> None:
    """Raises UserError for classifiers without vectors to read, and for others with them."""
    from ssmlens.lens import Subject

    for name, model in models.items():
        reads = Subject(name, model).access.vectors
        if reads and not vectors:
            raise UserError(f"{name} reads vectors and no text: give --images SOURCE or --inputs FILE")
        if vectors and not reads:
            raise UserError(
                f"{name} reads tokens: --images and --inputs are for classifiers, give --text or --token-ids"
            )


def _averaged(models: dict[str, Any]) -> list[str]:
    """What influence is of, for a model whose last hidden state is one of many that it reads."""
    named = [
        name for name, model in models.items() if getattr(getattr(model, "config", None), "pooling", None) == "mean"
    ]
    if not named:
        return []
    return [
        f"{', '.join(named)}: the answer is read off the mean over all hidden states. Influence is that on the last hidden state, as in models without a mean; "
        "what moves the answer is measured under its own name (reading)."
    ]


def _images(
    models: dict[str, Any], paths: list[str], source: str, side: int | None, sequences: int
) -> tuple[Any, dict[str, Any]]:
    """Test images, as many of each class as of the others, in [0, 1]."""
    from ssmlens.experiments.pixels_images import read_as_trained
    from ssmlens.tasks.images import balanced_order, to_unit

    found = read_as_trained(source, paths, side)
    for name, model in models.items():
        wanted = getattr(getattr(model, "config", model), "d_input", found.channels)
        if wanted != found.channels:
            raise UserError(f"{name} reads {wanted} numbers a pixel, {source} has {found.channels}")
    pixels = found.test.pixels[balanced_order(found.test.labels)[:sequences]]
    what = f"{len(pixels)} test images of {found.height} × {found.width} pixels, row by row; a token is a pixel"
    return to_unit(pixels), {"name": found.name, "sha256": found.sha256, "what": what}


def _vectors(file: Path, sequences: int) -> tuple[Any, dict[str, Any]]:
    """Floats (batch, length, d_input) of a .npy or .safetensors file, evenly spaced ones of the batch. Raises UserError."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if len(tensors) != 1 and "inputs" not in tensors:
                raise UserError(f"{file} holds {len(tensors)} tensors, and none is named inputs")
            x: Any = tensors.get("inputs", next(iter(tensors.values())))
        else:
            x = np.load(file, allow_pickle=False)
            if isinstance(x, np.ndarray) and x.dtype.kind == "f":  # of any byte order and precision
                x = torch.from_numpy(np.ascontiguousarray(x, np.float64 if x.itemsize > 4 else np.float32))
    except UserError:
        raise
    except Exception as e:  # numpy, zipfile, tokenize and safetensors raise a dozen kinds
        raise UserError(
            f"cannot read {file}: {getattr(e, 'strerror', None) or e}; give a .npy or .safetensors file of floats"
        ) from None
    if not isinstance(x, torch.Tensor) or x.ndim != 3 or not x.is_floating_point() or not len(x):
        raise UserError(f"{file} must hold floats of shape (batch, length, d_input)")
    rows = np.linspace(0, len(x) - 1, min(sequences, len(x))).astype(int).tolist()
    what = f"{len(rows)} of {len(x)} sequences of {x.shape[1]} vectors; a token is a vector"
    return (x[rows] if x.dtype == torch.float64 else x[rows].float()), {"name": file.name, "what": what}


def _tokens(
    models: dict[str, Any],
    paths: dict[str, str],
    text: Path | None,
    token_ids: Path | None,
    length: int,
    sequences: int,
) -> tuple[Any, dict[str, Any]]:
    """Evenly spaced sequences of tokens, and where they are from (for the record)."""
    if token_ids is not None:
        ids = _read_ids(token_ids)
        for name, model in models.items():
            bad = [i for i in ids if not 0 <= i < model.config.vocab_size]
            if bad:
                raise UserError(
                    f"{token_ids} holds token {bad[0]}, {name} has a vocabulary of {model.config.vocab_size}"
                )
        return _spread(ids, length, sequences, str(token_ids)), {
            "name": token_ids.name,
            "what": f"{len(ids)} token ids",
        }

    from ssmlens.tasks import corpus

    source = corpus.python_reference() if text is None else corpus.text_file(text, heldout=1.0)
    tokenizers = {
        name: tokens_of.tokenizer(name, model, paths[name], "give --token-ids FILE") for name, model in models.items()
    }
    held_out = "held-out part" if text is None else "all of it"
    what = {"name": source.name if text is None else text.name, "sha256": source.sha256, "python": source.python}
    if all(t is None for t in tokenizers.values()):
        return corpus.windows(source, length, sequences).tokens, {**what, "what": f"bytes, {held_out}"}
    if len({_vocabulary(t) for t in tokenizers.values()}) > 1:
        raise UserError("these models have different tokenizers; diagnose them one at a time, or give --token-ids")
    encode = tokens_of.coder(next(iter(tokenizers.values()))).encode
    ids = encode(bytes(source.heldout).decode("utf-8", errors="replace"))
    return _spread(ids, length, sequences, what["name"]), {
        **what,
        "what": f"tokens of the model's own tokenizer, {held_out}",
    }


def _read_ids(path: Path) -> list[int]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    if content.lstrip().startswith("["):
        try:
            found = json_.loads(content)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not a JSON list: {e}") from None
    else:
        found = [int(w) if re.fullmatch(r"-?\d{1,18}", w) else w[:40] for w in content.split()]
    wrong = [x for x in found if not isinstance(x, int) or isinstance(x, bool)]
    if wrong:
        raise UserError(f"{path} holds {wrong[0]!r}, which is no token id; give integers, or a JSON list of them")
    return list(found)


def _spread(ids: list[int], length: int, sequences: int, name: str) -> Any:
    import torch

    if len(ids) < length:
        raise UserError(
            f"{name} is {len(ids)} tokens long, shorter than the length {length}: more text, or --length {len(ids)}"
        )
    count = min(sequences, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([torch.tensor(ids[s : s + length]) for s in starts])


def _vocabulary(tokenizer: Any) -> tuple[tuple[str, int], ...] | None:
    return None if tokenizer is None else tuple(sorted(tokenizer.get_vocab().items()))
