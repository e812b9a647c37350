"""results.json: before, after and the paired gain, with what it was measured on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from fixres_dist.evaluate import Predictions, paired_gain
from fixres_dist.rundir import RunDir, environment, write
from fixres_dist.session import Session


def predictions_file(run: RunDir, when: str) -> Path:
    """Per-image predictions `before` or `after`, so that any two runs can be compared later."""
    return run.root / "predictions" / f"{when}.npz"


def write_results(run: RunDir, session: Session, seconds: float, images_seen: int) -> dict[str, Any]:
    config, ranks = session.config, session.ranks
    before, after = (Predictions.read(predictions_file(run, when)) for when in ("before", "after"))
    gain, interval = paired_gain(before.correct1, after.correct1)
    kept = ("top1", "top5", "loss")
    summary = {
        "model": config.model.name,
        "timm_name": config.model.timm_name,
        "weights": config.model.weights,
        "res": config.data.res,
        "policy": config.tune.policy,
        "transform": config.data.train_transform,
        "resize_rule": config.data.resize_rule,
        "n": len(after.loss),
        "before": {key: before.summary()[key] for key in kept},
        "after": {key: after.summary()[key] for key in kept},
        "delta_top1": gain,
        "delta_ci95": list(interval),
        "images_seen": images_seen,
        "seconds": round(seconds, 2),
        "world_size": ranks.world_size,
        "precision": session.precision,
        "hardware": hardware(session),
        "versions": environment()["versions"],
    }
    write(run.results, json.dumps(summary, indent=1) + "\n")
    return summary


def hardware(session: Session) -> dict[str, Any]:
    device = session.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": name, "devices": session.ranks.world_size, "nodes": list(session.ranks.nodes)}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sentence(summary: dict[str, Any]) -> str:
    low, high = summary["delta_ci95"]
    return (
        f"{summary['model']} at {summary['res']} px: top-1 {summary['before']['top1']:.2f} before, "
        f"{summary['after']['top1']:.2f} after fixing: {summary['delta_top1']:+.2f} points "
        f"(95 % interval {low:+.2f} to {high:+.2f}, paired, n {summary['n']})"
    )
