from __future__ import annotations

import math

import pytest

from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.training.stages import batch_per_device, evaluations_left, stages


def configured(*items: str) -> Config:
    return reading.parse(Config, reading.overrides(list(items)))


def test_step_schedule_is_the_originals() -> None:
    """56 epochs of ResNet-50: 8e-3 for epochs 0-29, 8e-4 for 30-55."""
    config = configured("tune.epochs=56", "tune.global_batch=512", "tune.base_lr=1e-3", "tune.schedule=step")
    (stage,) = stages(config, 5120)
    rates = [stage.learning_rate(step) for step in range(stage.stop)]
    assert rates[: 30 * 10] == pytest.approx([8e-3] * 300)
    assert rates[30 * 10 :] == pytest.approx([8e-4] * 260)


def test_decay_and_averages_are_functions_of_the_step() -> None:
    config = configured("tune.epochs=6", "tune.decay_epochs=2", "tune.global_batch=512", "tune.average_epochs=3")
    (stage,) = stages(config, 512 * 4)
    rates = [stage.learning_rate(epoch * 4) for epoch in range(6)]
    assert rates == pytest.approx([8e-3, 8e-3, 8e-4, 8e-4, 8e-5, 8e-5])
    counts = {done: stage.averages(done) for done in range(25) if stage.averages(done)}
    assert counts == {16: 1, 20: 2, 24: 3}


def test_cosine_with_warm_up() -> None:
    config = configured(
        "tune.epochs=10", "tune.schedule=cosine", "tune.warmup_epochs=2", "tune.lr_rule=none", "tune.base_lr=1"
    )
    (stage,) = stages(config, 384 * 5)
    rates = [stage.learning_rate(step) for step in range(stage.stop)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))


def test_steps_and_images_add_up_over_both_stages() -> None:
    config = configured(
        "pretrain.epochs=3", "pretrain.global_batch=10", "tune.epochs=2", "tune.global_batch=16", "run.seed=4"
    )
    first, second = stages(config, 25)
    assert (first.first, first.stop, second.first, second.stop) == (0, 9, 9, 13)
    assert [first.batch_size(s) for s in range(4)] == [10, 10, 5, 10]
    assert [second.batch_size(s) for s in range(9, 13)] == [16, 9, 16, 9]
    assert [second.images_until(s) for s in (9, 10, 11, 13)] == [0, 16, 25, 50]
    assert first.seed != second.seed


def test_evaluations_that_follow() -> None:
    """Stage one of 3 epochs of 3 steps, fixing of 2 of 2: after epochs 1 and 2, stage one's end, before, epoch 1, after."""
    found = stages(
        configured("pretrain.epochs=3", "pretrain.global_batch=10", "tune.epochs=2", "tune.global_batch=16"), 25
    )
    assert [evaluations_left(found, 1, step) for step in (0, 3, 6, 9, 11, 13)] == [6, 5, 4, 4, 1, 1]
    assert [evaluations_left(found, 0, step) for step in (0, 9, 13)] == [3, 3, 1]


def test_pixels_of_a_forward_stay_about_constant() -> None:
    config = configured()
    assert batch_per_device(config, 320) == 64
    assert batch_per_device(config, 640) == 16
    assert batch_per_device(config, 4000) == 1
    assert batch_per_device(configured("run.batch_per_device=3"), 640) == 3
