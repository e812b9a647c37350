"""results.json: before, after and the paired gain, with what it was measured on."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

from fixres_dist.base.environment import processor, versions
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.config import recipes
from fixres_dist.models import nvidia_apex
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import plan, samples
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import stages

LIBRARIES_GIB = 0.7  # resident once torch, timm and the rest are imported


def predictions_file(run: RunDir, when: str) -> Path:
    """Per-image predictions `before` or `after`, so that any two runs can be compared later."""
    return run.root / "predictions" / f"{when}.npz"


def write_results(
    run: RunDir, session: Session, seconds: float, images_seen: int, ran: dict[str, str]
) -> dict[str, Any]:
    config, ranks = session.config, session.ranks
    before, after = (Predictions.read(predictions_file(run, when)) for when in ("before", "after"))
    kept = ("top1", "top5", "loss")
    uses_apex = session.arithmetic.amp or config.run.optimizer == "apex"
    summary = {
        "model": config.model.name,
        "timm_name": config.model.timm_name,
        "weights": config.model.weights,
        "res": config.data.res,
        "policy": config.tune.policy,
        "transform": config.data.train_transform,
        "resize_rule": config.data.resize_rule,
        "n": int(after.counted.sum()),
        "skipped": samples.count_skipped(run),
        "before": {key: before.summary()[key] for key in kept},
        "after": {key: after.summary()[key] for key in kept},
        **after.gain_over(before),
        "images_seen": images_seen,
        "seconds": round(seconds, 2),
        "world_size": ranks.world_size,
        "precision": session.arithmetic.name,
        "optimizer": "apex FusedSGD" if config.run.optimizer == "apex" else "torch SGD",
        "apex": nvidia_apex.find().version if uses_apex else None,
        **ran,  # engine, and how the frozen trunk was arranged
        "prediction": prediction(session, seconds),
        "hardware": hardware(session),
        "versions": versions(),
    }
    write_text(run.results, json.dumps(summary, indent=1) + "\n")
    return summary


def prediction(session: Session, seconds: float) -> dict[str, Any] | None:
    """The dry run's estimates against this start's peak memory and the run's time; None for a model without a recipe's facts.

    On a CPU it is the process's resident memory, libraries included, and no time is predicted.
    """
    config, ranks = session.config, session.ranks
    try:
        facts = recipes.find(config.model.name).facts
    except UserError:  # a run directory written by hand
        facts = None
    if facts is None:
        return None
    cuda, world = ranks.device.type == "cuda", ranks.world_size
    low = session.arithmetic.name in ("bf16", "fp16", "apex-O1", "apex-O2")
    counts = plan.Counts(len(session.train), len(session.val), len(session.train.classes), "")
    memory = plan.memory_gib(config, facts, counts, world, 2 if low else 4)
    if cuda:
        measured = torch.cuda.max_memory_allocated(ranks.device) / 2**30
    else:
        memory += LIBRARIES_GIB
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    pictures = plan.engine_plan(config, facts, counts, stages(config, counts.train)[-1])[2]
    known = cuda and "H200" in torch.cuda.get_device_name(ranks.device)
    return {
        "memory_gib": plan.beside(memory, measured),
        "seconds": plan.beside(plan.seconds(config, facts, pictures, world), seconds) if known else None,
    }


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
