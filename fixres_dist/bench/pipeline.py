"""`bench end-to-end`: from JPEG files to the optimizer step, and whole runs with and without the feature cache.

`bench gpu` is trunk, step and end-to-end at a GPU's sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from fixres_dist import config as cfg
from fixres_dist import train
from fixres_dist.bench import data, model, turns
from fixres_dist.bench.model import Setting
from fixres_dist.bench.turns import Turn, Variant
from fixres_dist.data import torch_cpu
from fixres_dist.errors import UserError
from fixres_dist.meter import Meter
from fixres_dist.rundir import RunDir

CLASSES = 16  # of the runs with and without cache: their evaluations see one image of each


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.stage == "gpu":
        return gpu(args)
    with tempfile.TemporaryDirectory() as scratch:
        setting = model.prepare(args.model, args.res, args.batch, args.seconds, Path(scratch), args.data)
        rows, versus, failed = from_files(setting, args.repeat)
        cached: dict[str, Any] = {}
        if args.epochs:
            try:
                more, cached = with_and_without_cache(args, Path(scratch))
                rows += more
            except UserError as error:
                failed["feature cache"] = str(error)
    speedup = {"cached_vs_streamed": cached["epoch_speedup"]} if cached else {}
    return turns.result("end-to-end", rows, speedup, rows_vs=versus, cached=cached, failed=failed)


def from_files(
    setting: Setting, repeat: int, until: float = math.inf
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]], dict[str, str]]:
    """(rows, end to end against the slower of its parts and against what the CPUs allow, what failed)."""
    variants = {
        "data alone": Variant(decode, (setting,)),
        "step alone": Variant(model.step, (setting,)),
        "end to end": Variant(end_to_end, (setting,)),
    }
    found, failed = turns.alternate(variants, repeat, f"end-to-end {setting.model} {setting.res}", until)
    rows = {name: turns.row(name, values) for name, values in found.items()}
    versus: dict[str, dict[str, float]] = {}
    if len(rows) == len(variants):
        parts, whole = (rows["data alone"], rows["step alone"]), rows["end to end"]
        slower = min(part["images_per_second"] for part in parts)
        # Loader and step share the CPUs where there is no GPU: no schedule beats the sum of what both need.
        needed = sum(part["cpu_ms_per_image"] for part in parts) / 1000 / len(os.sched_getaffinity(0))
        bound = min(slower, 1 / needed)
        speed = whole["images_per_second"]
        versus["vs_slower_part"] = {whole["name"]: round(speed / slower, 3)}
        versus["vs_cpu_bound"] = {whole["name"]: round(speed / bound, 3)}
    return list(rows.values()), versus, failed


def decode(setting: Setting) -> Iterator[Turn]:
    """The product's loader alone."""
    base = turns.memory_mib()
    live = model.opened(setting)
    loaded = train.step_batches(live, model.fixing(live), 0, Meter())
    yield from streamed((sum(len(batch.labels) for batch in batches) for _, batches in loaded), live, setting, base)


def end_to_end(setting: Setting) -> Iterator[Turn]:
    base = turns.memory_mib()
    live = model.opened(setting)
    one, meter = model.stepper(live), Meter()
    loaded = train.step_batches(live, model.fixing(live), 0, meter)
    images = (len(one(step, batches)) for step, batches in loaded)
    for turn in streamed(images, live, setting, base):
        yield turn._replace(note=f"waits {100 * meter.wait_s / (time.monotonic() - meter.since):.1f} % for data")
        meter.restart()


def streamed(images: Iterator[int], live: Any, setting: Setting, base_mib: float) -> Iterator[Turn]:
    """Turns of at least `setting.seconds` in a stream's middle: what was made ahead between turns is used up first."""
    cuda = live.ranks.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    ahead = 2 * torch_cpu.worker_count(live.config.data.workers, 1) + 2
    while True:
        for _ in range(ahead):
            next(images)
        synchronize()
        turns.forget_peak()
        before, started, seen = turns.cpu_seconds(), time.monotonic(), 0
        while not seen or time.monotonic() - started < setting.seconds:
            seen += next(images)
        synchronize()
        took, used = time.monotonic() - started, turns.cpu_seconds() - before
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else turns.memory_mib(peak=True) - base_mib
        yield Turn(seen, took, used, peak)


def with_and_without_cache(args: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Whole runs of `epochs` on `images` photographs in fp32 with the deterministic transform, by both engines."""
    files = sorted((data.write_photographs(scratch / "for runs", 160) / "val" / "a").iterdir())
    folder = model.linked(files, scratch / "few classes", CLASSES, args.images)
    turns.once(Variant(model.write_weights, (args.model, CLASSES, scratch / "few.safetensors")))
    setting = Setting(args.model, args.res, args.batch, folder, scratch / "few.safetensors", 0.0, precision="fp32")
    rows, epoch_s, run_s, heads = [], {}, {}, {}
    for engine in ("stream", "cached"):
        here = RunDir(scratch / "runs" / engine)
        used, peak = train_run(here, setting, engine, args)
        lines = [json.loads(line) for line in here.metrics.read_text().splitlines()]
        # The first epoch may write the cache, or wait for the loader's start.
        later = [line["images_per_second"] for line in lines if line.get("stage") == "fix"][1:]
        epoch_s[engine] = args.images / median(later)
        result = json.loads(here.results.read_text())
        run_s[engine], images = result["seconds"], args.epochs * args.images
        rows.append(
            {
                "name": f"{args.epochs} epochs, {engine}",
                "images_per_second": round(images / run_s[engine], 2),
                "cpu_ms_per_image": round(1000 * used / images, 3),
                "peak_memory_mib": round(peak, 1),
                "n": images,
            }
        )
        heads[engine] = load_file(here.root / "export" / "model.safetensors")
    return rows, {
        "epoch_streamed_s": round(epoch_s["stream"], 4),
        "epoch_cached_s": round(epoch_s["cached"], 4),
        "epoch_speedup": round(epoch_s["stream"] / epoch_s["cached"], 2),
        "run_speedup": round(run_s["stream"] / run_s["cached"], 2),
        "head_difference": difference(heads["stream"], heads["cached"]),
    }


def train_run(here: RunDir, setting: Setting, engine: str, args: argparse.Namespace) -> tuple[float, float]:
    """A run by `python -m fixres_dist train`: (CPU seconds, peak MiB of the largest process); raises UserError if it fails."""
    batch = min(64, args.images)
    changes = {
        "data": {"train_transform": "test"},
        "tune": {"epochs": args.epochs, "global_batch": batch},
        "run": {"engine": engine, "eval_every": 0, "log_every": -(-args.images // batch)},
    }
    config = cfg.parse(cfg.Config, cfg.merge(cfg.plain(setting.config()), changes))
    here.root.mkdir(parents=True)
    (here.root / "config.yaml").write_text(cfg.dump(config))
    command = [sys.executable, "-m", "fixres_dist", "train", "--run", str(here.root)]
    print(f"{args.epochs} epochs of {args.images} images, {engine}", file=sys.stderr)
    with open(here.root / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the run with run.engine={engine} failed: {(here.root / 'log.txt').read_text()[-600:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two models' tensors, each relative to its tensor's largest value."""
    found = [
        float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)) for k in a if a[k].is_floating_point()
    ]
    return max(found)


def gpu(args: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise UserError(
            "bench gpu needs a GPU, and torch sees none. Next: bench trunk, step or end-to-end, on the CPU."
        )
    rows: list[dict[str, Any]] = []
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for size in args.sizes.split(","):
        name, res, batch = parse_size(size)
        with tempfile.TemporaryDirectory() as scratch:
            setting = model.prepare(name, res, batch, args.seconds, Path(scratch), args.data)
            for stage in ("trunk", "step", "end-to-end"):
                parts = (
                    from_files(setting, args.repeat)
                    if stage == "end-to-end"
                    else model.measure(stage, setting, args.repeat, compiled=True)
                )
                label = f"{name} {res}"
                rows += [row | {"name": f"{label}: {row['name']}"} for row in parts[0]]
                for key, values in parts[1].items():
                    found.setdefault(key, {}).update({f"{label}: {k}": v for k, v in values.items()})
                failed |= {f"{label} {stage}: {k}": v for k, v in parts[2].items()}
    return turns.result("gpu", rows, {k: model.of_auto({k: v}) for k, v in found.items()}, rows_vs=found, failed=failed)


def parse_size(text: str) -> tuple[str, int, int]:
    name, _, rest = text.partition("@")
    res, _, batch = rest.partition("x")
    if not (name and res.isdigit() and batch.isdigit()):
        raise UserError(f"size {text!r} cannot be read; accepted: MODEL@RESxBATCH, such as tf_efficientnet_b0@320x256.")
    return name, int(res), int(batch)
