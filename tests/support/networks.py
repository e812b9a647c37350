"""Networks in the states that tests need: with used BatchNorms, and after one step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.models import batchnorm
from fixres_dist.models.parts import Parts, set_modes

BN_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def lived_in(model: nn.Module) -> nn.Module:
    """`model` with BatchNorms as after training: statistics and affine are no longer 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
                (module.bias, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
    return model


def one_step(parts: Parts, bn_stats: str) -> None:
    """One SGD step on noise, the statistics measured on it first where they are to be exact."""
    torch.manual_seed(1)
    images, labels = torch.randn(6, 3, 64, 64) * 2 + 0.5, torch.arange(6) % 5
    set_modes(parts, bn_stats)
    inputs = (images,)
    if parts.trunk is not None:
        with torch.no_grad():
            inputs = parts.trunk(images)
    if parts.tuned.last_bns and bn_stats == "exact":
        (bn,) = (parts.model.get_submodule(name) for name in parts.tuned.last_bns)
        moments = batchnorm.Moments(bn.num_features)
        hook = bn.register_forward_pre_hook(lambda _, x: moments.add(x[0]))
        with torch.no_grad():
            parts.head(*inputs)
        hook.remove()
        moments.set(bn)
    optimizer = torch.optim.SGD([p for p in parts.model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(parts.head(*inputs), labels).backward()
    optimizer.step()
