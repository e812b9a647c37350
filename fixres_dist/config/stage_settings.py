"""The settings of a stage: of fixing, and those that stage one has beside them. The comments of the fields are the reference
documentation (see schema.py). No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from fixres_dist.base.errors import UserError

Transform = Literal["test", "test_flip", "test_aug", "random_resized_crop"]
Policy = Literal[
    "classifier", "classifier+bn_stats", "classifier+bn", "classifier+bn+conv_head", "last_block", "attention", "all"
]
Optimizer = Literal["sgd", "nesterov", "adam", "adamw", "nadamw", "lamb", "lars", "lion", "adan"]
BnStats = Literal["exact", "ema", "kept", "mean"]
THROUGH_ALL = ("attention", "all")  # policies whose gradients run through every block: there is no frozen trunk


def at_least(section: object, low: float, *names: str) -> None:
    """Raises UserError for a field of `names` below `low`."""
    for name in names:
        if not isinstance(value := getattr(section, name), str) and value < low:
            raise UserError(f"{name} is {value}; accepted: {low} or more.")


@dataclass(frozen=True, kw_only=True)
class Tune:
    policy: Policy = "classifier+bn"  # which tensors train (models/policies.py); the default is the paper's
    # The last BN's statistics: measured once (exact), by momentum, as they are, or half-way from those to measured ones
    bn_stats: BnStats = "exact"
    bn_stats_images: int = 50_000  # samples that exact statistics are measured on
    epochs: int = 1  # passes over the training images; 0: no step
    global_batch: int = 384  # images per optimizer step over all ranks; divides over 1-4, 6, 8, 12, 16, 24, 32 .. GPUs
    base_lr: float = 1e-3  # before lr_rule
    lr_rule: Literal["fixres", "none"] = "fixres"  # fixres: base_lr * 8 * global_batch / 512, as the original code does
    repeats: int = 1  # views of each drawn sample in an epoch (repeated augmentation); an epoch keeps n draws
    schedule: Literal["step", "cosine"] = "step"  # step: / 10 every decay_epochs; cosine: to zero at the stage's end
    decay_epochs: int = 30  # of schedule=step
    warmup_epochs: float = 0.0  # linear, from zero
    momentum: float = 0.9  # SGD's
    weight_decay: float = 1e-4  # L2, on what trains
    label_smoothing: float = 0.1  # training loss only; the note gives no value, 0.1 is our choice
    average_epochs: int = 0  # end with the mean of the tuned weights of the last N epochs' ends; 0: the last weights
    alpha: float = 1.0  # end between the weights before fixing (0) and the trained ones (1); measured statistics stay
    hold_out: float = 0.0  # share of train that stays out of stage one (docs/own-data.md); 0: none
    # choose: settings on it after a first stage one, then all of train again; train: it stays out and is half of the pictures
    hold_out_use: Literal["choose", "train"] = "choose"
    hold_out_sizes: tuple[int, ...] = ()  # test resolutions to choose from; empty: data.res

    def __post_init__(self) -> None:
        at_least(self, 1, "global_batch", "bn_stats_images", "repeats", "decay_epochs")
        at_least(self, 0, "epochs", "warmup_epochs", "average_epochs", "base_lr", "weight_decay")
        if self.average_epochs > self.epochs:
            raise UserError(f"average_epochs is {self.average_epochs} of {self.epochs} epochs; accepted: 0 .. epochs.")
        if self.average_epochs and self.policy == "all":
            raise UserError(
                "average_epochs needs a frozen trunk: with policy all every BN's statistics would be wrong."
            )
        check_shares(self)
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; accepted: 0 <= {name} < 1.")
        if self.policy == "all" and self.bn_stats == "mean":
            raise UserError(
                "bn_stats is mean, and with policy all every BN trains. Accepted: ema, kept. Next: tune.bn_stats=ema"
            )
        if self.policy == "all" and self.bn_stats == "exact":
            # Every BN trains, so no single layer's statistics can be measured beforehand.
            object.__setattr__(self, "bn_stats", "ema")

    @property
    def chooses(self) -> bool:
        """Whether this stage's settings are to be chosen on a held-out share."""
        return self.hold_out > 0 and self.hold_out_use == "choose"

    def peak_learning_rate(self) -> float:
        """The learning rate that the schedule starts from (the original code's: lr = 8 * base_lr * batch / 512)."""
        return self.base_lr * 8 * self.global_batch / 512 if self.lr_rule == "fixres" else self.base_lr


RAND_AUGMENT = re.compile(r"rand(-(mmax|m|n|inc)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3aw|3a))*")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Tune):
    """Stage one: ordinary training at the training resolution, before the fixing stage."""

    policy: Policy = "all"  # everything trains
    bn_stats: BnStats = "ema"  # every BN by momentum; kept: as the weights have them
    res: int = 224  # training resolution in pixels
    train_transform: Transform = "random_resized_crop"  # how stage one augments an image
    # sgd: as in the fixing stage; the others are timm's, which leave norms and biases out of weight decay
    optimizer: Optimizer = "sgd"
    layer_decay: float = 1.0  # a layer's learning rate over the next one's (timm's layer-wise decay); 1: all equal
    ema_decay: float = 0.0  # end with the weights' moving average (timm's ModelEmaV3, warmed up); 0: the last ones
    mixup: float = 0.0  # alpha of mixup (arXiv 1710.09412); 0: none
    cutmix: float = 0.0  # alpha of CutMix (arXiv 1905.04899); with both, each step draws which
    rand_augment: str = ""  # timm's notation, such as rand-m9-mstd0.5-inc1, instead of colour jitter; empty: none
    drop_path: float = 0.0  # stochastic depth of the last block, while the whole network trains (arXiv 1603.09382)
    classifier: Literal["new", "first_result"] = "new"  # that it starts from: new weights, or the first result's
    head_epochs: int = 0  # before: the new classifier alone, on kept features of the untouched trunk (arXiv 2202.10054)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 32, "res")
        at_least(self, 0, "mixup", "cutmix", "head_epochs")
        for name in ("ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; accepted: 0 <= {name} < 1.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}; accepted: above 0, to 1 (equal rates), such as 0.75.")
        if self.rand_augment and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise UserError(
                f"rand_augment is {self.rand_augment!r}; accepted: timm's notation, rand and then -mN (strength), -nN "
                "(operations), -mstdX, -pX, -inc1, -mmaxN in any order. Next: pretrain.rand_augment=rand-m9-mstd0.5-inc1"
            )
        check_alone(self)

    @property
    def mixes(self) -> bool:
        """Whether pictures of a step are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def head(self) -> Tune:
        """The settings of the first `head_epochs`: the classifier alone, plainly, at stage one's learning rate."""
        plain = {field.name: getattr(self, field.name) for field in fields(Tune)}
        return Tune(**{**plain, "policy": "classifier", "epochs": self.head_epochs, "bn_stats": "exact", "repeats": 1})


def check_shares(tune: Tune) -> None:
    """Raises UserError for a share out of range, or a size that no model takes."""
    for name, high in (("alpha", 1), ("hold_out", 0.5)):
        if not 0 <= getattr(tune, name) <= high:
            raise UserError(f"{name} is {getattr(tune, name)}; accepted: 0 to {high}.")
    if min(tune.hold_out_sizes, default=32) < 32:
        raise UserError(f"hold_out_sizes are {list(tune.hold_out_sizes)}; accepted: 32 px or more each.")


def check_alone(first: Pretrain) -> None:
    """Raises UserError for settings of stage one that exclude each other."""
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
