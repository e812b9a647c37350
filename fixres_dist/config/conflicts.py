"""Settings of stage one that exclude each other, or settings of other sections. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fixres_dist.base.errors import UserError

if TYPE_CHECKING:
    from fixres_dist.config.schema import Config, Pretrain, Tune


def check_alone(first: Pretrain) -> None:
    """Raises UserError for settings of stage one that exclude each other."""
    from fixres_dist.config.schema import THROUGH_ALL  # which imports this file

    checks = {
        "mixup and cutmix mix pictures": (
            first.mixes and first.policy not in THROUGH_ALL,
            f"and policy {first.policy} trains on a frozen trunk's features. Next: pretrain.policy=all, or both 0",
        ),
        f"mixup and cutmix with repeats={first.repeats}": (
            first.mixes and first.repeats > 1,
            "would mix a picture with its own other view. Next: pretrain.repeats=1, or both 0",
        ),
        f"drop_path={first.drop_path} with policy {first.policy}": (
            first.drop_path > 0 and first.policy != "all",
            "acts only while the whole network trains. Next: pretrain.policy=all, or pretrain.drop_path=0",
        ),
        f"rand_augment with train_transform {first.train_transform}": (
            bool(first.rand_augment) and first.train_transform in ("test", "test_flip"),
            "which shows the same pictures in every epoch. Next: pretrain.train_transform=random_resized_crop",
        ),
        "average_epochs and ema_decay": (
            first.average_epochs > 0 and first.ema_decay > 0,
            "are two averages of one stage. Next: pretrain.average_epochs=0, or pretrain.ema_decay=0",
        ),
        "alpha and hold_out": (
            first.alpha < 1 or first.hold_out > 0,
            "are settings of the fixing stage. Next: tune.alpha, tune.hold_out",
        ),
        "head_epochs": (
            first.head_epochs > 0 and first.policy == "classifier",
            "trains the classifier before all else, and policy classifier trains nothing else. Next: pretrain.head_epochs=0",
        ),
    }
    for what, (wrong, why) in checks.items():
        if wrong:
            raise UserError(f"pretrain: {what} {why}")


def check(config: Config, first: Pretrain) -> None:
    """Raises UserError for settings of stage one that another section excludes."""
    timms = first.optimizer != "sgd" or first.layer_decay < 1
    if timms and (config.run.optimizer == "apex" or config.run.precision.startswith("apex")):
        key = "run.optimizer=torch" if config.run.optimizer == "apex" else "run.precision=auto"
        raise UserError(
            f"pretrain.optimizer={first.optimizer} with pretrain.layer_decay={first.layer_decay:g} is timm's, and apex is "
            f"asked for, whose optimizer is plain SGD. Next: {key}, or pretrain.optimizer=sgd pretrain.layer_decay=1"
        )
    if first.rand_augment and config.data.backend == "dali":
        raise UserError(
            "pretrain.rand_augment is Pillow's work, and data.backend=dali draws no pictures with Pillow. "
            "Next: data.backend=auto, or pretrain.rand_augment="
        )
    if first.mixes and config.run.batch_per_device == 1:
        raise UserError(
            "pretrain.mixup and cutmix mix pairs of a forward pass, and run.batch_per_device is 1. "
            "Next: run.batch_per_device=2, or both 0"
        )
    if first.classifier == "first_result" and config.model.weights == "none":
        raise UserError(
            "pretrain.classifier=first_result starts from a classifier on the weights' features, and model.weights is none. "
            "Next: pretrain.classifier=new"
        )


def check_shares(tune: Tune) -> None:
    """Raises UserError for a share out of range, or a size that no model takes."""
    for name, high in (("alpha", 1), ("hold_out", 0.5)):
        if not 0 <= getattr(tune, name) <= high:
            raise UserError(f"{name} is {getattr(tune, name)}; accepted: 0 to {high}.")
    if min(tune.hold_out_sizes, default=32) < 32:
        raise UserError(f"hold_out_sizes are {list(tune.hold_out_sizes)}; accepted: 32 px or more each.")


def check_held_out(config: Config) -> None:
    """Raises UserError where pictures are held out of no stage one, or other settings than the classifier's are to be chosen.

    At submission, since stage one and tune.policy=auto are decided after a configuration is first read.
    """
    tune = config.tune
    if not tune.hold_out:
        return
    if not config.pretrain:
        raise UserError(
            "tune.hold_out keeps pictures out of stage one, and there is none: published weights have seen all of train, "
            "and stay as they are published. Next: tune.hold_out=0"
        )
    policy, shown = tune.policy, config.data.train_transform
    if config.tune.chooses and (policy not in ("classifier", "classifier+bn_stats") or shown != "test"):
        raise UserError(
            f"tune.hold_out_use=choose tries classifiers on kept features of test pictures, and tune.policy is {policy} "
            f"with data.train_transform={shown}. Next: tune.policy=auto, or tune.hold_out_use=train"
        )
