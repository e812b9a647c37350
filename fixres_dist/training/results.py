"""results.json of a finished run: accuracy before and after, the paired gain, and what it was measured with."""

from __future__ import annotations

from pathlib import Path

import torch

from fixres_dist.base.environment import processor, versions
from fixres_dist.models import nvidia_apex
from fixres_dist.runs.results import Accuracy, Hardware, Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session


def predictions_file(run: RunDir, when: str) -> Path:
    """Predictions `before` or `after` fixing, kept so that any two runs can be compared later."""
    return run.root / "predictions" / f"{when}.npz"


def write_results(run: RunDir, session: Session, seconds: float, images_seen: int, engine: str, trunk: str) -> Results:
    """results.json of a run that has saved its predictions before and after; `trunk` says how the frozen one ran."""
    config = session.config
    before, after = (Predictions.read(predictions_file(run, when)) for when in ("before", "after"))
    gain, uses_apex = after.gain_over(before), session.arithmetic.amp or config.run.optimizer == "apex"
    results = Results(
        model=config.model.name,
        timm_name=config.model.timm_name,
        weights=config.model.weights,
        res=config.data.res,
        policy=config.tune.policy,
        transform=config.data.train_transform,
        resize_rule=config.data.resize_rule,
        n=int(after.counted.sum()),
        skipped=run.skipped(),
        before=accuracy(before),
        after=accuracy(after),
        delta_top1=gain.delta_top1,
        delta_ci95=gain.delta_ci95,
        images_seen=images_seen,
        seconds=round(seconds, 2),
        world_size=session.ranks.world_size,
        precision=session.arithmetic.name,
        optimizer="apex FusedSGD" if config.run.optimizer == "apex" else "torch SGD",
        apex=nvidia_apex.find().version if uses_apex else None,
        engine=engine,
        trunk=trunk,
        hardware=hardware(session),
        versions=versions(),
    )
    results.write(run)
    return results


def accuracy(predictions: Predictions) -> Accuracy:
    found = predictions.summary()
    return Accuracy(found.top1, found.top5, found.loss)


def hardware(session: Session) -> Hardware:
    device = session.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Hardware(name, session.ranks.world_size, list(session.ranks.nodes))
