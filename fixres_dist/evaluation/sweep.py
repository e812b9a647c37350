"""Accuracy against test resolution, resize rule and crop_pct: one pass over the validation images for each, and the best."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fixres_dist.base.text import duration
from fixres_dist.config.schema import ResizeRule
from fixres_dist.data.geometry import Resize
from fixres_dist.models.parts import Parts
from fixres_dist.models.resizing import gmacs
from fixres_dist.runs.results import Gain, Summary
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session

Curve = dict[int, Summary]  # resolution in pixels -> accuracy


@dataclass(frozen=True)
class Crop:
    """How photographs become pictures of any resolution: a value of data.resize_rule and one of data.crop_pct."""

    resize_rule: ResizeRule
    crop_pct: float | Literal["auto"]

    def __str__(self) -> str:
        return self.resize_rule + ("" if self.crop_pct == "auto" else f" {self.crop_pct:g}")

    def of(self, session: Session) -> Session:
        """The session with its pictures cut this way."""
        config = session.config
        data = replace(config.data, resize_rule=self.resize_rule, crop_pct=self.crop_pct)
        return replace(session, config=replace(config, data=data))


@dataclass(frozen=True)
class Point:
    """The accuracy of a model, by its label, on pictures of `res` px cut by one rule with one crop_pct."""

    model: str
    res: int
    resize_rule: str
    crop_pct: float
    summary: Summary

    def record(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "summary"}
        return {**own, **asdict(self.summary)}

    def __str__(self) -> str:
        return f"{self.model} {self.res} px {self.resize_rule} {self.crop_pct:g} ({self.summary.top1:.2f})"


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
    curves: dict[str, Curve]  # of each model, by label; with several crops of each model and crop: "before, timm 0.875"
    costs: dict[int, Cost]
    limit: Limit | None
    # Of `after` over each other model by label, each at its best, and the images that both could decode.
    gains: dict[str, tuple[Gain, int]]
    points: tuple[Point, ...] = ()  # where there are several crops

    def best(self, limit: Limit | None = None) -> dict[str, int]:
        """The best resolution of each model among those that `limit` allows; empty if there are none."""
        allowed = [res for res, cost in self.costs.items() if limit is None or limit.allows(cost)]
        return {
            label: best_res({res: curve[res] for res in allowed}) for label, curve in self.curves.items() if allowed
        }

    def best_points(self, limit: Limit | None = None) -> list[Point]:
        """The best point of each model among those that `limit` allows."""
        found: dict[str, Point] = {}
        for point in self.points:
            if limit is None or limit.allows(self.costs[point.res]):
                found[point.model] = max(found.get(point.model, point), point, key=lambda p: (p.summary.top1, -p.res))
        return list(found.values())

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
        if self.points:
            found["points"] = [point.record() for point in self.points]
            found["best"] = {point.model: point.record() for point in self.best_points()}
        return found


Made = dict[tuple[str, Crop], dict[int, Predictions]]  # (label, crop) -> resolution -> predictions


def sweep(
    session: Session,
    models: Mapping[str, Parts],
    sizes: Sequence[int],
    limit: Limit | None,
    crops: Sequence[Crop] = (),
) -> Sweep:
    """Evaluate every model, by label, on the validation images at every resolution in `sizes`; on every rank.

    `crops`: with pictures cut in each of these ways; none: as the session's settings say.
    """
    data = session.config.data
    cuts = list(crops) or [Crop(data.resize_rule, data.crop_pct)]
    made, speeds = passes(session, models, sizes, cuts)
    names = {key: f"{key[0]}, {key[1]}" if len(cuts) > 1 else key[0] for key in made}
    curves = {names[key]: {res: p.summary() for res, p in curve.items()} for key, curve in made.items()}
    costs = {res: Cost(round(gmacs(session.model, res), 4), round(speeds[res], 1)) for res in sizes}
    best: dict[str, tuple[float, int, Predictions]] = {}  # label -> (top-1, -resolution, predictions)
    for key, curve in made.items():
        res = best_res(curves[names[key]])
        found = (curves[names[key]][res].top1, -res, curve[res])
        best[key[0]] = max(best.get(key[0], found), found, key=lambda one: one[:2])
    gains = gains_over({label: one[2] for label, one in best.items()})
    return Sweep(curves, costs, limit, gains, points(session, made) if len(cuts) > 1 else ())


def points(session: Session, made: Made) -> tuple[Point, ...]:
    """Each once: two crops may be one at a resolution, as a rule's own crop_pct and the same by number."""
    found = {}
    for (label, crop), curve in made.items():
        for res, predictions in curve.items():
            crop_pct = session.spec.crop_pct_at(crop.of(session).config.data, res)
            found[label, res, crop.resize_rule, crop_pct] = predictions.summary()
    return tuple(Point(*key, summary) for key, summary in sorted(found.items(), key=lambda item: item[0][1:]))


def passes(
    session: Session, models: Mapping[str, Parts], sizes: Sequence[int], crops: Sequence[Crop]
) -> tuple[Made, dict[int, float]]:
    """(predictions, resolution -> images per second of a pass over all models)."""
    made: Made = {(label, crop): {} for crop in crops for label in models}
    seen: dict[tuple[int, Resize], list[Predictions]] = {}  # several crops may be one at a resolution
    speeds: dict[int, float] = {}
    todo = [(res, crop) for res in sizes for crop in crops]
    worked, started = 0, time.monotonic()
    for k, (res, crop) in enumerate(todo, 1):
        cut, pass_started = crop.of(session), time.monotonic()
        key, note = (res, cut.resize(res)), f"{res} px" + (f" {crop}" if len(crops) > 1 else "")
        if key not in seen:
            partial = cut.partial(list(models.values()), res, "val")
            seen[key] = predict(cut, list(models.values()), res, note, partial=partial)
            elapsed_s = session.ranks.from_main(partial.seconds) if partial else time.monotonic() - pass_started
            speeds[res] = len(session.val) / elapsed_s
        for label, predictions in zip(models, seen[key], strict=True):
            made[label, crop][res] = predictions
        worked += res**2  # about what a pass costs
        eta_s = (time.monotonic() - started) * (sum(size**2 for size, _ in todo) / worked - 1)
        if session.ranks.is_main:
            scores = ", ".join(f"{label} {made[label, crop][res].summary().top1:.2f}" for label in models)
            eta = f" | eta {duration(eta_s)}" if k < len(todo) else ""
            print(f"{k}/{len(todo)} {note}: {scores} | {speeds[res]:,.0f} img/s{eta}", flush=True)
    return made, speeds


def best_res(curve: Curve) -> int:
    """The resolution with the highest top-1; of equals the smallest."""
    return max(curve, key=lambda res: (curve[res].top1, -res))


def gains_over(best: Mapping[str, Predictions]) -> dict[str, tuple[Gain, int]]:
    """See Sweep.gains; empty unless before and after were evaluated."""
    if not {"before", "after"} <= set(best):
        return {}
    after, gains = best["after"], {}
    for label, other in best.items():
        if label != "after":
            gains[label] = after.gain_over(other), int((after.counted & other.counted).sum())
    return gains
