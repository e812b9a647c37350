"""`run.batch_per_device: auto` on a GPU: the largest batch that fits, found once by trying, and kept with the run.

Where memory runs out all the same, on any device, the error names the next smaller batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from fixres_dist.base.errors import UserError, first_line
from fixres_dist.base.memory import does_not_fit
from fixres_dist.config.stage_settings import THROUGH_ALL
from fixres_dist.data.requests import every_sample
from fixres_dist.models import batchnorm
from fixres_dist.models.fast_trunk import FastTrunk
from fixres_dist.models.parts import Parts, set_modes
from fixres_dist.models.precision import LossScale
from fixres_dist.models.resizing import largest_batch
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, batch_per_device
from fixres_dist.training.step import backward, distribute
from fixres_dist.training.throughput import Meter

FRACTION = (
    0.9  # of the GPU's memory; the rest is for fragmentation and for a compiled trunk, which is tried as it is eager
)


class DoesNotFit(UserError):
    """Memory ran out in training; `smaller` images per forward pass take half as much."""

    def __init__(self, text: str, smaller: int) -> None:
        super().__init__(text)
        self.smaller = smaller


@contextlib.contextmanager
def naming_a_smaller_batch(work: StageSession, in_steps: bool) -> Iterator[None]:
    """Raises DoesNotFit where memory runs out inside; `in_steps`: in training steps, else in evaluation and statistics."""
    try:
        yield
    except Exception as error:
        if not does_not_fit(error):
            raise
        images, device, stage = work.batch_per_device, work.session.ranks.device, work.stage
        if in_steps:
            images = min(images, -(-stage.tune.global_batch // work.session.ranks.world_size))
        text = f"{images} images of {stage.res} px in a forward pass do not fit into the memory of {device}"
        if images <= stage.together:
            raise UserError(f"{text}, {ways_out(stage)} ({first_line(error)})") from error
        raise DoesNotFit(f"{text} ({first_line(error)})", images // 2) from error


def ways_out(stage: Stage) -> str:
    recompute = ", or run.activation_checkpointing=true" if stage.tune.policy in THROUGH_ALL else ""
    smaller = "a smaller --res" if stage.name == "fix" else "pretrain.res=, smaller"
    return f"with policy {stage.tune.policy}. Next: {smaller}{recompute}"


def largest_that_fits(fits: Callable[[int], bool], cap: int) -> int:
    """The largest batch up to `cap` for which `fits` holds, to an eighth: `cap` is halved until it does, then bisected; 0: none."""
    low, high = cap, cap + 1
    while low and not fits(low):
        low, high = low // 2, low
    while low and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_batch(
    session: Session, stage: Stage, parts: Parts, optimizer: torch.optim.Optimizer, scale: LossScale
) -> Session:
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
    cap = max(1, min(cap, largest_batch(session.model, stage.res)))

    def largest() -> dict[str, Any]:
        torch.cuda.empty_cache()  # what the trunk's probe has left
        work = as_tried(session, stage, parts)
        with nothing_moved(work, optimizer, scale):
            head = distribute(work)  # all ranks together; the attempts are each rank's own
            size = largest_that_fits(lambda n: step_fits(with_size(work, n), head, optimizer, scale), cap)
        size = -ranks.highest([-size])[0]
        if not size:
            raise UserError(
                f"not even one image of {stage.res} px fits into {FRACTION:.0%} of the GPU's memory {ways_out(stage)}"
            )
        return {"largest that fits": size, "of use": cap}

    name = f"batch per device, {stage.name} at {stage.res} px, {ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    size = session.decided(name, largest, together=True).get("largest that fits")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"choices.json has {size!r} for the {name}. Accepted: 1 or more. Next: remove that file.")
    return with_size(StageSession(session, stage, parts), size).session


def with_size(work: StageSession, n: int) -> StageSession:
    """The same work with `n` images in a forward pass."""
    config = work.session.config
    return replace(
        work, session=replace(work.session, config=replace(config, run=replace(config.run, batch_per_device=n)))
    )


class Alone(Ranks):
    """A rank that takes its part of the pictures and agrees with nobody: where it runs out of memory, no other one waits."""

    def highest(self, values: list[int]) -> list[int]:
        return values


def as_tried(session: Session, stage: Stage, parts: Parts) -> StageSession:
    """The stage's work for attempts: no graph is compiled for each size, undecodable files are not reported yet, and a stop
    signal waits for the end of the attempts."""
    trunk = parts.trunk.eager() if isinstance(parts.trunk, FastTrunk) else parts.trunk
    alone = Alone(**{field.name: getattr(session.ranks, field.name) for field in fields(Ranks)})
    tried = replace(session, on_skip=lambda *_: None, ranks=replace(alone, flag=None))
    return StageSession(tried, stage, replace(parts, trunk=trunk))


@contextlib.contextmanager
def nothing_moved(work: StageSession, optimizer: torch.optim.Optimizer, scale: LossScale) -> Iterator[None]:
    """Puts back after the block what training steps change: weights, statistics, momenta, loss scale, modes, random state."""
    state = work.session.model.state_dict()
    tensors = {
        name: state[name]
        for name in {*work.parts.tuned.tensors, *dict(work.session.model.named_buffers())} & set(state)
    }
    kept = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    momenta, scaled = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scale.state())
    device = work.session.ranks.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
        optimizer.zero_grad()
        optimizer.load_state_dict(momenta)
        scale.restore(scaled)
        set_modes(work.parts, work.stage.tune.bn_stats)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # what training itself takes is reported


def step_fits(work: StageSession, head: nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale) -> bool:
    """Whether what a start does at once stays within FRACTION of the device's memory, loaders and other processes included."""
    device = work.session.ranks.device
    torch.cuda.reset_peak_memory_stats(device)
    try:
        others = steps_and_evaluation(work, head, optimizer, scale)
        total = torch.cuda.mem_get_info(device)[1]
        return torch.cuda.max_memory_reserved(device) + others <= FRACTION * total
    except Exception as error:
        if not does_not_fit(error):
            raise
        return False
    finally:
        optimizer.zero_grad()
        torch.cuda.empty_cache()


def steps_and_evaluation(
    work: StageSession, head: nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale
) -> int:
    """Two steps, of which the first makes the momenta, then a batch of an evaluation, whose loader stands beside the other.

    Returns the bytes in use on the device outside of torch: decoders, NCCL, other processes. The learning rate is 0 before
    the loop sets it. Nothing goes to other ranks: one may run out of memory where others do not.
    """
    session, stage, several = work.session, work.stage, work.session.ranks.world_size > 1
    set_modes(work.parts, stage.tune.bn_stats)
    steps = work.steps(stage.first, Meter())
    for step, micro_batches in itertools.islice(steps, 2):
        optimizer.zero_grad()
        with head.no_sync() if several else contextlib.nullcontext(), batchnorm.on_this_rank_alone():  # type: ignore[operator]
            backward(work, head, scale, step, micro_batches, Meter())
        scale.step()
    work.parts.model.eval()
    work.parts.head.eval()
    pictures = session.batches(session.val, session.requests(every_sample, session.val, stage.res), stage.res)
    if batch := next(pictures, None):
        with torch.no_grad():
            session.logits(work.parts, work.parts.head, session.inputs(work.parts, batch.images))
    torch.cuda.synchronize(session.ranks.device)
    free, total = torch.cuda.mem_get_info(session.ranks.device)
    del steps, pictures  # both loaders have stood until here
    return total - free - torch.cuda.memory_reserved(session.ranks.device)
