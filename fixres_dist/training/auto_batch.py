"""`run.batch_per_device: auto` on a GPU: the largest batch that fits, found once by trying, and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fixres_dist.base.errors import UserError
from fixres_dist.models.fast_trunk import FastTrunk
from fixres_dist.models.parts import Parts, set_modes
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage, batch_per_device

# Of the GPU's memory; the rest is for the decoder's buffers, momenta, DDP's buckets and fragmentation.
FRACTION = 0.8


def largest_that_fits(fits: Callable[[int], bool], cap: int) -> int:
    """The largest batch up to `cap` for which `fits` holds, to an eighth: doubled until it fails, then bisected; 0: none."""
    low, high = 0, 1
    while high < cap and fits(high):
        low, high = high, 2 * high
    if high >= cap:
        if fits(cap):
            return cap
        high = cap
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_batch(session: Session, stage: Stage, parts: Parts) -> Session:
    """`session` with a number for `run.batch_per_device` where it is `auto` and the device a GPU; otherwise as it is.

    Every rank measures alone and all take the smallest. Kept by stage, world size and GPU, because a resume is bit-exact
    only with the same micro-batches; another kind of GPU measures anew.
    """
    ranks, config = session.ranks, session.config
    if config.run.batch_per_device != "auto" or ranks.device.type != "cuda":
        return session
    share = -(-stage.tune.global_batch // ranks.world_size)
    # A frozen trunk is as fast with the pixel rule's batch as with a larger one; evaluation takes the same.
    cap = share if parts.trains_blocks else max(share, batch_per_device(config, stage.res))

    def largest() -> dict[str, Any]:
        size = largest_that_fits(lambda n: step_fits(session, stage, parts, n), cap)
        size = -ranks.highest([-size])[0]
        if not size:
            raise UserError(
                f"not even one image of {stage.res} px fits into {FRACTION:.0%} of the GPU's memory with policy "
                f"{stage.tune.policy}. Next: a smaller --res, or run.activation_checkpointing=true with policy all"
            )
        return {"largest that fits": size, "of use": cap}

    name = f"batch per device, {stage.name} at {stage.res} px, {ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    size = session.decided(name, largest, together=True)["largest that fits"]
    return replace(session, config=replace(config, run=replace(config.run, batch_per_device=size)))


def step_fits(session: Session, stage: Stage, parts: Parts, n: int) -> bool:
    """Whether a forward and backward pass of `n` images stays within FRACTION; moves no weight and no statistic."""
    device = session.ranks.device
    trunk = parts.trunk.eager() if isinstance(parts.trunk, FastTrunk) else parts.trunk  # no graph for each size tried
    tried = replace(parts, trunk=trunk)
    parts.head.eval()  # BatchNorms keep their statistics
    torch.cuda.reset_peak_memory_stats(device)
    try:
        images = torch.zeros(n, 3, stage.res, stage.res, dtype=torch.uint8)
        torch.autograd.backward(session.logits(tried, parts.head, session.inputs(tried, images)).sum())
        torch.cuda.synchronize(device)
        return (
            torch.cuda.max_memory_reserved(device) <= FRACTION * torch.cuda.get_device_properties(device).total_memory
        )
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        parts.head.zero_grad()
        set_modes(parts, stage.tune.bn_stats)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # what training itself takes is reported
