"""A frozen trunk with its BatchNorms folded into the convolutions before them: the same function, fewer passes.

Which BatchNorm follows which convolution is seen by watching one forward pass, so it needs no knowledge of the model;
that the result is the same function is checked on a second one. Folding is done in fp32, before any cast.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4  # relative to the largest output; rounding alone stays below 1e-5, a wrong pair is off by far more


@torch.no_grad()
def folded(trunk: nn.Module, res: int) -> tuple[nn.Module, int]:
    """(a copy of `trunk` in eval mode with BatchNorms folded, how many); the original and its tensors stay as they are.

    `res`: pixels of the two pictures it is watched and checked on. Returns (trunk, 0) where the check fails.
    """
    copied = copy.deepcopy(trunk).eval()
    parameter = next(copied.parameters(), None)
    if parameter is None or not any(isinstance(module, _BatchNorm) for module in copied.modules()):
        return trunk, 0
    noise = torch.randn(2, 3, res, res, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    pairs = followers(copied, noise)
    if not pairs:
        return trunk, 0
    before = copied(noise)
    for conv, name in pairs:
        fold(copied, conv, name)
    after = copied(noise)
    for a, b in zip(before, after, strict=True):
        if not bool((a - b).abs().max() <= TOLERANCE * a.abs().max()):
            return trunk, 0
    return copied, len(pairs)


def followers(module: nn.Module, images: torch.Tensor) -> list[tuple[nn.Conv2d, str]]:
    """(convolution, name of the BatchNorm that takes its output), each used once in a forward pass of `images`."""
    made: list[tuple[torch.Tensor, nn.Conv2d]] = []
    pairs: list[tuple[nn.Conv2d, str]] = []
    calls: dict[nn.Module, int] = {}

    def convolved(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[conv] = calls.get(conv, 0) + 1
        made.append((output, conv))  # type: ignore[arg-type]

    def normalised(name: str, bn: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[bn] = calls.get(bn, 0) + 1
        pairs.extend((conv, name) for output, conv in made if output is inputs[0])

    hooks = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            hooks.append(child.register_forward_hook(convolved))
        elif isinstance(child, _BatchNorm) and child.running_mean is not None:
            hooks.append(child.register_forward_pre_hook(lambda m, x, name=name: normalised(name, m, x)))
    module(images)
    for hook in hooks:
        hook.remove()
    return [(conv, name) for conv, name in pairs if calls[conv] == calls[module.get_submodule(name)] == 1]


def fold(module: nn.Module, conv: nn.Conv2d, name: str) -> None:
    """Scale `conv` as its BatchNorm would, and leave only what timm fuses into the BatchNorm: the activation."""
    bn: Any = module.get_submodule(name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, getattr(bn, "act", nn.Identity()))
