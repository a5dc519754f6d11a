"""What `--data` names where an item reads text: files or a data set of the hub, and a tokenizer; and tokens for models that have none.

--data FILE,FILE,...        --data datasets:NAME,tokenizer:FILE        --data FILE,tokenizer:NAME
"""

import hashlib
import re
from pathlib import Path

from ssmlens.errors import UserError
from ssmlens.tasks import corpus
from ssmlens.tasks.streamed import Encode

BYTES = 256
_NUL = 0  # between documents of a model of bytes
_ENDS = ("<|endoftext|>", "</s>", "<eos>")


def divided(data: str | None) -> tuple[str | None, str | None]:
    """Text (paths with commas between, or datasets:NAME) and tokenizer of `--data`; None for what it does not name. Raises UserError."""
    parts = [part.strip() for part in (data or "").split(",") if part.strip()]
    tokenizers = [part.removeprefix("tokenizer:") for part in parts if part.startswith("tokenizer:")]
    texts = [part for part in parts if not part.startswith("tokenizer:")]
    if len(tokenizers) > 1 or (len(texts) > 1 and any(t.startswith("datasets:") for t in texts)):
        raise UserError("--data takes text files, or one datasets:NAME, and at most one tokenizer:FILE")
    return ",".join(texts) or None, tokenizers[0] if tokenizers else None


def identity(text: str, tokenizer: str | None) -> dict[str, str | None]:
    """What a run knows its text and tokenizer by: files by name and contents, wherever they lie; what is streamed or of the hub by name.

    Raises UserError for a file that is not there."""
    if text == corpus.PYTHON_REFERENCE:
        name, digest = text, corpus.python_reference().sha256
    elif text.startswith("datasets:"):
        where = Path(text.removeprefix("datasets:"))
        name, digest = f"datasets:{where.name}" if where.is_dir() else text, None
    else:
        paths = [Path(path) for path in corpus.paths(text)]
        name = " + ".join(path.name for path in paths)
        digest = hashlib.sha256("".join(map(_digest, paths)).encode()).hexdigest()
    own = Path(tokenizer) if tokenizer and Path(tokenizer).is_file() else None
    return {
        "name": name, "sha256": digest, "tokenizer": own.name if own else tokenizer, "tokenizer_sha256": _digest(own) if own else None,
    }  # fmt: skip


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no text file {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def coding(name: str | None) -> tuple[Encode, int, int]:
    """Texts → tokens, the size of the vocabulary, and what is put after a document. None: bytes.

    name: a tokenizer.json, or a name of the hub; its vocabulary is rounded up to a multiple of 8, as Mamba's. Raises UserError."""
    if name is None:
        return (lambda texts: [list(text.encode()) for text in texts]), BYTES, _NUL
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(name) if Path(name).is_file() else Tokenizer.from_pretrained(name)
    except Exception as e:  # tokenizers raises plain Exception
        raise UserError(f"cannot read the tokenizer {name}: {' '.join(str(e).split())[:200]}") from e
    known = found.get_vocab()
    end = next((known[t] for t in _ENDS if t in known), None)
    if end is None:
        raise UserError(f"the tokenizer {name} has no token for the end of a text ({', '.join(_ENDS)})")
    size = -(-(max(known.values()) + 1) // 8) * 8
    return (lambda texts: [e.ids for e in found.encode_batch(texts, add_special_tokens=False)]), size, end


def hashed_words(text: str, vocab_size: int) -> list[int]:
    """A token for every word and mark, by hash: for a model with random embeddings, to which it only matters which tokens are the same."""
    words = re.findall(r"\w+|[^\w\s]", text)
    numbers = {w: int.from_bytes(hashlib.sha256(w.encode()).digest()[:8], "big") % vocab_size for w in set(words)}
    return [numbers[w] for w in words]
