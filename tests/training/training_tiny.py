"""The smallest model and stream with the interface that the loop expects, and workers for sweeps.

As a program, `python training_tiny.py DIR [kill-in-save N | sweep | sleep | distributed]`, it is what the kill tests kill.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ssmlens.errors import UserError
from ssmlens.training import TrainConfig, checkpoints, sweep, train

VOCABULARY, WIDTH = 11, 8


class Tiny(nn.Module):
    """Cumulative mean of embeddings, a linear layer, dropout (so that random numbers matter), a tied head, a
    counter.
    """

    def __init__(self, seed=0, dropout=0.1):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids, targets):
        self.calls += self.training
        x = self.embedding(input_ids)
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        h = self.dropout(torch.tanh(self.mix(torch.cat([x, past], -1))))
        at = targets != -100
        logits, wanted = self.head(h[at]), targets[at]
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum") / max(1, len(wanted))
        return SimpleNamespace(loss=loss, n_targets=len(wanted), n_correct=(logits.argmax(-1) == wanted).sum())


@dataclass
class Batch:
    tokens: np.ndarray
    targets: np.ndarray


class Stream:
    """Random tokens; the target is the token before, at some positions. `at`: step → what to do when it is
    drawn.
    """

    batches_per_epoch = 10

    def __init__(self, rows=6, delay=0.0, at=None):
        self.rows, self.delay, self.at = rows, delay, at or {}

    def batch(self, step):
        time.sleep(self.delay)
        self.at.get(step, lambda: None)()
        rng = np.random.default_rng(step)
        tokens = rng.integers(0, VOCABULARY, (self.rows, 12))
        targets = np.where(rng.random(tokens.shape) < 0.4, np.roll(tokens, 1, 1), -100)
        targets[:, 5] = tokens[:, 4]
        return Batch(tokens, targets)


def call(model, batch):
    return model(input_ids=torch.as_tensor(batch.tokens), targets=torch.as_tensor(batch.targets))


def evaluate(model):
    """Draws random numbers on purpose: training must not notice."""
    torch.rand(3)
    out = call(model, Stream().batch(10_000))
    return {"loss": float(out.loss), "accuracy": float(out.n_correct) / out.n_targets}


CONFIG = TrainConfig(
    steps=60, lr=3e-2, warmup_steps=5, clip=1.0, log_every=4, eval_every=10, checkpoint_every=7, seed=3
)


def run(out_dir, config=CONFIG, *, seed=0, dropout=0.1, stream=None, **options):
    """Trains a fresh Tiny. Returns (model, result)."""
    model = Tiny(seed, dropout)
    options = {"evaluate": evaluate, "progress": False, "identity": {"model": {"width": WIDTH}}, **options}
    return model, train(model, stream or Stream(), config, out_dir, **options)


def worker(config, directory, report):
    """A job of a sweep: what it does is in its config."""
    report(0.25)
    if config.get("fail") == "bug":
        raise RuntimeError("a bug\nof two lines")
    if config.get("fail") == "user":
        raise UserError("no such thing")
    if config.get("fail") == "killed" and not (directory / "was-here").exists():
        (directory / "was-here").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with open(directory / "starts.txt", "a") as file:
        file.write("x")
    return {"threads": torch.get_num_threads(), "pid": os.getpid(), "twice": 2 * config["n"]}


def training_worker(config, directory, report):
    """A job that trains, resumes, and prints."""
    print("hello from", config["seed"])
    _, result = run(directory, seed=config["seed"], stream=Stream(delay=config["delay"]), resume=True, progress=report)
    return {"loss": result.history[-1]["loss"], "resumed_from": result.resumed_from}


def sleeping_worker(config, directory, report):
    (directory / "asleep").touch()
    time.sleep(600)


SLOW_JOBS = [("seed1", {"seed": 1, "delay": 0.0}), ("seed2", {"seed": 2, "delay": 0.1})]

if __name__ == "__main__" and "sweep" in sys.argv:
    import training_tiny  # workers must be functions of a module that children can import

    sweep(SLOW_JOBS, sys.argv[1], training_tiny.training_worker, processes=2, progress=False)
elif __name__ == "__main__" and "sleep" in sys.argv:
    import training_tiny

    sweep([("one", {})], sys.argv[1], training_tiny.sleeping_worker, progress=False)
elif __name__ == "__main__" and "distributed" in sys.argv:
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), dropout=0.0, stream=Stream(delay=0.05 if "slow" in sys.argv else 0.0), resume=True)
elif __name__ == "__main__":
    torch.set_num_threads(1)
    if "kill-in-save" in sys.argv:
        countdown, write = [int(sys.argv[3])], checkpoints.files.sync

        def sync_or_die(path):
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path)

        checkpoints.files.sync = sync_or_die
    run(Path(sys.argv[1]), stream=Stream(delay=0.01))
