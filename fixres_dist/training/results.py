"""results.json of a finished run: accuracy before and after, the paired gain, and what it was measured with."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fixres_dist.base.environment import processor, versions
from fixres_dist.base.small_files import Damaged, read_json, read_lines
from fixres_dist.models import nvidia_apex
from fixres_dist.models.sizes import of_weights
from fixres_dist.runs import looks
from fixres_dist.runs.choice import read as read_choice
from fixres_dist.runs.results import Accuracy, Before, Best, Floor, Hardware, Results, read_floors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.confusion import measures
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import other_sizes


def predictions_file(run: RunDir, when: str) -> Path:
    """Predictions `before` or `after` fixing, kept so that any two runs can be compared later."""
    return run.root / "predictions" / f"{when}.npz"


def write_results(
    run: RunDir, session: Session, seconds: float, images_seen: int, engine: str, trunk: str, trained: str
) -> Results:
    """results.json of a run that has saved its predictions before and after; `trunk` says how the frozen one ran."""
    config = session.config
    before, after = (Predictions.read(predictions_file(run, when)) for when in ("before", "after"))
    others = before_at(run, session)
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
        before_at={res: Before(**asdict(accuracy(p)), why=why) for res, (p, why) in others.items()},
        best_before=best_before(after, {config.data.res: before} | {r: p for r, (p, _) in others.items()}),
        measures={when: found for when, p in (("before", before), ("after", after)) if (found := measures(p))},
        looks=counted_looks(run, session.val.fingerprint),
        floor=floors(run, after),
        choice=read_choice(run.chosen, run.again),
        images_seen=images_seen,
        seconds=round(seconds, 2),
        world_size=session.ranks.world_size,
        precision=session.arithmetic.name,
        optimizer="apex FusedSGD" if config.run.optimizer == "apex" else "torch SGD",
        apex=nvidia_apex.find().version if uses_apex else None,
        engine=engine,
        trunk=trunk,
        trained=trained,
        hardware=hardware(session),
        versions=versions(),
    )
    results.write(run)
    return results


def counted_looks(run: RunDir, sample_list: str) -> dict[str, dict[str, int]]:
    """Results.looks of a run whose val has this fingerprint; what commands have counted stays where a run ends again."""
    kept: dict[str, dict[str, int]] = {}
    with contextlib.suppress(FileNotFoundError, Damaged):
        kept = read_json(run.results, Results, "").looks
    own = {looks.TRAINING: len(read_lines(run.metrics, evaluation=str)), "first result": len(read_floors(run))}
    own = {what: times for what, times in own.items() if times}
    return {**kept, sample_list: {**kept.get(sample_list, {}), **own}}


def before_at(run: RunDir, session: Session) -> dict[int, tuple[Predictions, str]]:
    """Predictions before fixing at other resolutions, and why they were made: those kept for this validation split."""
    config, found = session.config, {}
    for res, why in other_sizes(config, of_weights(config.model)).items():
        file = predictions_file(run, f"before-{res}")
        if file.exists():  # not of a run that an older version has begun
            predictions, sample_list = Predictions.read_with_list(file)
            if sample_list == session.val.fingerprint:
                found[res] = predictions, why
    return found


def best_before(after: Predictions, before: dict[int, Predictions]) -> Best | None:
    """The gain over the best of `before`, by resolution, of which the first is the test's; None for that one alone."""
    if len(before) == 1:
        return None
    res = max(before, key=lambda res: before[res].summary().top1)
    return Best(**asdict(after.gain_over(before[res], of=len(before))), res=res, of=len(before))


def floors(run: RunDir, after: Predictions) -> tuple[Floor, ...]:
    """The first results with the gain over them, one of as many; without it where their predictions are not kept."""
    found = read_floors(run)
    files = {floor: predictions_file(run, f"floor-{floor.res}") for floor in found}
    kept = {floor: Predictions.read(file) for floor, file in files.items() if file.exists()}
    return tuple(
        replace(floor, after=after.gain_over(kept[floor], of=len(found)) if floor in kept else None) for floor in found
    )


def accuracy(predictions: Predictions) -> Accuracy:
    found = predictions.summary()
    return Accuracy(found.top1, found.top5, found.loss)


def hardware(session: Session) -> Hardware:
    device = session.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    ranks = session.ranks
    return Hardware(name, ranks.world_size, list(ranks.nodes), device.type == "cuda", ranks.cpus)
