"""The model as it runs: on its device, in its number format, with the preprocessing that its weights want."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL
from fixres_dist.models import nvidia_apex, precision
from fixres_dist.models.build import Preprocessing, preprocessing
from fixres_dist.models.weights import open_model


class Network(NamedTuple):
    model: nn.Module  # in eval mode
    spec: Preprocessing
    arithmetic: precision.Arithmetic
    memory_format: torch.memory_format  # of the model and its pictures where it trains as a whole


def open_network(
    config: Config,
    classes: Sequence[str],
    device: torch.device,
    load_weights: bool = True,
    say: Callable[[str], None] = print,
) -> Network:
    """The configured model for the classes of these names on `device`; `say`, and UserErrors: as of `open_model`.

    apex is looked for again here, after submission: a container, or another node, may hold another one.
    """
    nvidia_apex.check_apex(config)
    model = open_model(config, classes, load_weights, say)
    arithmetic = precision.Arithmetic(precision.resolve(config.run.precision, device), device)
    layout = memory_format(config, device)
    model = model.to(device=device).to(memory_format=layout)
    return Network(model, preprocessing(config.model.timm_name), arithmetic, layout)


def memory_format(config: Config, device: torch.device) -> torch.memory_format:
    """Of the whole model; a frozen trunk has its own (fast_trunk.py).

    `auto`: channels-last on CPUs, and on GPUs where whole blocks train.
    """
    trains_blocks = any(stage.policy in ("last_block", *THROUGH_ALL) for stage in config.stage_settings())
    auto = device.type == "cpu" or trains_blocks
    last = {"channels_last": True, "contiguous": False}.get(config.run.memory_format, auto)
    return torch.channels_last if last else torch.contiguous_format
