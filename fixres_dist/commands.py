"""`python -m fixres_dist evaluate | sweep | fetch`: a model from a run or a file, on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fixres_dist import recipes
from fixres_dist.errors import EXIT_DONE, UserError
from fixres_dist.rundir import RunDir, write
from fixres_dist.subjects import Subject, add_source, opened, source, split_with, subjects, weights_after


def add_parsers(commands: Any) -> None:
    p = commands.add_parser("evaluate", help="top-1, top-5 and loss of a run or a weights file, every image once")
    add_source(p)
    p.add_argument("--res", help="test resolution in pixels; default: the run's")
    p.add_argument("--split", default="val", help="folder of the data set to evaluate on; default: val")
    p.add_argument("--json", type=Path, help="also write the result here")
    p.set_defaults(func=evaluate)
    p = commands.add_parser("sweep", help="accuracy against test resolution, before and after: table, JSON and PNG")
    add_source(p)
    p.add_argument("--res", required=True, help="comma-separated resolutions, such as 224,256,288")
    p.add_argument(
        "--also", action="append", default=[], metavar="LABEL=RUN", help="another run's curve, such as a control"
    )
    p.add_argument("--out", type=Path, help="where sweep.json and sweep.png go; default: the run directory")
    p.set_defaults(func=sweep)
    p = commands.add_parser("fetch", help="put pretrained weights where offline nodes find them")
    p.add_argument("--model", required=True, help="a recipe or a timm model name")
    p.add_argument("--weights", default="", help="ns or ap for the recipes")
    p.set_defaults(func=fetch)


def evaluate(args: argparse.Namespace) -> int:
    config = source(args, None if args.res is None else parse_sizes(args.res)[0])
    subject = subjects(args, config)[-1]
    with opened(config, [subject], args.run, args.split) as live:
        predictions = live.evaluate(split_with(live, subject.weights), config.data.res, "evaluating", args.split)
        if live.ranks.is_main:
            result = {"model": config.model.name, "res": config.data.res, "split": args.split, **predictions.summary()}
            print(
                f"{result['model']} at {result['res']} px on {args.split}: top-1 {result['top1']:.2f} | "
                f"top-5 {result['top5']:.2f} | loss {result['loss']:.4f} | n {result['n']}"
            )
            if args.json:
                write(args.json, json.dumps(result, indent=1) + "\n")
    return EXIT_DONE


def parse_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--res is {text!r}; accepted: whole numbers of pixels, such as 224 or 224,256,288.") from None
    if min(sizes) < 32:
        raise UserError(f"--res {min(sizes)} is below 32 px; accepted: 32 or more.")
    return sizes


def sweep(args: argparse.Namespace) -> int:
    """Evaluate every subject at every resolution: one pass over the images per resolution, one trunk where it is shared."""
    from fixres_dist import evaluate as ev
    from fixres_dist import models, report

    sizes = parse_sizes(args.res)
    config = source(args, None)
    found = subjects(args, config)
    for item in args.also:
        label, equals, folder = item.partition("=")
        if not equals:
            raise UserError(f"--also is {item!r}; accepted: LABEL=RUN, such as control=runs/demo-control.")
        found.append(Subject(label, weights_after(RunDir(Path(folder)))))
    curves: dict[str, dict[int, ev.Predictions]] = {}
    with opened(config, found, args.run) as live:
        models.check_resolutions(live.model, sizes)
        every = [split_with(live, subject.weights) for subject in found]
        for res in sizes:
            for subject, predictions in zip(found, live.evaluate_all(every, res, f"{res} px"), strict=True):
                curves.setdefault(subject.label, {})[res] = predictions
        if not live.ranks.is_main:
            return EXIT_DONE
    out = args.out or args.run or Path(".")
    out.mkdir(parents=True, exist_ok=True)
    table = {label: {res: p.summary() for res, p in curve.items()} for label, curve in curves.items()}
    summary: dict[str, Any] = {"model": config.model.name, "fixed_at": config.data.res, "curves": table}
    print(report.sweep_table(table))
    if "before" in curves and "after" in curves:
        best = {label: max(curve, key=lambda r: curve[r].correct1.mean()) for label, curve in curves.items()}
        for label in (name for name in curves if name != "after"):
            gain, interval = ev.paired_gain(
                curves[label][best[label]].correct1, curves["after"][best["after"]].correct1
            )
            summary[f"best_after_minus_best_{label}"] = {"points": gain, "ci95": list(interval)}
            print(
                f"best after fixing ({best['after']} px) minus best {label} ({best[label]} px): {gain:+.2f} points "
                f"(95 % interval {interval[0]:+.2f} to {interval[1]:+.2f}, paired, n {len(curves[label][best[label]].loss)})"
            )
        summary["best_res"] = best
    write(out / "sweep.json", json.dumps(summary, indent=1) + "\n")
    report.sweep_plot(table, config, out / "sweep.png")
    if args.run:
        report.sweep_board(table, RunDir(args.run))
    print(f"curve: {out / 'sweep.png'}")
    return EXIT_DONE


def fetch(args: argparse.Namespace) -> int:
    recipe = recipes.find(args.model, args.weights)
    from fixres_dist import models

    name = recipe.values["model"]["timm_name"]
    size = sum(t.numel() * t.element_size() for t in models.hub_state(name).values())
    print(f"{name}: {size / 2**20:,.0f} MiB, in the local cache now")
    return EXIT_DONE
