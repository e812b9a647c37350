"""One optimizer step: this rank's pictures or features, the gradients of the global batch, the head over all ranks."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fixres_dist.data import order
from fixres_dist.data.requests import Pictures, Request, first_samples, train_steps
from fixres_dist.models import batchnorm
from fixres_dist.models.parts import Parts
from fixres_dist.models.pooled_head import pooled_head
from fixres_dist.models.precision import LossScale
from fixres_dist.training.cache.store import Loaded, Store
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage, batch_per_device
from fixres_dist.training.throughput import Meter


@torch.no_grad()
def average_weights(optimizer: torch.optim.Optimizer, count: int, use: bool) -> None:
    """Take the weights into their running mean as the `count`-th (kept with the momenta, so a resume has it); `use`: take it.

    Statistics stay as they are: those of a last BN before which nothing trains belong to any weights.
    """
    for parameter, state in ((p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]):
        state["average"] = parameter.clone() if count == 1 else state["average"].lerp_(parameter, 1 / count)
        if use:
            parameter.copy_(state["average"])


def step_batches(
    session: Session, stage: Stage, first: int, meter: Meter, store: Store | None
) -> Iterator[tuple[int, Iterator[Loaded]]]:
    """(step, this rank's micro-batches) from step `first` to the stage's end; loading runs ahead over step and epoch ends."""
    ranks, size = session.ranks, batch_per_device(session.config, stage.res)
    pictures = Pictures(stage.transform, stage.res, session.resize(stage.res), stage.seed)

    def requests() -> Iterator[list[Request]]:
        span = (first - stage.first, stage.stop - stage.first)
        return train_steps(
            *(session.train, pictures, stage.tune.global_batch, size, *span, ranks.rank, ranks.world_size),
            stage.tune.repeats,
        )

    loaded = meter.waiting(session.batches(session.train, itertools.chain.from_iterable(requests()), stage.res, store))
    for step in range(first, stage.stop):
        low, high = order.rank_part(0, stage.batch_size(step), ranks.rank, ranks.world_size)
        yield step, itertools.islice(loaded, max(1, -(-(high - low) // size)))


def backward(
    session: Session,
    stage: Stage,
    parts: Parts,
    head: nn.Module,
    scale: LossScale,
    step: int,
    micro_batches: Iterator[Loaded],
    meter: Meter,
) -> list[int]:
    """Gradients of the mean loss over the global batch, accumulated over micro-batches; returns the samples seen.

    With `ema` statistics a frozen trunk's outputs are joined first, so that the head's BN sees the rank's whole batch.
    """
    joined = parts.trunk is not None and stage.tune.bn_stats == "ema"
    batches = list(micro_batches) if joined else micro_batches
    groups = iter([batches]) if joined else ([batch] for batch in batches)
    batch_size, samples = stage.batch_size(step), []
    group = next(groups, None)
    while group is not None:
        every = [session.inputs(parts, batch.images) for batch in group]
        inputs = every[0] if len(every) == 1 else tuple(map(torch.cat, zip(*every, strict=True)))
        labels = torch.cat([batch.labels for batch in group]).to(session.ranks.device)
        samples += [int(sample) for batch in group for sample in batch.samples]
        group = next(groups, None)
        with contextlib.nullcontext() if group is None or session.ranks.world_size == 1 else head.no_sync():  # type: ignore[operator]
            logits = session.logits(parts, head, inputs)
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=stage.tune.label_smoothing)
            # DDP averages over ranks; wanted is the mean over the global batch, whatever a rank's part of it.
            with batchnorm.statistics_kept(parts):
                scale.backward(loss * (session.ranks.world_size / batch_size), last=group is None)
        meter.add(loss.detach(), len(labels))
    return samples


def distribute(session: Session, stage: Stage, parts: Parts) -> nn.Module:
    """The head as it trains, in DDP where there are ranks: its gradients are all that crosses the network."""
    own = pooled_head(parts)
    if session.ranks.world_size == 1:
        return own
    if stage.tune.bn_stats == "ema":
        batchnorm.share_batch_statistics(parts)
    device = session.ranks.device
    options = inspect.signature(DistributedDataParallel).parameters
    # Buffers are the same on every rank by construction. The option's name is another one from torch 2.15 on.
    buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers": False
    }
    head = DistributedDataParallel(own, [device.index] if device.type == "cuda" else None, **buffers)
    # DDP lays its buckets out anew after the first backward; sums over three or more ranks depend on the layout, so a
    # resumed run is bit-identical only if that has happened before its first real step. No image, no gradient, no statistics.
    modes = {module: module.training for module in parts.head.modules()}
    parts.head.eval()
    for _ in range(2):
        nothing = torch.zeros(0, 3, stage.res, stage.res, dtype=torch.uint8)
        session.logits(parts, head, session.inputs(parts, nothing)).sum().backward()
        parts.head.zero_grad()
    for module, training in modes.items():
        module.training = training
    return head


def measure_statistics(session: Session, stage: Stage, parts: Parts, store: Store | None) -> int:
    """Set the last BN's mean and variance from the first `bn_stats_images` samples of the order; returns how many.

    One pass and one all-reduce of fp64 sums: the same at any world size. Without autograd and before any training.
    """
    bn = session.model.get_submodule(parts.tuned.last_bn)
    moments = batchnorm.Moments(bn.num_features)  # type: ignore[arg-type]
    hook = bn.register_forward_pre_hook(lambda _, inputs: moments.add(inputs[0]))
    pictures = Pictures(stage.transform, stage.res, session.resize(stage.res), stage.seed)
    size, ranks = batch_per_device(session.config, stage.res), session.ranks
    requests = first_samples(session.train, pictures, stage.tune.bn_stats_images, size, ranks.rank, ranks.world_size)
    with torch.no_grad():
        for batch in session.batches(session.train, requests, stage.res, store):
            session.logits(parts, parts.head, session.inputs(parts, batch.images))
    hook.remove()
    ranks.total(moments.sums)
    moments.set(bn)
    return min(stage.tune.bn_stats_images, stage.n)
