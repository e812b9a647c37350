"""The measurements behind docs/scaling.md: `python benchmarks/scaling.py` writes benchmarks/results/scaling.json.

Agreement on flags over gloo ranks, a checkpoint's write, imports, and index and order at ImageNet's size and beyond.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import processor, versions
from fixres_dist.base.files import write_text
from fixres_dist.bench import turns
from fixres_dist.config import recipes
from fixres_dist.data import order
from fixres_dist.data.index import CachedIndex, Index, read_cached, write_cached
from fixres_dist.training.plan import IMAGENET
from fixres_dist.training.ranks import Ranks


def agree(rank: int, world: int, folder: str, rounds: int) -> None:
    """One rank: microseconds of Ranks.highest, as the loop calls it at every step; rank 0 writes them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, world, ("here",), torch.device("cpu"))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        ranks.highest([0, 0])
        times.append(1e6 * (time.perf_counter() - started))
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times[rounds // 10 :]))
    dist.destroy_process_group()


def flags_us(folder: Path, world: int, rounds: int) -> dict[str, float]:
    torch.multiprocessing.spawn(agree, (world, str(folder), rounds), world)
    times = json.loads((folder / "times.json").read_text())
    return {"median": round(median(times), 1), "p99": round(quantiles(times, n=100)[98], 1), "n": len(times)}


def checkpoint(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to have l2's head and momenta on disk."""
    facts = recipes.find("l2").facts
    assert facts is not None
    count = facts.trainable("classifier+bn", 1000)
    tensors, times = {name: torch.zeros(count) for name in ("head", "momenta")}, []
    for k in range(rounds):
        started = time.monotonic()
        save_file(tensors, folder / f"{k}.safetensors")
        with open(folder / f"{k}.safetensors") as file:
            os.fsync(file.fileno())
        times.append(time.monotonic() - started)
    return {"mb": round(8 * count / 1e6, 1), "median_s": round(median(times), 3), "n": rounds}


def imports(rounds: int) -> dict[str, float]:
    times = []
    for _ in range(rounds):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import fixres_dist.training.worker"], check=True, cwd=ROOT)
        times.append(time.monotonic() - started)
    return {"median": round(median(times), 2), "n": rounds}


def index(folder: Path) -> dict[str, float]:
    """Loading the index of ImageNet's training images and its fingerprint, in this process."""
    n, kept = IMAGENET[0], folder / "index.npz"
    names = [b"n%08d/n%08d_%d.JPEG" % (i // 1282, i // 1282, i) for i in range(n)]
    labels, sizes = (np.arange(n) // 1282).astype(np.int32), np.full((n, 2), 400, np.int32)
    ends, classes = np.cumsum([len(name) for name in names], dtype=np.int64), tuple(f"n{k:08d}" for k in range(1000))
    whole = Index(folder, classes, b"".join(names), ends, labels, sizes, np.arange(n, dtype=np.uint32))
    write_cached(CachedIndex(whole), kept)
    del names, labels, sizes, ends, whole
    turns.forget_peak()
    before, started = turns.memory_mib(peak=True), time.process_time()
    cached = read_cached(kept)
    assert cached is not None
    assert cached.index.fingerprint
    took = round(time.process_time() - started, 3)
    return {"images": n, "load_cpu_s": took, "mib": round(turns.memory_mib(peak=True) - before, 1)}


def order_ms(n: int, step: int) -> float:
    """CPU time of the 512 samples of a step, in milliseconds."""
    times = []
    for seed in range(5):
        started = time.process_time()
        order.train_draws(n, seed, step, 512, 0, 1)
        times.append(time.process_time() - started)
    return round(1000 * median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--rounds", type=int, default=2000, help="agreements on flags; default: 2000")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    found: dict[str, Any] = {
        "command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]),
        "hardware": {"processor": processor(), "cpus": len(os.sched_getaffinity(0)), "load": load},
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["flags_us"] = {world: flags_us(Path(folder), world, args.rounds) for world in (2, 4)}
        found["checkpoint_l2"] = checkpoint(Path(folder), 5)
        found["index"] = index(Path(folder))
    found["import_s"] = imports(3)
    found["order_ms"] = {f"{n} images, step {k}": order_ms(n, k) for n in (IMAGENET[0], 10**9) for k in (0, 4000)}
    write_text(args.json, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
