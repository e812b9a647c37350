"""One optimizer step: gradients of the global batch, the head over all ranks, exact statistics before the first one."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fixres_dist.data.order import keyed
from fixres_dist.data.progress import progress_bar
from fixres_dist.models import batchnorm
from fixres_dist.models.parts import keep_no_biases
from fixres_dist.models.pooled_head import pooled_head
from fixres_dist.models.precision import LossScale
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.mixing import mixed
from fixres_dist.training.partial import Partial
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.throughput import Meter


def backward(
    work: StageSession,
    head: nn.Module,
    scale: LossScale,
    step: int,
    micro_batches: Iterator[Loaded],
    meter: Meter,
) -> list[int]:
    """Accumulate the gradients of the mean loss over the global batch; returns the samples that this rank has seen.

    With `ema` statistics the outputs of a frozen trunk are joined first, so that the head's BN sees the rank's whole batch.
    """
    ranks, tune, classes = work.session.ranks, work.stage.tune, len(work.session.classes)
    joined = work.parts.trunk is not None and tune.bn_stats == "ema"
    groups = iter([list(micro_batches)]) if joined else ([batch] for batch in micro_batches)
    batch_size, samples = work.stage.batch_size(step), []
    group, k = next(groups, None), 0
    while group is not None:
        if work.parts.everything:  # dropout and stochastic depth draw the same after a resume
            torch.manual_seed(int(keyed(work.stage.seed, 4, step, ranks.rank, k)[0]) >> 1)
        every = [work.inputs(batch.images) for batch in group]
        inputs = every[0] if len(every) == 1 else tuple(map(torch.cat, zip(*every, strict=True)))
        labels = torch.cat([batch.labels.to(ranks.device, non_blocking=True) for batch in group])
        samples += [sample for batch in group for sample in batch.samples.tolist()]
        group, k = next(groups, None), k + 1
        waiting = contextlib.nullcontext() if group is None or ranks.world_size == 1 else head.no_sync()  # type: ignore[operator]
        alone = batchnorm.single_image(work.parts, len(labels) if ranks.world_size == 1 else 0)
        first, targets = mixed(work.stage, classes, step, inputs[0], labels)
        smoothing = 0.0 if targets.is_floating_point() else tune.label_smoothing  # soft targets have it in them
        with waiting, alone:
            logits = work.logits(head, (first, *inputs[1:]))
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # DDP averages over ranks, and the loss is the mean over the global batch, however large this rank's part is.
            with batchnorm.statistics_kept(work.parts):
                scale.backward(loss * (ranks.world_size / batch_size), last=group is None)
        meter.add(loss.detach(), len(labels))
    return samples


def distribute(work: StageSession) -> nn.Module:
    """The head as it trains: wrapped in DDP where there are several ranks, so that only its gradients are reduced."""
    parts, ranks = work.parts, work.session.ranks
    # The pass pays where a map outgrows a processor's cache. No GPU has been asked: there the plain layers run.
    own = pooled_head(parts) if ranks.device.type == "cpu" else parts.head
    if ranks.world_size == 1:
        return own
    if work.stage.tune.bn_stats == "ema":
        batchnorm.share_batch_statistics(parts)
    # Buffers are the same on every rank by construction. The option has another name from torch 2.15 on.
    options = inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers": False
    }
    head = DistributedDataParallel(own, [ranks.device.index] if ranks.device.type == "cuda" else None, **buffers)
    # DDP orders its buckets anew after the first backward pass, and sums over three or more ranks depend on that order.
    # A resumed run has the same bits only if this has happened before its first real step: so two backward passes of an
    # empty batch come first. They have no gradient and leave the statistics alone.
    modes = {module: module.training for module in parts.head.modules()}
    parts.head.eval()
    keep_no_biases(parts.head)
    for _ in range(2):
        nothing = torch.zeros(0, 3, work.stage.res, work.stage.res, dtype=torch.uint8)
        torch.autograd.backward(work.logits(head, work.inputs(nothing)).sum())
        parts.head.zero_grad()
    for module, training in modes.items():
        module.training = training
    return head


@torch.no_grad()
def measure_statistics(work: StageSession, partial: Partial | None = None) -> int:
    """Set mean and variance of the last BN from the first `bn_stats_images` samples of the order; returns how many.

    One pass and one all-reduce of fp64 sums, so the result is the same at any world size. `partial` keeps each rank's
    sums and its number of batches at a stop signal (Stopped); it belongs to one world size.
    """
    ranks = work.session.ranks
    bns: list[Any] = [work.session.model.get_submodule(name) for name in work.parts.tuned.last_bns]
    moments = {bn: batchnorm.Moments(bn.num_features, ranks.device) for bn in bns}
    hooks = [bn.register_forward_pre_hook(lambda bn, inputs: moments[bn].add(inputs[0])) for bn in bns]
    count = 0
    if partial and (done := ranks.from_main(partial.read)) is not None:
        count, kept = int(done[ranks.rank, 0]), torch.from_numpy(done[ranks.rank, 1:]).to(ranks.device)
        for bn, sums in zip(bns, torch.split(kept, [len(moments[bn].sums) for bn in bns]), strict=True):
            moments[bn].sums += sums

    def keep() -> None:
        own = torch.cat([torch.tensor([count], dtype=torch.float64), *(moments[bn].sums.cpu() for bn in bns)])
        found = torch.zeros(ranks.world_size, len(own), dtype=torch.float64)
        found[ranks.rank] = own
        ranks.total(found)
        if partial and ranks.is_main:
            partial.write(found.numpy())

    every_s, passed = partial.every_s if partial else math.inf, 0
    total = -(-min(work.stage.tune.bn_stats_images, len(work.session.train)) // ranks.world_size)
    with progress_bar(f"statistics of {', '.join(work.parts.tuned.last_bns)}", ranks.is_main) as report:
        for batch in ranks.together(work.statistics_batches(count), keep, every_s):
            work.logits(work.parts.head, work.inputs(batch.images))
            count += 1
            passed += len(batch.samples)  # of this start
            report(min(total, passed), total)
    for bn, hook in zip(bns, hooks, strict=True):
        hook.remove()
        moments[bn].sums = ranks.total(moments[bn].sums.cpu())
        own = bn.running_mean.clone(), bn.running_var.clone()
        moments[bn].set(bn)
        if work.stage.tune.bn_stats == "mean":
            bn.running_mean.lerp_(own[0], 0.5)
            bn.running_var.lerp_(own[1], 0.5)
    return min(work.stage.tune.bn_stats_images, work.stage.n)


@torch.no_grad()
def average_weights(optimizer: torch.optim.Optimizer, count: int, use: bool) -> None:
    """Take the weights into their running mean as its `count`-th member; with `use`, continue with the mean.

    The mean is kept with the momenta, so a checkpoint holds it. Statistics stay: nothing trains before the last BN.
    """
    for parameter, state in ((p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]):
        state["average"] = parameter.clone() if count == 1 else state["average"].lerp_(parameter, 1 / count)
        if use:
            parameter.copy_(state["average"])
