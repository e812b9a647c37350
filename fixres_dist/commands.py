"""`python -m fixres_dist evaluate | sweep | fetch`: a model from a run or a file, on a data set."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixres_dist import config as cfg
from fixres_dist import recipes
from fixres_dist.errors import EXIT_DONE, UserError
from fixres_dist.rundir import RunDir, write


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


def add_source(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", type=Path, help="a run directory")
    p.add_argument("--model", help="with --checkpoint: a recipe or a timm model name")
    p.add_argument("--checkpoint", help="weights file of the whole model, or ns, ap, pretrained")
    p.add_argument("--data", help="data set; default: the run's")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as data.resize_rule=timm")


def source(args: argparse.Namespace, res: int | None) -> cfg.Config:
    """The configuration to evaluate under: a run's, or a model's with --checkpoint as its weights."""
    if args.run and (args.model or args.checkpoint):
        raise UserError("--run and --model/--checkpoint exclude each other. Next: give one of the two.")
    if args.run:
        values = cfg.plain(RunDir(args.run).config())
    elif args.model and args.checkpoint:
        values = dict(recipes.find(args.model, args.checkpoint).values)
    else:
        raise UserError("what shall be evaluated? Accepted: --run DIR, or --model M --checkpoint FILE.")
    flags: dict[str, dict[str, Any]] = {"data": {}}
    if args.data:
        flags["data"]["root"] = args.data
    if res is not None:
        flags["data"]["res"] = res
    config = cfg.parse(cfg.Config, cfg.merge(cfg.merge(values, flags), cfg.overrides(args.overrides)))
    if not config.data.root:
        raise UserError("no data set given. Next: --data DIR, with train/ and val/.")
    return config


@dataclass(frozen=True)
class Subject:
    """One set of weights to evaluate."""

    label: str
    weights: Path | None  # None: as the configuration says


def subjects(args: argparse.Namespace, config: cfg.Config) -> list[Subject]:
    """Before and after for a run, the file for a checkpoint."""
    if not args.run:
        return [Subject("checkpoint", None)]
    return [Subject("before", weights_before(RunDir(args.run))), Subject("after", weights_after(RunDir(args.run)))]


def weights_before(run: RunDir) -> Path | None:
    """The whole model after stage one; without stage one the starting weights, which the configuration names."""
    return run.pretrained if run.pretrained.exists() else None


def weights_after(run: RunDir) -> Path:
    exported = run.root / "export" / "model.safetensors"
    if not exported.exists():
        raise UserError(
            f"run {run.name} has not finished fixing: there is no {exported}. Next: python launch/status.py {run.name}"
        )
    return exported


@contextlib.contextmanager
def opened(config: cfg.Config, found: list[Subject], run: Path | None, split: str = "val") -> Iterator[Any]:
    """A session with `split` alone; its own weights are loaded only if a subject has none of its own."""
    from fixres_dist import distributed, session

    ranks = distributed.start(run or meeting_place())
    try:
        needed = any(subject.weights is None for subject in found)
        yield session.open_session(config, ranks, load_weights=needed, splits=(split,))
    finally:
        distributed.stop(ranks)


def split_with(live: Any, weights: Path | None) -> Any:
    """A copy of the session's model with `weights` (or as opened), cut for evaluation in the run's own arithmetic."""
    from fixres_dist import models, tuning

    model = copy.deepcopy(live.model)
    if weights is not None:
        models.fill(model, models.read_state(weights), str(weights))
    return live.with_fast_trunk(tuning.split(model, live.config.tune.policy))


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


def meeting_place() -> Path:
    from fixres_dist.data.index import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sweep(args: argparse.Namespace) -> int:
    """Evaluate every subject at every resolution: one pass over the images per resolution, one trunk where it is shared."""
    from fixres_dist import evaluate as ev
    from fixres_dist import report

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
