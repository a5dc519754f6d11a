"""The training loop: one process, one device, or several under `accelerate launch`.

    for step in range(steps):   loss = mean over the targets of batch(step);   AdamW with learning_rate(step)

    DIR/history.jsonl    loss, accuracy, lr, tokens per second; evaluations      (history.py)
    DIR/checkpoints/     complete checkpoints, the last two                      (checkpoints.py)

A run that was killed and resumed ends bitwise where an uninterrupted one ends (on a CPU with the same number of threads;
on a GPU as far as its kernels are deterministic): data and learning rate are functions of the step, everything else is
in the checkpoint, and an evaluation leaves the random number generators as it found them.
"""

import atexit
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ssmlens import files
from ssmlens.errors import UserError
from ssmlens.training import checkpoints
from ssmlens.training.config import TrainConfig
from ssmlens.training.data import Piece, Share, Stream, shares
from ssmlens.training.history import History, Row, Window
from ssmlens.training.identity import differences, fingerprint, run_identity, surroundings
from ssmlens.training.optimizer import Groups, adamw, default_groups, learning_rate
from ssmlens.training.progress import Display, Quiet, display
from ssmlens.training.result import TrainResult
from ssmlens.training.stops import Stops

Evaluate = Callable[[nn.Module], dict[str, float]]


def train(
    model: nn.Module,
    stream: Stream,
    config: TrainConfig,
    out_dir: str | Path,
    *,
    evaluate: Evaluate | None = None,
    optimizer_groups: Groups | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool | Callable[[float], None] = True,
    title: str = "training",
    log: Callable[[str], None] | None = None,
) -> TrainResult:
    """Trains `model` in place on stream.batch(0), stream.batch(1), ...

    model: model(tokens, targets=targets) returns .loss, the mean over the targets, and .n_correct
    evaluate: from the model (in evaluation mode, without gradients) to named numbers, `accuracy` for an early stop
    optimizer_groups: AdamW groups; None for `default_groups`
    identity: JSON-able; whatever else must be the same on resume (the configuration of model and data)
    resume: continue from the last complete checkpoint in out_dir, from the start if there is none
    progress: a bar on stderr; or a function that is told the share of the steps done; or False

    Raises
        UserError: loss or parameters are no longer finite (names step and lr; the last good checkpoint stays); out_dir
            holds a run and resume is False, or another process trains there; on resume, the configuration is another (names
            the keys); out_dir is not writable
        KeyboardInterrupt, SystemExit(143): on Ctrl-C or SIGTERM, once the step at hand is done and a checkpoint written
    """
    run = _Run(model, stream, config, Path(out_dir), evaluate, optimizer_groups, identity, log)
    try:
        run.start(resume)
        if run.main:
            run.display = display(progress, title, config.steps, run.step)
        with Stops() as stops:
            run.train(stops)
        return run.result()
    finally:
        run.close()


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Run:
    """The state of one run. `train` is its only user."""

    def __init__(
        self,
        model: nn.Module,
        stream: Stream,
        config: TrainConfig,
        out_dir: Path,
        evaluate: Evaluate | None,
        groups: Groups | None,
        identity: Mapping[str, Any] | None,
        log: Callable[[str], None] | None,
    ) -> None:
        if config.early_stop is not None and evaluate is None:
            raise ValueError("early_stop needs evaluate")

        from accelerate import Accelerator
        from accelerate.utils import set_seed

        # precision is ours, not that of the launcher's environment: autocast is entered below
        alone = not torch.distributed.is_initialized()
        self.accelerator = Accelerator(mixed_precision="no")
        if alone and torch.distributed.is_initialized():
            # its threads must be gone before the interpreter is: else they now and then abort a run that was done
            atexit.register(_leave_process_group)
        self.config, self.stream, self.model, self.evaluate = config, stream, model, evaluate
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.per_epoch: int | None = getattr(stream, "batches_per_epoch", None)
        self.out_dir, self.checkpoints = out_dir, out_dir / "checkpoints"
        self._log = log
        self._held = ExitStack()
        self.display: Display = Quiet(config.steps, None)
        self.history = History(out_dir / "history.jsonl")
        set_seed(config.seed, device_specific=True)

        groups = default_groups(model, config.weight_decay) if groups is None else groups
        # both move the parameters and keep them the same objects; `prepare` costs a second of imports
        self.prepared = model.train().to(self.device) if self.world == 1 else self.accelerator.prepare(model.train())
        self.optimizer = adamw(groups, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.identity = run_identity(config, model, self.optimizer, identity)

        self.window = Window()
        self.step, self.evaluated, self.tokens = 0, 0, 0
        self.saved: tuple[int, str | None] | None = None  # the step of the last checkpoint and whether it was the end
        self.seconds, self.window_seconds, self.window_tokens = 0.0, 0.0, 0
        self._mark = time.perf_counter()
        self.metrics: dict[str, float] = {}
        self.finished: str | None = None
        self.resumed_from: int | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def log(self, message: str) -> None:
        if self.main:
            (self._log or self.display.log)(message)

    # ---- beginning ----

    def start(self, resume: bool) -> None:
        self._lock()
        latest = checkpoints.latest(self.checkpoints)
        newest = checkpoints.newest(self.checkpoints)
        if newest is not None and not resume:
            raise UserError(f"{self.out_dir} holds a run already: resume it (--resume) or choose another directory")
        if newest != latest and newest is not None:
            where = f"from {latest.name}" if latest is not None else "from the start"
            self.log(f"note: checkpoint {newest.name} is damaged; continuing {where}")
        self.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        if latest is not None:
            self._restore(latest)
        elif self.main:
            self.history.start()

    def _lock(self) -> None:
        """The directory is for this run alone until `close`. The first process asks, all of them hear the answer."""
        refusal: str | None = None
        if self.main:
            try:
                self._held.enter_context(files.locked(self.out_dir, "training"))
                files.clean(files.make_directory(self.checkpoints))
            except UserError as error:
                refusal = str(error)
        if self.world > 1:
            from accelerate.utils import broadcast_object_list

            refusal = broadcast_object_list([refusal])[0]
        if refusal is not None:
            raise UserError(refusal)

    def _restore(self, path: Path) -> None:
        state = checkpoints.read_state(path)
        changed = differences(state["identity"], self.identity)
        if changed:
            raise UserError(
                f"{self.out_dir} holds a run with another configuration: {'; '.join(changed)}. "
                "Use the same one or choose another directory"
            )
        rng = checkpoints.load(path, self.model, self.optimizer)
        for name, now in surroundings(self.world, self.device).items():
            if state[name] != now:
                was = state[name]
                self.log(f"note: {name} was {was} and is now {now}; the resumed run may differ in the last bits")
        if self.rank < len(rng):
            checkpoints.set_rng(rng[self.rank])
        self.window = Window(state["window"])
        self.step = self.resumed_from = state["step"]
        self.saved = state["step"], state["finished"]
        self.evaluated, self.tokens, self.finished = state["evaluated"], state["tokens"], state["finished"]
        self.seconds, self.window_seconds, self.window_tokens = state["seconds"]
        self.metrics = state["metrics"]
        if self.main and not self.history.start(state["history_bytes"]):
            self.log(f"note: {self.history.path} is shorter than when the checkpoint was written; its end is missing")

    def close(self) -> None:
        self.display.close()
        self.history.close()
        self._held.close()

    # ---- training ----

    def train(self, stops: Stops) -> None:
        config = self.config
        batches = shares(
            self.stream,
            self.step,
            config.steps,
            pieces=config.grad_accumulation,
            rank=self.rank,
            world=self.world,
            device=self.device,
        )
        self._lap()
        if self.step > 0 and self.finished is None:
            self._between_steps(stops)  # an evaluation that was cut off
        while self.finished is None:
            self._update(next(batches))
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._row()
            self.display.step(self.step)
            self._between_steps(stops)
        self.model.eval()

    def _update(self, share: Share) -> None:
        lr = learning_rate(self.config, self.step, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        done = [self._piece(piece, piece is share.pieces[-1]) for piece in share.pieces]
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.window.add(done)
        self.window_tokens += share.n_tokens
        self.step += 1

    def _piece(self, piece: Piece, last: bool) -> tuple[Tensor, Any, int]:
        wait: AbstractContextManager[Any] = nullcontext()
        if self.world > 1 and not last:  # gradients are exchanged once per step
            wait = self.accelerator.no_sync(self.prepared)
        with wait:
            with self._precision():
                output = self.prepared(piece.tokens, targets=piece.targets)
            loss: Tensor = output.loss
            (loss if piece.weight == 1.0 else loss * piece.weight).backward()
        return loss.detach(), output.n_correct, piece.n_targets

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # ---- between steps ----

    def _between_steps(self, stops: Stops) -> None:
        """Evaluation, early stop, checkpoint, Ctrl-C: in this order, each where it is due and not yet done."""
        config = self.config
        end = self.step == config.steps
        due = end or (config.eval_every is not None and self.step % config.eval_every == 0)
        if self.evaluate is not None and due and self.evaluated < self.step:
            try:
                self._evaluate(self.evaluate, stops)
            except (KeyboardInterrupt, SystemExit) as error:
                self._stop(error)
        if end:
            self.finished = "steps"
        if self.finished is not None and len(self.window):
            self._row()
        if self.finished is not None or self.step % config.checkpoint_every == 0:
            self._save()
        if self._stop_agreed(stops):
            self._stop(stops.error())

    def _stop(self, error: BaseException) -> NoReturn:
        self._save()
        self.log(f"stopped after step {self.step}; a checkpoint is written, the run can be resumed")
        raise error

    def _row(self) -> None:
        """Closes the window: the one place in ordinary steps that waits for the device."""
        self._drain()
        loss, accuracy = self.window.close()
        self.window_seconds += self._lap()
        speed = self.window_tokens / self.window_seconds
        self.seconds, self.window_seconds = self.seconds + self.window_seconds, 0.0
        self.tokens, self.window_tokens = self.tokens + self.window_tokens, 0
        lr = learning_rate(self.config, self.step - 1, self.per_epoch)
        row = {"step": self.step, "loss": loss, "accuracy": accuracy, "lr": lr, "tokens_per_second": round(speed, 1)}
        self._append(row)

    def _evaluate(self, evaluate: Evaluate, stops: Stops) -> None:
        from accelerate.utils import broadcast_object_list

        self.window_seconds += self._lap()
        metrics: dict[str, float] = {}
        rng = checkpoints.get_rng()  # evaluating more or less often changes nothing in the training
        try:
            if self.main:
                self.model.eval()
                at_once = stops.at_once() if self.world == 1 else nullcontext()
                with at_once, torch.no_grad(), self._precision():
                    metrics = {name: float(value) for name, value in evaluate(self.model).items()}
        finally:
            self.model.train()
            checkpoints.set_rng(rng)
            self._lap()
        if self.world > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.metrics, self.evaluated = metrics, self.step
        self._append({"step": self.step, "evaluation": metrics})
        if self.config.early_stop is not None:
            name = self.config.early_stop_metric
            if name not in metrics:
                raise ValueError(f"early_stop needs {name!r} among what evaluate returns: {sorted(metrics)}")
            if metrics[name] > self.config.early_stop:
                self.finished = "early_stop"

    def _save(self) -> None:
        from accelerate.utils import gather_object

        if self.saved == (self.step, self.finished):
            return
        self.window_seconds += self._lap()
        self._drain()
        if not bool(torch.stack([torch.isfinite(p).all() for p in self.parameters]).all()):
            raise self._diverged("the parameters are not finite", self.step)
        rng = checkpoints.get_rng()
        everyone = gather_object([rng]) if self.world > 1 else [rng]
        if self.main:
            state = {
                "identity": self.identity,
                "fingerprint": fingerprint(self.identity),
                "finished": self.finished,
                "evaluated": self.evaluated,
                "metrics": self.metrics,
                "tokens": self.tokens,
                "seconds": [self.seconds, self.window_seconds, self.window_tokens],
                "window": self.window.entries,
                "history_bytes": self.history.sync(),
                **surroundings(self.world, self.device),
            }
            checkpoints.save(
                self.checkpoints, self.step, model=self.model, optimizer=self.optimizer, rng=everyone, state=state
            )
        self.saved = self.step, self.finished
        self.accelerator.wait_for_everyone()
        self._lap()

    def _stop_agreed(self, stops: Stops) -> bool:
        """Whether a stop was asked for. Several processes must stop at the same step: they compare notes at rows."""
        if self.world == 1:
            return stops.requested is not None
        if self.step % self.config.log_every:
            return False
        return bool(self._sum(torch.tensor([float(stops.requested is not None)])).item())

    # ---- small things ----

    def _drain(self) -> None:
        self.window.drain(self._sum)
        if (bad := self.window.bad()) is not None:
            step = self.step - len(self.window) + bad + 1
            raise self._diverged(f"the loss is {self.window.entries[bad][0]}", step)

    def _diverged(self, what: str, step: int) -> UserError:
        lr = learning_rate(self.config, step - 1, self.per_epoch)
        kept = checkpoints.latest(self.checkpoints)
        return UserError(
            f"training diverged: {what} at step {step} (lr {lr:.3g}). Lower lr, or set clip or warmup_steps. "
            + (f"The last good checkpoint is {kept}" if kept else "No checkpoint had been written yet")
        )

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        if self.world == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return total.cpu()

    def _append(self, row: Row) -> None:
        if self.main:
            self.history.append(row)
            self.display.row(row)

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def result(self) -> TrainResult:
        assert self.finished is not None
        return TrainResult(
            step=self.step,
            finished=self.finished,
            metrics=self.metrics,
            history=[row for row in self.history.rows if "loss" in row],
            evaluations=[row for row in self.history.rows if "evaluation" in row],
            seconds=self.seconds,
            tokens=self.tokens,
            checkpoint=self.checkpoints / f"step-{self.step:08d}",
            resumed_from=self.resumed_from,
        )
