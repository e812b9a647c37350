"""Accuracy against test resolution: one pass over the validation images per resolution, and the best resolutions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fixres_dist.base.text import duration
from fixres_dist.models.build import gmacs
from fixres_dist.models.parts import Parts
from fixres_dist.runs.results import Gain, Summary
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session

Curve = dict[int, Summary]  # resolution in pixels -> accuracy


@dataclass(frozen=True)
class Cost:
    gmacs: float  # 1e9 multiply-adds per image
    images_per_second: float  # of the pass over all models, as measured here


@dataclass(frozen=True)
class Limit:
    """The most that an image may cost; None: no limit."""

    max_gmacs: float | None = None
    min_images_per_second: float | None = None

    def allows(self, cost: Cost) -> bool:
        return (self.max_gmacs is None or cost.gmacs <= self.max_gmacs) and (
            self.min_images_per_second is None or cost.images_per_second >= self.min_images_per_second
        )

    def __str__(self) -> str:
        texts = {"at most {:g} GMACs": self.max_gmacs, "at least {:g} images/s": self.min_images_per_second}
        return " and ".join(text.format(value) for text, value in texts.items() if value is not None)


@dataclass(frozen=True)
class Sweep:
    curves: dict[str, Curve]  # of each model, by label
    costs: dict[int, Cost]
    limit: Limit | None
    # Of `after` over each other model by label, each at its best resolution, and the images that both could decode.
    gains: dict[str, tuple[Gain, int]]

    def best(self, limit: Limit | None = None) -> dict[str, int]:
        """The best resolution of each model among those that `limit` allows; empty if there are none."""
        allowed = [res for res, cost in self.costs.items() if limit is None or limit.allows(cost)]
        return {
            label: best_res({res: curve[res] for res in allowed}) for label, curve in self.curves.items() if allowed
        }

    def record(self) -> dict[str, Any]:
        """As in sweep.json; docs/method.md has the keys."""
        found: dict[str, Any] = {
            "curves": {label: {res: asdict(s) for res, s in curve.items()} for label, curve in self.curves.items()},
            "costs": {res: asdict(cost) for res, cost in self.costs.items()},
            "best_res": self.best(),
        }
        if self.limit:
            found["limit"] = {**asdict(self.limit), "best_res": self.best(self.limit) or dict.fromkeys(self.curves)}
        for label, (gain, n) in self.gains.items():
            found[f"best_after_minus_best_{label}"] = {"points": gain.delta_top1, "ci95": gain.delta_ci95, "n": n}
        return found


def sweep(session: Session, models: Mapping[str, Parts], sizes: Sequence[int], limit: Limit | None) -> Sweep:
    """Evaluate every model, by label, on the validation images at every resolution in `sizes`; on every rank."""
    made, speeds = passes(session, models, sizes)
    curves = {label: {res: p.summary() for res, p in curve.items()} for label, curve in made.items()}
    costs = {res: Cost(round(gmacs(session.model, res), 4), round(speeds[res], 1)) for res in sizes}
    return Sweep(curves, costs, limit, gains_over(made, {label: best_res(curve) for label, curve in curves.items()}))


def passes(
    session: Session, models: Mapping[str, Parts], sizes: Sequence[int]
) -> tuple[dict[str, dict[int, Predictions]], dict[int, float]]:
    """(label -> resolution -> predictions, resolution -> images per second of the pass over all models)."""
    made: dict[str, dict[int, Predictions]] = {label: {} for label in models}
    speeds: dict[int, float] = {}
    worked, started = 0, time.monotonic()
    for k, res in enumerate(sizes, 1):
        pass_started = time.monotonic()
        found = predict(session, list(models.values()), res, f"{res} px")
        speeds[res] = len(session.val) / (time.monotonic() - pass_started)
        for curve, predictions in zip(made.values(), found, strict=True):
            curve[res] = predictions
        worked += res**2  # about what a pass costs
        eta_s = (time.monotonic() - started) * (sum(size**2 for size in sizes) / worked - 1)
        if session.ranks.is_main:
            scores = ", ".join(f"{label} {curve[res].summary().top1:.2f}" for label, curve in made.items())
            eta = f" | eta {duration(eta_s)}" if k < len(sizes) else ""
            print(f"{k}/{len(sizes)} {res} px: {scores} | {speeds[res]:,.0f} img/s{eta}", flush=True)
    return made, speeds


def best_res(curve: Curve) -> int:
    """The resolution with the highest top-1; of equals the smallest."""
    return max(curve, key=lambda res: (curve[res].top1, -res))


def gains_over(made: Mapping[str, Mapping[int, Predictions]], best: Mapping[str, int]) -> dict[str, tuple[Gain, int]]:
    """See Sweep.gains; empty unless before and after were evaluated."""
    if not {"before", "after"} <= set(made):
        return {}
    after, gains = made["after"][best["after"]], {}
    for label in (name for name in made if name != "after"):
        other = made[label][best[label]]
        gains[label] = after.gain_over(other), int((after.counted & other.counted).sum())
    return gains
