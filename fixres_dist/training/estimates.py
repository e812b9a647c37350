"""Memory and time of a run, estimated before it starts from what one picture costs. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from fixres_dist.base import memory
from fixres_dist.base.text import duration
from fixres_dist.config.recipes import Costs
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL
from fixres_dist.training.stages import Stage, batch_per_device, stages

# An eager EfficientNet is bound by memory traffic; 55 % of the nominal bandwidth is what published A100 timings reach.
H200_MIB_PER_S = 0.55 * 4.8e12 / 2**20
# 1e9 multiply-adds of one CPU core: Lite0 at 224 px with its backward pass, bf16 (docs/own-data.md).
CORE_G_PER_S = 10.0
BACKWARD = 2  # forward passes that a backward pass costs as much as
# Of the bytes that a forward writes and reads, what a backward pass needs: tensors that autograd saves, counted on the meta
# device for b0 at 320 px (0.49) and b4 at 380 px (0.48), fp32, timm 1.0.31; and the share of them left by checkpointing
# (0.11 and 0.07).
SAVED, CHECKPOINTED = 0.49, 0.11
PROCESS_GIB = 0.8  # of a process that has imported torch and timm, before it has a model (torch 2.15: 825 MB)
LEFT_OUT = "without decoding, start-up, compiling and the wait in a queue"


@dataclass(frozen=True)
class Counts:
    train: int
    val: int
    classes: int
    source: str
    files: str = ""  # what in the data set is no sample, where there is any


def stage_gib(config: Config, stage: Stage, costs: Costs, counts: Counts, world_size: int) -> float:
    """Peak of a rank's device in one stage, with activations as wide as run.precision makes them."""
    width = 4 if config.run.precision in ("fp32", "tf32") else 2
    tune, most = stage.tune, batch_per_device(config, stage.res)
    # Evaluation and statistics have no gradients, and take as many images at once as are left for a rank.
    without = max(counts.val, min(tune.bn_stats_images, counts.train))
    step = min(most, -(-tune.global_batch // world_size))
    picture = 3 * costs.res**2 * (1 + 4 + width) / 2**20  # as uint8, as fp32, and cast
    mib = max(step, min(most, -(-without // world_size))) * (picture + costs.peak_mib * width)
    if tune.policy in THROUGH_ALL:
        kept = CHECKPOINTED if config.run.activation_checkpointing else 1.0
        mib += step * SAVED * kept * costs.traffic_mib * width / 2
    trainable = costs.trainable(tune.policy, counts.classes)
    own = stage.ordinary  # the optimizer, and the moving average of the weights
    weights = 4 * costs.parameters * (2 if own.ema_decay else 1) + trained_bytes(own.optimizer) * trainable
    return weights / 2**30 + mib * (stage.res / costs.res) ** 2 / 2**10


def trained_bytes(optimizer: str) -> int:
    """Of a trained weight: gradient, DDP's bucket and momentum; Adam's kind keeps the squares' too, Adan four tensors."""
    momentum_alone = optimizer in ("sgd", "nesterov", "lars", "lion")
    return 12 if momentum_alone else 24 if optimizer == "adan" else 16


def memory_gib(config: Config, costs: Costs, counts: Counts, world_size: int) -> float:
    """Peak of a rank's device over both stages."""
    return max(stage_gib(config, stage, costs, counts, world_size) for stage in stages(config, counts.train))


def on_cpus(config: Config) -> Config:
    """As a CPU runs it, where `auto` is taken to be fp32, the wider format."""
    return replace(config, run=replace(config.run, precision="fp32")) if config.run.precision == "auto" else config


def cpu_memory_gib(config: Config, costs: Costs, counts: Counts, world_size: int, processes: int) -> float:
    """Of `processes` ranks on one machine's CPU, each with its libraries."""
    return processes * (PROCESS_GIB + memory_gib(on_cpus(config), costs, counts, world_size))


def with_batch(config: Config, batch: int) -> Config:
    return replace(config, run=replace(config.run, batch_per_device=batch))


def fitting_batch(
    config: Config, costs: Costs, counts: Counts, world_size: int, processes: int, have_gib: float
) -> int:
    """The batch per rank, halved until the estimate fits `have_gib` of a machine's CPU memory; 1 may not fit either."""

    def need(batch: int) -> float:
        return cpu_memory_gib(with_batch(config, batch), costs, counts, world_size, processes)

    batch = max(batch_per_device(config, res) for res in config.resolutions())
    while batch > 1 and need(batch) > have_gib:
        batch //= 2
    return batch


def shortage(
    config: Config, costs: Costs, counts: Counts, world_size: int, processes: int, started: bool = False
) -> str:
    """What is missing on a CPU, and the batch that would fit; empty where the estimate fits. `started`: they run already."""
    have = memory.available_bytes()
    if have is None:
        return ""
    have_gib = have / 2**30 + (processes * PROCESS_GIB if started else 0.0)
    needed = cpu_memory_gib(config, costs, counts, world_size, processes)
    if needed <= have_gib:
        return ""
    batch = fitting_batch(config, costs, counts, world_size, processes, have_gib)
    fits = cpu_memory_gib(with_batch(config, batch), costs, counts, world_size, processes) <= have_gib
    way = f"run.batch_per_device={batch}" if fits else "a smaller --res, or fewer processes"
    return f"{have_gib:.1f} of the {needed:.1f} GiB are available, and the kernel kills processes that take more. Next: {way}"


def memory_text(config: Config, costs: Costs, counts: Counts, world_size: int, on_cpu: bool) -> str:
    """The plan's line: the peak, and of two stages both."""
    gib = memory_gib(config, costs, counts, world_size)
    text = f"about {gib:.1f} GiB per GPU: weights, head, activations"
    if on_cpu:
        gib = cpu_memory_gib(config, costs, counts, world_size, world_size)
        text = f"about {gib:.1f} GiB of this machine's memory for {world_size} process(es)"
    if config.pretrain:
        as_run, alone = (on_cpus(config), world_size * PROCESS_GIB) if on_cpu else (config, 0.0)
        each = [
            f"{stage.name} {(world_size if on_cpu else 1) * stage_gib(as_run, stage, costs, counts, world_size) + alone:.1f}"
            for stage in stages(config, counts.train)
        ]
        text += f": {', '.join(each)}"
    text += " (estimate)"
    short = shortage(config, costs, counts, world_size, world_size) if on_cpu else ""
    return f"{text}; {short}" if short else text


def passes(config: Config, counts: Counts, pictures: int) -> float:
    """Forward passes at the test size that a run costs as much as; `pictures`: those of the fixing stage's frozen trunk."""
    found = float(pictures)
    if config.tune.policy in ("last_block", *THROUGH_ALL):
        found += BACKWARD * config.tune.epochs * counts.train
    if config.pretrain:
        first, every = config.pretrain, config.run.eval_every
        shown = (1 + BACKWARD) * first.epochs * counts.train + (-(-first.epochs // every) if every else 1) * counts.val
        found += shown * (first.res / config.data.res) ** 2
        if config.tune.chooses:  # a first stage one, and features at every size that is tried
            found += shown * (1 - config.tune.hold_out) * (first.res / config.data.res) ** 2
            found += sum(counts.train * (res / config.data.res) ** 2 for res in config.tune.hold_out_sizes)
    return found


def seconds(
    config: Config, costs: Costs, counts: Counts, pictures: int, world_size: int, on_cpu: bool = False
) -> tuple[float, float]:
    """(seconds of a run, forward passes per second of a rank at the test size): of an H200 by memory traffic, or of this
    machine's CPU by multiply-adds."""
    area = (config.data.res / costs.res) ** 2
    each = H200_MIB_PER_S / (costs.traffic_mib * area)
    if on_cpu:
        cores = len(os.sched_getaffinity(0)) / world_size
        each = CORE_G_PER_S * cores / (costs.multiply_adds_g * area)
    return passes(config, counts, pictures) / each / world_size, each


def roughly(seconds: float) -> str:
    """As far as an estimate of a run's time can be believed: starting alone takes some seconds."""
    return f"about {duration(seconds)}" if seconds >= 10 else "less than 10s"


def here() -> str:
    """Where a run on this machine's CPU takes its time, and how good an estimate of that is."""
    cores = len(os.sched_getaffinity(0))
    return f"on the {cores} CPUs of this machine (an estimate from multiply-adds, a third to three times)"


def time_text(config: Config, costs: Costs, counts: Counts, pictures: int, world_size: int, on_cpu: bool) -> str:
    eta_s, each = seconds(config, costs, counts, pictures, world_size, on_cpu)
    if on_cpu:
        return f"{roughly(eta_s)} {here()}"
    return (
        f"{roughly(eta_s)} on {world_size} H200 ({each:,.0f} images/s each; an estimate from memory traffic, +-40 %, "
        f"{LEFT_OUT})"
    )
