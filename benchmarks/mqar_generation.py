"""How fast MQAR batches are drawn: ours against a generator that draws each row with `choice(replace=False)`.

    python benchmarks/mqar_generation.py

Both make the same kind of batch (tests/tasks/test_mqar.py checks ours against the exact distribution), one
thread each, in this process, taking turns; printed is the median time of a batch. Below, what making batches on the fly
costs beside a training step of the laptop scale of table 2 (the smallest model, so the largest share), again in turns.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from ssmlens.experiments import recall
from ssmlens.models import LanguageModel
from ssmlens.tasks.mqar import MqarStream, sample

ROUNDS = 25
SIZES = [  # batch, length, pairs, vocabulary
    (128, 1024, 256, 8192),
    (128, 1024, 64, 8192),
    (64, 64, 16, 8192),
    (64, 64, 16, 256),
    (64, 128, 32, 256),
]


def row_by_row(
    batch: int, length: int, pairs: int, vocab_size: int, power_a: float, rng: np.random.RandomState
) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual way: three draws without replacement for every row."""
    lower = vocab_size // 2
    key_tokens, value_tokens = np.arange(1, lower), np.arange(lower, vocab_size)
    weight = np.arange(1, length // 2 - pairs + 1) ** (power_a - 1)
    weight /= weight.sum()
    tokens = np.zeros((batch, length), np.int64)
    targets = np.full((batch, length), -100, np.int64)
    for row in range(batch):
        keys = rng.choice(key_tokens, pairs, replace=False)
        values = rng.choice(value_tokens, pairs, replace=False)
        query = 2 * pairs + 2 * rng.choice(len(weight), pairs, replace=False, p=weight)
        tokens[row, 0 : 2 * pairs : 2], tokens[row, 1 : 2 * pairs : 2] = keys, values
        tokens[row, query], targets[row, query] = keys, values
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, measured in turns so that a slow moment of the machine hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, spent in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            run()
            spent.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.RandomState(0)
    print(" batch  length  pairs  vocab       ours   row by row   ratio")
    for batch, length, pairs, vocab_size in SIZES:
        seeds = iter(range(ROUNDS))
        ours, theirs = compare(
            lambda: sample(batch, length, pairs, vocab_size, 0.01, (next(seeds),)),  # noqa: B023 (called at once)
            lambda: row_by_row(batch, length, pairs, vocab_size, 0.01, rng),  # noqa: B023
        )
        print(
            f"{batch:6}{length:8}{pairs:7}{vocab_size:7}{ours * 1e3:8.2f} ms{theirs * 1e3:10.2f} ms"
            f"{theirs / ours:7.1f}x"
        )
    batch_time, step_time = share_of_a_step()
    print(
        f"\non the fly at laptop scale: {batch_time * 1e3:.2f} ms a batch beside {step_time * 1e3:.1f} ms a training step, "
        f"{100 * batch_time / (batch_time + step_time):.1f} %"
    )


def share_of_a_step() -> tuple[float, float]:
    """Median seconds of a batch from the stream, and of a training step on it, at the laptop scale of table 2, 2 layers."""
    scale = recall.SCALES["laptop"]
    stream = MqarStream(recall.data(scale, "corrected", 0))
    model = LanguageModel(recall.model(scale, recall.CONFIGURATIONS[0], "corrected"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    steps = iter(range(10**6))

    def train() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, targets=targets).loss.backward()
        optimizer.step()

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        tokens, targets, _ = stream.batch(next(steps))
        middle = time.perf_counter()
        train()
        times[0].append(middle - begin)
        times[1].append(time.perf_counter() - middle)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
