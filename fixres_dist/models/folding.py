"""BatchNorms of a frozen trunk folded into the convolutions before them: the same function, fewer passes over memory.

One forward pass shows which BatchNorm takes which convolution's output, so nothing has to be known of the model; a second
one checks that the folded trunk computes the same. Folding is done in fp32, before any cast.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-4  # relative to the largest output; rounding stays below 1e-5, a wrong pair is off by far more


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Around the check: TF32 keeps ten bits of each factor, and its rounding alone would exceed TOLERANCE."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, before in zip(backends, allowed, strict=True):
            backend.allow_tf32 = before


def norms(module: nn.Module) -> int:
    """How many BatchNorms it has."""
    return sum(isinstance(child, _BatchNorm) for child in module.modules())


@torch.no_grad()
@without_tf32()
def folded(trunk: nn.Module, res: int) -> tuple[nn.Module, int]:
    """(copy of `trunk` in eval mode with BatchNorms folded, how many); (trunk, 0) where there is none or the check fails.

    `res`: side in pixels of the two noise images for the two passes. `trunk` and its tensors stay as they are.
    """
    copied = copy.deepcopy(trunk).eval()
    parameter = next(copied.parameters(), None)
    if parameter is None or not norms(copied):
        return trunk, 0
    noise = torch.randn(2, 3, res, res, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    pairs = conv_bn_pairs(copied, noise)
    before = copied(noise)
    for conv, name in pairs:
        fold(copied, conv, name)
    same = all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max()) for a, b in zip(before, copied(noise), strict=True)
    )
    return (copied, len(pairs)) if pairs and same else (trunk, 0)


def conv_bn_pairs(module: nn.Module, images: torch.Tensor) -> list[tuple[nn.Conv2d, str]]:
    """(convolution, name of the BatchNorm that takes its output) for layers that a forward pass of `images` runs once."""
    outputs: list[tuple[torch.Tensor, nn.Module]] = []
    pairs: list[tuple[Any, str]] = []
    calls: dict[nn.Module, int] = {}

    def after_conv(conv: nn.Module, _: Any, output: torch.Tensor) -> None:
        calls[conv] = calls.get(conv, 0) + 1
        outputs.append((output, conv))

    def before_bn(name: str, bn: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[bn] = calls.get(bn, 0) + 1
        pairs.extend((conv, name) for output, conv in outputs if output is inputs[0])

    hooks = []
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d):
            hooks.append(child.register_forward_hook(after_conv))
        elif isinstance(child, _BatchNorm) and child.running_mean is not None:
            hooks.append(child.register_forward_pre_hook(lambda m, x, name=name: before_bn(name, m, x)))
    module(images)
    for hook in hooks:
        hook.remove()
    return [(conv, name) for conv, name in pairs if calls[conv] == calls[module.get_submodule(name)] == 1]


def fold(module: nn.Module, conv: nn.Conv2d, name: str) -> None:
    """Scale `conv` as its BatchNorm would, and keep of the BatchNorm only the activation that timm fuses into it."""
    bn: Any = module.get_submodule(name)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    module.set_submodule(name, getattr(bn, "act", nn.Identity()))
