"""Multi-query associative recall by Mamba, with one state channel at one, one at zero, both: what is trained, at which scale.

Eight configurations, the paper's seven and the one it leaves out (one channel at 1, 4 layers), each in variants:

    corrected   Mamba's own initialisation and weight-decay groups, channels at exactly 0 and 1, shuffled data; at paper scale
                the training mix of the paper's text
    released    what the paper's code runs: Δ's bias zeroed, small weights, decay on everything, -100 for the zero channel, data in
                order, early stop at 99 % on the test set (SPEC.md §4); at paper scale the training mix of that code
    rescaled    corrected, with Δ's initial range scaled from length 1024 to the length at hand, so that a sequence is as many
                half-lives long as it is in the paper; differs from corrected only below paper scale

Each has learning rates of its own, so variants are compared by what polarization adds to each, not with each other.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.tasks import mqar
from ssmlens.training import TrainConfig, train
from ssmlens.training.schedulers import Report

PAPER_LENGTH = 1024
DT_RANGE = (0.001, 0.1)  # Mamba's, with which the paper's length is about 1.5 half-lives of the slowest channel


@dataclass(frozen=True)
class Variant:
    """initialization: of Mamba (its config). decay: the weight-decay groups. zero: A of a channel at zero, None for exactly -inf.
    order: of the data. test_stop: whether the early stop looks at the test set. rates: whose learning rates. mode: of polarization.
    dt_scale: Δ's initial range times this, so the slowest channel's half-life divided by it; None: paper length / length."""

    initialization: Literal["authors", "released", "released_dt", "released_weights"] = "authors"
    decay: Literal["corrected", "released"] = "corrected"
    zero: float | None = None
    order: Literal["shuffled", "released"] = "shuffled"
    test_stop: bool = False
    rates: Literal["corrected", "released"] = "corrected"
    mode: Literal["append", "replace"] = "append"
    dt_scale: float | None = 1.0


VARIANTS = {
    "corrected": Variant(),
    "released": Variant("released", "released", -100.0, "released", True, "released"),
    "rescaled": Variant(dt_scale=None),
}


@dataclass(frozen=True)
class Configuration:
    """One row of the table. paper: accuracy in % at 64, 128, 256 pairs and length 1024."""

    id: str
    label: str
    ones: int
    zeros: int
    layers: int
    paper: tuple[float, float, float] | None


CONFIGURATIONS = (
    Configuration("default-2", "default Mamba", 0, 0, 2, (98.38, 81.81, 36.00)),
    Configuration("default-4", "default Mamba", 0, 0, 4, (99.23, 82.08, 33.52)),
    Configuration("one-2", "one channel at 1", 1, 0, 2, (99.81, 94.70, 56.39)),
    Configuration("one-4", "one channel at 1", 1, 0, 4, None),
    Configuration("zero-2", "one channel at 0", 0, 1, 2, (98.41, 81.35, 36.55)),
    Configuration("zero-4", "one channel at 0", 0, 1, 4, (99.74, 92.20, 52.21)),
    Configuration("both-2", "both", 1, 1, 2, (99.23, 95.54, 54.74)),
    Configuration("both-4", "both", 1, 1, 4, (99.94, 98.80, 81.56)),
)


@dataclass(frozen=True)
class Scale:
    """Sizes. The longest of `lengths` is measured on, with 1/16, 1/8 and 1/4 of it as numbers of pairs, as in the paper.
    steps: None for `epochs` passes over the paper's training mix with its schedule, a cosine stepped once an epoch; else so many
    steps on fresh examples, cosine at every step. epochs: how often the data is gone through, and the early stop looked at."""

    lengths: tuple[int, ...]
    vocab_size: int
    d_model: int
    batch_size: int
    steps: int | None  # None: `epochs` over the paper's training mix
    epochs: int
    lr: dict[int, float]  # by number of layers: recall is learned only near the right one, which differs with depth
    released_lr: dict[int, float]  # of the released variant, whose initialisation learns at other rates
    warmup_steps: int
    clip: float | None
    test_examples: int
    seeds: int
    variants: tuple[str, ...]
    early_stop: float | None = (
        None  # accuracy at which a run of the other variants ends; None: only the released one stops early
    )

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def pairs(self) -> tuple[int, int, int]:
        return self.length // 16, self.length // 8, self.length // 4


SCALES = {
    "smoke": Scale(
        lengths=(16, 32), vocab_size=32, d_model=16, batch_size=16, steps=12, epochs=2, lr={2: 4e-3, 4: 4e-3},
        released_lr={2: 4e-3, 4: 4e-3}, warmup_steps=2, clip=1.0, test_examples=32, seeds=2, variants=("corrected",),
    ),
    "laptop": Scale(
        lengths=(8, 16, 32, 64), vocab_size=64, d_model=32, batch_size=128, steps=3000, epochs=20, lr={2: 1e-2, 4: 5e-3},
        released_lr={2: 2e-2, 4: 5e-3}, warmup_steps=100, clip=1.0, test_examples=500, seeds=5, variants=("corrected", "released"),
        early_stop=0.99,
    ),
    "paper": Scale(
        lengths=(64, 128, 256, 512, PAPER_LENGTH), vocab_size=8192, d_model=128, batch_size=128, steps=None, epochs=64,
        lr={2: 1e-3, 4: 1e-3}, released_lr={2: 1e-3, 4: 1e-3}, warmup_steps=0, clip=None, test_examples=1000, seeds=3, variants=("corrected", "released"),
    ),
}  # fmt: skip


def data(scale: Scale, variant: Variant, seed: int) -> mqar.MqarConfig:
    """The task. At paper scale the training mixes are the paper's (text or released code), a finite set; below it every batch
    is drawn afresh, more of the shorter lengths, each with the same three shares of pairs (at least one): memorising plays no part."""
    tests = mqar.paper_test_segments(scale.length, scale.test_examples)
    if scale.steps is None:
        mix = mqar.released_mix(scale.length) if variant.order == "released" else mqar.paper_text_mix(scale.lengths)
    else:
        shapes = sorted({(n, max(1, n // share)) for n in scale.lengths for share in (16, 8, 4)})
        per_length = {n: sum(length == n for length, _ in shapes) for n in scale.lengths}
        # the shorter the more, as in the released mix: short sequences are where the association is first learned, and cheap
        share = {n: scale.length / n for n in scale.lengths}
        rows = scale.steps / scale.epochs * scale.batch_size / sum(share.values())
        mix = tuple(
            mqar.Segment(length=n, pairs=k, examples=max(1, round(rows * share[n] / per_length[n]))) for n, k in shapes
        )
    return mqar.MqarConfig(
        vocab_size=scale.vocab_size, train=mix, test=tests, batch_size=scale.batch_size, seed=seed, order=variant.order,
        on_the_fly=scale.steps is not None,
    )  # fmt: skip


def dt_range(scale: Scale, variant: Variant) -> tuple[float, float]:
    """Between which Δ starts, where the initialisation does not fix it."""
    factor = PAPER_LENGTH / scale.length if variant.dt_scale is None else variant.dt_scale
    low, high = (dt * factor for dt in DT_RANGE)
    return low, max(low, min(high, 0.8))  # at 1.6 the fastest ordinary channels would begin as good as at zero


def half_life(scale: Scale, variant: Variant) -> float:
    """Of the slowest ordinary state channel at its slowest Δ, in tokens, before training."""
    dt = math.log(2) if variant.initialization in ("released", "released_dt") else dt_range(scale, variant)[0]
    return math.log(2) / dt


def model(scale: Scale, configuration: Configuration, variant: Variant) -> LanguageModelConfig:
    dt_min, dt_max = dt_range(scale, variant)
    polarization: dict[str, Any] | None = None
    if configuration.ones or configuration.zeros:
        polarization = {"ones": configuration.ones, "zeros": configuration.zeros, "mode": variant.mode}
        if variant.zero is not None:
            polarization["zero"] = variant.zero
    return LanguageModelConfig(
        vocab_size=scale.vocab_size, d_model=scale.d_model, n_layers=configuration.layers, mixer="mamba",
        mixer_config={"dt_min": dt_min, "dt_max": dt_max, "initialization": variant.initialization}, polarization=polarization,
        tie_word_embeddings=True,
    )  # fmt: skip


def training(
    scale: Scale, variant: Variant, layers: int, seed: int, batches_per_epoch: int, rate: float = 1.0
) -> TrainConfig:
    """rate: the scale's learning rate times this."""
    per_epoch = batches_per_epoch if scale.steps is None else max(1, scale.steps // scale.epochs)
    lr = scale.released_lr if variant.rates == "released" else scale.lr
    early_stop = 0.99 if variant.test_stop else scale.early_stop
    return TrainConfig(
        steps=scale.epochs * batches_per_epoch if scale.steps is None else scale.steps,
        lr=lr[layers] * rate, weight_decay=0.1, warmup_steps=scale.warmup_steps, clip=scale.clip, seed=seed,
        schedule="cosine_epoch" if scale.steps is None else "cosine", checkpoint_every=500,
        eval_every=None if early_stop is None else per_epoch,
        early_stop=early_stop, early_stop_on="released" if variant.test_stop else "validation",
    )  # fmt: skip


@torch.no_grad()
def accuracy(lm: torch.nn.Module, batches: Any) -> dict[int, float]:
    """Share of right answers by number of pairs."""
    correct: dict[int, int] = {}
    asked: dict[int, int] = {}
    device = next(lm.parameters()).device
    for batch in batches:
        out = lm(torch.as_tensor(batch.tokens).to(device), targets=torch.as_tensor(batch.targets).to(device))
        k = batch.group.pairs
        correct[k] = correct.get(k, 0) + int(out.n_correct)
        asked[k] = asked.get(k, 0) + int(out.n_targets)
    return {k: correct[k] / asked[k] for k in sorted(asked)}


def job(
    scale_name: str,
    variant: Variant,
    configuration: Configuration,
    seed: int,
    *,
    length: int | None = None,
    rate: float = 1.0,
) -> dict[str, Any]:
    """What `work` needs to know, and what a run that is resumed must find unchanged. length: another one than the scale's longest."""
    return {
        "scale": scale_name, "sizes": asdict(sized(SCALES[scale_name], length)), "variant": asdict(variant),
        "configuration": configuration.id, "rate": rate, "length": length, "seed": seed,
    }  # fmt: skip


def sized(scale: Scale, length: int | None) -> Scale:
    """The scale with further lengths, each twice the one before, up to another longest one, a vocabulary that has room for so many
    pairs, and as many more steps as there are more lengths."""
    if length is None or length == scale.length:
        return scale
    lengths = list(scale.lengths)
    while lengths[-1] < length:
        lengths.append(2 * lengths[-1])
    steps = None if scale.steps is None else scale.steps * len(lengths) // len(scale.lengths)
    return replace(scale, lengths=tuple(lengths), vocab_size=max(scale.vocab_size, length), steps=steps)


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One run, in a process of its own; resumes from what is in `directory`.

    found: the share of the steps after which the accuracy was first half way from guessing to one; None: never, or not looked at."""
    scale = sized(SCALES[config["scale"]], config["length"])
    configuration = next(c for c in CONFIGURATIONS if c.id == config["configuration"])
    variant, seed = Variant(**config["variant"]), config["seed"]
    stream = mqar.MqarStream(data(scale, variant, seed))
    torch.manual_seed(seed)
    lm = LanguageModel(model(scale, configuration, variant))
    settings = training(scale, variant, configuration.layers, seed, stream.batches_per_epoch, config["rate"])

    def evaluate(lm: torch.nn.Module) -> dict[str, float]:
        seen = accuracy(lm, stream.test() if variant.test_stop else stream.validation())
        mean = sum(seen.values()) / len(seen)
        return {"accuracy": mean, "test_accuracy": mean}

    result = train(
        lm, stream, settings, directory, evaluate=evaluate, resume=True, progress=report,
        optimizer_groups=lm.parameter_groups(settings.weight_decay, variant.decay),
    )  # fmt: skip
    half = (1 + guessing(scale)) / 2
    return {
        "accuracy": {str(k): v for k, v in accuracy(lm, stream.test()).items()},
        "parameters": sum(p.numel() for p in lm.parameters()),
        "steps": result.step,
        "found": next(
            (r["step"] / settings.steps for r in result.evaluations if r["evaluation"]["accuracy"] >= half), None
        ),
        "finished": result.finished,
        "seconds": result.seconds,
        "loss": [[row["step"], row["loss"]] for row in result.history[:: max(1, len(result.history) // 40)]],
    }


def guessing(scale: Scale) -> float:
    """Accuracy of answering with any value of the sequence."""
    return sum(1 / k for k in scale.pairs) / len(scale.pairs)


def recall_distance(scale: Scale, examples: int = 512) -> float:
    """Mean distance from a value to where it is asked for, in tokens, over the test's numbers of pairs."""
    distances = []
    for pairs in scale.pairs:
        slots = mqar.draw(examples, scale.length, pairs, scale.vocab_size, mqar.POWER_A, (0,)).slots.astype(float)
        value = 2 * np.arange(pairs) + 1
        distances.append(float((2 * pairs + 2 * slots - value).mean()))
    return sum(distances) / len(distances)
