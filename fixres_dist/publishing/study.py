"""A study: models at several resolutions before and after fixing, which point is best at each cost, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError
from fixres_dist.cluster.grid import differing
from fixres_dist.config import reading
from fixres_dist.data import class_maps
from fixres_dist.publishing import report
from fixres_dist.publishing.figures import interval
from fixres_dist.publishing.model_card import data_name
from fixres_dist.runs import looks
from fixres_dist.runs.results import Gain
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Point:
    """A network at one resolution."""

    model: str  # the name of its curve
    timm_name: str
    classes: int
    when: str  # before | after fixing
    res: int  # pixels
    gmacs: float  # 1e9 multiply-adds of a picture
    run: RunDir
    file: Path  # of the predictions
    predictions: Predictions
    sample_list: str  # fingerprint of the images
    images_per_second: float | None = None  # None: not measured

    @property
    def top1(self) -> float:
        return self.predictions.summary().top1

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % interval of top-1, in percent."""
        below, above = interval(self.top1, int(self.predictions.counted.sum()))
        return round(self.top1 - below, 4), round(self.top1 + above, 4)

    def over(self, other: Point, of: int = 1) -> Gain:
        return self.predictions.gain_over(other.predictions, of)

    def __str__(self) -> str:
        return f"{self.model} at {self.res} px {self.when} fixing"

    def record(self) -> dict[str, Any]:
        keys = ("model", "when", "res", "gmacs", "images_per_second")
        found = {key: getattr(self, key) for key in keys} | asdict(self.predictions.summary()) | {"ci95": self.ci95}
        return {**found, "run": str(self.run.root), "predictions": str(self.file)}


CostOf = Callable[[Point], float]
END = 2**16  # bytes at the end of a file of weights, of which another training leaves none as they are


def multiply_adds(point: Point) -> float:
    return point.gmacs


def seconds_per_image(point: Point) -> float:
    """Infinite where it has not been measured."""
    return 1 / point.images_per_second if point.images_per_second else math.inf


@dataclass(frozen=True)
class Choice:
    """The best point within every budget from its own cost up to that of the next choice."""

    best: Point
    over_cheaper: Gain | None  # over the choice before this one
    as_good: Point | None  # the cheapest point below it in cost whose difference from it may be none

    def record(self) -> dict[str, Any]:
        named = {"best": self.best, "not_told_apart_from": self.as_good}
        points = {key: p and {"model": p.model, "when": p.when, "res": p.res} for key, p in named.items()}
        gain = asdict(self.over_cheaper) if self.over_cheaper else None
        return {**points, "gmacs": self.best.gmacs, "top1": self.best.top1, "over_the_cheaper_choice": gain}


def front(points: Iterable[Point], cost: CostOf) -> list[Point]:
    """The points that no other one of at most the same cost equals or beats, cheapest first (the Pareto front).

    Of equals the one before fixing, which needs no training.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (cost(p), -p.top1, p.when == "after")):
        if not found or point.top1 > found[-1].top1:
            found.append(point)
    return found


def choices(points: Sequence[Point], cost: CostOf) -> list[Choice]:
    """The best point at each cost, cheapest first.

    `as_good` allows for the choice among all points (Bonferroni's correction), since the best of many is partly luck.
    """
    found: list[Choice] = []
    for best in front(points, cost):
        cheaper = sorted((p for p in points if cost(p) < cost(best)), key=cost)
        as_good = next((p for p in cheaper if best.over(p, of=len(points)).delta_ci95[0] <= 0), None)
        found.append(Choice(best, best.over(found[-1].best) if found else None, as_good))
    return found


@dataclass(frozen=True)
class Study:
    points: list[Point]  # by model, before first, then by resolution
    unfinished: list[dict[str, Any]]  # the other runs, as `report --json` has them
    notes: list[str]  # what a reader has to know
    data: str
    evaluations: int  # on the validation set, by all runs and the commands about them (runs/looks.py)

    @property
    def n(self) -> int:
        """Images of the validation set."""
        return len(self.points[0].predictions.predicted) if self.points else 0

    def with_speeds(self, speeds: Mapping[tuple[str, int], float]) -> Study:
        """`speeds`: images per second by timm name and resolution."""
        return replace(
            self, points=[replace(p, images_per_second=speeds.get((p.timm_name, p.res))) for p in self.points]
        )

    @property
    def measured(self) -> bool:
        return any(point.images_per_second for point in self.points)

    def gains(self) -> list[tuple[Point, Point, Gain]]:
        """(before, after, gain) of each network that was fixed, at the resolution where it was."""
        before = {(p.model, p.res): p for p in self.points if p.when == "before"}
        after = [p for p in self.points if p.when == "after"]
        return [(before[p.model, p.res], p, p.over(before[p.model, p.res])) for p in after]

    def record(self) -> dict[str, Any]:
        """As study.json holds it."""
        found: dict[str, Any] = {"data": self.data, "n": self.n, "evaluations": self.evaluations}
        found["points"] = [point.record() for point in self.points]
        found["gains"] = [{"model": a.model, "res": a.res, **asdict(gain)} for _, a, gain in self.gains()]
        found["best"] = {"gmacs": [choice.record() for choice in choices(self.points, multiply_adds)]}
        if self.measured:
            found["best"]["images_per_second"] = [c.record() for c in choices(self.points, seconds_per_image)]
        return found | {"unfinished": self.unfinished, "notes": self.notes}


def read(runs: Iterable[RunDir]) -> Study:
    """The study of these runs: each is a point after fixing, and several before. Raises UserError where the images differ."""
    finished, unfinished = [], []
    for run in {run.root.resolve(): run for run in runs}.values():
        _, others = report.rows([run])
        unfinished += others
        finished += [] if others else [run]
    names, points = curves(finished), []
    for run in finished:
        points += points_of(run, names[run.root])
    check_same_images(points)
    kept, notes = merged(points), several_networks(finished, names)
    order = list(dict.fromkeys(names.values()))
    kept.sort(key=lambda p: (order.index(p.model), p.when == "after", p.res))
    data = data_name(finished[0].config()) if finished else ""
    made = looks.by_command(finished, points[0].sample_list).total() if points else 0
    return Study(kept, unfinished, notes, data, made)


def curves(runs: Sequence[RunDir]) -> dict[Path, str]:
    """A name for each run, which all have that differ in resolution alone: the model's, and settings where it needs them."""
    by_model: dict[str, list[RunDir]] = {}
    for run in runs:
        by_model.setdefault(run.config().model.name, []).append(run)
    found: dict[Path, str] = {}
    for model, several in by_model.items():
        settings = [settings_of(run) for run in several]
        keys = differing(settings)
        for run, values in zip(several, settings, strict=True):
            found[run.root] = ", ".join([model, *(f"{key}={values.get(key, 'none')}" for key in keys)])
    taken: set[tuple[str, int]] = set()
    for run in runs:
        key = found[run.root], run.config().data.res
        if key in taken:  # the same settings twice
            found[run.root] += f" ({run.name})"
        taken.add(key)
    return found


def settings_of(run: RunDir) -> dict[str, str]:
    identity = reading.identity(run.config())
    flat = {f"{section}.{key}": str(v) for section, keys in identity.items() for key, v in (keys or {}).items()}
    return {key: value for key, value in flat.items() if key != "data.res"}


def points_of(run: RunDir, model: str) -> list[Point]:
    """Of a finished run: before fixing at each resolution at which it was measured, and after."""
    config = run.config()
    classes, folder = len(class_maps.trained_classes(config, run.root, "val")), run.root / "predictions"
    files = [("before", config.data.res, folder / "before.npz"), ("after", config.data.res, folder / "after.npz")]
    for file in folder.glob("before-*.npz"):
        size = file.stem.removeprefix("before-")
        files += [("before", int(size), file)] if size.isdecimal() else []
    found = []
    for when, res, file in files:
        gmacs = report.costs(replace(config, data=replace(config.data, res=res)), classes)[1]
        made, sample_list = Predictions.read_with_list(file)
        name = config.model.timm_name
        found.append(Point(model, name, classes, when, res, round(gmacs, 4), run, file, made, sample_list))
    return found


def check_same_images(points: Sequence[Point]) -> None:
    """Raise UserError for points that were measured on other images than the first."""
    for point in points:
        if point.sample_list != points[0].sample_list:
            raise UserError(
                f"{point.run.root} was measured on another validation set than {points[0].run.root}, so the two cannot be "
                "compared image by image. Accepted: runs of one validation set. Next: leave one of the two out"
            )


def merged(points: Sequence[Point]) -> list[Point]:
    """Each point once: all runs of a curve measure its network before fixing, some at the same resolution, where a run's
    own counts."""
    found: dict[tuple[str, str, int], Point] = {}
    for point in sorted(points, key=lambda p: p.file.stem not in ("before", "after")):
        found.setdefault((point.model, point.when, point.res), point)
    return list(found.values())


def several_networks(runs: Sequence[RunDir], names: Mapping[Path, str]) -> list[str]:
    """A note for each curve whose runs have trained stage one more than once."""
    ends: dict[str, set[bytes]] = {}
    for run in runs:
        if run.pretrained.exists():
            with run.pretrained.open("rb") as file:
                file.seek(max(0, run.pretrained.stat().st_size - END))
                ends.setdefault(names[run.root], set()).add(file.read())
    text = "{} before fixing is {} networks: its runs did not share stage one. Each gain compares a run with itself."
    return [text.format(model, len(found)) for model, found in ends.items() if len(found) > 1]
