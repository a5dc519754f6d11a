"""Configurations: what is refused and how, the learning rate, groups, and telling two configurations
apart.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssmlens.errors import UserError
from ssmlens.training import TrainConfig, default_groups, learning_rate
from ssmlens.training.identity import differences, fingerprint
from ssmlens.training.optimizer import adamw


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"warmup_step": 3}, "no key 'warmup_step'; did you mean 'warmup_steps'"),
        ({"lr": -1.0}, "lr: .*greater than 0"),
        ({"lr": math.nan}, "lr: .*finite"),
        ({"steps": "many"}, "steps: .*integer"),
        ({"schedule": "linear"}, "schedule: .*cosine_epoch"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr .* is above lr"),
        ({"warmup_steps": 11}, "warmup_steps .* more than steps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"early_stop": 0.9}, "early_stop needs eval_every"),
    ],
)
def test_bad_values_are_explained_in_one_line(bad, message):
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig.of({"steps": 10, **bad}, "train.json")
    assert str(caught.value).startswith("train.json: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"steps": 10, **bad})


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig(steps=10).lr = 1.0


@given(st.integers(1, 300), st.integers(0, 300), st.floats(1e-5, 1.0), st.floats(0, 1.0))
def test_cosine_rises_then_falls_between_its_ends(steps, warmup, lr, floor):
    config = TrainConfig(steps=steps, lr=lr, warmup_steps=min(warmup, steps), min_lr=floor * lr)
    rates = [learning_rate(config, step) for step in range(steps)]
    rising, falling = rates[: config.warmup_steps], rates[config.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(rates) == pytest.approx(lr)
    assert all(rate >= config.min_lr * (1 - 1e-9) for rate in falling)
    if falling:
        assert falling[0] == pytest.approx(lr)


def test_cosine_per_epoch_is_pytorchs():
    config = TrainConfig(steps=40, lr=1e-3, schedule="cosine_epoch")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.0)
    for epoch in range(8):
        for step in range(5 * epoch, 5 * epoch + 5):
            assert learning_rate(config, step, 5) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    with pytest.raises(ValueError, match="batches_per_epoch"):
        learning_rate(config, 0)
    constant = TrainConfig(steps=40, lr=1e-3, schedule="constant", warmup_steps=4)
    assert [learning_rate(constant, step) for step in (0, 3, 4, 39)] == [2.5e-4, 1e-3, 1e-3, 1e-3]


def test_default_groups_spare_vectors_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    decayed, spared = default_groups(model, 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert [p.shape for p in spared["params"]] == [(4,)] * 3


def test_adamw_leaves_out_empty_groups_and_serves_complex_parameters():
    real, imaginary = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = adamw([{"params": []}, {"params": iter([real, imaginary])}], TrainConfig(steps=1, lr=0.1))
    assert len(optimizer.param_groups) == 1
    (real.sum() + imaginary.abs().sum()).backward()
    optimizer.step()
    assert (real < 1).all()
    assert (imaginary.real < 1).all()


def test_differences_name_the_keys():
    old = {"training": {"lr": 0.1, "betas": [0.9, 0.99]}, "model": {"width": 8}}
    assert differences(old, {"model": {"width": 8}, "training": {"betas": (0.9, 0.99), "lr": 0.1}}) == []
    new = {"training": {"lr": 0.2, "betas": [0.9, 0.95], "clip": None}}
    assert differences(old, new) == [
        "model.width was 8, is now absent",
        "training.betas.1 was 0.99, is now 0.95",
        "training.clip was absent, is now None",
        "training.lr was 0.1, is now 0.2",
    ]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_how_often_to_save_may_change_on_resume():
    one, other = TrainConfig(steps=10, checkpoint_every=5), TrainConfig(steps=10, checkpoint_every=7)
    assert one.identity() == other.identity() != TrainConfig(steps=11).identity()
