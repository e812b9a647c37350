"""The mean of several runs' fixed weights, such as a grid's (model soups: Wortsman et al., arXiv 2203.05482), measured beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fixres_dist.base.errors import UserError
from fixres_dist.data import class_maps
from fixres_dist.evaluation.inputs import parts_with, weights_after
from fixres_dist.models import weights
from fixres_dist.runs.results import Gain, Summary
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predict import predict
from fixres_dist.training.session import Session

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Soup:
    """Accuracy on val of each run after fixing, by its folder, and of their mean; `gain`: of the mean over the best of them."""

    runs: dict[str, Summary]
    mean: Summary
    best: str
    gain: Gain

    def rows(self) -> list[tuple[str, Summary]]:
        return [*self.runs.items(), ("mean", self.mean)]


def check(runs: Sequence[RunDir]) -> None:
    """Refuse runs that are not finished, or not of one model, size and classes: their tensors do not mean the same."""
    first, *others = runs
    for run in runs:
        weights_after(run)
    of_first = facts(first)
    for run in others:
        if differ := [name for (name, a), b in zip(of_first.items(), facts(run).values(), strict=True) if a != b]:
            raise UserError(
                f"{first.root} and {run.root} are of different {' and '.join(differ)}, so their weights have no mean. Accepted: "
                f"runs like one another in these, such as a grid's over tune settings. Next: leave {run.root} out"
            )


def facts(run: RunDir) -> dict[str, object]:
    config = run.config()
    names = class_maps.trained_classes(config, run.root, "val")
    return {"model": config.model.timm_name, "resolution": config.data.res, "classes": names}


def mean(runs: Sequence[RunDir]) -> State:
    """Tensor by tensor in fp64, BatchNorm statistics like weights; integers (the BatchNorms' counters) are the first run's."""
    first, *others = (weights.read_state(weights_after(run)) for run in runs)
    return {
        name: torch.stack([v.double() for v in (value, *(o[name] for o in others))]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def measure(session: Session, runs: Sequence[RunDir], averaged: State) -> Soup:
    """One pass over val; on every rank."""
    models = [parts_with(session, weights_after(run)) for run in runs] + [parts_with(session, averaged)]
    *singles, last = predict(session, models, session.config.data.res, "soup")
    found = {str(run.root): p.summary() for run, p in zip(runs, singles, strict=True)}
    best = max(range(len(runs)), key=lambda k: singles[k].summary().top1)
    return Soup(found, last.summary(), str(runs[best].root), last.gain_over(singles[best], of=len(runs)))
