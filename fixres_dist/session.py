"""A model, its data and its device, opened once: what training, evaluation and the resolution sweep share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from fixres_dist import config as cfg
from fixres_dist import distributed, evalsets, folding, models, nvidia_apex, precision, tuning
from fixres_dist.data import geometry, loading, plan, sources, torch_cpu
from fixres_dist.data.index import Index, cache_folder
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
    splits: dict[str, Index]  # train and val; where a model is just evaluated, the split and the sets asked for
    classes: tuple[str, ...]  # of the model, in the order of its logits
    columns: dict[str, tuple[int, ...]]  # of each split: the model's class of each of its folders
    arithmetic: precision.Arithmetic
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
        mean, std = (
            255 * torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.spec.mean, self.spec.std)
        )
        return ((images.float() - mean) / std).contiguous(memory_format=self.memory_format)

    def with_fast_trunk(self, parts: tuning.Split) -> tuning.Split:
        """The same function with the frozen trunk's BatchNorms folded and, with `run.compile`, one graph per resolution."""
        if parts.trunk is None:
            return parts
        with self.arithmetic.fp32():
            trunk, _ = folding.folded(parts.trunk, models.small_size(parts.model))
        trunk = self.arithmetic.frozen(trunk)
        if self.config.run.compile:
            # dynamic=False: a second size would otherwise be traced symbolically, which takes minutes with SAME padding.
            trunk = cast(nn.Module, torch.compile(trunk, dynamic=False))
        return replace(parts, trunk=trunk)

    def inputs(self, parts: tuning.Split, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the head takes, for uint8 pictures: the trunk's output in fp32 without autograd, or the pictures themselves."""
        x = self.to_device(images)
        if parts.trunk is None:
            return (x,)
        with torch.no_grad(), self.arithmetic.low():
            features = parts.trunk(x if len(x) else black(x))
            return tuple(feature[: len(x)].float() for feature in features)

    def logits(self, parts: tuning.Split, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """fp32 [n, classes]. A head is fp32, but in low precision like a trunk where whole blocks of it train."""
        with self.arithmetic.low() if parts.trains_blocks else self.arithmetic.fp32():
            if parts.trunk is None and not parts.tuned.buffers and not len(inputs[0]):
                return head(black(inputs[0]))[:0].float()
            return head(*inputs).float()

    def evaluate(self, parts: tuning.Split, res: int, note: str, split: str = "val") -> Predictions:
        """Every image of the split once over all ranks; leaves the model in eval mode."""
        return self.evaluate_all([parts], res, note, split)[0]

    def evaluate_all(self, models: list[tuning.Split], res: int, note: str, split: str = "val") -> list[Predictions]:
        """Several models in one pass over the images, in the arithmetic of training; a trunk they share runs once.

        Logits are restricted to the split's classes (the protocol of ImageNet-A and -R); predictions are the model's.
        """
        index, columns = self.splits[split], torch.tensor(self.columns[split], device=self.ranks.device)
        for parts in models:
            parts.model.eval()
            parts.head.eval()
        several = len(models) > 1  # a digest reads every weight
        trunks = [tuning.frozen_digest(m) if m.trunk is not None and several else str(k) for k, m in enumerate(models)]

        def logits(batch: torch_cpu.Batch) -> list[torch.Tensor]:
            features = {
                name: self.inputs(parts, batch.images) for name, parts in dict(zip(trunks, models, strict=True)).items()
            }
            # Cloned: a head may work in place, and another one may take the same features.
            return [
                self.logits(parts, parts.head, tuple(f.clone() for f in features[name]))[:, columns]
                for name, parts in zip(trunks, models, strict=True)
            ]

        batches = self.batches(index, self.requests(plan.every_sample, index, res), res)
        found = predict(logits, index, batches, self.ranks, len(models), note)
        return [p.of_classes(self.columns[split]) for p in found]

    def requests(self, which: Callable[..., Iterator[plan.Request]], index: Index, res: int) -> Iterator[plan.Request]:
        """This rank's requests for the split as it is tested."""
        pictures, size = plan.Pictures("test", res, self.resize(res), 0), batch_per_device(self.config, res)
        return which(index, pictures, size, self.ranks.rank, self.ranks.world_size)


def black(images: torch.Tensor) -> torch.Tensor:
    """One picture for a rank that has none, where nothing remembers it: the reshapes of a ViT refuse an empty batch."""
    return images.new_zeros(1, *images.shape[1:])


def tell(index: Index, bad: loading.Bad) -> None:
    print(f"skipped {index.where(bad.sample)}: {bad.reason}", flush=True)


def open_session(
    config: cfg.Config,
    ranks: Ranks,
    load_weights: bool = True,
    on_skip: loading.OnSkip = tell,
    splits: tuple[str, ...] = ("train", "val"),
    sets: Mapping[str, Path] | None = None,
    trained: tuple[str, ...] = (),
    mark: Callable[[str], None] = lambda phase: None,
) -> Session:
    """Index the data and build the model; rank 0 goes first where something is written.

    `sets`: more folders of class folders, by name. `trained`: the model's classes where they are not the first split's.
    `load_weights=False` leaves the model as drawn from the seed, for one whose whole model stands in a file of its own.
    `mark` is told of each part that is through.
    """
    nvidia_apex.check(config)  # again: a container, or another node, may hold another apex
    data, indexes = config.data, {}
    keep_compiled_code(cache_folder(data.cache))
    for turn in (True, False):
        if ranks.is_main is turn:
            root = sources.folder(data.root, data.cache)
            for split, folder in ({split: root / split for split in splits} | dict(sets or {})).items():
                indexes[split] = sources.load(
                    folder.parent, folder.name, data.cache, ranks.is_main, data.deny_list, data.on_bad
                )
        distributed.barrier(ranks)
    mark("index")
    name, classes = config.model.timm_name, trained or indexes[splits[0]].classes
    if config.model.num_classes not in (0, len(classes)):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}; the data set has {len(classes)} classes. Accepted: 0, or that number."
        )
    columns = {split: evalsets.class_map(index.classes, classes, index.folder) for split, index in indexes.items()}
    model = models.build(name, len(classes), config.run.seed)
    models.check_resolutions(model, config.resolutions())
    if load_weights:
        models.load_weights(model, name, config.model.weights, new_classifier=config.pretrain is not None)
    chosen = precision.resolve(config.run.precision, ranks.device)
    layout = memory_format(config, ranks.device)
    model = model.to(device=ranks.device).to(memory_format=layout)
    mark("model")
    arithmetic = precision.Arithmetic(chosen, ranks.device)
    spec = models.preprocessing(name)
    return Session(config, ranks, model, spec, indexes, classes, columns, arithmetic, layout, on_skip)


def keep_compiled_code(cache: Path) -> None:
    """torch.compile's results go beside the indexes, where every node finds them: a restart compiles nothing again."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    own = f"{tempfile.gettempdir()}/torchinductor_"  # importing torch has set its default; a person's setting stands
    if os.environ.get(name, own).startswith(own):
        os.environ[name] = str(cache.absolute() / "inductor")


def memory_format(config: cfg.Config, device: torch.device) -> torch.memory_format:
    """`auto`: channels-last on CPUs, and on GPUs where gradients reach the trunk; published timings have it lose on
    large frozen forwards (timm's benchmark tables: -14 to -21 % from B6 to L2 on a 3090)."""
    policies = {config.tune.policy, *([config.pretrain.policy] if config.pretrain else [])}
    auto = device.type == "cpu" or bool(policies & {"all", "last_block"})
    last = {"channels_last": True, "contiguous": False}.get(config.run.memory_format, auto)
    return torch.channels_last if last else torch.contiguous_format
