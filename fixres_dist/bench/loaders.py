"""`bench data`: the cost of a batch with our loaders, beside torch's DataLoader with PIL.

CPU time, with that of loader processes, is the number to trust on a shared machine.
"""

from __future__ import annotations

import gc
import io
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from fixres_dist.base.memory import keep_freed_memory
from fixres_dist.bench import turns
from fixres_dist.bench.photographs import write_photographs
from fixres_dist.bench.result import Ratios, Result, Row, row_of
from fixres_dist.bench.turns import Turn
from fixres_dist.data import dataset, geometry, torch_cpu
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, in_batches
from fixres_dist.models.build import Preprocessing

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(
    data: Path | None,
    transforms: list[str],
    sizes: list[int],
    loaders: list[str],
    images: int,
    workers: int,
    repeat: int,
) -> Result:
    """Every loader at every transform and size, `images` a turn, on `data`'s val (default: synthetic photographs)."""
    result = Result()
    with tempfile.TemporaryDirectory() as scratch:
        root = data or write_photographs(Path(scratch) / "photographs", 160)
        for transform, res in itertools.product(transforms, sizes):
            case = f"{transform} {res}"
            variants = {
                f"{case} {name}": partial(load, root, transform, res, name, images, workers) for name in loaders
            }
            found, failed = turns.alternate(variants, repeat, case)
            result.rows += [row_of(name, values) for name, values in found.items()]
            result.failed |= failed
    result.ratios = dict(vs_pil_loader(result.rows))
    return result


def vs_pil_loader(rows: list[Row]) -> Ratios:
    """CPU time per image against torch's DataLoader with PIL."""
    cost = {row.name: row.cpu_ms_per_image for row in rows}
    found = {}
    for name, value in cost.items():
        transform, res, *loader = name.split(" ")
        reference = cost.get(f"{transform} {res} pil")
        if reference and loader != ["pil"]:
            found[name] = round(value / reference, 3)
    return {"vs_pil_loader": found}


def load(root: Path, transform: str, res: int, loader: str, images: int, workers: int) -> Iterator[Turn]:
    """A turn loads `images` in batches, from the loader's start to the last one."""
    torch.set_num_threads(1)
    if loader != "pil":
        keep_freed_memory()  # as a run on a CPU does
    samples = dataset.load(root, "val", show=False)
    chosen = np.arange(images) % len(samples)
    while True:
        before, started = turns.cpu_seconds(), time.monotonic()
        seen = 0
        for batch in batches(loader, transform, res, samples, chosen, workers):
            seen += len(batch)
        del batch
        idle = time.process_time()
        gc.collect()  # ends the worker processes; going through all of torch takes 0.2 s of CPU that no loader causes
        collecting = time.process_time() - idle
        if seen != images:
            raise RuntimeError(f"{loader} made {seen} pictures of {images}")
        used, took = turns.cpu_seconds() - before - collecting, time.monotonic() - started - collecting
        peak = max(turns.memory_mib(peak=True), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        yield Turn(images, took, used, peak)


def batches(
    loader: str, transform: str, res: int, samples: Index, chosen: NDArray[np.int64], workers: int
) -> Iterator[torch.Tensor]:
    """[n, 3, res, res] of one loader: uint8 of `torch` and `dali`, normalised fp32 of `torch normalised` and `pil`."""
    if loader == "pil":
        yield from pil_batches(transform, res, samples, chosen, workers)
        return
    resize = geometry.resize_of("fixefficientnet", res, 1.0, "bicubic")
    pictures = Pictures(transform, res, resize, 0)
    requests = in_batches(samples, pictures, chosen, BATCH)
    if loader == "dali":
        from fixres_dist.data import dali

        loaded = dali.batches(samples, requests, res, resize, dali.Settings(BATCH, workers))
    else:
        loaded = torch_cpu.batches(samples, requests, res, resize, workers)
    spec = Preprocessing(MEAN, STD, 1.0, resize.interpolation)
    for batch in loaded:
        yield spec.normalised(batch.images) if loader == "torch normalised" else batch.images


def pil_batches(
    transform: str, res: int, samples: Index, chosen: NDArray[np.int64], workers: int
) -> Iterator[torch.Tensor]:
    """What training scripts do: DataLoader workers, PIL, torchvision's transforms, ToTensor, Normalize, collate."""
    cubic = T.InterpolationMode.BICUBIC
    whole = [T.Resize(res, cubic), T.CenterCrop(res)]
    crop: list[Any] = {
        "random_resized_crop": [
            *(T.RandomResizedCrop(res, interpolation=cubic), T.RandomHorizontalFlip(), T.ColorJitter(0.3, 0.3, 0.3))
        ],
        "test_aug": [*whole, T.RandomHorizontalFlip(), T.ColorJitter(0.05, 0.05, 0.05)],
        "test": whole,
    }[transform]
    compose = T.Compose([*crop, T.ToTensor(), T.Normalize(MEAN, STD)])

    class Files(Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(chosen)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            sample = int(chosen[i])
            with Image.open(io.BytesIO(samples.read(sample).data) if samples.shards else samples.path(sample)) as image:
                return compose(image.convert("RGB")), int(samples.labels[sample])

    for images, _ in DataLoader(Files(), BATCH, num_workers=workers, multiprocessing_context="fork"):
        yield images
