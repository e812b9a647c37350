"""Runs beside the published numbers and timm's: the rows and the markdown of `report`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fixres_dist.base.text import duration
from fixres_dist.cluster import status
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.publishing import model_card
from fixres_dist.runs.rundir import RunDir

KEPT = ("model", "timm_name", "weights", "res", "n", "before", "after", "delta_top1", "delta_ci95", "seconds")
HEAD = "run | model | data | M parameters | G multiply-adds | trained at | tested at | before | after | gain (paired 95 %) | n"
HEAD += " | published top-1 | time | hardware"
FIGURES = {
    "sweep.png": "accuracy against test resolution",
    "activations.png": "activation statistics at train and test resolution",
    "alpha.png": "between the starting head (0) and the fixed one (1)",
}


def costs(config: Config, classes: int) -> tuple[int, float, int]:
    """(parameters, 1e9 multiply-adds of a picture at the run's resolution, the starting weights' resolution)."""
    model, res = config.model, config.data.res
    if model.name in recipes.model_names():
        recipe = recipes.find(model.name, model.weights if model.weights in ("ns", "ap") else "")
        if recipe.facts and recipe.values["model"]["timm_name"] == model.timm_name:
            cost = recipe.facts.multiply_adds_g * (res / recipe.facts.res) ** 2
            return recipe.facts.total(classes), cost, recipe.facts.train_res
    import torch

    from fixres_dist.models.build import build_model, gmacs, native_size

    with torch.device("meta"):
        built: Any = build_model(model.timm_name, classes)
    count = sum(p.numel() for p in built.parameters())
    return count, gmacs(built, res), native_size(model.timm_name)


def row(run: RunDir) -> dict[str, Any]:
    """All that the report says of a finished run, in plain numbers."""
    config, found, classes = run.config(), model_card.results(run), len(model_card.class_names(run))
    parameters, multiply_adds_g, trained_at = costs(config, classes)
    return {
        "run": run.name,
        **{key: found[key] for key in KEPT},
        "hardware": f"{found['world_size']} x {found['hardware']['device']}",
        "data": model_card.data_name(config),
        "classes": classes,
        "train_res": config.pretrain.res if config.pretrain else trained_at,
        "parameters_m": round(parameters / 1e6, 3),
        "multiply_adds_g": round(multiply_adds_g, 3),
        "published": recipes.published().get((config.model.name, config.model.weights)),
        "evaluations": model_card.evaluations(run),
    }


def unfinished(runs: Iterable[RunDir]) -> list[dict[str, Any]]:
    """name, state, step, total_steps, reason of the runs without results, as `status` has them."""
    keys = ("name", "state", "step", "total_steps", "reason")
    return [
        {key: getattr(r, key) for key in keys} for r in status.rows(run for run in runs if not run.results.exists())
    ]


def published_curves() -> dict[str, list[tuple[float, float, float]]]:
    """(parameters in millions, 1e9 multiply-adds, top-1) of the note's 18 rows, before and after fixing, on ImageNet."""
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


def table(head: str, lines: Iterable[Sequence[object]]) -> list[str]:
    rule = "|" + "-|" * (head.count("|") + 1)
    return [f"| {head} |", rule, *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def cells(r: dict[str, Any]) -> list[object]:
    """A row under HEAD."""
    p, published = r["published"], ""
    if p:
        published = f"{p['base_top1']} at {p['base_test_res']} -> {p['fix_top1']} at {p['fix_test_res']}"
        published += f"; timm's start: {p['timm_base_top1']}"
    model = [r["run"], r["timm_name"], f"{r['data']}, {r['classes']} classes", f"{r['parameters_m']:.3g}"]
    model += [f"{r['multiply_adds_g']:.3g}", r["train_res"], r["res"]]
    return [*model, *model_card.accuracy(r), r["n"], published, duration(r["seconds"]), r["hardware"]]


def markdown(runs: Sequence[RunDir], rows: list[dict[str, Any]], out: Path) -> str:
    """report.md in the folder `out`, which the links to the runs' figures start from."""
    text = [
        "# Runs",
        "",
        *table(HEAD, map(cells, rows)),
        "![top-1 against parameters and multiply-adds](report.png)",
        "",
    ]
    text += ["Published: arXiv 2003.08237, on ImageNet. before and after are both at the test resolution.", ""]
    robust = [
        (r["run"], name, e["res"], *model_card.accuracy(e))
        for r in rows
        if r["evaluations"]
        for name, e in [("validation", r), *((e["set"], e) for e in r["evaluations"])]
    ]
    if robust:
        head = "run | set | px | before | after | gain (paired 95 %)"
        text += ["## Gain and robustness", "", *table(head, robust)]
    for run in runs:
        found = {note: run.root / file for file, note in FIGURES.items() if (run.root / file).exists()}
        links = [f"![{note}]({os.path.relpath(file, out)})" for note, file in found.items()]
        text += [f"## {run.name}", "", *links, ""] if links else []
    if waiting := unfinished(runs):
        lines = [(w["name"], w["state"], f"{w['step']} of {w['total_steps'] or '?'}", w["reason"]) for w in waiting]
        text += ["## Not finished", "", *table("run | state | step | why", lines)]
    return "\n".join(text)
