"""The cost model of docs/scaling.md: `python benchmarks/scaling.py` prints its tables from the recipes' facts.

    python benchmarks/scaling.py --measure benchmarks/results/scaling.json
    python benchmarks/scaling.py --page docs/scaling.md

The second also measures what the page quotes: agreement on flags over gloo ranks, a checkpoint's write, imports. The
third puts the current tables and cores into the page, after a new data_cpu.json for example.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import processor, versions
from fixres_dist.base.files import write_text
from fixres_dist.config import recipes
from fixres_dist.config.recipes import Facts
from fixres_dist.training.plan import H200_MIB_PER_S, IMAGENET

POLICY, BATCH = "classifier+bn", 384
IMAGE_BYTES = 147_897_477_120 / IMAGENET[0]  # ILSVRC2012_img_train.tar
HOP_S = 15e-6  # of a message between nodes: assumed
FLOOR_S = 2e-3  # of a step on a GPU, however few its images: assumed; some hundred kernels that a CUDA graph starts
RANKS = (8, 64, 384, 1000)
ROW = re.compile(r"\| (b\d|l2)@\d+ \|")
DATA = ROOT / "benchmarks/results/data_cpu.json"


def rate(facts: Facts) -> float:
    """images/s of one H200 by memory traffic, as the plan estimates it."""
    return H200_MIB_PER_S / facts.traffic_mib


def head_bytes(facts: Facts) -> int:
    return 4 * facts.trainable(POLICY, 1000)


def all_reduce_s(size: int, ranks: int, bandwidth: float) -> float:
    """A ring's bytes at a tree's latency."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * math.log2(ranks) * HOP_S


def feature_bytes(facts: Facts) -> int:
    """Of an image in the cache, bf16: the map that the last, widening convolution takes."""
    return 2 * facts.conv_head_parameters // facts.classifier_inputs * math.ceil(facts.res / 32) ** 2


def decode_ms(res: int) -> float:
    """CPU time of an image, between the measured sizes in proportion to the pixels."""
    rows = {row["name"]: row["cpu_ms_per_image"] for row in json.loads(DATA.read_text())["rows"]}
    points = {
        int(n.split()[1]) ** 2: ms for n, ms in rows.items() if n.startswith("test ") and n.endswith("folder torch")
    }
    return float(np.interp(res**2, sorted(points), [points[p] for p in sorted(points)]))


def decode_cores(facts: Facts) -> float:
    """That keep one GPU supplied."""
    return rate(facts) * decode_ms(facts.res) / 1e3


def models() -> list[tuple[str, Facts]]:
    """One recipe of each model, smallest first."""
    found = {recipe.name: recipe.facts for recipe in reversed(recipes.every()) if recipe.facts}
    return sorted(found.items(), key=lambda item: item[1].multiply_adds_g)


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def per_gpu() -> str:
    heads = ["model", "images/s", "gradient MB", "all-reduce of 1,000 ranks at 25 / 50 GB/s, ms", "checkpoint MB"]
    heads += ["read MB/s", "decode cores", "features KB", "of ImageNet GB"]
    rows = []
    for name, facts in models():
        size, speed, kept = head_bytes(facts), rate(facts), feature_bytes(facts)
        reduce = " / ".join(f"{1e3 * all_reduce_s(size, 1000, b * 1e9):.2f}" for b in (25, 50))
        statistics = 2 * facts.bn_parameters  # mean and variance take as much as weight and bias
        cells = [
            f"{name}@{facts.res}",
            f"{speed:,.0f}",
            f"{size / 1e6:.1f}",
            reduce,
            f"{(2 * size + 2 * statistics) / 1e6:.0f}",
        ]
        cells += [f"{speed * IMAGE_BYTES / 1e6:,.0f}", f"{decode_cores(facts):.1f}"]
        rows.append([*cells, f"{kept / 1000:,.0f}", f"{kept * IMAGENET[0] / 1e9:,.0f}"])
    return table(heads, rows)


def at_scale() -> str:
    """A step of the default global batch, and an epoch, by ranks; the network at 25 GB/s a GPU, flags by a tree of hops."""
    heads = ["model", *(f"{n:,} ranks: step = compute + network ms; epoch" for n in RANKS)]
    rows = []
    for name, facts in models():
        cells = [f"{name}@{facts.res}"]
        for ranks in RANKS:
            images = max(1, BATCH / ranks)  # a rank without an image still waits for one that has
            compute = max(FLOOR_S, images / rate(facts))
            network = all_reduce_s(head_bytes(facts), ranks, 25e9) + 2 * math.log2(ranks) * HOP_S
            epoch = (compute + network) * IMAGENET[0] / BATCH
            cells.append(f"{1e3 * compute:.2f} + {1e3 * network:.2f}; {epoch:,.0f} s")
        rows.append(cells)
    return table(heads, rows)


def renew(page: Path) -> None:
    """Put the tables' rows into `page`, in whose order they stand, and their cores into its prose."""
    fresh = iter([line for part in (per_gpu(), at_scale()) for line in part.splitlines()[2:]])
    cores = {name: f"{decode_cores(facts):.0f}" for name, facts in models()}
    text = re.sub(
        r"B0 wants \d+ cores for each GPU and B4 \d+",
        f"B0 wants {cores['b0']} cores for each GPU and B4 {cores['b4']}",
        page.read_text(),
    )
    write_text(page, "".join(f"{next(fresh) if ROW.match(line) else line}\n" for line in text.splitlines()))


def agree(rank: int, world: int, file: str, rounds: int) -> None:
    """One rank: microseconds of distributed.highest, as the loop calls it at every step; rank 0 prints them."""
    import torch
    import torch.distributed as dist

    from fixres_dist.training.ranks import Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, world, ("here",), torch.device("cpu"))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        ranks.highest([0, 0])
        times.append(1e6 * (time.perf_counter() - started))
    if rank == 0:
        print(json.dumps(times[rounds // 10 :]))
    dist.destroy_process_group()


def measured(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"flags_us": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for world in (2, 4):
            parts = [["--agree", str(rank), str(world), f"{scratch}/{world}", str(rounds)] for rank in range(world)]
            processes = [subprocess.Popen([sys.executable, __file__, *part], stdout=subprocess.PIPE) for part in parts]
            outputs = [process.communicate()[0] for process in processes]
            times = json.loads(outputs[0])
            tail = quantiles(times, n=100)[98]
            found["flags_us"][world] = {"median": round(median(times), 1), "p99": round(tail, 1), "n": len(times)}
        found["checkpoint_l2"] = checkpoint(Path(scratch), 5)
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import fixres_dist.train"], check=True, cwd=ROOT)
        times.append(time.monotonic() - started)
    found["import_s"] = {"median": round(median(times), 2), "n": len(times)}
    return found


def checkpoint(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds to have l2's head and momenta on disk."""
    import torch
    from safetensors.torch import save_file

    facts = next(facts for name, facts in models() if name == "l2")
    tensors = {name: torch.zeros(head_bytes(facts) // 4) for name in ("head", "momenta")}
    times = []
    for k in range(rounds):
        started = time.monotonic()
        save_file(tensors, folder / f"{k}.safetensors")
        with open(folder / f"{k}.safetensors") as file:
            os.fsync(file.fileno())
        times.append(time.monotonic() - started)
    return {"mb": round(2 * head_bytes(facts) / 1e6, 1), "median_s": round(median(times), 3), "n": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", type=Path, metavar="JSON", help="also measure, and write it here")
    parser.add_argument("--page", type=Path, metavar="MD", help="put the tables into this page")
    parser.add_argument("--rounds", type=int, default=2000, help="agreements on flags; default: 2000")
    parser.add_argument("--agree", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agree:
        rank, world, file, rounds = args.agree
        agree(int(rank), int(world), file, int(rounds))
        return
    print(f"One H200 each:\n\n{per_gpu()}\n\nGlobal batch {BATCH}:\n\n{at_scale()}")
    if args.page:
        renew(args.page)
    if args.measure:
        command = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
        hardware = {
            "processor": processor(),
            "cpus": len(os.sched_getaffinity(0)),
            "load": round(os.getloadavg()[0], 1),
        }
        found = {"command": command, "hardware": hardware, "versions": versions(), **measured(args.rounds)}
        write_text(args.measure, json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
