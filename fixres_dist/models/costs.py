"""What one picture costs a network: multiply-adds, memory traffic, the largest layer. Counted on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from fixres_dist.config.recipes import Costs
from fixres_dist.models.build import build_model, meta_forward
from fixres_dist.models.resizing import for_size, gmacs


def layer_traffic(model: nn.Module, res: int) -> tuple[float, float]:
    """(MiB that all layers of one picture's bf16 forward pass read and write, the most that one layer does)."""
    traffic = peak = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal traffic, peak
        size = 2 * sum(t.numel() for t in (*inputs, output) if isinstance(t, torch.Tensor))
        traffic, peak = traffic + size, max(peak, size)

    hooks = [m.register_forward_hook(add) for m in model.modules() if not list(m.children())]
    meta_forward(model, 1, res)
    for hook in hooks:
        hook.remove()
    return traffic / 2**20, peak / 2**20


@cache
def costs(timm_name: str, num_classes: int, res: int) -> Costs:
    """Of any timm model with `num_classes` classes at `res` px; raises UserError for a size that it does not take."""
    with torch.device("meta"):
        model = for_size(build_model(timm_name, num_classes), res)
    traffic, peak = layer_traffic(model, res)
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(res=res, parameters=parameters, multiply_adds_g=gmacs(model, res), traffic_mib=traffic, peak_mib=peak)
