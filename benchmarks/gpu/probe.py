"""Does DALI work on this GPU? Each step in a process of its own, so that a crash names its step.

    python benchmarks/gpu/probe.py --json probe.json          # exit code 0: DALI decodes, hardware decoder included
    python benchmarks/gpu/probe.py --cpu --json probe.json    # the same steps on the CPU

Exit code 3: DALI decodes with data.hw_decoder_load=0 only; 1: it does not decode. The JSON is written after every step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fixres_dist.base.files import write_text
from fixres_dist.bench import turns
from fixres_dist.bench.photographs import write_photographs
from fixres_dist.data import dataset, geometry, torch_cpu
from fixres_dist.data.decoding import Batch
from fixres_dist.data.requests import Pictures, chunks, make_request

SHARES = (0.0, 0.65, 1.0)  # of the images, decoded by the hardware decoder; 0.65 is DALI's default
SIZES = (224, 320, 600, 800)
BATCH = 32


def load(cpu: bool) -> Iterator[dict[str, Any]]:
    """Versions, and the path of the DALI that is found."""
    import nvidia.dali

    found = {"dali": nvidia.dali.__version__, "torch": torch.__version__, "from": nvidia.dali.__file__}
    yield found if cpu else found | {"gpu": torch.cuda.get_device_name()}


def kernels(cpu: bool) -> Iterator[dict[str, Any]]:
    """DALI's own GPU code without a decoder: the loader's two slices and its scaling, in grey levels from the CPU's."""
    from nvidia.dali import Pipeline, fn, types

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (300 + 7 * k, 400 - 5 * k, 3), np.uint8) for k in range(8)]

    def run(device: str) -> Any:
        pipe = Pipeline(8, 4, None if device == "cpu" else 0, prefetch_queue_depth=1)
        with pipe:
            x = fn.external_source(lambda: pictures, batch=True, layout="HWC")
            x = x.gpu() if device == "gpu" else x
            x = fn.slice(x, (10, 20), (250, 330), axis_names="HW", normalized_anchor=False, normalized_shape=False)
            how = {"interp_type": types.INTERP_CUBIC, "antialias": True, "roi_relative": False}
            x = fn.resize(x, size=(250, 128), roi_start=(0, 330), roi_end=(250, 0), **how)  # mirrored
            x = fn.resize(x, size=(128, 128), roi_start=(0, 0), roi_end=(250, 128), **how)
            x = fn.slice(x, (-3, -2), (134, 134), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
            pipe.set_outputs(x)
        pipe.build()
        (out,) = pipe.run()
        return np.array((out.as_cpu() if device == "gpu" else out).as_tensor()).astype(int)

    difference = np.abs(run("cpu" if cpu else "gpu") - run("cpu"))
    yield {"mean": round(float(difference.mean()), 4), "max": int(difference.max()), "ok": int(difference.max()) <= 2}


def batches(root: Path, res: int, count: int, settings: Any = None) -> Iterator[Batch]:
    """`count` training pictures of 64 photographs, from the product's DALI loader, or without `settings` from torch's."""
    resize = geometry.resize_of("fixefficientnet", res, 1.0, "bicubic")
    samples, pictures = dataset.load(root, "val", show=False), Pictures("test_aug", res, resize, 0)
    requests = (make_request(samples, pictures, part, 0) for part in chunks(np.arange(count) % 64, BATCH))
    if settings is None:
        return torch_cpu.batches(samples, requests, res, resize, 0)
    from fixres_dist.data import dali

    # Two passes on the CPU as well: the question is the decoder's pixels, not the rounding between passes.
    return dali.batches(samples, requests, res, resize, settings, True)


def settings(cpu: bool, share: float) -> Any:
    from fixres_dist.data import dali

    return dali.Settings(BATCH, 8, None if cpu else 0, share)


def decode(root: Path, cpu: bool, share: float) -> Iterator[dict[str, Any]]:
    """Grey levels from the torch loader's pixels, and whether a second pass makes the same pixels."""
    how = settings(cpu, share)
    first, second = (torch.cat([b.images.cpu() for b in batches(root, 320, 64, how)]) for _ in range(2))
    reference = torch.cat([b.images for b in batches(root, 320, 64)])
    difference = (first.short() - reference.short()).abs().float()
    mean = round(float(difference.mean()), 4)
    same = torch.equal(first, second)
    yield {"mean_from_cpu": mean, "max_from_cpu": int(difference.max()), "same_again": same, "ok": mean < 1.0}


def speed(root: Path, cpu: bool, res: int) -> Iterator[dict[str, Any]]:
    """images/s of pictures left on the device, and the device memory in use, without the first batches."""
    first, count, started, n = 8, 64 if cpu else 2048, 0.0, 0
    before = 0 if cpu else torch.cuda.mem_get_info()[0]
    for k, batch in enumerate(batches(root, res, count + first * BATCH, settings(cpu, SHARES[1]))):
        started = time.monotonic() if k == first else started
        n += len(batch.images) if k >= first else 0
    if not cpu:
        torch.cuda.synchronize()
    used = 0 if cpu else before - torch.cuda.mem_get_info()[0]
    yield {"images_per_second": round(n / (time.monotonic() - started), 1), "memory_mib": used >> 20, "n": n}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each step; default: 60")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return probe(write_photographs(Path(scratch) / "photographs", 64), args)


def probe(root: Path, args: argparse.Namespace) -> int:
    steps: dict[str, turns.Variant] = {"load": partial(load, args.cpu), "kernels": partial(kernels, args.cpu)}
    steps |= {f"decode {share}": partial(decode, root, args.cpu, share) for share in SHARES}
    steps |= {f"speed {res}": partial(speed, root, args.cpu, res) for res in SIZES}
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        started = time.monotonic()
        try:
            found[name] = {"ok": True, **turns.once(step, args.seconds)}
        except turns.Failed as error:
            found[name] = {"ok": False, "error": str(error)}
        found[name]["seconds"] = round(time.monotonic() - started, 1)
        write_text(args.json, json.dumps(found, indent=1) + "\n")
        print(f"probe {name}: {found[name]}", flush=True)
        if not found["load"]["ok"]:
            return 1
    working = [share for share in SHARES if found[f"decode {share}"]["ok"]]
    print(f"DALI decodes with hw_decoder_load {working}" if working else "DALI does not decode")
    return 0 if SHARES[1] in working else 3 if 0.0 in working else 1


if __name__ == "__main__":
    sys.exit(main())
