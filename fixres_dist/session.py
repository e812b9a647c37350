"""A model, its data and its device, opened once: what training, evaluation and the resolution sweep share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist import config as cfg
from fixres_dist import distributed, models, precision, trunk, tuning
from fixres_dist.data import geometry, loading, plan, sources, torch_cpu
from fixres_dist.data.index import Index
from fixres_dist.distributed import Ranks
from fixres_dist.errors import UserError
from fixres_dist.evaluate import Predictions, predict
from fixres_dist.features import Loaded, Store
from fixres_dist.rundir import write
from fixres_dist.schedule import batch_per_device

PROBE_IMAGES = 16  # at most, on a CPU; a GPU is probed with a whole batch


@dataclass(frozen=True)
class Session:
    config: cfg.Config
    ranks: Ranks
    model: nn.Module
    spec: models.Preprocessing
    splits: dict[str, Index]  # train and val; only the one that is asked for where a model is just evaluated
    precision: str  # what really runs
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    memory_format: (
        torch.memory_format
    )  # of a model that trains as a whole, and its pictures; a frozen trunk has its own
    on_skip: loading.OnSkip  # what is done about an image that cannot be decoded, under data.on_bad: skip
    kept: Path | None = None  # file of what was decided for the run (`decided`)

    @property
    def train(self) -> Index:
        return self.splits["train"]

    @property
    def val(self) -> Index:
        return self.splits["val"]

    def resize(self, res: int) -> geometry.Resize:
        return geometry.resize_of(self.config.data.resize_rule, res, self.spec.crop_pct, self.spec.interpolation)

    def batches(
        self, index: Index, requests: Iterable[plan.Request], res: int, store: Store | None = None
    ) -> Iterator[Loaded]:
        """The pictures of every request, or what the trunk made of them where there is a `store`."""
        if store:
            return loading.watched(index, store.batches(index, requests), self.config.data.on_bad, self.on_skip)
        return self.pictures(index, requests, res)

    def pictures(self, index: Index, requests: Iterable[plan.Request], res: int) -> Iterator[torch_cpu.Batch]:
        settings, device, size = self.config.data, self.ranks.device, batch_per_device(self.config, res)
        workers = torch_cpu.worker_count(settings.workers, self.ranks.local_size)
        return loading.batches(index, requests, res, self.resize(res), settings, device, workers, size, self.on_skip)

    def to_device(self, images: torch.Tensor, memory_format: torch.memory_format | None = None) -> torch.Tensor:
        """uint8 pictures to normalised fp32 [n, 3, res, res] on this rank's device."""
        images = images.to(self.ranks.device, non_blocking=True)
        mean, std = (
            255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.spec.mean, self.spec.std)
        )
        return ((images.float() - mean) / std).contiguous(memory_format=memory_format or self.memory_format)

    def decided(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 decides, the same on all ranks; kept with the run, so that its next start goes on in the same way."""
        value = None
        if self.ranks.is_main:
            known = json.loads(self.kept.read_text()) if self.kept and self.kept.exists() else {}
            value = known.get(name) or decide()
            if self.kept and name not in known:
                write(self.kept, json.dumps({**known, name: value}, indent=1) + "\n")
                print(f"{name}: {', '.join(f'{key} {v}' for key, v in value.items())}", flush=True)
        return distributed.from_main(self.ranks, value)

    def with_fast_trunk(self, parts: tuning.Split, res: int = 0) -> tuning.Split:
        """The same function with the frozen trunk folded, cast and arranged (trunk.py); probed at `res`, or at data.res."""
        if parts.trunk is None:
            return parts
        res, dtype = res or self.config.data.res, precision.DTYPES.get(self.precision, torch.float32)
        own = trunk.prepared(parts.trunk, dtype)
        choices = trunk.candidates(self.config.run, self.ranks.device)
        how = choices[0]
        if len(choices) > 1:
            size = batch_per_device(self.config, res)
            size = size if self.ranks.device.type == "cuda" else min(size, PROBE_IMAGES)
            images = torch.zeros(size, 3, res, res, device=self.ranks.device)
            todo = sum(map(len, self.splits.values())) * max(1, self.config.tune.epochs) // self.ranks.world_size
            name = f"trunk at {res} px ({' | '.join(map(str, choices))})"
            found = self.decided(name, lambda: trunk.probe(own, dtype, choices, images, todo))
            how = trunk.Arrangement(found["memory_format"], found["compile"])
        return replace(parts, trunk=trunk.arranged(own, dtype, how))

    def full(self, n: int, res: int) -> int:
        """The batch size that `n` pictures are filled up to for a compiled trunk: an epoch's last batch is no new graph."""
        size = batch_per_device(self.config, res)
        sections = [self.config.tune, *([self.config.pretrain] if self.config.pretrain else [])]
        parts = (-(-section.global_batch // self.ranks.world_size) for section in sections)
        return min((s for s in (*(min(part, size) for part in parts), size) if s >= n), default=n)

    @torch.no_grad()
    def features(self, fast: trunk.FastTrunk, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the cached engine keeps of uint8 pictures, in the trunk's own number format."""
        n, res = len(images), images.shape[-1]
        if fast.compiled:
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.full(n, res) - n))
        found = fast.features(self.to_device(images, fast.memory_format))
        return tuple(f[:n] for f in found) if fast.compiled else found

    @torch.no_grad()
    def inputs(self, parts: tuning.Split, images: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What the head takes, in fp32 without autograd: for uint8 pictures, or for their `features` as they were kept."""
        if isinstance(parts.trunk, trunk.FastTrunk):
            found = images if isinstance(images, tuple) else self.features(parts.trunk, images)
            device = self.ranks.device
            found = parts.trunk.finish([f.to(device, non_blocking=True) for f in found])
        elif isinstance(images, tuple):
            raise TypeError("kept features belong to a trunk made by Session.with_fast_trunk")
        elif parts.trunk is None:
            return (self.to_device(images),)
        else:
            with self.autocast():
                found = parts.trunk(self.to_device(images))
        return tuple(feature.float() for feature in found)

    def logits(self, parts: tuning.Split, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """fp32 [n, classes]. The head is fp32 by itself; where there is no trunk it is the whole network, under autocast."""
        with self.autocast() if parts.trunk is None else contextlib.nullcontext():
            return head(*inputs).float()

    def evaluate(
        self, parts: tuning.Split, res: int, note: str, split: str = "val", store: Store | None = None
    ) -> Predictions:
        """Every image of the split once over all ranks; leaves the model in eval mode."""
        return self.evaluate_all([parts], res, note, split, store)[0]

    def evaluate_all(
        self, models: list[tuning.Split], res: int, note: str, split: str = "val", store: Store | None = None
    ) -> list[Predictions]:
        """Several models in one pass over the images, in the arithmetic of training; a trunk they share runs once."""
        index = self.splits[split]
        for parts in models:
            parts.model.eval()
            parts.head.eval()
        trunks = [tuning.frozen_digest(parts) if parts.trunk else str(k) for k, parts in enumerate(models)]

        def logits(batch: Loaded) -> list[torch.Tensor]:
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
            self.batches(index, requests, res, store),
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
    kept: Path | None = None,
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
    return Session(config, ranks, model, models.preprocessing(name), indexes, chosen, autocast, layout, on_skip, kept)


def memory_format(config: cfg.Config, device: torch.device) -> torch.memory_format:
    """Of the model itself. `auto`: channels-last on CPUs, and on GPUs where gradients reach the trunk; what is frozen is
    arranged by trunk.py."""
    policies = {config.tune.policy, *([config.pretrain.policy] if config.pretrain else [])}
    auto = device.type == "cpu" or bool(policies & {"all", "last_block"})
    last = {"channels_last": True, "contiguous": False}.get(config.run.memory_format, auto)
    return torch.channels_last if last else torch.contiguous_format
