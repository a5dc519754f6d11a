"""The tokenizer that belongs to a model, and what models are called: for every command that takes MODEL and text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ssmlens.errors import UserError

BYTES = 256  # the vocabulary of a model without a tokenizer: its tokens are bytes
# What a tokenizer may consist of, beside a model's weights.
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_ENOUGH = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # one of these makes one


class Coder(NamedTuple):
    """Text → tokens and back, without special tokens. start: those that the tokenizer puts before every text."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: list[int]


def names(paths: list[str]) -> list[str]:
    """Short names for the page: the last part of each path, or that before it where it is the `model` of a run; numbered where two are alike."""
    found: list[str] = []
    for path in paths:
        whole = Path(path).resolve()
        base = (whole.parent.name if whole.name == "model" else whole.name) if Path(path).exists() else path
        name, n = base, 2
        while name in found:
            name, n = f"{base} ({n})", n + 1
        found.append(name)
    return found


def tokenizer(name: str, model: Any, path: str, instead: str = "") -> Any:
    """The model's own tokenizer: beside the weights, inside a GGUF file, or the hub's; None for a model of bytes.

    instead: what the caller takes in place of text, for the error. Raises UserError where there is none or it does not fit."""
    from ssmlens.models.pretrained import packaged

    place, vocab_size = packaged().get(path, Path(path)), getattr(model.config, "vocab_size", None)
    is_gguf = place.is_file() and place.suffix == ".gguf"
    on_hub = not place.exists()
    if not (is_gguf or on_hub or (place.is_dir() and any((place / file).is_file() for file in _ENOUGH))):
        if vocab_size == BYTES:
            return None
        raise UserError(
            f"{name} has no tokenizer, and its {vocab_size} tokens are not bytes" + (instead and f"; {instead}")
        )
    try:
        found = _read(place, is_gguf, path)
    except Exception as e:  # whatever transformers and tokenizers raise: there is no usable tokenizer
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"{name}: its tokenizer cannot be loaded ({reason})" + (instead and f"; {instead}")) from e
    if isinstance(vocab_size, int) and (most := max(found.get_vocab().values(), default=0)) >= vocab_size:
        raise UserError(
            f"{name}: its tokenizer has the token {most}, the model only {vocab_size} of them: they do not belong together"
        )
    return found


def coder(found: Any) -> Coder:
    """Of what `tokenizer` returned."""
    if found is None:
        return Coder(
            lambda text: list(text.encode()), lambda ids: bytes(i % BYTES for i in ids).decode(errors="replace"), []
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = found(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    plain, special = encode("x"), list(found("x", verbose=False)["input_ids"])
    before = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return Coder(encode, lambda ids: str(found.decode(ids, skip_special_tokens=True)), special[:before])


def keep(name: str, model: Any, path: str, directory: Path) -> None:
    """The tokenizer of the model at `path`, if it has one, beside a model saved in `directory`."""
    import shutil

    from ssmlens.models.pretrained import packaged

    place = packaged().get(path, Path(path))
    if place.is_dir():
        for file in FILES:
            if (place / file).is_file():
                shutil.copyfile(place / file, directory / file)
    elif place.suffix == ".gguf" or not place.exists():
        try:
            found = tokenizer(name, model, path)
        except UserError:
            return  # a hub id without one
        if found is not None:
            found.save_pretrained(directory)


def _read(place: Path, is_gguf: bool, path: str) -> Any:
    """The kind comes from tokenizer_config.json; where that says nothing, tokenizer.json alone is a whole tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if is_gguf:
        return AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name, trust_remote_code=False)
    try:
        return AutoTokenizer.from_pretrained(str(place) if place.exists() else path, trust_remote_code=False)
    except Exception:
        if not (place / "tokenizer.json").is_file():
            raise
        return PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"))
