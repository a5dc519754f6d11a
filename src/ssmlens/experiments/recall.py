"""Multi-query associative recall by Mamba, with one state channel at one, one at zero, both: what is trained, at which scale.

Eight configurations, the paper's seven and the one it leaves out (one channel at 1, 4 layers), each in variants:

    corrected   Mamba's own initialisation and weight-decay groups, channels at exactly 0 and 1, shuffled data; at paper scale
                the training mix of the paper's text
    released    what the paper's code runs: Δ's bias zeroed, small weights, decay on everything, -100 for the zero channel, data in
                order, early stop at 99 % on the test set (SPEC.md §4); at paper scale the training mix of that code
    rescaled    corrected, with Δ's initial range scaled from length 1024 to the length at hand, so that a sequence is as many
                half-lives long as it is in the paper; differs from corrected only below paper scale

All have one learning rate, so variants are compared by what polarization adds to each, not with each other.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ssmlens.models import LanguageModel, LanguageModelConfig
from ssmlens.targets import IGNORED
from ssmlens.tasks import mqar
from ssmlens.training import TrainConfig, train
from ssmlens.training.schedulers import Report

PAPER_LENGTH = 1024
FOUND = 0.8  # accuracy on short sequences, where guessing among the values has 0.4
DT_RANGE = (0.001, 0.1)  # Mamba's, with which the paper's length is about 1.5 half-lives of the slowest channel


@dataclass(frozen=True)
class Variant:
    """initialization: of Mamba (its config). decay: the weight-decay groups. zero: A of a channel at zero, None for exactly -inf.
    order: of the data. mix: whose training mix (at paper scale). test_stop: whether the early stop looks at the test set.
    mode: of polarization.
    dt_scale: Δ's initial range times this, so the slowest channel's half-life divided by it; None: paper length / length."""

    initialization: Literal["authors", "released", "released_dt", "released_weights"] = "authors"
    decay: Literal["corrected", "released"] = "corrected"
    zero: float | None = None
    order: Literal["shuffled", "released"] = "shuffled"
    mix: Literal["text", "released"] = "text"
    test_stop: bool = False
    mode: Literal["append", "replace"] = "append"
    dt_scale: float | None = 1.0


VARIANTS = {
    "corrected": Variant(),
    "released": Variant("released", "released", -100.0, "released", "released", True),
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
    """Sizes. The longest of `lengths` is measured on, with 1/16, 1/8 and 1/4 of it as numbers of pairs, as in the paper; `full`: the length
    from which on there are no more pairs (None: there is none).
    steps: None for `epochs` passes over the paper's training mix with its schedule, a cosine stepped once an epoch; else so many
    steps on fresh examples, cosine at every step. epochs: how often the data is gone through, and the early stop looked at.

    finding: when a run finds that a value belongs to its key is chance, and with few steps decides what it ends with. So below paper scale a
    run first sees short sequences, at a constant learning rate, until it has: then all have as long to learn to hold more."""

    lengths: tuple[int, ...]
    vocab_size: int
    d_model: int
    batch_size: int
    steps: int | None  # None: `epochs` over the paper's training mix
    epochs: int
    lr: dict[int, float]  # by number of layers: recall is learned only near the right one, which differs with depth
    warmup_steps: int
    clip: float | None
    test_examples: int
    seeds: int
    variants: tuple[str, ...]
    early_stop: float | None = (
        None  # accuracy at which a run of the other variants ends; None: only the released one stops early
    )
    full: int | None = None
    finding: int = 0  # at most so many steps before the others, until the association is found; 0: none

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def pairs(self) -> tuple[int, int, int]:
        return self.pairs_at(self.length)

    def pairs_at(self, length: int) -> tuple[int, int, int]:
        """At least one."""
        n = min(length, self.full or length)
        return max(1, n // 16), max(1, n // 8), max(1, n // 4)


SCALES = {
    "smoke": Scale(
        lengths=(16, 32), vocab_size=32, d_model=16, batch_size=16, steps=12, finding=4, epochs=2, lr={2: 4e-3, 4: 4e-3},
        warmup_steps=2, clip=1.0, test_examples=32, seeds=2, variants=("corrected",),
    ),
    "laptop": Scale(
        lengths=(8, 16, 32, 64), vocab_size=64, d_model=32, batch_size=128, steps=1500, finding=4000, epochs=15,
        lr={2: 1e-2, 4: 5e-3}, warmup_steps=100, clip=1.0, test_examples=500, seeds=5, variants=("corrected", "released"), early_stop=0.99,
    ),
    "paper": Scale(
        lengths=(64, 128, 256, 512, PAPER_LENGTH), vocab_size=8192, d_model=128, batch_size=128, steps=None, epochs=64,
        lr={2: 1e-3, 4: 1e-3}, warmup_steps=0, clip=None, test_examples=1000, seeds=3, variants=("corrected", "released"),
    ),
}  # fmt: skip


def data(scale: Scale, variant: Variant, seed: int) -> mqar.MqarConfig:
    """The task. At paper scale the training mixes are the paper's (text or released code), a finite set; below it every batch
    is drawn afresh, so memorising plays no part: twice as many of the shortest length as of the others, which are about the shares of the
    released mix, each with the same three shares of pairs (at least one)."""
    tests = tuple(mqar.Segment(length=scale.length, pairs=k, examples=scale.test_examples) for k in scale.pairs)
    if scale.steps is None:
        mix = mqar.released_mix(scale.length) if variant.mix == "released" else mqar.paper_text_mix(scale.lengths)
    else:
        mix = _mix(scale, (scale.lengths[0], *scale.lengths))
    return mqar.MqarConfig(
        vocab_size=scale.vocab_size, train=mix, test=tests, batch_size=scale.batch_size, seed=seed, order=variant.order,
        on_the_fly=scale.steps is not None,
    )  # fmt: skip


def finding_data(scale: Scale, seed: int) -> mqar.MqarConfig:
    """The two shortest lengths alone, and of their numbers of pairs those that leave something to find. Shuffled in all variants: one segment after
    the other, the association may not be found at all."""
    mix = tuple(s for s in _mix(scale, scale.lengths[:2]) if s.pairs > 1)
    return mqar.MqarConfig(
        vocab_size=scale.vocab_size, train=mix, test=tuple(s.model_copy(update={"examples": 128}) for s in mix), batch_size=scale.batch_size,
        seed=1_000_000 + seed, on_the_fly=True,
    )  # fmt: skip


def _mix(scale: Scale, lengths: tuple[int, ...]) -> tuple[mqar.Segment, ...]:
    """An epoch: as many examples of every length, and of every number of pairs of it; twice as many of a length that is there twice."""
    assert scale.steps is not None
    rows = scale.steps / scale.epochs * scale.batch_size / len(lengths)
    return tuple(
        mqar.Segment(length=n, pairs=k, examples=max(1, round(rows * lengths.count(n) / len(pairs))))
        for n in dict.fromkeys(lengths)
        for pairs in [sorted({*scale.pairs_at(n)})]
        for k in pairs
    )


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
    early_stop = 0.99 if variant.test_stop else scale.early_stop
    return TrainConfig(
        steps=scale.epochs * batches_per_epoch if scale.steps is None else scale.steps,
        lr=scale.lr[layers] * rate, weight_decay=0.1, warmup_steps=scale.warmup_steps, clip=scale.clip, seed=seed,
        schedule="cosine_epoch" if scale.steps is None else "cosine", checkpoint_every=500,
        eval_every=None if early_stop is None else per_epoch,
        early_stop=early_stop, early_stop_on="released" if variant.test_stop else "validation",
        precision="bf16" if scale.steps is None else "fp32",
    )  # fmt: skip


def finding_training(settings: TrainConfig, scale: Scale) -> TrainConfig:
    """Like `settings`, at a constant learning rate, until the association is found."""
    return settings.model_copy(
        update={
            "steps": scale.finding, "schedule": "constant", "warmup_steps": min(settings.warmup_steps, scale.finding // 2),
            "eval_every": min(50, scale.finding), "early_stop": FOUND, "early_stop_on": "validation",
        }
    )  # fmt: skip


Counts = dict[int, dict[int, list[int]]]


@torch.no_grad()
def recalled(lm: torch.nn.Module, batches: Any) -> Counts:
    """[right, asked], by number of pairs and by distance from a value to where it is asked for (in tokens, the lower edges of half octaves)."""
    device = next(lm.parameters()).device
    found: Counts = {}
    for batch in batches:
        tokens, targets = torch.as_tensor(batch.tokens), torch.as_tensor(batch.targets)
        out = lm(tokens.to(device), targets=targets.to(device))
        rows, at = torch.nonzero(targets != IGNORED, as_tuple=True)
        right = out.logits.argmax(-1).cpu() == targets[rows, at]
        pairs = batch.group.pairs
        told = (tokens[rows, 0 : 2 * pairs : 2] == tokens[rows, at, None]).int().argmax(1)
        edges = torch.bucketize(at - (2 * told + 1), _EDGES, right=True) - 1
        of = found.setdefault(pairs, {})
        for edge in edges.unique().tolist():
            here, count = edges == edge, of.setdefault(int(_EDGES[edge]), [0, 0])
            count[0] += int(right[here].sum())
            count[1] += int(here.sum())
    return found


_EDGES = torch.tensor(sorted({*(2**i for i in range(20)), *(3 * 2**i for i in range(19))}))


def accuracy(found: Counts) -> dict[int, float]:
    """Share of right answers by number of pairs."""
    return {k: sum(r for r, _ in of.values()) / sum(n for _, n in of.values()) for k, of in sorted(found.items())}


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
    """The scale with further lengths, each twice the one before, up to another longest one, and as many more steps as there are more lengths.
    Of pairs there are no more than before: what grows is how long they must be kept."""
    if length is None or length == scale.length:
        return scale
    lengths = list(scale.lengths)
    while lengths[-1] < length:
        lengths.append(2 * lengths[-1])
    steps = None if scale.steps is None else scale.steps * len(lengths) // len(scale.lengths)
    return replace(scale, lengths=tuple(lengths), steps=steps, full=scale.length)


def work(config: dict[str, Any], directory: Path, report: Report) -> dict[str, Any]:
    """One run, in a process of its own; resumes from what is in `directory`.

    found: the step, of all, at which the association was seen to be found; None: never, or not looked at."""
    scale = sized(SCALES[config["scale"]], config["length"])
    configuration = next(c for c in CONFIGURATIONS if c.id == config["configuration"])
    variant, seed = Variant(**config["variant"]), config["seed"]
    stream = mqar.MqarStream(data(scale, variant, seed))
    torch.manual_seed(seed)
    lm = LanguageModel(model(scale, configuration, variant))
    settings = training(scale, variant, configuration.layers, seed, stream.batches_per_epoch, config["rate"])
    groups = lm.parameter_groups(settings.weight_decay, variant.decay)

    def accuracies(batches: Any) -> dict[str, float]:
        seen = accuracy(recalled(lm, batches))
        mean = sum(seen.values()) / len(seen)
        return {"accuracy": mean, "test_accuracy": mean}

    before, found, seconds = 0, None, 0.0
    if scale.finding:
        short = mqar.MqarStream(finding_data(scale, seed))
        first = train(
            lm, short, finding_training(settings, scale), directory / "finding", evaluate=lambda _: accuracies(short.validation()), resume=True,
            progress=lambda share: report(0.4 * share), optimizer_groups=groups,
        )  # fmt: skip
        before, seconds = first.step, first.seconds
        found = first.step if first.finished == "early_stop" else None
    result = train(
        lm, stream, settings, directory, evaluate=lambda _: accuracies(stream.test() if variant.test_stop else stream.validation()), resume=True,
        progress=lambda share: report(0.4 + 0.6 * share if scale.finding else share), optimizer_groups=groups,
    )  # fmt: skip
    half, tested = (1 + guessing(scale)) / 2, recalled(lm, stream.test())
    later = next((before + r["step"] for r in result.evaluations if r["evaluation"]["accuracy"] >= half), None)
    return {
        "accuracy": {str(k): v for k, v in accuracy(tested).items()},
        "by_distance": {str(k): {str(d): counts for d, counts in sorted(of.items())} for k, of in tested.items()},
        "parameters": sum(p.numel() for p in lm.parameters()),
        "steps": before + result.step,
        "found": later if found is None else found,
        "finished": result.finished,
        "seconds": seconds + result.seconds,
        "loss": [[before + row["step"], row["loss"]] for row in result.history[:: max(1, len(result.history) // 40)]],
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
