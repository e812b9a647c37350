"""A model, its data and its device, opened once: what training, evaluation and the resolution sweep share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from fixres_dist import config as cfg
from fixres_dist import distributed, folding, models, precision, tuning
from fixres_dist.data import geometry, loading, plan, sources, torch_cpu
from fixres_dist.data.index import Index
from fixres_dist.distributed import Ranks
from fixres_dist.errors import UserError
from fixres_dist.evaluate import Predictions, predict
from fixres_dist.schedule import batch_per_device


@dataclass(frozen=True)
class Session:
    config: cfg.Config
    ranks: Ranks
    model: nn.Module
    spec: models.Preprocessing
    splits: dict[str, Index]  # train and val; only the one that is asked for where a model is just evaluated
    precision: str  # what really runs
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    memory_format: torch.memory_format
    on_skip: loading.OnSkip  # what is done about an image that cannot be decoded, under data.on_bad: skip

    @property
    def train(self) -> Index:
        return self.splits["train"]

    @property
    def val(self) -> Index:
        return self.splits["val"]

    def resize(self, res: int) -> geometry.Resize:
        return geometry.resize_of(self.config.data.resize_rule, res, self.spec.crop_pct, self.spec.interpolation)

    def batches(self, index: Index, requests: Iterable[plan.Request], res: int) -> Iterator[torch_cpu.Batch]:
        workers = torch_cpu.worker_count(self.config.data.workers, self.ranks.local_size)
        settings, device, size = self.config.data, self.ranks.device, batch_per_device(self.config, res)
        return loading.batches(index, requests, res, self.resize(res), settings, device, workers, size, self.on_skip)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pictures to normalised fp32 [n, 3, res, res] on this rank's device, in the trunk's memory format."""
        images = images.to(self.ranks.device, non_blocking=True)
        return self.spec.normalised(images).contiguous(memory_format=self.memory_format)

    def with_fast_trunk(self, parts: tuning.Split) -> tuning.Split:
        """The same function with the frozen trunk's BatchNorms folded and, with `run.compile`, one graph per resolution."""
        if parts.trunk is None:
            return parts
        trunk, _ = folding.folded(parts.trunk, 64)
        if self.config.run.compile:
            # dynamic=False: a second size would otherwise be traced symbolically, which takes minutes with SAME padding.
            trunk = cast(nn.Module, torch.compile(trunk, dynamic=False))
        return replace(parts, trunk=trunk)

    def inputs(self, parts: tuning.Split, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the head takes, for uint8 pictures: the trunk's output in fp32 without autograd, or the pictures themselves."""
        x = self.to_device(images)
        if parts.trunk is None:
            return (x,)
        with torch.no_grad(), self.autocast():
            return tuple(feature.float() for feature in parts.trunk(x))

    def logits(self, parts: tuning.Split, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """fp32 [n, classes]. The head is fp32 by itself; where there is no trunk it is the whole network, under autocast."""
        with self.autocast() if parts.trunk is None else contextlib.nullcontext():
            return head(*inputs).float()

    def evaluate(self, parts: tuning.Split, res: int, note: str, split: str = "val") -> Predictions:
        """Every image of the split once over all ranks; leaves the model in eval mode."""
        return self.evaluate_all([parts], res, note, split)[0]

    def evaluate_all(self, models: list[tuning.Split], res: int, note: str, split: str = "val") -> list[Predictions]:
        """Several models in one pass over the images, in the arithmetic of training; a trunk they share runs once."""
        index = self.splits[split]
        for parts in models:
            parts.model.eval()
            parts.head.eval()
        trunks = [tuning.frozen_digest(parts) if parts.trunk else str(k) for k, parts in enumerate(models)]

        def logits(batch: torch_cpu.Batch) -> list[torch.Tensor]:
            features = {
                name: self.inputs(parts, batch.images) for name, parts in dict(zip(trunks, models, strict=True)).items()
            }
            # Cloned: a head may work in place, and another one may take the same features.
            return [
                self.logits(parts, parts.head, tuple(f.clone() for f in features[name]))
                for name, parts in zip(trunks, models, strict=True)
            ]

        pictures = plan.Pictures("test", res, self.resize(res), 0)
        size = batch_per_device(self.config, res)
        requests = plan.every_sample(index, pictures, size, self.ranks.rank, self.ranks.world_size)
        return predict(
            logits,
            index,
            self.batches(index, requests, res),
            self.ranks,
            len(models),
            note,
        )


def tell(index: Index, bad: loading.Bad) -> None:
    print(f"skipped {index.where(bad.sample)}: {bad.reason}", flush=True)


def open_session(
    config: cfg.Config,
    ranks: Ranks,
    load_weights: bool = True,
    on_skip: loading.OnSkip = tell,
    splits: tuple[str, ...] = ("train", "val"),
) -> Session:
    """Index the data and build the model; rank 0 goes first where something is written.

    `load_weights=False` leaves the model as drawn from the seed, for one whose whole model stands in a file of its own.
    """
    data, indexes = config.data, {}
    for turn in (True, False):
        if ranks.is_main is turn:
            root = sources.folder(data.root, data.cache)
            for split in splits:
                indexes[split] = sources.load(root, split, data.cache, ranks.is_main, data.deny_list, data.on_bad)
        distributed.barrier(ranks)
    name, classes = config.model.timm_name, len(indexes[splits[0]].classes)
    if config.model.num_classes not in (0, classes):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}; the data set has {classes} classes. Accepted: 0, or that number."
        )
    model = models.build(name, classes, config.run.seed)
    if load_weights:
        models.load_weights(model, name, config.model.weights, new_classifier=config.pretrain is not None)
    chosen = precision.resolve(config.run.precision, ranks.device)
    layout = memory_format(config, ranks.device)
    model = model.to(device=ranks.device).to(memory_format=layout)
    autocast = precision.apply(chosen, ranks.device)
    return Session(config, ranks, model, models.preprocessing(name), indexes, chosen, autocast, layout, on_skip)


def memory_format(config: cfg.Config, device: torch.device) -> torch.memory_format:
    """`auto`: channels-last on CPUs, and on GPUs where gradients reach the trunk; published timings have it lose on
    large frozen forwards (timm's benchmark tables: -14 to -21 % from B6 to L2 on a 3090)."""
    policies = {config.tune.policy, *([config.pretrain.policy] if config.pretrain else [])}
    auto = device.type == "cpu" or bool(policies & {"all", "last_block"})
    last = {"channels_last": True, "contiguous": False}.get(config.run.memory_format, auto)
    return torch.channels_last if last else torch.contiguous_format
