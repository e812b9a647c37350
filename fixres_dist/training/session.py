"""A model, its data and its device, opened once: what training, evaluation and the resolution sweep share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.base.small_files import Damaged, put_aside, read_json, write_json
from fixres_dist.base.text import decision
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import backends, class_maps, dataset, decoding, geometry
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, Request
from fixres_dist.models import fast_trunk, precision
from fixres_dist.models.build import Preprocessing
from fixres_dist.models.network import open_network
from fixres_dist.models.parts import Parts, parts_of, remembers
from fixres_dist.models.resizing import for_size, largest_batch
from fixres_dist.runs import looks
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import compiled_code
from fixres_dist.training.cache.store import Loaded, Store
from fixres_dist.training.partial import Partial
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.stages import Stage, batch_per_device

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    config: Config
    ranks: Ranks
    model: nn.Module
    spec: Preprocessing
    splits: dict[str, Index]  # train and val; where a model is just evaluated, the split and the sets asked for
    classes: tuple[str, ...]  # of the model, in the order of its logits
    columns: dict[str, tuple[int, ...]]  # of each split: the model's class of each of its folders
    arithmetic: precision.Arithmetic
    # Of a model that trains as a whole, and its pictures; a frozen trunk has its own.
    memory_format: torch.memory_format
    on_skip: backends.OnSkip  # what is done about an image that cannot be decoded, under data.on_bad: skip
    kept: Path | None = None  # file of what was decided for the run (`decided`)
    largest: dict[int, int] = field(default_factory=dict)  # largest_batch at each resolution asked for
    job: RunDir | None = None  # of a command: in its folder `partial`, passes over images keep what they have found
    counted: tuple[RunDir, str] | None = (
        None  # the run whose results.json counts passes over labelled images, and by what
    )

    @property
    def train(self) -> Index:
        return self.splits["train"]

    @property
    def val(self) -> Index:
        return self.splits["val"]

    def resize(self, res: int) -> geometry.Resize:
        return self.spec.resize(self.config.data, res)

    def batch_per_device(self, res: int) -> int:
        """Images of one forward pass of a rank at `res` pixels; on a GPU no more than its kernels can index."""
        size = batch_per_device(self.config, res)
        if self.ranks.device.type == "cpu":
            return size
        if res not in self.largest:
            self.largest[res] = largest_batch(self.model, res)
        return max(1, min(size, self.largest[res]))

    def pictures_of(self, transform: str, res: int, seed: int = 0) -> Pictures:
        return Pictures(transform, res, self.resize(res), seed)

    def batches(
        self, index: Index, requests: Iterable[Request], res: int, store: Store | None = None
    ) -> Iterator[Loaded]:
        """The pictures of every request, or what the trunk made of them where there is a `store`."""
        if store:
            return backends.checked(index, store.batches(index, requests), self.config.data.on_bad, self.on_skip)
        return self.pictures(index, requests, res)

    def pictures(self, index: Index, requests: Iterable[Request], res: int) -> Iterator[decoding.Batch]:
        settings, device, size = self.config.data, self.ranks.device, self.batch_per_device(res)
        workers = backends.worker_count(settings.workers, self.ranks.cpus, self.ranks.local_size)
        return backends.batches(index, requests, res, self.resize(res), settings, device, workers, size, self.on_skip)

    def to_device(self, images: torch.Tensor, memory_format: torch.memory_format | None = None) -> torch.Tensor:
        """uint8 pictures to normalised fp32 [n, 3, res, res] on this rank's device."""
        images = images.to(self.ranks.device, non_blocking=True)
        return self.spec.normalised(images).contiguous(memory_format=memory_format or self.memory_format)

    def partial(self, models: Sequence[Parts], res: int, split: str, *depends: object) -> Partial | None:
        """Where a pass of these models over a split keeps what it has found, in a job; None elsewhere."""
        if not self.job:
            return None
        settings, index = self.config.run, self.splits[split]
        depends = (
            index.fingerprint,
            index.contents,
            self.columns[split],
            res,
            self.resize(res),
            self.arithmetic.name,
            *depends,
        )
        return Partial.of_pass(self.job.partial, settings.save_every_s, models, depends)

    def passed(self) -> None:
        """Rank 0 of a job: a pass over images is complete."""
        if self.job and self.ranks.is_main:
            self.job.update_state(step=self.job.saved_step())

    def looked(self, split: str, models: int) -> None:
        """Rank 0: so many models were evaluated on a split, by this start and not by an earlier one."""
        if self.counted and self.ranks.is_main:
            run, command = self.counted
            looks.count(run, self.splits[split].fingerprint, command, models)

    def decided(self, name: str, decide: Callable[[], dict[str, Any]], together: bool = False) -> dict[str, Any]:
        """What rank 0 decides, the same on all ranks; kept with the run, so that its next start does the same.

        `together`: every rank calls `decide`, and the ranks agree on the answer within it.
        """
        if known := self.ranks.from_main(lambda: self.choices().get(name)):
            return known
        value = decide() if together else self.ranks.from_main(decide)
        if self.kept and self.ranks.is_main:
            write_json(self.kept, {**self.choices(), name: value}, sealed=True)
            print(decision(name.partition(" (")[0], value), flush=True)
        return value

    def choices(self) -> dict[str, dict[str, Any]]:
        """What has been decided for the run so far (choices.json), by name."""
        if not self.kept:
            return {}
        try:
            return read_json(self.kept, dict[str, dict[str, Any]], "")
        except FileNotFoundError:
            return {}
        except Damaged as error:
            print(f"{self.kept}: {error.why}; it is decided again, which may round differently", flush=True)
            put_aside(self.kept)
            RunDir(self.kept.parent).event("rebuilt", file=self.kept.name, reason=error.why)
            return {}

    def with_fast_trunk(self, parts: Parts, res: int = 0) -> Parts:
        """The same function with the frozen trunk as it runs (models/fast_trunk.py); probed at `res`, or at data.res."""
        res = res or self.config.data.res
        pictures = sum(map(len, self.splits.values())) * max(1, self.config.tune.epochs) // self.ranks.world_size
        size = self.batch_per_device(res)
        return fast_trunk.with_fast_trunk(parts, self.arithmetic, self.config.run, size, res, pictures, self.decided)

    def for_stage(self, stage: Stage) -> Session:
        """The same, decoding with torch where the stage's pictures are Pillow's work (RandAugment)."""
        if not stage.ordinary.rand_augment:
            return self
        return replace(self, config=replace(self.config, data=replace(self.config.data, backend="torch")))

    def for_size(self, res: int) -> Session:
        """The session with its model for pictures of `res` px: the same one wherever that takes them as it is."""
        model = for_size(self.model, res)
        return self if model is self.model else replace(self, model=model.to(memory_format=self.memory_format))

    def parts_for_size(self, parts: Parts, res: int) -> Parts:
        """`parts` for pictures of `res` px, in the arithmetic in which they are evaluated."""
        model = for_size(parts.model, res)
        if model is parts.model:
            return parts
        made = parts_of(model.to(memory_format=self.memory_format), self.config.tune.policy)
        return self.with_fast_trunk(made, res)

    def full(self, n: int, res: int) -> int:
        """The batch size that `n` pictures are filled up to for a compiled trunk: an epoch's last batch is no new graph."""
        size = self.batch_per_device(res)
        parts = (-(-stage.global_batch // self.ranks.world_size) for stage in self.config.stage_settings())
        return min((s for s in (*(min(part, size) for part in parts), size) if s >= n), default=n)

    @torch.no_grad()
    def trunk_features(self, fast: fast_trunk.FastTrunk, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the cached engine keeps of uint8 pictures, in the trunk's own number format."""
        n, res = len(images), images.shape[-1]
        if fast.compiled and (missing := self.full(n, res) - n):  # F.pad copies even where it adds nothing
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
        found = fast.features(self.to_device(images if len(images) else black(images), fast.memory_format))
        return tuple(f[:n] for f in found)

    @torch.no_grad()
    def inputs(self, parts: Parts, images: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What the head takes, in fp32 without autograd: for uint8 pictures, or for their `trunk_features` as they are kept."""
        if isinstance(parts.trunk, fast_trunk.FastTrunk):
            found = images if isinstance(images, tuple) else self.trunk_features(parts.trunk, images)
            device = self.ranks.device
            found = parts.trunk.finish([f.to(device, non_blocking=True) for f in found])
        elif isinstance(images, tuple):
            raise TypeError("kept features belong to a trunk made by Session.with_fast_trunk")
        elif parts.trunk is None:
            return (self.to_device(images),)
        else:
            x = self.to_device(images)
            with self.arithmetic.low():
                found = tuple(f[: len(x)] for f in parts.trunk(x if len(x) else black(x)))
        return tuple(feature.float() for feature in found)

    def logits(self, parts: Parts, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """fp32 [n, classes]. A head is fp32, but in low precision like a trunk where whole blocks of it train."""
        with self.arithmetic.low() if parts.trains_blocks else self.arithmetic.fp32():
            # Many layers refuse an empty batch; one that remembers what it sees must not see a picture that is not there.
            empty = not len(inputs[0]) and not remembers(parts.head)
            logits: torch.Tensor = head(*map(black, inputs))[:0] if empty else head(*inputs)
            return logits.float()

    def requests(self, which: Callable[..., Iterator[Request]], index: Index, res: int) -> Iterator[Request]:
        """This rank's requests for the split as it is tested."""
        return which(
            index, self.pictures_of("test", res), self.batch_per_device(res), self.ranks.rank, self.ranks.world_size
        )


def to_host(tensors: Iterable[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Start copying tensors from their device to the CPU; the function that is returned waits for the copies alone."""
    given = tuple(tensors)
    if given[0].device.type == "cpu":
        return lambda: given
    copies = tuple(torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in given)
    copied = torch.cuda.current_stream(given[0].device).record_event()

    def wait() -> tuple[torch.Tensor, ...]:
        copied.synchronize()
        return copies

    return wait


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, each handed out once the next one is made: a device works on that while the caller waits for this one."""
    made: list[T] = []
    for item in items:
        made.append(item)
        if len(made) > 1:
            yield made.pop(0)
    yield from made


def black(images: torch.Tensor) -> torch.Tensor:
    """One picture for a rank that has none, where nothing remembers it: the reshapes of a ViT refuse an empty batch."""
    return images.new_zeros(1, *images.shape[1:])


def tell(index: Index, bad: decoding.Bad) -> None:
    print(f"skipped {index.where(bad.sample)}: {bad.reason}", flush=True)


def open_session(
    config: Config,
    ranks: Ranks,
    load_weights: bool = True,
    on_skip: backends.OnSkip = tell,
    splits: tuple[str, ...] = ("train", "val"),
    sets: Mapping[str, Path] | None = None,
    trained: tuple[str, ...] = (),
    kept: Path | None = None,
    mark: Callable[[str], None] = lambda phase: None,
    job: RunDir | None = None,
) -> Session:
    """Index the data and build the model; rank 0 goes first where something is written.

    `sets`: more folders of class folders, by name. `trained`: the model's classes where they are not the first split's.
    `load_weights=False` leaves the model as drawn from the seed, for one whose whole model stands in a file of its own.
    `mark` is told of each part that is through.
    """
    data, indexes = config.data, {}
    if config.run.compile is True or (config.run.compile and ranks.device.type == "cuda"):
        compiled_code.use_node_folder(data.cache)
    for turn in (True, False):
        if ranks.is_main is turn:
            root = dataset.folder(data.root, data.cache)
            for split, folder in (
                {split: root / data.split_name(split) for split in splits} | dict(sets or {})
            ).items():
                indexes[split] = dataset.of(data, folder, show=ranks.is_main)
        ranks.barrier()
    mark("index")
    classes = trained or class_maps.trained_classes(config, None, splits[0]) or indexes[splits[0]].classes
    recipes.check_count(config.model.num_classes, len(classes))
    known = class_maps.aliases(config, splits[0])
    columns = {name: class_maps.class_map(i.classes, classes, i.folder, known) for name, i in indexes.items()}
    for split in splits:
        indexes[split], columns[split] = class_maps.fitted(indexes[split], classes, config, splits[0])
    say = print if ranks.is_main else lambda text: None
    model, spec, arithmetic, layout = open_network(config, classes, ranks.device, load_weights, say)
    mark("model")
    return Session(config, ranks, model, spec, indexes, classes, columns, arithmetic, layout, on_skip, kept, job=job)
