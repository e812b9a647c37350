"""What follows from the number of images of a data set with classes of its own, and what a person's settings change of it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.cli import submit
from fixres_dist.config import own_data, reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Tune


def derived(n: int, ranks: int = 1, *items: str, classes: int = 3) -> Config:
    given: dict[str, Any] = reading.overrides([*items])
    values = reading.merge(recipes.find("b0").values, recipes.preset("own_classes"))
    values = reading.merge(values, own_data.derived(n, classes, ranks, given))
    return reading.parse(Config, reading.merge(values, own_data.without_auto(given)))


@pytest.mark.parametrize("n", [6, 28, 711, 5_000, 60_000, 1_281_167])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 24])
def test_both_stages_have_some_hundred_steps_at_any_size_and_a_batch_that_divides(n: int, ranks: int) -> None:
    config = derived(n, ranks)
    assert config.pretrain
    for tune, fewest in ((config.pretrain, 300), (config.tune, 240)):
        assert tune.epochs * math.ceil(n / tune.global_batch) >= fewest
        assert tune.global_batch % ranks == 0
    assert max(config.pretrain.epochs, config.tune.epochs) / config.run.eval_every <= 5


def test_what_was_measured_on_711_pictures_is_what_they_get() -> None:
    config = derived(711, 2)
    assert config.pretrain
    first, tune = config.pretrain, config.tune
    assert (first.policy, first.epochs, first.global_batch, first.peak_learning_rate()) == ("all", 15, 32, 3e-4)
    assert (first.classifier, first.optimizer, first.bn_stats) == ("first_result", "adamw", "kept")
    assert (tune.policy, tune.bn_stats, tune.epochs, tune.global_batch) == ("classifier", "kept", 20, 64)
    assert (tune.peak_learning_rate(), tune.schedule, config.data.train_transform) == (0.03, "cosine", "test")


def test_a_given_setting_stays_and_decides_those_that_depend_on_it() -> None:
    config = derived(711, 1, "pretrain.global_batch=128", "tune.epochs=3", "tune.policy=auto")
    assert config.pretrain
    assert (config.pretrain.epochs, config.pretrain.base_lr) == (50, 6e-4), "300 steps of 6 an epoch; lr as the root"
    assert (config.tune.epochs, config.tune.policy) == (3, "classifier")
    chosen = derived(711, 1, "tune.policy=classifier+bn").tune
    assert (chosen.bn_stats, chosen.lr_rule, chosen.base_lr, chosen.epochs) == ("exact", "fixres", 1e-3, 20)
    with pytest.raises(UserError, match=r"pretrain\.global_batch is 'x'"):
        derived(711, 1, "pretrain.global_batch=x")


@pytest.mark.parametrize(("n", "classes", "items"), [(711, 3, ["pretrain.classifier=new"]), (1_281_167, 1000, [])])
def test_a_new_classifier_learns_faster(n: int, classes: int, items: list[str]) -> None:
    """Where it is asked for, and where a first result would take too long."""
    first = derived(n, 1, *items, classes=classes).pretrain
    assert first
    assert (first.classifier, first.optimizer, first.bn_stats) == ("new", "sgd", "ema")
    assert first.peak_learning_rate() == pytest.approx(0.02 * (first.global_batch / 32) ** 0.5, rel=1e-2)


@pytest.mark.parametrize(
    "item", ["pretrain.optimizer=sgd", "pretrain.optimizer=nesterov", "run.optimizer=apex", "run.precision=apex-O1"]
)
def test_who_asks_for_sgd_gets_its_learning_rate_and_statistics_of_the_batches(item: str) -> None:
    first = derived(711, 1, item).pretrain
    assert first
    assert first.optimizer == ("nesterov" if "nesterov" in item else "sgd")
    assert (first.peak_learning_rate(), first.bn_stats, first.classifier) == (0.005, "ema", "first_result")


def test_too_few_steps_are_said_with_the_values_to_set() -> None:
    few = own_data.few_steps("tune", Tune(epochs=1, global_batch=384), 2, 711)
    assert few == "; warning: only 2 steps. Next: tune.epochs=50, or a smaller tune.global_batch"
    assert not own_data.few_steps("tune", Tune(epochs=20, global_batch=64), 240, 711)
    assert not own_data.few_steps("tune", Tune(epochs=0), 0, 711)


def planned(tmp_path: Path, photos: Path, *words: str) -> tuple[Config, str]:
    p = argparse.ArgumentParser()
    submit.add_arguments(p)
    args = p.parse_args(["--data", str(photos), "--runs-dir", str(tmp_path), *words])
    args.words = []
    (target,) = submit.asked_for(args, "inline")
    return target.config, "\n".join(target.plan())


def test_the_plan_of_any_model_says_that_stage_one_is_added_with_steps_memory_and_time(
    tmp_path: Path, photos: Path
) -> None:
    config, said = planned(tmp_path, photos, "--model", "resnet18.a1_in1k")
    assert config.pretrain
    assert (config.pretrain.res, config.data.res) == (224, 288)
    for text in (
        "resnet18.a1_in1k classifies 1000 classes, the data set has 3: stage one trains a new classifier",
        "G multiply-adds per image",
        "process(es): pretrain ",
        "an estimate from multiply-adds",
        "resnet18.a1_in1k-288-own_classes",
    ):
        assert text in said
    assert config.data.resize_rule == "timm"


def test_no_preset_drops_stage_one_and_a_class_map_needs_none(tmp_path: Path, photos: Path) -> None:
    assert planned(tmp_path, photos, "--model", "b0", "--preset", "none")[0].pretrain is None
    assert planned(tmp_path, photos, "--model", "b0", "pretrain=none")[0].pretrain is None
    (tmp_path / "map.txt").write_text("ash 0\nbirch 1\ncedar 2\n")
    mapped = ("model.num_classes=1000", f"data.class_map={tmp_path / 'map.txt'}")
    assert planned(tmp_path, photos, "--model", "b0", *mapped)[0].pretrain is None
    assert planned(tmp_path, photos, "--model", "b0", "--weights", "none")[0].pretrain is None


def test_a_batch_that_a_cpus_memory_cannot_hold_is_halved_at_submission(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fixres_dist.base.memory.available_bytes", lambda: 4 * 2**30)
    config, said = planned(tmp_path, photos, "--model", "b4")
    assert config.run.batch_per_device in (1, 2, 4, 8)
    assert "are available" not in said
    asked = planned(tmp_path, photos, "--model", "b4", "run.batch_per_device=32")
    assert asked[0].run.batch_per_device == 32
    assert "are available" in asked[1]


def test_the_plan_says_what_a_held_out_share_is_for(tmp_path: Path, photos: Path) -> None:
    """With the stage one that submit adds by itself, and the sizes to choose from where none is given."""
    config, said = planned(tmp_path, photos, "--model", "b0", "tune.hold_out=0.2")
    assert config.tune.hold_out_sizes == (224, 256, 288, 320)
    assert (
        "stay out of a first stage one and choose the fixing stage's settings at 224, 256, 288, 320 px; then all again"
        in said
    )
    assert "warning: few to choose on. Next: tune.hold_out=0" in said
    given = planned(tmp_path, photos, "--model", "b0", "--res", "256", "tune.hold_out=0.2")
    assert "settings at 256 px" in given[1]
    config, said = planned(tmp_path, photos, "--model", "b0", "tune.hold_out=0.2", "tune.hold_out_use=train")
    assert config.tune.hold_out_sizes == ()
    assert "stay out of stage one, and are half of what the fixing stage draws" in said
