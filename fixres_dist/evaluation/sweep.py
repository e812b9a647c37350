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
        texts = [
            "" if self.max_gmacs is None else f"at most {self.max_gmacs:g} GMACs",
            "" if self.min_images_per_second is None else f"at least {self.min_images_per_second:g} images/s",
        ]
        return " and ".join(filter(None, texts))


@dataclass(frozen=True)
class BestGain:
    """Of the fixed model at its best resolution over another one at its own, on the `n` images that both could decode."""

    gain: Gain
    n: int


@dataclass(frozen=True)
class Sweep:
    curves: dict[str, Curve]  # of each model, by label
    costs: dict[int, Cost]
    limit: Limit | None
    gains: dict[str, BestGain]  # by the label of the other model; empty unless before and after were evaluated

    @property
    def best(self) -> dict[str, int]:
        """The best resolution of each model."""
        return {label: best_res(curve) for label, curve in self.curves.items()}

    @property
    def best_within_limit(self) -> dict[str, int] | None:
        """The same of the resolutions that the limit allows; None if there are none."""
        allowed = [res for res, cost in self.costs.items() if self.limit is None or self.limit.allows(cost)]
        found = {label: {res: curve[res] for res in allowed} for label, curve in self.curves.items()}
        return {label: best_res(curve) for label, curve in found.items()} if allowed else None

    def record(self) -> dict[str, Any]:
        """As in sweep.json; docs/method.md has the keys."""
        found: dict[str, Any] = {
            "curves": {label: {res: asdict(s) for res, s in curve.items()} for label, curve in self.curves.items()},
            "costs": {res: asdict(cost) for res, cost in self.costs.items()},
            "best_res": self.best,
        }
        if self.limit:
            within = self.best_within_limit or dict.fromkeys(self.curves)
            found["limit"] = {**asdict(self.limit), "best_res": within}
        for label, best in self.gains.items():
            row = {"points": best.gain.delta_top1, "ci95": best.gain.delta_ci95, "n": best.n}
            found[f"best_after_minus_best_{label}"] = row
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


def gains_over(made: Mapping[str, Mapping[int, Predictions]], best: Mapping[str, int]) -> dict[str, BestGain]:
    """The gain of `after` over each other model, each at its best resolution, paired image by image."""
    if not {"before", "after"} <= set(made):
        return {}
    after, gains = made["after"][best["after"]], {}
    for label in (name for name in made if name != "after"):
        other = made[label][best[label]]
        gains[label] = BestGain(after.gain_over(other), int((after.counted & other.counted).sum()))
    return gains
