"""`python -m fixres_dist bench data`: what a batch costs, beside the loader people use today.

Every loader runs in a process of its own that stays alive, and they take turns, so that whatever else the machine does
falls on all of them. CPU time, that of loader processes included, is the number to trust on a shared machine.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fixres_dist.data import geometry, index, order, plan, shards
from fixres_dist.errors import EXIT_DONE, UserError, unknown
from fixres_dist.rundir import processor, versions, write

# Ours hand over uint8, since a GPU normalises for nothing; `torch normalised` does it on the CPU, as `pil` has to.
# `torch alone` decodes and scales, and drops the pictures in the worker: what handing over costs is the difference.
LOADERS = ("pil", "torch", "torch normalised", "torch alone", "dali")
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


def add_parsers(subparsers: Any) -> None:
    bench = subparsers.add_parser("bench", help="measure: data")
    sub = bench.add_subparsers(dest="stage", required=True, metavar="STAGE")
    text = "images/s and CPU-ms per image of both backends beside torch DataLoader + PIL; index and order at scale"
    p = sub.add_parser("data", help=text, description=text)
    p.add_argument("--data", type=Path, help="data set whose val/ is read; default: synthetic 500x375 photographs")
    p.add_argument("--res", default="224,320,600", help="default: 224,320,600")
    p.add_argument("--transforms", default="random_resized_crop,test_aug,test", help="default: all three")
    p.add_argument("--sources", default="folder", help="folder, shards, or both; default: folder")
    p.add_argument("--loaders", default=",".join(LOADERS), help=f"default: {','.join(LOADERS)}")
    p.add_argument("--images", type=int, default=320, help="of each measurement; default: 320")
    p.add_argument("--repeat", type=int, default=3, help="measurements of each; the median counts; default: 3")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU")
    p.add_argument(
        "--no-scale", action="store_true", help="leave out the index and the order at a million and a billion"
    )
    p.add_argument("--json", type=Path, help="also write the result here")
    p.set_defaults(func=bench_data)


def bench_data(args: argparse.Namespace) -> int:
    loaders = args.loaders.split(",")
    for loader in loaders:
        if loader not in LOADERS:
            raise unknown("loader", loader, LOADERS)
    cases = [
        Case(s, t, int(r))
        for s in args.sources.split(",")
        for t in args.transforms.split(",")
        for r in args.res.split(",")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or write_photographs(Path(scratch) / "photographs", 160)
        if "shards" in args.sources:
            shards.write_shards(index.load(folder, "val"), Path(scratch) / "shards" / "val", 1000)
        roots = {"folder": folder, "shards": Path(scratch) / "shards"}
        rows = list(compare(loaders, cases, roots, args))
        scale = {} if args.no_scale else at_scale(Path(scratch))
    result: dict[str, Any] = {
        "stage": "data",
        "hardware": {"processor": processor(), "cpus": len(os.sched_getaffinity(0))},
        "versions": versions(),
        "command": " ".join(["python -m fixres_dist", *sys.argv[1:]]),
        "rows": rows,
        "ratios": {"vs_pil_loader": ratios(rows)},
        "scale": scale,
    }
    print(table(rows, result["ratios"]["vs_pil_loader"]))
    for key, value in scale.items():
        print(f"{key}: {value}")
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n")
    return EXIT_DONE


def compare(
    loaders: list[str], cases: list[Case], roots: dict[str, Path], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of {name, images_per_second, cpu_ms_per_image, peak_memory_mib, n}; medians of CPU time, best wall time."""
    pools = {loader: ProcessPoolExecutor(1, get_context("spawn")) for loader in loaders}
    try:
        for case in cases:
            found: dict[str, list[tuple[float, float, float]]] = {loader: [] for loader in loaders}
            for turn in range(args.repeat + 1):
                for loader in loaders:
                    job = pools[loader].submit(measure, loader, case, roots[case.source], args.images, args.workers)
                    if turn:  # the first one warms caches and allocators
                        found[loader].append(job.result())
                    else:
                        job.result()
            for loader, values in found.items():
                cpu, wall, memory = zip(*values, strict=True)
                yield {
                    "name": f"{case.name} {loader}",
                    "images_per_second": round(args.images / min(wall), 1),
                    "cpu_ms_per_image": round(1000 * median(cpu) / args.images, 3),
                    "peak_memory_mib": round(max(memory), 1),
                    "n": args.images * args.repeat,
                }
                print(f"{case.name} {loader}: {1000 * median(cpu) / args.images:.2f} CPU-ms per image", file=sys.stderr)
    finally:
        for pool in pools.values():
            pool.shutdown()


def measure(loader: str, case: Case, root: Path, images: int, workers: int) -> tuple[float, float, float]:
    """(CPU seconds with children, wall seconds, peak MiB) of loading `images` in batches."""
    import torch

    torch.set_num_threads(1)
    samples = shards.load(root, "val") if case.source == "shards" else index.load(root, "val")
    chosen = np.arange(images) % len(samples)
    before, started = cpu_seconds(), time.monotonic()
    seen = 0
    for batch in start(loader, case, samples, chosen, workers):
        seen += len(batch)
    del batch
    gc.collect()  # ends the worker processes, whose CPU time is known only then
    if seen != images and loader != "torch alone":
        raise RuntimeError(f"{loader} made {seen} pictures of {images}")
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return cpu_seconds() - before, time.monotonic() - started, memory


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def start(loader: str, case: Case, samples: index.Index, chosen: Any, workers: int) -> Iterator[Any]:
    """The batches [n, 3, res, res] of one loader, in this process."""
    import torch

    from fixres_dist.data import torch_cpu

    resize = geometry.resize_of("fixefficientnet", case.res, 1.0, "bicubic")
    pictures = plan.Pictures(case.transform, case.res, resize, 0)
    if loader == "pil":
        yield from pil_loader(case, samples, chosen, workers)
        return
    requests = (plan.request(samples, pictures, part, 0) for part in plan.chunks(chosen, BATCH))
    if loader == "dali":
        from fixres_dist.data import dali

        batches = dali.batches(samples, requests, case.res, resize, dali.Settings(BATCH, workers))
    else:
        finish = drop if loader == "torch alone" else torch_cpu.as_is
        batches = torch_cpu.batches(samples, requests, case.res, resize.interpolation, workers, finish)
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    for batch in batches:
        yield batch.images.float().sub_(mean).div_(std) if loader == "torch normalised" else batch.images


def drop(batch: Any) -> Any:
    return batch._replace(images=batch.images[:0].clone())


def pil_loader(case: Case, samples: index.Index, chosen: Any, workers: int) -> Iterator[Any]:
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


def table(rows: list[dict[str, Any]], against: dict[str, float]) -> str:
    lines = [f"{'transform, size, source, loader':44}{'images/s':>10}{'CPU-ms/image':>14}{'of PIL':>8}{'peak MiB':>10}"]
    for row in rows:
        ratio = f"{against[row['name']]:.2f}" if row["name"] in against else ""
        numbers = (
            f"{row['images_per_second']:10.0f}{row['cpu_ms_per_image']:14.2f}{ratio:>8}{row['peak_memory_mib']:10.0f}"
        )
        lines.append(f"{row['name']:44}{numbers}")
    return "\n".join(lines)


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
    index.keep(
        index.Index(scratch, classes, b"".join(names), ends, labels, sizes), {"directories": [], "scanned_ns": 0}, kept
    )
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        seconds, peak, grown = pool.submit(load_index, kept).result()
    found = {"index of 1,281,167: load s": seconds, "its process: peak MiB": peak, "of it the index: MiB": grown}
    for n in (IMAGENET, 10**9):
        for step in (0, 4000):
            times = []
            for k in range(5):
                started = time.process_time()
                order.train_samples(n, k, step, 512, 0, 1)
                times.append(time.process_time() - started)
            found[f"order of {n:,}: ms for the 512 samples of step {step}"] = round(1000 * median(times), 3)
    return found


def load_index(kept: Path) -> tuple[float, float, float]:
    """(CPU seconds, peak MiB of the process, MiB more than before) of loading an index and its fingerprint."""
    before, started = peak_mib(), time.process_time()
    cached = index.read_cached(kept)
    if cached is None:
        raise UserError(f"cannot read {kept}")
    _ = cached[0].fingerprint
    return round(time.process_time() - started, 3), round(peak_mib(), 1), round(peak_mib() - before, 1)


def peak_mib() -> float:
    """Of this program; getrusage's figure would include the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
