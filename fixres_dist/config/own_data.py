"""Batch, epochs and learning rates for a data set with classes of its own, from its number of images.

Measured on 14 classes of some 700 pictures with EfficientNet-Lite0 (docs/own-data.md): few images need many epochs, and
BatchNorm statistics measured on some hundred pictures lose against the ones that stage one leaves. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fixres_dist.config import reading
from fixres_dist.config.stage_settings import Tune

LARGEST = 1.5e6  # images x classes of a first result; more would take longer than minutes
FEW_STEPS = 100  # a stage of fewer has hardly begun
EVALUATIONS = 5  # of a stage on the way, at most: more would cost a small set longer than its training
SIZE = 1.29  # of the test pictures over those of stage one: the best of SIZES
SIZES = (1.0, 1.14, 1.29, 1.43)  # that a held-out share may choose from


@dataclass(frozen=True)
class Stage:
    """What a stage takes for up to 2,000 images; larger sets have larger batches and fewer epochs."""

    batch: int
    rate: float  # learning rate at this batch; it grows with the batch's square root
    epochs: int  # at least
    steps: int  # at least


FIRST = Stage(batch=32, rate=3e-4, epochs=15, steps=300)  # the whole network, by AdamW
SGD_RATE = 0.02  # of SGD with a new classifier, or new weights
HEAD = Stage(batch=64, rate=0.03, epochs=2, steps=240)  # the classifier on kept features, where a step costs nothing


def schedule(stage: Stage, n: int, ranks: int, given: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Batch, epochs and learning rate of a stage on `n` images; a batch that is `given` decides the others.

    The batch doubles with every fourfold of 2,000 images, up to eight times, and divides over the ranks.
    """
    growth = min(3, max(0, math.floor(math.log(n / 500, 4))))
    batch = math.ceil(stage.batch * 2**growth / ranks) * ranks
    if "global_batch" in given:
        batch = max(1, reading.convert(given["global_batch"], int, f"{section}.global_batch"))
    epochs = max(stage.epochs, math.ceil(stage.steps / math.ceil(n / batch)))
    rate = float(f"{stage.rate * math.sqrt(batch / stage.batch):.3g}")
    return {"global_batch": batch, "epochs": epochs, "lr_rule": "none", "base_lr": rate, "schedule": "cosine"}


def has_first_result(n: int, classes: int) -> bool:
    """Whether a logistic classifier of so many classes is fitted on `n` images before stage one (training/floor.py)."""
    return n * classes <= LARGEST


def derived(n: int, classes: int, ranks: int, given: Mapping[str, Any], new: bool = False) -> dict[str, Any]:
    """Sections of the configuration for `n` training images, laid under what a person has `given`; `new`: of new weights.

    Stage one starts from the first result, which is a classifier on the network as it is. Statistics of the batches would
    change what that classifier reads before the first step is taken, so BatchNorms keep theirs. SGD diverges then: some
    channels have almost no variance, and so large gradients, on which AdamW's steps do not depend (docs/own-data.md has the
    measurements). Who asks for SGD, or for apex, whose optimizer it is, has statistics of the batches, and a quarter of a
    new classifier's learning rate.

    `tune.policy=auto`, the default, is the classifier on kept features with BatchNorm statistics as they are; another
    policy keeps its own way and learning rate.
    """
    first, tune, run = (given.get(section) or {} for section in ("pretrain", "tune", "run"))
    new = new or first.get("classifier") == "new" or not has_first_result(n, classes)
    apex = run.get("optimizer") == "apex" or str(run.get("precision")).startswith("apex")
    optimizer = first.get("optimizer", "sgd" if new or apex else "adamw")
    if optimizer in ("sgd", "nesterov"):
        stage, statistics = replace(FIRST, rate=SGD_RATE if new else SGD_RATE / 4), "ema"
    else:
        stage, statistics = FIRST, "ema" if new else "kept"
    start = "new" if new else "first_result"
    pretrain = {"warmup_epochs": 1, "optimizer": optimizer, "bn_stats": statistics, "classifier": start}
    settings = {
        "pretrain": schedule(stage, n, ranks, first, "pretrain") | pretrain,
        "tune": schedule(HEAD, n, ranks, tune, "tune"),
        "run": {},
    }
    if automatic(given):
        settings["tune"] |= {"policy": "classifier", "bn_stats": "kept"}
        settings["data"] = {"train_transform": "test"}
    else:
        for key in ("lr_rule", "base_lr", "schedule"):
            del settings["tune"][key]
    longest = max(settings[section]["epochs"] for section in ("pretrain", "tune"))
    settings["run"]["eval_every"] = math.ceil(longest / EVALUATIONS)
    return settings


def automatic(given: Mapping[str, Any]) -> bool:
    """Whether the policy is left to the program."""
    return bool((given.get("tune") or {}).get("policy", "auto") == "auto")


def without_auto(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without `tune.policy=auto`, which no run's config.yaml has: it names what was decided."""
    tune = given.get("tune")
    if not tune or tune.get("policy") != "auto":
        return dict(given)
    return {**given, "tune": {key: value for key, value in tune.items() if key != "policy"}}


def few_steps(section: str, tune: Tune, steps: int, n: int) -> str:
    """The warning for a stage of too few steps, with the values to set; empty where there are enough."""
    if steps >= FEW_STEPS or not tune.epochs:
        return ""
    epochs = math.ceil(FEW_STEPS / math.ceil(n / tune.global_batch))
    return f"; warning: only {steps} steps. Next: {section}.epochs={epochs}, or a smaller {section}.global_batch"
