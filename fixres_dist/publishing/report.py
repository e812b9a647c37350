"""Finished runs beside the published numbers and timm's: the rows of `report` and its markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import StorageError, UserError, printable
from fixres_dist.base.text import duration, markdown_table
from fixres_dist.cluster import status
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps
from fixres_dist.evaluation import robustness
from fixres_dist.evaluation.exported import fitted_temperature
from fixres_dist.publishing.model_card import data_name, evaluations, of_sets
from fixres_dist.runs import looks
from fixres_dist.runs.results import BeforeAfter, Results
from fixres_dist.runs.rundir import RunDir

IMAGENET_CLASSES = 1000
HEAD = (
    *("run", "model", "data", "M parameters", "G multiply-adds", "trained at", "tested at", "before", "after"),
    *("gain (paired 95 %)", "n", "published top-1", "time", "hardware"),
)
MEASURES = ("run", "", "precision", "recall", "F1", "calibration error", "mean confidence")
FIGURES = {
    "sweep.png": "accuracy against test resolution",
    "activations.png": "activation statistics at train and test resolution",
    "alpha.png": "between the starting head (0) and the fixed one (1)",
    "pictures/confusion.png": "which class is taken for which after fixing",
}


@dataclass(frozen=True)
class Row:
    """A finished run, with what its model costs and what was published for it."""

    run: str
    root: Path  # of the run
    results: Results
    data: str
    classes: int
    train_res: int  # of the weights before fixing
    parameters_m: float  # millions
    multiply_adds_g: float  # 1e9, of a picture at the run's resolution
    published: dict[str, Any] | None  # a row of configs/published.csv
    evaluations: list[dict[str, Any]]  # records of the other sets
    verdict: str  # of a run that made its weights worse, as Results.verdict has it
    robustness: str  # of a run that lost on one of the sets, as robustness.warning has it
    temperature: str  # of its export, in a sentence; empty: none

    @property
    def hardware(self) -> str:
        return f"{self.results.world_size} x {self.results.hardware.device}"

    def record(self) -> dict[str, Any]:
        """As `report --json` prints it."""
        own = {key: value for key, value in vars(self).items() if key not in ("results", "root")}
        return {**asdict(self.results), **own, "hardware": self.hardware}

    def cells(self) -> list[object]:
        """Under HEAD."""
        r, p, published = self.results, self.published, ""
        if p:
            published = f"{p['base_top1']} at {p['base_test_res']} -> {p['fix_top1']} at {p['fix_test_res']}"
            published += f"; timm's start: {p['timm_base_top1']}"
        model = [self.run, r.timm_name, f"{self.data}, {self.classes} classes", f"{self.parameters_m:.3g}"]
        others = [f"; {one.top1:.2f} at {res} px" for res, one in r.before_at.items()]
        others += [
            f"; {one.top1:.2f} at {one.res} px by a logistic classifier on the untouched network" for one in r.floor
        ]
        best = r.best_before if r.over_the_best() else None
        gain = f"{r.gain}; over the best before, {best.res} px: {best}{best.corrected}" if best else r.gain
        accuracy = [f"{r.before.top1:.2f}{''.join(others)}", f"{r.after.top1:.2f}", gain, r.n]
        resolutions = [f"{self.multiply_adds_g:.3g}", self.train_res, r.res]
        return [*model, *resolutions, *accuracy, published, duration(r.seconds), self.hardware]

    def sets(self) -> list[BeforeAfter]:
        """The validation split, and the other sets that were evaluated."""
        return [BeforeAfter.read(asdict(self.results), set="validation"), *of_sets(self.evaluations)]


def row(run: RunDir) -> Row:
    config = run.config()
    classes = len(class_maps.trained_classes(config, run.root, "val"))
    parameters, multiply_adds_g, trained_at = costs(config, classes)
    return Row(
        run=run.name,
        root=run.root,
        results=Results.read(run),
        data=data_name(config),
        classes=classes,
        train_res=config.pretrain.res if config.pretrain else trained_at,
        parameters_m=round(parameters / 1e6, 3),
        multiply_adds_g=round(multiply_adds_g, 3),
        published=recipes.published().get((config.model.name, config.model.weights)),
        evaluations=evaluations(run),
        verdict=Results.read(run).verdict(run),
        robustness=robustness.warning(run, of_sets(evaluations(run))),
        temperature=fitted.sentence() if (fitted := fitted_temperature(run.root / "export")) else "",
    )


def costs(config: Config, classes: int) -> tuple[int, float, int]:
    """(parameters, 1e9 multiply-adds of a picture at the run's resolution, resolution of the starting weights)."""
    model, res = config.model, config.data.res
    if model.name in recipes.model_names():
        recipe = recipes.find(model.name, model.weights if model.weights in ("ns", "ap") else "")
        if recipe.facts and recipe.values["model"]["timm_name"] == model.timm_name:
            multiply_adds_g = recipe.facts.multiply_adds_g * (res / recipe.facts.res) ** 2
            return recipe.facts.total(classes), multiply_adds_g, recipe.facts.train_res
    from fixres_dist.models import costs as counted
    from fixres_dist.models.build import preprocessing

    found = counted.costs(model.timm_name, classes, res)
    return found.parameters, found.multiply_adds_g, preprocessing(model.timm_name).train_res


def rows(runs: Iterable[RunDir]) -> tuple[list[Row], list[dict[str, Any]]]:
    """The finished runs; and name, state, step, total_steps and reason of the others, as `status` has them: those without
    results, and those whose files are damaged, which the reason says."""
    found, others = [], []
    for run in runs:
        try:
            found.append(row(run))
        except (UserError, StorageError) as error:
            others.append((run, str(error)))
    keys = ("name", "state", "step", "total_steps", "reason")
    told = [{key: getattr(r, key) for key in keys} for r in status.rows(run for run, _ in others)]
    for one, (run, why) in zip(told, others, strict=True):
        if run.done.exists() and why not in one["reason"]:
            one["reason"] = "; ".join(filter(None, (one["reason"], why)))
    return found, told


def of_imagenet(rows: Iterable[Row]) -> bool:
    """Whether a run may be compared with the published numbers: of one of their models, on as many classes."""
    return any(row.published and row.classes == IMAGENET_CLASSES for row in rows)


def published_curves() -> dict[str, list[tuple[float, float, float]]]:
    """(parameters in millions, 1e9 multiply-adds, top-1 in percent on ImageNet) of each published model.

    18 models before and after fixing, from arXiv 2003.08237.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for recipe in recipes.every():
        facts, p = recipe.facts, recipe.published
        assert facts is not None
        assert p is not None
        name = {"ns": "Noisy Student", "ap": "AdvProp"}[recipe.weights]
        for label, kind in ((name, "base"), (f"{name}, fixed", "fix")):
            cost = facts.multiply_adds_g * (int(p[f"{kind}_test_res"]) / facts.res) ** 2
            curves.setdefault(label, []).append((float(p["params_m"]), cost, float(p[f"{kind}_top1"])))
    return {label: sorted(points) for label, points in curves.items()}


def markdown(runs: Sequence[RunDir], rows: Sequence[Row], others: Sequence[dict[str, Any]], out: Path) -> str:
    """report.md of what `rows` has found; its links to the runs' figures start from the folder `out`."""
    text = ["# Runs", "", markdown_table(HEAD, (row.cells() for row in rows)), ""]
    if rows:
        text += ["![top-1 of each run before and after fixing](gains.png)", ""]
        text += ["![top-1 against parameters and multiply-adds](report.png)", ""]
        text += ["before and after are at the test resolution, and before also at others.", ""]
    if of_imagenet(rows):
        text += ["Published: arXiv 2003.08237, on ImageNet.", ""]
    text += [line for row in rows if row.verdict for line in (f"**{row.run}**: {row.verdict}.", "")]
    for row in rows:
        if choice := row.results.choice:
            text += [f"## What {row.run} has chosen", "", f"{choice.sentence()}.", "", choice.table(), ""]
    robust = [
        (row.run, line.set, line.res, f"{line.before.top1:.2f}", f"{line.after.top1:.2f}", line.gain)
        for row in rows
        if row.evaluations
        for line in row.sets()
    ]
    if robust:
        head = ("run", "set", "px", "before", "after", "gain (paired 95 %)")
        text += ["## Gain and robustness", "", markdown_table(head, robust), ""]
        text += [line for row in rows if row.robustness for line in (f"**{row.run}**: {row.robustness}.", "")]
    measured = [
        (row.run, when, *(f"{value:.2f}" for value in asdict(one).values()))
        for row in rows
        for when, one in row.results.measures.items()
    ]
    text += [line for said in looks.sentences([RunDir(row.root) for row in rows]) for line in (f"{said}.", "")]
    if measured:
        text += ["## Measures on the validation split (%)", "", markdown_table(MEASURES, measured), ""]
        text += [line for row in rows if row.temperature for line in (f"{row.run}: {row.temperature}.", "")]
        text += [
            "Means over the classes, as scikit-learn's `macro`. A calibrated model is as often right as it is sure.",
            "",
        ]
    for run in runs:
        found = {note: run.root / file for file, note in FIGURES.items() if (run.root / file).exists()}
        links = [f"![{note}]({os.path.relpath(file, out)})" for note, file in found.items()]
        text += [f"## {run.name}", "", *links, ""] if links else []
    if others:
        lines = [(w["name"], w["state"], f"{w['step']} of {w['total_steps'] or '?'}", w["reason"]) for w in others]
        text += ["## Not finished, or damaged", "", markdown_table(("run", "state", "step", "why"), lines), ""]
    return printable("\n".join(text))
