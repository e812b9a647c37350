"""BatchNorm statistics: measured exactly, shared over ranks in training, updated once where a layer runs twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.models.parts import Parts


class Moments:
    """Sums for a BN's statistics in fp64, per channel: sum, sum of squares, and the count.

    `sums` [2 channels + 1] of several ranks add up, so one all-reduce makes them those of all images.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Count in the BN's input [n, channels, ...]."""
        flat = x.detach().double().transpose(0, 1).flatten(1)
        self.sums += torch.cat([flat.sum(1), flat.square().sum(1), flat.new_full((1,), flat.shape[1])])

    def set(self, bn: nn.Module) -> None:
        """Write mean and unbiased variance into the BN's running statistics; raises UserError where nothing was added."""
        count = self.sums[-1]
        if not count:
            raise UserError(
                "no statistics for the last BN: none of the first tune.bn_stats_images images could be decoded. "
                f"Next: {command('data', 'verify', '--data', 'DIR')}"
            )
        mean, square = self.sums[:-1].chunk(2)
        mean = mean / count
        variance = (square / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
        bn.running_mean.copy_(mean)  # type: ignore[operator]
        bn.running_var.copy_(variance)  # type: ignore[operator]


class AllReduceSum(torch.autograd.Function):
    """Sum over ranks, forward and backward."""

    alone = False  # as on_this_rank_alone has it

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return AllReduceSum.total(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return AllReduceSum.total(grad)

    @staticmethod
    def total(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if not AllReduceSum.alone:
            dist.all_reduce(x)
        return x


@contextlib.contextmanager
def on_this_rank_alone() -> Iterator[None]:
    """BatchNorms that share their batch's statistics take this rank's inside: what its memory holds can be tried alone."""
    AllReduceSum.alone = True
    try:
        yield
    finally:
        AllReduceSum.alone = False


def normalise_over_ranks(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward of a BatchNorm in train mode over the batches of all ranks, x [n, channels, ...] being this rank's.

    torch's SyncBatchNorm refuses CPUs and drops timm's activation. A single value per channel, over all ranks, has no
    variance: it is normalised by the running statistics, which stay.
    """
    if not self.training:
        return cast(torch.Tensor, type(self).forward(self, x))
    x = x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    shift = self.running_mean.clone().view(shape)  # the same on every rank; keeps the sum of squares from cancelling
    centred = x - shift
    count = x.new_full((1,), x.numel() / x.shape[1])
    sums = AllReduceSum.apply(torch.cat([centred.sum(dims), centred.square().sum(dims), count]))
    count = sums[-1].detach()
    mean, square = (sums[:-1] / count.clamp(min=1)).chunk(2)
    some = count > 1  # False too where every rank skipped all its images
    mean, variance = mean * some, torch.where(some, square - mean.square(), self.running_var)
    with torch.no_grad():
        self.num_batches_tracked += some
        self.running_mean.lerp_(mean + shift.flatten(), self.momentum * some)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum * some)
    x = (centred - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
    x = x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
    return cast(torch.Tensor, self.act(self.drop(x))) if hasattr(self, "act") else x


def share_batch_statistics(parts: Parts) -> None:
    """Let every BN that runs in train mode normalise over the batches of all ranks: the same result at any world size."""
    names = parts.tuned.last_bns if parts.trunk is not None else [n for n, _ in parts.model.named_modules()]
    for name in names:
        module = parts.model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            module.forward = MethodType(normalise_over_ranks, module)  # type: ignore[method-assign]


@contextlib.contextmanager
def single_image(parts: Parts, images: int) -> Iterator[None]:
    """Around both passes of a batch, on one rank. Of one image, a BatchNorm behind a global pool sees one value per channel.

    That has no variance, and torch refuses it: such a BatchNorm uses its running statistics, and they stay.
    """

    def before(bn: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        bn.training = inputs[0].numel() > inputs[0].shape[1]

    def after(bn: nn.Module, *_: Any) -> None:
        bn.training = True

    norms = [m for m in parts.model.modules() if isinstance(m, _BatchNorm) and m.training] if images == 1 else []
    hooks = [h for bn in norms for h in (bn.register_forward_pre_hook(before), bn.register_forward_hook(after))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def statistics_kept(parts: Parts) -> Iterator[None]:
    """Around a backward pass: activation checkpointing runs BatchNorms again there, and their statistics must not move twice."""
    norms: list[Any] = [m for m in parts.model.modules() if isinstance(m, _BatchNorm)] if parts.recomputes else []
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the second update has weight zero
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
