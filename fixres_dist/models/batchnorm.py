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


class BatchNormOverRanks(torch.autograd.Function):
    """Normalise x [n, channels, ...] by mean and variance of all ranks' batches, whose gradients the ranks sum too.

    The backward pass computes the normalised values again: like torch's own on one rank, it keeps the input and numbers per
    channel. (Plain autograd kept six maps instead.)
    """

    alone = False  # as on_this_rank_alone has it

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(y in the dtype of x; mean, variance and count of all ranks' values in fp32)."""
        shape, dims = [1, -1, *[1] * (x.dim() - 2)], [d for d in range(x.dim()) if d != 1]
        shift = running_mean.clone()  # the same on every rank; keeps the sum of squares from cancelling
        centred = x.float() - shift.view(shape)
        count = centred.new_full((1,), x.numel() / x.shape[1])
        sums = BatchNormOverRanks.total(torch.cat([centred.sum(dims), centred.square().sum(dims), count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count.clamp(min=1)).chunk(2)
        some = count > 1  # False too where every rank skipped all its images
        mean, variance = mean * some, torch.where(some, square - mean.square(), running_var)
        scale = torch.rsqrt(variance + eps)
        y = centred.sub_(mean.view(shape)).mul_(scale.view(shape))
        if weight is not None and bias is not None:
            y = y.mul_(weight.view(shape)).add_(bias.view(shape))
        ctx.save_for_backward(x, weight, shift, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean + shift, variance, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, shift, mean, scale, count = ctx.saved_tensors
        shape, dims = [1, -1, *[1] * (x.dim() - 2)], [d for d in range(x.dim()) if d != 1]
        grad = grad.float()
        normal = (x.float() - shift.view(shape)).sub_(mean.view(shape)).mul_(scale.view(shape))
        own = torch.cat([grad.sum(dims), (grad * normal).sum(dims)])  # of this rank: DDP sums the parameters' gradients
        of_bias, of_weight = own.chunk(2)
        parameters = (None, None) if weight is None else (of_weight, of_bias)
        if not ctx.needs_input_grad[0]:
            return None, *parameters, None, None, None
        share = (count > 1) / count.clamp(min=1)  # 0 where running statistics took the batch's place
        a, b = (BatchNormOverRanks.total(own) * share).chunk(2)
        factor = scale if weight is None else scale * weight
        of_x = normal.mul_(-b.view(shape)).add_(grad).sub_(a.view(shape)).mul_(factor.view(shape))
        return of_x.to(x.dtype), *parameters, None, None, None

    @staticmethod
    def total(x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        if not BatchNormOverRanks.alone:
            x = x.clone()
            dist.all_reduce(x)
        return x


@contextlib.contextmanager
def on_this_rank_alone() -> Iterator[None]:
    """BatchNorms that share their batch's statistics take this rank's inside: what its memory holds can be tried alone."""
    BatchNormOverRanks.alone = True
    try:
        yield
    finally:
        BatchNormOverRanks.alone = False


def normalise_over_ranks(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward of a BatchNorm in train mode over the batches of all ranks, x [n, channels, ...] being this rank's.

    torch's SyncBatchNorm refuses CPUs and drops timm's activation. A single value per channel, over all ranks, has no
    variance: it is normalised by the running statistics, which stay.
    """
    if not self.training:
        return cast(torch.Tensor, type(self).forward(self, x))
    x, mean, variance, count = BatchNormOverRanks.apply(
        x, self.weight, self.bias, self.running_mean, self.running_var, self.eps
    )
    some = count > 1
    with torch.no_grad():
        self.num_batches_tracked += some
        self.running_mean.lerp_(mean, self.momentum * some)
        self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum * some)
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
