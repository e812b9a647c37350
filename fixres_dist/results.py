"""results.json: before, after and the paired gain, with what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fixres_dist.data.index import Index
from fixres_dist.data.torch_cpu import Bad
from fixres_dist.distributed import Ranks
from fixres_dist.evaluate import Predictions, paired_gain
from fixres_dist.rundir import RunDir, append, processor, versions, write
from fixres_dist.session import Session


def predictions_file(run: RunDir, when: str) -> Path:
    """Per-image predictions `before` or `after`, so that any two runs can be compared later."""
    return run.root / "predictions" / f"{when}.npz"


def write_results(
    run: RunDir, session: Session, seconds: float, images_seen: int, ran: dict[str, str]
) -> dict[str, Any]:
    config, ranks = session.config, session.ranks
    before, after = (Predictions.read(predictions_file(run, when)) for when in ("before", "after"))
    both = before.counted & after.counted
    gain, interval = paired_gain(before.correct1[both], after.correct1[both])
    kept = ("top1", "top5", "loss")
    summary = {
        "model": config.model.name,
        "timm_name": config.model.timm_name,
        "weights": config.model.weights,
        "res": config.data.res,
        "policy": config.tune.policy,
        "transform": config.data.train_transform,
        "resize_rule": config.data.resize_rule,
        "n": int(after.counted.sum()),
        "skipped": count_skipped(run),
        "before": {key: before.summary()[key] for key in kept},
        "after": {key: after.summary()[key] for key in kept},
        "delta_top1": gain,
        "delta_ci95": list(interval),
        "images_seen": images_seen,
        "seconds": round(seconds, 2),
        "world_size": ranks.world_size,
        "precision": session.precision,
        **ran,  # engine, and how the frozen trunk was arranged
        "hardware": hardware(session),
        "versions": versions(),
    }
    write(run.results, json.dumps(summary, indent=1) + "\n")
    return summary


def skipping(run: RunDir, ranks: Ranks) -> Callable[[Index, Bad], None]:
    """What a run does about an image it has to do without: a line in skipped/rank_K.jsonl, once per start."""
    seen: set[str] = set()

    def note(index: Index, bad: Bad) -> None:
        name = f"{index.folder.name}/{index.name(bad.sample)}"
        if name not in seen:
            seen.add(name)
            (run.root / "skipped").mkdir(exist_ok=True)
            append(run.root / "skipped" / f"rank_{ranks.rank}.jsonl", {"name": name, "reason": bad.reason})
            print(f"skipped {index.where(bad.sample)}: {bad.reason}", flush=True)

    return note


def count_skipped(run: RunDir) -> int:
    """Images that this run, over all its starts and ranks, could not decode."""
    files = (run.root / "skipped").glob("rank_*.jsonl")
    return len({json.loads(line)["name"] for file in files for line in file.read_text().splitlines()})


def hardware(session: Session) -> dict[str, Any]:
    device = session.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": name, "devices": session.ranks.world_size, "nodes": list(session.ranks.nodes)}


def sentence(summary: dict[str, Any]) -> str:
    low, high = summary["delta_ci95"]
    return (
        f"{summary['model']} at {summary['res']} px: top-1 {summary['before']['top1']:.2f} before, "
        f"{summary['after']['top1']:.2f} after fixing: {summary['delta_top1']:+.2f} points "
        f"(95 % interval {low:+.2f} to {high:+.2f}, paired, n {summary['n']})"
    )
