"""A finished run's part of `report --html`: what it measured, its curves and pictures, what ran, what happened, what it cost."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixres_dist.base.commands import command
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import read_lines, read_note
from fixres_dist.base.text import duration, markdown_table
from fixres_dist.config import reading
from fixres_dist.publishing import figures
from fixres_dist.publishing.html_page import verbatim
from fixres_dist.publishing.report import Row
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.starts import device_seconds
from fixres_dist.runs.states import details
from fixres_dist.training.calibration import reliability_of
from fixres_dist.training.predictions import Predictions

MOST_EVENTS = 200  # of a page; the newest
# Files of the run directory, and of the page's folder -> what they show, and the command that makes one that is missing.
SHOWN = {
    "Curves": {"training": ("loss in training, and top-1 of every evaluation", "")},
    "Test resolution": {"sweep": ("top-1 against test resolution, before and after", "sweep --res A,B,...")},
    "Pictures": {
        "crops": ("photographs of train as each stage trains on them, beside the same ones as they are tested", ""),
        "mistakes": ("the mistakes of which the fixed model is most sure", ""),
        "confusion": ("which class is taken for which, after fixing", ""),
    },
    "Confidence": {"reliability": ("accuracy against confidence, before and after", "")},
    "Between the two heads": {"alpha": ("top-1 from the starting head (0) to the fixed one (1)", "interpolate")},
    "What enters the classifier": {
        "activations": ("pooled activations against those in training", "sweep --activations")
    },
}


def pages(rows: Sequence[Row], out: Path) -> list[str]:
    """Of each run, in markdown. Runs of different folders may have one name: their files in `out` are told apart by position."""
    names = [row.root.name for row in rows]
    if len(set(names)) < len(names):
        names = [f"{k}-{name}" for k, name in enumerate(names, 1)]
    return [line for row, name in zip(rows, names, strict=True) for line in page(row, out, name)]


def page(row: Row, out: Path, prefix: str) -> list[str]:
    """The lines in markdown; draws what is not drawn yet into the folder `out`, from where its pictures are named, in files
    `PREFIX-*.png`."""
    run = RunDir(row.root)
    made = draw(run, out, prefix)
    text = [f"## {verbatim(run.name)}", "", f"{verbatim(row.results.sentence(run))}.", ""]
    text += [markdown_table(("", ""), ((name, verbatim(value)) for name, value in facts(run, row).items())), ""]
    for title, wanted in SHOWN.items():
        text += [f"### {title}", ""]
        for name, (what, how) in wanted.items():
            file = next((file for file in places(run, name, made) if file.exists()), None)
            if file:
                text += [f"![{what}](<{os.path.relpath(file, out)}>)", "", f"*{what}*", ""]
            elif how:
                words = how.split()
                text += [f"Not measured: `{command(words[0], '--run', run.root, *words[1:])}` does.", ""]
            else:
                text += [f"Not drawn: {what}.", ""]
    config = run.config()
    plan = redacted(read_note(run.root / "plan.txt"), config.cluster.env)
    for title, body in (("Plan", plan), ("Configuration", reading.dump(config, public=True))):
        text += [f"### {title}", "", *fenced(body), ""] if body else []
    return [*text, "### What happened", "", events(run), ""]


def places(run: RunDir, name: str, made: dict[str, Path]) -> Sequence[Path]:
    """Where a picture may be."""
    return (run.root / f"{name}.png", run.root / "pictures" / f"{name}.png", *([made[name]] if name in made else []))


def draw(run: RunDir, out: Path, prefix: str) -> dict[str, Path]:
    """Name -> PNG in `out` of the curves that follow from metrics.jsonl and the predictions."""
    made, lines = {}, read_lines(run.metrics, step=int)
    if lines:
        made["training"] = out / f"{prefix}-training.png"
        figures.training_plot(lines, made["training"])
    files = {when: run.root / "predictions" / f"{when}.npz" for when in ("before", "after")}
    found = {when: reliability_of(Predictions.read(file)) for when, file in files.items() if file.exists()}
    if known := {when: one for when, one in found.items() if one}:
        made["reliability"] = out / f"{prefix}-reliability.png"
        figures.reliability_plot(known, made["reliability"])
    return made


def facts(run: RunDir, row: Row) -> dict[str, str]:
    r, state = row.results, run.state()
    restarts = ", ".join(f"{count} {why}" for why, count in state.restarts.items() if count)
    versions = ", ".join(f"{name} {r.versions[name]}" for name in ("torch", "timm") if r.versions.get(name))
    found = {
        "model": f"{r.timm_name}, {row.parameters_m:.3g} M parameters, {row.multiply_adds_g:.3g} G multiply-adds at {r.res} px",
        "data": f"{row.data}, {row.classes} classes, {r.n:,} validation images",
        "hardware": f"{row.hardware} on {len(r.hardware.nodes)} node(s)",
        "time": f"{duration(r.seconds)} of training and evaluation",
        "cost": cost(run, row),
        "starts": f"{1 + sum(state.restarts.values())}" + (f"; restarts: {restarts}" if restarts else ""),
        "arithmetic": f"{r.precision}, {r.optimizer}, engine {r.engine}",
        "versions": versions,
    }
    if means := r.measures.get("after"):
        found["by class"] = (
            f"macro F1 {means.macro_f1:.2f}, precision {means.macro_precision:.2f}, recall {means.macro_recall:.2f}"
        )
    return found


def cost(run: RunDir, row: Row) -> str:
    """What the run has held over all its starts, waits and failures within them included."""
    hours, hardware = device_seconds(run) / 3600, row.results.hardware
    if hardware.gpu:
        return f"{hours:.3g} GPU-hours"
    return f"{hours * hardware.cpus:.3g} core-hours" if hardware.cpus else f"{hours:.3g} hours of a rank"


def fenced(text: str) -> list[str]:
    """As code: a fence longer than any in it."""
    return ["~~~~~~", *text.rstrip().replace("~~~~~~", "~~~~~").splitlines(), "~~~~~~"]


def events(run: RunDir) -> str:
    found = read_lines(run.events, event=str, time=float)
    rows = [
        (time.strftime("%F %T", time.localtime(x["time"])), verbatim(x["event"]), verbatim(short(x))) for x in found
    ]
    note = f"\n\n{len(rows) - MOST_EVENTS} earlier ones stand in events.jsonl." if len(rows) > MOST_EVENTS else ""
    return markdown_table(("time", "event", ""), rows[-MOST_EVENTS:]) + note


def short(event: dict[str, Any]) -> str:
    text = redacted(details(event))
    return text if len(text) <= 240 else f"{text[:240]} ..."
