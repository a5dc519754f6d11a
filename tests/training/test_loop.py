"""The loop: what it learns, writes, counts and refuses; kills and resumption are in test_resume.py."""

import json

import pytest
import torch
from torch import nn
from training_tiny import CONFIG, Stream, Tiny, call, run

from ssmlens.errors import UserError
from ssmlens.training import TrainConfig, checkpoints, default_groups, train
from ssmlens.training.optimizer import adamw, learning_rate

PLAIN = TrainConfig(steps=7, lr=1e-2, log_every=5)


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_it_learns_and_writes_its_history(tmp_path):
    config = TrainConfig(steps=200, lr=3e-2, log_every=10, eval_every=100, weight_decay=0.0)
    model, result = run(tmp_path, config, stream=Stream(rows=32), dropout=0.0)
    assert result.history[0]["loss"] > result.history[-1]["loss"] + 0.3
    assert result.metrics == result.evaluations[-1]["evaluation"]
    assert (result.step, result.finished, result.resumed_from) == (200, "steps", None)
    assert result.tokens == 200 * 32 * 12
    assert not model.training

    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(10, 201, 10))
    assert [row["step"] for row in rows if "evaluation" in row] == [100, 200]
    assert result.history == [row for row in rows if "loss" in row]
    for row in result.history:
        assert set(row) == {"step", "loss", "accuracy", "lr", "tokens_per_second"}
        assert row["lr"] == learning_rate(config, row["step"] - 1)
        assert row["tokens_per_second"] > 0


def test_every_step_is_what_plain_pytorch_would_do(tmp_path):
    model, result = run(tmp_path, PLAIN.model_copy(update={"clip": 0.1}), dropout=0.0)
    plain = Tiny(0, 0.0)
    optimizer = adamw(default_groups(plain, PLAIN.weight_decay), PLAIN)
    sums, rows = torch.zeros(3, dtype=torch.float64), []
    for step in range(PLAIN.steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(PLAIN, step)
        output = call(plain, Stream().batch(step))
        output.loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        n = output.n_targets
        sums += torch.tensor([output.loss.item() * n, float(output.n_correct), n], dtype=torch.float64)
        if step in (4, 6):
            rows.append((sums[:2] / sums[2]).tolist())
            sums.zero_()
    assert equal(model.state_dict(), plain.state_dict())
    assert [row["step"] for row in result.history] == [5, 7]
    for row, (loss, accuracy) in zip(result.history, rows, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-12)
        assert row["accuracy"] == pytest.approx(accuracy, rel=1e-12)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Although the pieces have different numbers of targets."""
    one, first = run(tmp_path / "1", PLAIN, dropout=0.0)
    three, second = run(tmp_path / "3", PLAIN.model_copy(update={"grad_accumulation": 3}), dropout=0.0)
    for left, right in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    for left, right in zip(first.history, second.history, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["accuracy"] == right["accuracy"]


def test_evaluation_does_not_change_the_training(tmp_path):
    often, _ = run(tmp_path / "often", CONFIG.model_copy(update={"eval_every": 3}))
    never, result = run(tmp_path / "never", evaluate=None)
    assert equal(often.state_dict(), never.state_dict())
    assert result.metrics == {}
    assert result.evaluations == []


def test_the_seed_decides_dropout(tmp_path):
    models = [run(tmp_path / str(i), PLAIN.model_copy(update={"seed": seed}))[0] for i, seed in enumerate((1, 1, 2))]
    assert equal(models[0].state_dict(), models[1].state_dict())
    assert not equal(models[0].state_dict(), models[2].state_dict())


def test_bf16_keeps_float32_parameters_and_trains_in_bfloat16(tmp_path):
    seen = set()

    class Spy(Tiny):
        def forward(self, input_ids, targets):
            seen.add(self.mix(torch.zeros(1, 16)).dtype)
            return super().forward(input_ids, targets)

    model = Spy()
    config = PLAIN.model_copy(update={"precision": "bf16"})
    result = train(model, Stream(), config, tmp_path, progress=False)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.history[-1]["loss"] > 0


def test_early_stop_on_validation_or_as_released_on_test(tmp_path):
    def scores(model):
        return {"accuracy": float(model.calls) / 100, "test_accuracy": float(model.calls) / 50}

    config = CONFIG.model_copy(update={"early_stop": 0.35})
    _, on_validation = run(tmp_path / "a", config, evaluate=scores)
    assert (on_validation.step, on_validation.finished) == (40, "early_stop")
    _, released = run(tmp_path / "b", config.model_copy(update={"early_stop_on": "released"}), evaluate=scores)
    assert released.step == 20
    assert on_validation.history[-1]["step"] == 40
    again = run(tmp_path / "a", config, evaluate=scores, resume=True)[1]
    assert (again.step, again.finished, again.metrics) == (40, "early_stop", on_validation.metrics)
    with pytest.raises(ValueError, match="'accuracy'"):
        run(tmp_path / "c", config, evaluate=lambda model: {"loss": 1.0})


def test_a_nan_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    class Bad(Tiny):
        def forward(self, input_ids, targets):
            output = super().forward(input_ids, targets)
            if self.calls == 18:
                output.loss = output.loss * float("nan")
            return output

    model = Bad()
    with pytest.raises(UserError, match=r"loss is nan at step 18 \(lr 0\.0\d+\).*step-00000014"):
        train(model, Stream(), CONFIG, tmp_path, progress=False)
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000014"
    assert "nan" not in (tmp_path / "history.jsonl").read_text().lower()


def test_a_poisoned_parameter_is_never_written(tmp_path):
    """A finite loss may still have an infinite gradient: the update before the checkpoint is the bad one."""

    class Bad(Tiny):
        def forward(self, input_ids, targets):
            output = super().forward(input_ids, targets)
            if self.calls == 14:
                self.mix.weight.register_hook(lambda grad: grad * float("inf"))
            return output

    with pytest.raises(UserError, match=r"parameters are not finite at step 14.*step-00000007"):
        train(Bad(), Stream(), CONFIG, tmp_path, progress=False)
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000007"


def test_parameter_groups_are_used_and_must_hold_everything(tmp_path):
    model = Tiny()
    groups = [
        {"params": [model.embedding.weight], "weight_decay": 0.5},
        {"params": [model.mix.weight, model.mix.bias]},
    ]
    train(model, Stream(), PLAIN, tmp_path, optimizer_groups=groups, progress=False)
    state = checkpoints.read_state(checkpoints.latest(tmp_path / "checkpoints"))
    assert [group["weight_decay"] for group in state["identity"]["optimizer_groups"]] == [0.5, 0.1]
    with pytest.raises(ValueError, match=r"mix\.bias"):
        train(
            model,
            Stream(),
            PLAIN,
            tmp_path / "2",
            optimizer_groups=[{"params": [model.embedding.weight]}],
            progress=False,
        )


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="cannot be cut into 7 pieces"):
        run(tmp_path / "a", PLAIN.model_copy(update={"grad_accumulation": 7}))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the directory"):
        run(tmp_path / "file" / "run", PLAIN)
    run(tmp_path / "b", PLAIN)
    with pytest.raises(UserError, match="holds a run already"):
        run(tmp_path / "b", PLAIN)


def test_the_bar_shows_the_numbers_on_stderr(tmp_path, capfd):
    run(tmp_path, PLAIN, progress=True, title="tiny")
    out, err = capfd.readouterr()
    assert out == ""
    assert "tiny" in err
    assert "7/7" in err
    assert "tok/s" in err
    assert "acc " in err


def test_progress_may_be_a_function(tmp_path):
    told = []
    run(tmp_path, PLAIN, progress=told.append)
    assert told[-1] == 1.0
