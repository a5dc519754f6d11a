"""Depth against width at equal numbers of parameters: what Figure 4 and Table 4 train, at which scale, and one run of it.

    parameters ≈ V d + depth · (6 d² + 2 d (2 r + 3 N + 8))       d: width, r = d/16 rounded up, N = 16, V: vocabulary

A size is a number of parameters; for every depth the width is chosen that comes nearest to it. Sizes form tiers with steps and a peak learning
rate of their own, whatever the depth (the paper's Table 4). A batch holds so many tokens, whatever the context: a longer one means fewer sequences.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmlens.errors import UserError
from ssmlens.experiments.texts import BYTES, coding, divided, identity
from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.tasks import corpus
from ssmlens.tasks.corpus import CorpusConfig, CorpusStream
from ssmlens.tasks.streamed import PackedStream, source_of
from ssmlens.training import TrainConfig, train
from ssmlens.training.identity import fingerprint
from ssmlens.training.schedulers import Report

VARIANTS = {
    "default": "default Mamba",
    "polarized": "polarized Mamba",
    "half-rate": "default Mamba at half the learning rate",
}
"""half-rate: the default at half the learning rate, to see how much of an effect of depth is one of the rate."""
_LOOKED_AT = 4  # sequences whose sharpness is measured


@dataclass(frozen=True)
class Tier:
    """Sizes up to `most` parameters: how long and how fast they are trained."""

    most: int
    steps: int
    lr: float


@dataclass(frozen=True)
class Part:
    """What is run: every size at every depth and context, so many seeds."""

    variant: str
    sizes: tuple[int, ...]
    depths: tuple[int, ...]
    seeds: int


@dataclass(frozen=True)
class Scale:
    """contexts: the shorter and the longer one. compared: three of the depths, for what is said of shallow, middle and deep.
    piece: tokens of one forward pass; more are accumulated. recompute_from: depth from which activations are computed again on the way back.
    text, tokenizer: what is read where no other is given; no tokenizer: bytes. heldout: tokens of a stream that are kept from training."""

    parts: tuple[Part, ...]
    tiers: tuple[Tier, ...]
    contexts: tuple[int, int]
    compared: tuple[int, int, int]
    batch_tokens: int
    piece: int
    multiple: int  # of a width
    min_lr: float
    warmup: float  # share of the steps
    validation_tokens: int
    checkpoint_every: int
    variants: tuple[str, ...] = ("default",)
    precision: str = "fp32"
    recompute_from: int = 1000
    text: str = corpus.PYTHON_REFERENCE
    tokenizer: str | None = None
    heldout: int = 0

    def tier(self, size: int) -> Tier:
        return next(tier for tier in self.tiers if size <= tier.most)

    @property
    def shared(self) -> dict[str, Any]:
        """What every run depends on, whichever runs there are and however many seeds of each."""
        return {key: value for key, value in asdict(self).items() if key not in ("parts", "variants", "compared")}

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(sorted({depth for part in self.parts for depth in part.depths}))


_PAPER_SIZES = (140_000_000, 200_000_000, 280_000_000, 360_000_000, 450_000_000, 550_000_000)
_PAPER_DEPTHS = (16, 24, 32, 48, 64, 72)

SCALES = {
    "smoke": Scale(
        parts=(Part("default", (9_000, 14_000), (1, 2, 3), 1), Part("polarized", (9_000,), (1, 2, 3), 1), Part("half-rate", (9_000,), (1, 3), 1)), tiers=(Tier(10_000, 3, 4e-3), Tier(20_000, 4, 2e-3)),
        contexts=(16, 32), compared=(1, 2, 3), batch_tokens=64, piece=64, multiple=4, min_lr=1e-5, warmup=0.1, validation_tokens=256, checkpoint_every=100,
        variants=tuple(VARIANTS),
    ),
    "laptop": Scale(
        parts=(
            Part("default", (204_000,), (2, 4, 8, 16, 32), 3),
            Part("polarized", (204_000,), (2, 8, 32), 3),
            Part("half-rate", (204_000,), (2, 8, 32), 3),
            Part("default", (600_000,), (2, 8, 32), 2),
            Part("default", (600_000,), (4, 16), 1),
            Part("polarized", (600_000,), (2, 8, 32), 1),
            Part("default", (2_000_000,), (2, 8, 32), 1),
        ),
        tiers=(Tier(300_000, 800, 8e-3), Tier(1_000_000, 800, 6e-3), Tier(2_500_000, 800, 4e-3)),
        contexts=(128, 512), compared=(2, 8, 32), batch_tokens=1024, piece=1024, multiple=2, min_lr=1e-5, warmup=0.1, validation_tokens=1 << 16,
        checkpoint_every=400, variants=tuple(VARIANTS),
    ),
    "paper": Scale(
        parts=tuple(Part(variant, _PAPER_SIZES, _PAPER_DEPTHS, 1) for variant in ("default", "polarized")),
        tiers=(Tier(250_000_000, 4_800, 3e-3), Tier(400_000_000, 13_500, 1.5e-3), Tier(560_000_000, 20_000, 1.25e-3)),
        contexts=(2048, 8192), compared=(16, 32, 72), batch_tokens=1 << 19, piece=1 << 15, multiple=16, min_lr=1e-5, warmup=0.1,
        validation_tokens=10_000_000, checkpoint_every=50, precision="bf16", recompute_from=32, text="datasets:mlfoundations/dclm-baseline-1.0",
        tokenizer="EleutherAI/gpt-neox-20b", heldout=10_000_000,
    ),
}  # fmt: skip


def parameters(depth: int, width: int, vocab_size: int) -> int:
    """Of a Mamba with default settings and tied embeddings."""
    n, inner, rank = 16, 2 * width, math.ceil(width / 16)
    convolution, steps, skip = 5 * inner, (rank + 1) * inner, inner
    mixer = 4 * width**2 + convolution + inner * (rank + 2 * n) + steps + inner * n + skip + 2 * width**2
    return vocab_size * width + depth * (width + mixer) + width


def width(depth: int, size: int, vocab_size: int, multiple: int) -> int:
    """The multiple that brings the number of parameters nearest to `size`."""
    above = multiple
    while parameters(depth, above, vocab_size) < size:
        above += multiple
    below = max(multiple, above - multiple)
    return min(below, above, key=lambda d: abs(parameters(depth, d, vocab_size) - size))


def model(scale: Scale, variant: str, size: int, depth: int, vocab_size: int) -> LanguageModelConfig:
    """Polarized: one state channel at one and one at zero in place of learned ones, the width that of the default. That is 4 d_model parameters a layer
    less (two transitions of each inner channel); appended, they would be 8 d_model more, most of all in the deepest models."""
    return LanguageModelConfig(
        vocab_size=vocab_size, d_model=width(depth, size, vocab_size, scale.multiple), n_layers=depth, mixer="mamba", tie_word_embeddings=True,
        polarization={"ones": 1, "zeros": 1, "mode": "replace"} if variant == "polarized" else None,
    )  # fmt: skip


def training(scale: Scale, variant: str, size: int, seed: int) -> TrainConfig:
    """Mamba's recipe, which the paper follows: AdamW with β = (0.9, 0.95), warm-up, a cosine to 1e-5."""
    tier = scale.tier(size)
    return TrainConfig(
        steps=tier.steps, lr=tier.lr / (2 if variant == "half-rate" else 1), min_lr=scale.min_lr, warmup_steps=round(scale.warmup * tier.steps), weight_decay=0.1, betas=(0.9, 0.95), clip=1.0,
        seed=seed, precision="bf16" if scale.precision == "bf16" else "fp32", grad_accumulation=scale.batch_tokens // scale.piece,
        checkpoint_every=scale.checkpoint_every,
    )  # fmt: skip


# ---- text ----


@dataclass
class Text:
    """A stream of batches, and held-out windows of the longer context."""

    stream: Any
    vocab_size: int
    heldout: Tensor
    targets: Tensor
    described: dict[str, Any]


def text(scale: Scale, data: str | None, context: int, seed: int, cache: Path) -> Text:
    """Files as bytes are held in memory, windows drawn at random; what is tokenized or streamed is packed on disk, in `cache`."""
    named, tokenizer = divided(data)
    named, tokenizer = named or scale.text, tokenizer or scale.tokenizer
    batch_size, longest = scale.batch_tokens // context, max(scale.contexts)
    count = max(1, scale.validation_tokens // longest)
    if tokenizer is None and not named.startswith("datasets:"):
        stream = CorpusStream(CorpusConfig(text=named, length=context, batch_size=batch_size, seed=seed))
        found = corpus.windows(stream.corpus, longest, count)
        told = {
            "name": stream.corpus.name,
            "sha256": stream.corpus.sha256,
            "tokens": len(stream.corpus.train),
            "unit": "bytes",
        }
        return Text(stream, BYTES, found.tokens, found.targets, told)
    if named == corpus.PYTHON_REFERENCE:
        raise UserError(
            "the packaged text is read as bytes: name a text beside the tokenizer, --data FILE,tokenizer:FILE"
        )
    encode, vocab_size, end = coding(tokenizer)
    source = source_of(named)
    cache = cache / _key(identity(named, tokenizer))
    packed = PackedStream(
        source, encode, vocab_size, cache, length=context, batch_size=batch_size, heldout=max(scale.heldout, count * longest + 1), separator=end, seed=seed
    )  # fmt: skip
    held = packed.validation(count, longest)
    told = {
        "name": source.name,
        "sha256": packed.identity["first_chunk"],
        "tokens": None,
        "unit": "tokens" if tokenizer else "bytes",
    }
    return Text(packed, vocab_size, held.tokens, held.targets, told)


def known(scale: Scale, data: str | None) -> dict[str, str | None]:
    """The text and the tokenizer that `--data` names, as a run knows them."""
    named, tokenizer = divided(data)
    return identity(named or scale.text, tokenizer or scale.tokenizer)


def source(out: Path, text: dict[str, str | None]) -> Path:
    """The file that says where a text lies. It stands beside the runs: that may change while they do not."""
    return out / f"text-{_key(text)}.json"


def _key(text: dict[str, str | None]) -> str:
    return fingerprint(text)[:12]


# ---- a run ----


def recomputing(lm: LanguageModel) -> None:
    """Every block keeps its input alone and computes the rest again on the way back: memory of one block's graph, a third more work."""
    from torch.utils.checkpoint import checkpoint

    for block in lm.backbone.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@torch.no_grad()
def evaluate(lm: nn.Module, heldout: Tensor, targets: Tensor, context: int, piece: int) -> dict[str, float]:
    """Nats a token on the same held-out text, whatever the context: its windows are cut into sequences of `context`."""
    device = next(lm.parameters()).device
    rows = [t.reshape(-1, context) for t in (heldout, targets)]
    loss = count = 0.0
    for tokens, wanted in zip(*(r.split(max(1, piece // context)) for r in rows), strict=True):
        out = lm(tokens.to(device), targets=wanted.to(device))
        loss, count = loss + float(out.loss) * int(out.n_targets), count + int(out.n_targets)
    return {"loss": loss / count}


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One run, in a process of its own; resumes from what is in `directory`. What is packed of a stream lies beside the runs, for all of them."""
    from ssmlens.lens import smoothing

    scale = SCALES[config["scale"]]
    variant, size, depth, context, seed = (config[key] for key in ("variant", "size", "depth", "context", "seed"))
    data = json.loads(source(directory.parents[1], config["text"]).read_text(encoding="utf-8"))
    if known(scale, data) != config["text"]:
        raise UserError(
            f"{data or scale.text} is not the text that this run began with: give that one, or another --out"
        )
    read = text(scale, data, context, seed, directory.parents[1] / "packed")
    torch.manual_seed(seed)
    lm = LanguageModel(model(scale, variant, size, depth, read.vocab_size))
    if depth >= scale.recompute_from:
        recomputing(lm)
    settings = training(scale, variant, size, seed)
    result = train(
        lm, read.stream, settings, directory, evaluate=lambda m: evaluate(m, read.heldout, read.targets, context, scale.piece), resume=True,
        progress=report, optimizer_groups=lm.parameter_groups(settings.weight_decay), identity=read.stream.identity,
    )  # fmt: skip
    seen = smoothing.measure(lm, read.heldout[:_LOOKED_AT, :context], states=False)
    return {
        "loss": result.metrics["loss"],
        "blur": seen.change_over_depth().value,
        "parameters": sum(p.numel() for p in lm.parameters()),
        "embedding": read.vocab_size * lm.config.d_model,
        "width": lm.config.d_model,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "text": read.described,
        "history": [[row["step"], row["loss"]] for row in result.history[:: max(1, len(result.history) // 40)]],
    }
