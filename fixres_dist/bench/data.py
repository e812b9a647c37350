"""`bench data`: what a batch costs, beside the loader people use today.

CPU time, that of loader processes included, is the number to trust on a shared machine.
"""

from __future__ import annotations

import argparse
import gc
import io
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fixres_dist.base.errors import UserError
from fixres_dist.base.memory import keep_freed_memory
from fixres_dist.bench import turns
from fixres_dist.data import dataset, geometry, order, shards
from fixres_dist.data.index import CachedIndex, Index, read_cached, write_cached
from fixres_dist.data.requests import Pictures, chunks, make_request

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = 1_281_167


@dataclass(frozen=True)
class Case:
    source: str  # folder | shards
    transform: str
    res: int

    @property
    def name(self) -> str:
        return f"{self.transform} {self.res} {self.source}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    loaders = args.loaders.split(",")
    cases = [
        Case(s, t, int(r))
        for s in args.dataset.split(",")
        for t in args.transforms.split(",")
        for r in args.res.split(",")
    ]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or write_photographs(Path(scratch) / "photographs", 160)
        if "shards" in args.sources:
            shards.write_shards(dataset.load(folder, "val"), Path(scratch) / "shards" / "val", 1000)
        roots = {"folder": folder, "shards": Path(scratch) / "shards"}
        for case in cases:
            variants = {
                f"{case.name} {loader}": turns.Variant(
                    measure, (loader, case, roots[case.source], args.images, args.workers)
                )
                for loader in loaders
            }
            found, broken = turns.alternate(variants, args.repeat, case.name)
            rows += [turns.row(name, values) for name, values in found.items()]
            failed |= broken
        scale = {} if args.no_scale else at_scale(Path(scratch))
    return turns.result("data", rows, {"vs_pil_loader": ratios(rows)}, scale=scale, failed=failed)


def measure(loader: str, case: Case, root: Path, images: int, workers: int) -> Iterator[turns.Turn]:
    """A turn loads `images` in batches, from nothing to the last one."""
    import torch

    torch.set_num_threads(1)
    if loader != "pil":
        keep_freed_memory()  # as a run on a CPU does
    samples = dataset.load(root, "val")
    chosen = np.arange(images) % len(samples)
    while True:
        before, started = turns.cpu_seconds(), time.monotonic()
        seen = 0
        for batch in start(loader, case, samples, chosen, workers):
            seen += len(batch)
        del batch
        idle = time.process_time()
        gc.collect()  # ends the worker processes; going through all of torch takes 0.2 s of CPU that no loader causes
        collecting = time.process_time() - idle
        if seen != images and loader != "torch alone":
            raise RuntimeError(f"{loader} made {seen} pictures of {images}")
        used, took = turns.cpu_seconds() - before - collecting, time.monotonic() - started - collecting
        peak = max(turns.memory_mib(peak=True), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
        yield turns.Turn(images, took, used, peak)


def start(loader: str, case: Case, samples: Index, chosen: Any, workers: int) -> Iterator[Any]:
    """The batches [n, 3, res, res] of one loader, in this process."""
    from fixres_dist.data import torch_cpu
    from fixres_dist.models.build import Preprocessing

    resize = geometry.resize_of("fixefficientnet", case.res, 1.0, "bicubic")
    pictures = Pictures(case.transform, case.res, resize, 0)
    if loader == "pil":
        yield from pil_loader(case, samples, chosen, workers)
        return
    requests = (make_request(samples, pictures, part, 0) for part in chunks(chosen, BATCH))
    if loader == "dali":
        from fixres_dist.data import dali

        batches = dali.batches(samples, requests, case.res, resize, dali.Settings(BATCH, workers))
    else:
        finish = drop if loader == "torch alone" else torch_cpu.as_is
        batches = torch_cpu.batches(samples, requests, case.res, resize.interpolation, workers, finish)
    spec = Preprocessing(MEAN, STD, 1.0, resize.interpolation)
    for batch in batches:
        yield spec.normalised(batch.images) if loader == "torch normalised" else batch.images


def drop(batch: Any) -> Any:
    return batch._replace(images=batch.images[:0].clone())


def pil_loader(case: Case, samples: Index, chosen: Any, workers: int) -> Iterator[Any]:
    """What training scripts do: DataLoader workers, PIL, torchvision's transforms, ToTensor, Normalize, collate."""
    import torch
    from PIL import Image
    from torchvision import transforms as T

    cubic = T.InterpolationMode.BICUBIC
    crop = {
        "random_resized_crop": [T.RandomResizedCrop(case.res, interpolation=cubic), T.RandomHorizontalFlip(), T.ColorJitter(0.3, 0.3, 0.3)],
        "test_aug": [T.Resize(case.res, cubic), T.CenterCrop(case.res), T.RandomHorizontalFlip(), T.ColorJitter(0.05, 0.05, 0.05)],
        "test": [T.Resize(case.res, cubic), T.CenterCrop(case.res)],
    }[case.transform]  # fmt: skip
    transform = T.Compose([*crop, T.ToTensor(), T.Normalize(MEAN, STD)])

    class Files(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(chosen)

        def __getitem__(self, i: int) -> Any:
            sample = int(chosen[i])
            with Image.open(io.BytesIO(samples.read(sample).data) if samples.shards else samples.path(sample)) as image:
                return transform(image.convert("RGB")), int(samples.labels[sample])

    for images, _ in torch.utils.data.DataLoader(Files(), BATCH, num_workers=workers, multiprocessing_context="fork"):
        yield images


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """CPU time per image against DataLoader + PIL on folders."""
    cost = {row["name"]: row["cpu_ms_per_image"] for row in rows}
    found = {}
    for name, value in cost.items():
        transform, res, _, *loader = name.split(" ")
        reference = cost.get(f"{transform} {res} folder pil")
        if reference and loader != ["pil"]:
            found[name] = round(value / reference, 3)
    return found


def write_photographs(root: Path, count: int) -> Path:
    """Synthetic JPEGs of ImageNet's usual size, structure at all scales; three in four with halved chroma."""
    from PIL import Image

    folder = root / "val" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = ((375, 500), (500, 375), (333, 500), (500, 500))[i % 4]
        total = np.zeros((height, width, 3), np.float32)
        for scale in (2, 6, 20, 70):
            coarse = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
            total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) * np.float32(
                scale
            )
        pixels = (total * (255 / total.max())).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=90, subsampling=2 if i % 4 else 0)
    return root


def at_scale(scratch: Path) -> dict[str, float]:
    """The index of ImageNet's size in a fresh process, and slices of the order there and at a billion samples."""
    kept = scratch / "index.npz"
    names = [b"n%08d/n%08d_%d.JPEG" % (i // 1282, i // 1282, i) for i in range(IMAGENET)]
    labels = (np.arange(IMAGENET) // 1282).astype(np.int32)
    sizes = np.full((IMAGENET, 2), 400, np.int32)
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    classes = tuple(f"n{k:08d}" for k in range(1000))
    index = Index(scratch, classes, b"".join(names), ends, labels, sizes, np.arange(IMAGENET, dtype=np.uint32))
    write_cached(CachedIndex(index), kept)
    seconds, peak, grown = turns.once(turns.Variant(load_index, (kept,)), bare=True)
    found = {"index of 1,281,167: load s": seconds, "its process: peak MiB": peak, "of it the index: MiB": grown}
    for n in (IMAGENET, 10**9):
        for step in (0, 4000):
            times = []
            for k in range(5):
                started = time.process_time()
                order.train_draws(n, k, step, 512, 0, 1)
                times.append(time.process_time() - started)
            found[f"order of {n:,}: ms for the 512 samples of step {step}"] = round(1000 * median(times), 3)
    return found


def load_index(kept: Path) -> Iterator[tuple[float, float, float]]:
    """(CPU seconds, peak MiB of the process, MiB more than before) of loading an index and its fingerprint."""
    before, started = turns.memory_mib(peak=True), time.process_time()
    cached = read_cached(kept)
    if cached is None:
        raise UserError(f"cannot read {kept}")
    _ = cached.index.fingerprint
    took, peak = time.process_time() - started, turns.memory_mib(peak=True)
    yield round(took, 3), round(peak, 1), round(peak - before, 1)
