"""The optimizer of a stage: plain SGD, by torch or apex, or one of timm's with its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from fixres_dist.config.schema import Run
from fixres_dist.config.stage_settings import Pretrain, Tune
from fixres_dist.models.precision import sgd

TIMM = {"sgd": "momentum", "nesterov": "sgd"}  # timm calls SGD with Nesterov's momentum sgd


def optimizer_of(model: nn.Module, run: Run, tune: Tune) -> torch.optim.Optimizer:
    """Of the parameters that require grad; the learning rate is 0 until the loop sets it, times a group's `lr_scale`."""
    own = tune if isinstance(tune, Pretrain) else Pretrain()
    if own.optimizer == "sgd" and own.layer_decay == 1:
        trainable = [p for p in model.parameters() if p.requires_grad]
        return sgd(run.optimizer, trainable, tune.momentum, tune.weight_decay)
    options: dict[str, Any] = {"layer_decay": own.layer_decay} if own.layer_decay < 1 else {}
    name = TIMM.get(own.optimizer, own.optimizer)
    made: torch.optim.Optimizer = create_optimizer_v2(
        model, name, lr=0.0, weight_decay=tune.weight_decay, momentum=tune.momentum, **options
    )
    return made
