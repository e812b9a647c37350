"""`bench end-to-end`: from JPEG files to the optimizer step, and whole runs with and without the feature cache.

`bench gpu` is trunk, step and end-to-end at a GPU's sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from fixres_dist.base.errors import UserError
from fixres_dist.bench import model, turns
from fixres_dist.bench.model import Setting, Work
from fixres_dist.bench.turns import Variant
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import backends
from fixres_dist.data.requests import Pictures, train_steps
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.session import Session
from fixres_dist.training.throughput import Meter

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
    builds = {"data alone": decode, "step alone": model.step, "end to end": end_to_end}
    variants = {name: Variant(model.variant, (build, setting)) for name, build in builds.items()}
    found, failed = turns.alternate(variants, repeat, f"end-to-end {setting.model} {setting.res}", until)
    rows = {name: turns.row(name, values) for name, values in found.items()}
    versus: dict[str, dict[str, float]] = {}
    if len(rows) == len(variants):
        parts, whole, speed = (rows["data alone"], rows["step alone"]), "end to end", "images_per_second"
        slower = min(part[speed] for part in parts)
        # Loader and step share the CPUs where there is no GPU: no schedule beats the sum of what both need.
        needed_s = sum(part["cpu_ms_per_image"] for part in parts) / 1000 / len(os.sched_getaffinity(0))
        versus["vs_slower_part"] = {whole: round(rows[whole][speed] / slower, 3)}
        versus["vs_cpu_bound"] = {whole: round(rows[whole][speed] / min(slower, 1 / needed_s), 3)}
        versus["data_wait_percent"] = {whole: round(median(100 * t.waited_s / t.wall_s for t in found[whole]), 2)}
    return list(rows.values()), versus, failed


def decode(live: Session, setting: Setting) -> Work:
    """The product's loader alone."""
    meter = Meter()
    batches = loaded(live, meter)
    return Work(lambda: len(next(batches).labels), ahead(live), meter)


def end_to_end(live: Session, setting: Setting) -> Work:
    one, meter = model.stepper(live), Meter()
    batches = loaded(live, meter)
    return Work(lambda: one(0, itertools.islice(batches, 1)), ahead(live), meter)


def loaded(live: Session, meter: Meter) -> Iterator[Any]:
    """The batches of a run's optimizer steps, one after the other."""
    stage = model.fixing(live)
    pictures, size = Pictures(stage.transform, stage.res, live.resize(stage.res), 0), stage.tune.global_batch
    requests = train_steps(live.train, pictures, size, size, 0, stage.stop, 0, 1)
    return meter.waiting(live.batches(live.train, itertools.chain.from_iterable(requests), stage.res))


def ahead(live: Session) -> int:
    """More batches than a loader has made while others had their turn."""
    return 2 * backends.worker_count(live.config.data.workers, 1) + 2


def with_and_without_cache(
    args: argparse.Namespace, scratch: Path, until: float = math.inf
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Whole runs of `epochs` on `images` photographs in fp32 with the deterministic transform, by both engines."""
    folder = model.linked(scratch / "photographs", scratch / "few classes", CLASSES, args.images)
    turns.once(Variant(model.write_weights, (args.model, CLASSES, scratch / "few.safetensors")))
    setting = Setting(args.model, args.res, args.batch, folder, scratch / "few.safetensors", 0.0, precision="fp32")
    rows, epoch_s, run_s, heads = [], {}, {}, {}
    for engine in ("stream", "cached"):
        here = RunDir(scratch / "runs" / engine)
        used, peak = train_run(here, setting, engine, args, until)
        lines = [json.loads(line) for line in here.metrics.read_text().splitlines()]
        # The first steps may wait for the loader's start.
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


def train_run(
    here: RunDir, setting: Setting, engine: str, args: argparse.Namespace, until: float
) -> tuple[float, float]:
    """A run by `python -m fixres_dist train`: (CPU seconds, peak MiB of the largest process); raises UserError if it fails."""
    batch = min(64, args.images)
    steps = args.epochs * -(-args.images // batch)
    changes = {
        "data": {"train_transform": "test"},
        "tune": {"epochs": args.epochs, "global_batch": batch},
        "run": {
            "engine": engine,
            "eval_every": 0,
            "feature_cache": str(here.root / "features"),
            "log_every": -(-steps // 4),  # lines to take the speed from
        },
    }
    config = reading.parse(Config, reading.merge(asdict(setting.config()), changes))
    here.root.mkdir(parents=True)
    (here.root / "config.yaml").write_text(reading.dump(config))
    command = [sys.executable, "-m", "fixres_dist", "train", "--run", str(here.root)]
    print(f"{args.epochs} epochs of {args.images} images, {engine}", file=sys.stderr)
    with open(here.root / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        timer = threading.Timer(min(until - time.monotonic(), threading.TIMEOUT_MAX), process.kill)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)  # subprocess does not tell what it used
        timer.cancel()
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
    for name, res, batch in [parse_size(size) for size in args.sizes.split(",")]:
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
