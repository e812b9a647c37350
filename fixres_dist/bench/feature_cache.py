"""The second half of `bench end-to-end`: whole runs that decode every epoch, and runs that cache the trunk's features."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from fixres_dist.base.small_files import read_lines
from fixres_dist.bench import turns
from fixres_dist.bench.photographs import write_data_set
from fixres_dist.bench.result import Result, Row
from fixres_dist.bench.setting import Setting, write_weights
from fixres_dist.bench.turns import Failed
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir

CLASSES = 16  # evaluation sees one image of each


def measure(setting: Setting, images: int, epochs: int, scratch: Path, result: Result) -> None:
    """Runs of `epochs` on `images` photographs in fp32 with the deterministic transform, by both engines, into `result`."""
    folder, weights = scratch / "few classes", scratch / "few.safetensors"
    write_data_set(scratch / "photographs", folder, CLASSES, images)
    turns.once(partial(write_weights, setting.model, CLASSES, weights))
    setting = replace(setting, folder=folder, weights=weights, precision="fp32")
    epoch_s, run_s, heads, n = [], [], [], epochs * images
    for engine in ("stream", "cached"):
        run, name = RunDir(scratch / "runs" / engine), f"{epochs} epochs, {engine}"
        try:
            used_s, peak_mib = train(run, setting, engine, images, epochs)
        except Failed as error:
            result.failed[name] = str(error)
            return
        lines = read_lines(run.metrics)
        # The first steps may wait for the loader's start.
        later = [line["images_per_second"] for line in lines if line.get("stage") == "fix"][1:]
        epoch_s.append(images / median(later))
        run_s.append(Results.read(run).seconds)
        heads.append(load_file(run.root / "export" / "model.safetensors"))
        result.rows.append(Row(name, round(n / run_s[-1], 2), round(1000 * used_s / n, 3), round(peak_mib, 1), n))
    result.cached = {
        "epoch_streamed_s": round(epoch_s[0], 4),
        "epoch_cached_s": round(epoch_s[1], 4),
        "epoch_speedup": round(epoch_s[0] / epoch_s[1], 2),
        "run_speedup": round(run_s[0] / run_s[1], 2),
        "head_difference": difference(*heads),
    }
    result.ratios["cached_vs_streamed"] = result.cached["epoch_speedup"]


def train(run: RunDir, setting: Setting, engine: str, images: int, epochs: int) -> tuple[float, float]:
    """(CPU seconds, peak MiB of the largest process) of `fixres train` in a process of its own; raises Failed."""
    batch = min(64, images)
    changes = {
        "data": {"train_transform": "test"},
        "tune": {"epochs": epochs, "global_batch": batch},
        "run": {
            "engine": engine,
            "eval_every": 0,
            "feature_cache": str(run.root / "features"),
            "log_every": -(-epochs * -(-images // batch) // 4),  # four lines to take the speed from
        },
    }
    config = reading.parse(Config, reading.merge(asdict(setting.config()), changes))
    run.root.mkdir(parents=True)
    run.config_file.write_text(reading.dump(config))
    print(f"{epochs} epochs of {images} images, {engine}", file=sys.stderr)
    with open(run.root / "log.txt", "w") as log:
        command = [sys.executable, "-m", "fixres_dist", "train", "--run", str(run.root)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)  # subprocess does not tell the CPU time and the peak
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failed((run.root / "log.txt").read_text()[-600:])
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference between two models' tensors, each relative to its tensor's largest value."""
    pairs = [(a[k], b[k]) for k in a if a[k].is_floating_point()]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)) for x, y in pairs)
