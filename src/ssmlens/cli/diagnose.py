"""`ssmlens diagnose [MODEL ...]`."""

import json as json_
import re
from pathlib import Path
from typing import Any

from ssmlens.cli import tokens as tokens_of
from ssmlens.errors import UserError


def run(
    models: list[str], text: Path | None, token_ids: Path | None, length: int, sequences: int, probes: int, exact: bool,
    initial: bool, transformer: bool, measures: list[str] | None, seed: int, device: str, resume: bool, out: Path | None, json: bool,
) -> None:  # fmt: skip
    from ssmlens.cli.output import directory, finish
    from ssmlens.models.pretrained import load, packaged

    if text is not None and token_ids is not None:
        raise UserError("give --text or --token-ids, not both")
    if not models and not packaged():
        raise UserError("this installation has no packaged checkpoints; name a model")
    on = _device(device)
    from ssmlens.lens import MEASURES, diagnose
    from ssmlens.lens.diagnosis import check_measures

    check_measures(measures or [])  # before models are loaded, which may take long
    where = directory(out, "diagnose")
    chosen = models or list(packaged())
    names = tokens_of.names(chosen)
    loaded = {name: load(path).to(on) for name, path in zip(names, chosen, strict=True)}
    tokens, source = _tokens(loaded, dict(zip(names, chosen, strict=True)), text, token_ids, length, sequences)

    diagnosis = diagnose(
        loaded, tokens, method="exact" if exact else "probes", probes=probes, at_initialisation=initial, transformer=transformer,
        measures=measures or list(MEASURES), seed=seed, progress=True, out_dir=where, resume=resume, config={"text": source}, notes=[f"Text: {source['name']}, {source['what']}."],
    )  # fmt: skip
    finish(diagnosis.record(), where, json)
    if not diagnosis.complete:
        raise KeyboardInterrupt


def _device(name: str) -> str:
    """auto: CUDA, else Apple's MPS, else the CPU. Raises UserError for what is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, is_there in there.items() if is_there)
    kind = name.partition(":")[0]
    if kind not in there:
        raise UserError(f"unknown device {name!r}: give auto, cpu, cuda or mps")
    if not there[kind]:
        raise UserError(f"this machine has no {kind} that PyTorch can use; give --device auto or cpu")
    return name


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
