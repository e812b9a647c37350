"""What only a GPU can tell about the data plane; run once on new hardware or a new DALI release, and commit the result.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu_check_<device>.json

Decodes 1,000 JPEGs (a crash here is what data/dali.py avoids by not decoding regions), compares the pictures with the
CPU's at several shares of the hardware decoder, and measures images/s and memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fixres_dist.bench import write_photographs
from fixres_dist.data import dali, geometry, index, plan
from fixres_dist.rundir import versions, write

BATCH = 64


def requests(samples: index.Index, pictures: plan.Pictures, count: int) -> Iterator[plan.Request]:
    for part in plan.chunks(np.arange(count) % len(samples), BATCH):
        yield plan.request(samples, pictures, part, 0)


def images(
    samples: index.Index, pictures: plan.Pictures, count: int, settings: dali.Settings
) -> Iterator[torch.Tensor]:
    # Two passes on the CPU as well: the question is what the GPU's decoder does, not how often pixels are rounded.
    for batch in dali.batches(
        samples, requests(samples, pictures, count), pictures.res, pictures.resize, settings, True
    ):
        yield batch.images


def pixel_difference(samples: index.Index, load: float, count: int) -> dict[str, float]:
    """Grey levels between GPU and CPU pictures; fancy upsampling is on, so a hardware engine that ignores it shows here."""
    pictures = plan.Pictures("test_aug", 320, geometry.resize_of("fixefficientnet", 320, 1.0, "bicubic"), 0)
    gpu = images(samples, pictures, count, dali.Settings(BATCH, 8, 0, load))
    cpu = images(samples, pictures, count, dali.Settings(BATCH, 8))
    mean, largest, batches = 0.0, 0, 0
    for a, b in zip(gpu, cpu, strict=True):
        difference = (a.cpu().short() - b.short()).abs()
        mean, largest, batches = (
            mean + float(difference.float().mean()),
            max(largest, int(difference.max())),
            batches + 1,
        )
    return {"hw_decoder_load": load, "mean": round(mean / batches, 4), "max": largest, "n": count}


def speed(samples: index.Index, res: int, threads: int, load: float, count: int) -> dict[str, Any]:
    """images/s of training pictures left on the device, without the first batches."""
    pictures = plan.Pictures("test_aug", res, geometry.resize_of("fixefficientnet", res, 1.0, "bicubic"), 0)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    started, seen = 0.0, 0
    for k, batch in enumerate(images(samples, pictures, count + 8 * BATCH, dali.Settings(BATCH, threads, 0, load))):
        if k == 8:
            torch.cuda.synchronize()
            started = time.monotonic()
        seen += len(batch) if k >= 8 else 0
    torch.cuda.synchronize()
    seconds, used = time.monotonic() - started, (before - torch.cuda.mem_get_info()[0]) / 2**20
    return {
        "res": res, "threads": threads, "hw_decoder_load": load,
        "images_per_second": round(seen / seconds, 1), "device_memory_mib": round(used), "n": seen,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="data set whose val/ is read; default: synthetic 500x375 photographs")
    parser.add_argument("--images", type=int, default=4096, help="of each speed measurement; default: 4096")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    with tempfile.TemporaryDirectory() as scratch:
        samples = index.load(args.data or write_photographs(Path(scratch) / "photographs", 500), "val")
        result = {
            "stage": "gpu data",
            "hardware": {"device": torch.cuda.get_device_name()},
            "versions": versions(),
            "difference_from_cpu": [pixel_difference(samples, load, 1000) for load in (0.0, 0.65, 1.0)],
            "speed": [speed(samples, r, t, 0.65, args.images) for r in (224, 320, 600, 800) for t in (4, 8, 16)]
            + [speed(samples, 320, 8, load, args.images) for load in (0.0, 0.9, 1.0)],
        }
    write(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
