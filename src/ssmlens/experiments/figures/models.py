"""The models that Figures 1, 5, 6 and 7 look at: Mamba and Pythia in their published sizes at initialisation, and trained ones.

    initial     a published shape with fresh parameters: Mamba's by its authors' initialiser, Pythia's by that of GPT-NeoX
    trained     a packaged checkpoint, a directory, or a hub id; or the same with fresh parameters
    beside      a transformer of the size of a trained model, at initialisation, or trained here as that model was

Models at initialisation read real text: the tokens of a tokenizer where one is given, else a token for every word (to random embeddings it only matters
which tokens are alike). Trained ones read text that was held out from them, as the tokens that they know.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.experiments.texts import BYTES, coding, divided, hashed_words
from ssmlens.lens import Subject
from ssmlens.lens.baseline import transformer_like
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.models.parts import MLP
from ssmlens.models.pretrained import load, packaged
from ssmlens.tasks import corpus
from ssmlens.tasks.corpus import CorpusConfig, CorpusStream
from ssmlens.training import TrainConfig, train
from ssmlens.training.schedulers import Report

MAMBA = {
    "130M": (24, 768),
    "370M": (48, 1024),
    "790M": (48, 1536),
    "1.4B": (48, 2048),
    "2.8B": (64, 2560),
    "tiny": (3, 16),
}
"""Layers and width (Gu and Dao 2023, Table 12)."""
PYTHIA = {
    "160M": (12, 768, 12),
    "410M": (24, 1024, 16),
    "1B": (16, 2048, 8),
    "1.4B": (24, 2048, 16),
    "2.8B": (32, 2560, 32),
    "tiny": (2, 16, 2),
}
"""Layers, width and heads (Biderman et al. 2023, Table 1)."""
BESIDE = {"130M": "160M", "370M": "410M", "790M": "1B", "1.4B": "1.4B", "2.8B": "2.8B", "tiny": "tiny"}
"""Of a Mamba the Pythia that comes nearest to its size."""
VOCABULARY = {"mamba": 50280, "pythia": 50304}
_TINY = 256
_STEPS = 1000  # of the packaged checkpoints, of 8 sequences of 512 bytes

Kind = Literal["mamba", "pythia", "loaded", "fresh", "transformer", "trained transformer"]


@dataclass(frozen=True)
class Model:
    """of: a size of MAMBA or PYTHIA, or what `ssmlens.load` takes. seed: of the initialisation, and of a training."""

    kind: Kind
    of: str
    seed: int = 0

    @property
    def name(self) -> str:
        short = Path(self.of).name if os.path.isdir(self.of) else self.of
        return {
            "mamba": f"Mamba-{self.of}", "pythia": f"Pythia-{self.of}", "loaded": short, "fresh": f"{short} (at initialisation)",
            "transformer": f"transformer of {short}'s size (at initialisation)", "trained transformer": f"transformer of {short}'s size (trained here)",
        }[self.kind]  # fmt: skip

    @property
    def trained(self) -> bool:
        return self.kind in ("loaded", "trained transformer")

    @property
    def id(self) -> str:
        """For the name of a directory."""
        short = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.of).strip("-.")[-60:]
        return f"{self.kind.replace(' ', '-')}-{short}" + ("" if self.kind == "loaded" else f"-seed{self.seed}")


def build(model: Model, directory: Path, report: Report) -> Subject:
    """The model on the GPU, where there is one. directory: of what is trained here, for all figures. Raises UserError."""
    if model.kind in ("mamba", "pythia"):
        subject = Subject(model.name, initial(model.kind, model.of, model.seed))
    else:
        subject = Subject(model.name, load(model.of))
        if model.kind == "fresh":
            subject = Subject(model.name, subject.at_initialisation(model.seed).model)
        elif model.kind != "loaded":
            subject = Subject(model.name, transformer_like(subject, model.seed).model)
    if model.kind == "trained transformer":
        _train(subject.model, model, directory, report)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Subject(model.name, subject.model.to(device).eval())


def initial(family: str, size: str, seed: int) -> LanguageModel:
    """A published shape with fresh parameters."""
    vocab_size = _TINY if size == "tiny" else VOCABULARY[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "mamba":
            layers, width = MAMBA[size]
            return LanguageModel(
                LanguageModelConfig(vocab_size=vocab_size, d_model=width, n_layers=layers, mixer="mamba")
            )
        layers, width, heads = PYTHIA[size]
        made = LanguageModel(
            LanguageModelConfig(
                vocab_size=vocab_size, d_model=width, n_layers=layers, mixer="attention", norm="layer", mlp="gelu", mlp_ratio=4.0, mlp_bias=True,
                parallel=True, tie_word_embeddings=False, mixer_config={"n_heads": heads, "bias": True, "rope_fraction": 0.25},
            )
        )  # fmt: skip
        _as_gpt_neox(made, layers, width)
        return made


@torch.no_grad()
def _as_gpt_neox(made: LanguageModel, layers: int, width: int) -> None:
    """Linear weights and embeddings N(0, 2/(5 width)), those that write into the residual stream N(0, (2/(layers √width))²), biases 0: Pythia's
    "small_init" and "wang_init"."""
    small, out = math.sqrt(2 / (5 * width)), 2 / (layers * math.sqrt(width))
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=out if name.endswith(("o_proj", "out_proj")) else small)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    assert any(isinstance(module, MLP) for module in made.modules())


def _train(transformer: nn.Module, model: Model, directory: Path, report: Report) -> None:
    """As configs/mamba-default.toml trains the packaged Mamba: text, batches, steps and learning rate."""
    if model.of not in packaged():
        raise UserError(f"a transformer beside {model.of} cannot be trained: how that model was trained is not known")
    assert isinstance(transformer, LanguageModel)
    stream = CorpusStream(CorpusConfig(length=512, batch_size=8, seed=model.seed))
    settings = TrainConfig(
        steps=_STEPS, lr=4e-3, min_lr=4e-5, warmup_steps=_STEPS // 10, weight_decay=0.1, clip=1.0, seed=model.seed, checkpoint_every=250
    )  # fmt: skip
    train(
        transformer, stream, settings, directory / model.id, resume=True, progress=report, optimizer_groups=transformer.parameter_groups(0.1),
        identity=stream.identity,
    )  # fmt: skip


# ---- what they read ----


def tokens(model: Model, subject: Subject, data: str | None, length: int, count: int) -> Tensor:
    """Evenly spaced sequences, (count, length): fewer where the text has no room for so many. Raises UserError."""
    named, tokenizer = divided(data)
    if named is not None and named.startswith("datasets:"):
        raise UserError("these figures read a text file, not a data set: give --data FILE")
    vocab_size = int(getattr(subject.model.config, "vocab_size", 0))
    untrained = model.kind in ("mamba", "pythia")
    if vocab_size == BYTES and not untrained:
        return corpus.windows(
            corpus.read(named or corpus.PYTHON_REFERENCE, 0.1 if named is None else 1.0), length, count
        ).tokens
    text = _text(named, untrained)
    if tokenizer is None and not untrained:
        tokenizer = _own_tokenizer(model.of)
    if tokenizer is None:
        ids = hashed_words(text, vocab_size)
    else:
        encode, size, _ = coding(tokenizer)
        if size - 8 > vocab_size:
            raise UserError(
                f"{model.name} knows {vocab_size} tokens, the tokenizer {tokenizer} has {size}: they do not belong together"
            )
        ids = encode([text])[0]
    if len(ids) < length:
        raise UserError(
            f"the text has {len(ids):,} tokens, shorter than the length {length:,}: give a longer one with --data FILE"
        )
    count = min(count, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([torch.tensor(ids[s : s + length]) for s in starts])


def _text(named: str | None, untrained: bool) -> str:
    """Held-out text; all of it for a model that has learned nothing."""
    found = corpus.read(named or corpus.PYTHON_REFERENCE, 0.1 if named is None else 1.0)
    parts = [found.train, found.heldout] if untrained else [found.heldout]
    return b"\n".join(part.tobytes() for part in parts).decode("utf-8", errors="replace")


def _own_tokenizer(path: str) -> str:
    beside = Path(path) / "tokenizer.json"
    if Path(path).is_dir() and not beside.is_file():
        raise UserError(f"{path} has no tokenizer.json: give one with --data FILE,tokenizer:FILE")
    return str(beside) if beside.is_file() else path


def described(data: str | None) -> str:
    """Of the text, for the record: names, without paths."""
    named, tokenizer = divided(data)
    found = corpus.read(named or corpus.PYTHON_REFERENCE, 0.1 if named is None else 1.0)
    coded = "a token for every word, by hash" if tokenizer is None else f"tokens of {Path(tokenizer).name}"
    return f"Text: {found.name}, sha256 {found.sha256[:16]}; published sizes read it as {coded}, trained models as the tokens that they know."
