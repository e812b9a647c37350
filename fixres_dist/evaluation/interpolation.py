"""Between two heads: accuracy of weighted means of a run's starting weights and its fixed ones (alpha.json)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fixres_dist.evaluation.inputs import parts_with, weights_after, weights_before
from fixres_dist.models import weights
from fixres_dist.runs.results import Gain, Summary
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predict import predict
from fixres_dist.training.session import Session

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Mixture:
    """Accuracy of the weights at `alpha`, and their gain over those at 0."""

    alpha: float
    summary: Summary
    gain: Gain

    def record(self) -> dict[str, Any]:
        return {"alpha": self.alpha, **asdict(self.summary), **asdict(self.gain)}


Curves = dict[str, list[Mixture]]  # set -> one mixture for each alpha


def interpolated(before: State, after: State, alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) · before + alpha · after, tensor by tensor: exactly `before` at 0, exactly `after` at 1.

    Tensors that tuning left alone stay as they are. BatchNorm means and variances are interpolated like weights, which is
    not the variance of a mixture. Integers (the BatchNorms' counters) are those of `after`.
    """
    if alpha == 0:
        return dict(before)
    return {
        name: torch.lerp(before[name], end, alpha) if end.is_floating_point() else end for name, end in after.items()
    }


def starting_state(run: RunDir, model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model before fixing, on the CPU, for the size that `model` is built for: after stage one, or without it
    the fixed one with the head that it had before; of older versions' runs `model`, with the starting weights.
    """
    if file := weights_before(run):
        return weights.fitted(model, weights.read_state(file))
    if run.head_before.exists():
        return {**weights.read_state(weights_after(run)), **weights.read_state(run.head_before)}
    return {name: value.cpu() for name, value in model.state_dict().items()}


def curves(session: Session, run: RunDir, alphas: Sequence[float]) -> Curves:
    """Evaluate the mixtures on every set of the session, one pass over the images of each; on every rank."""
    start, end, res = (
        starting_state(run, session.for_size(session.config.data.res).model),
        weights.read_state(weights_after(run)),
        session.config.data.res,
    )
    models = [parts_with(session, interpolated(start, end, alpha)) for alpha in [0.0, *alphas]]
    found: Curves = {}
    for split in session.splits:
        first, *others = predict(session, models, res, f"alpha on {split}", split)
        found[split] = [Mixture(a, p.summary(), p.gain_over(first)) for a, p in zip(alphas, others, strict=True)]
    return found
