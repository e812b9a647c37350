"""`python -m fixres_dist sweep`: accuracy against test resolution, its cost, and the activations that explain it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.files import write_text
from fixres_dist.base.text import duration, parse_sizes
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.evaluation.inputs import Subject, add_source, opened, source, split_with, subjects, weights_after
from fixres_dist.runs.rundir import RunDir


def add_parsers(commands: Any) -> None:
    p = commands.add_parser("sweep", help="accuracy against test resolution, before and after: table, JSON and PNG")
    add_source(p)
    p.add_argument("--res", required=True, help="comma-separated resolutions, such as 224,256,288")
    p.add_argument(
        "--also", action="append", default=[], metavar="LABEL=RUN", help="another run's curve, such as a control"
    )
    p.add_argument("--max-gmacs", type=float, metavar="G", help="also the best within G 1e9 multiply-adds per image")
    p.add_argument(
        "--min-images-per-second", type=float, metavar="N", help="also the best at N images/s or more, as measured here"
    )
    p.add_argument(
        "--activations",
        action="store_true",
        help="also what enters the classifier, against what did in training",
    )
    p.add_argument("--out", type=Path, help="where sweep.json and the PNGs go; default: the run directory")
    p.set_defaults(func=sweep)


def sweep(args: argparse.Namespace) -> int:
    """Evaluate every subject at every resolution: one pass over the images per resolution, one trunk where it is shared."""
    from fixres_dist.models.build import check_resolutions, gmacs
    from fixres_dist.publishing import figures, tables
    from fixres_dist.runs import tracking

    sizes = parse_sizes(args.res)
    config = source(args, None)
    own = subjects(args, config)
    found = [*own, *others(args.also)]
    explained: dict[str, Any] = {}
    with opened(config, found, args.run) as live:
        check_resolutions(live.model, sizes)
        every = {subject.label: split_with(live, subject.weights) for subject in found}
        curves, speeds = passes(live, every, sizes)
        if args.activations:
            explained = features(live, {subject.label: every[subject.label] for subject in own})
        if not live.ranks.is_main:
            return EXIT_DONE
        cost = {res: round(gmacs(live.model, res), 4) for res in sizes}
    costs = {res: {"gmacs": cost[res], "images_per_second": round(speeds[res], 1)} for res in sizes}
    out = args.out or args.run or Path(".")
    out.mkdir(parents=True, exist_ok=True)
    table = {label: {res: p.summary() for res, p in curve.items()} for label, curve in curves.items()}
    summary: dict[str, Any] = {"model": config.model.name, "fixed_at": config.data.res, "curves": table, "costs": costs}
    summary |= bests(table, costs, args.max_gmacs, args.min_images_per_second)
    gains = gains_over(curves, summary["best_res"])
    print("\n".join([tables.sweep_table(table, costs), *tables.best_lines(summary, gains)]))
    summary |= {f"best_after_minus_best_{label}": value for label, value in gains.items()}
    if explained:
        summary["activations"] = draw_activations(explained, config, out, args.run)
    write_text(out / "sweep.json", json.dumps(summary, indent=1) + "\n")
    figures.sweep_plot(table, config, out / "sweep.png")
    for label, curve in table.items() if args.run else ():
        tracking.write_curve(RunDir(args.run), label, "eval_by_res/top1", {res: s["top1"] for res, s in curve.items()})
    print(f"curve: {out / 'sweep.png'}")
    return EXIT_DONE


def others(items: list[str]) -> list[Subject]:
    found = []
    for item in items:
        label, equals, folder = item.partition("=")
        if not equals:
            raise UserError(f"--also is {item!r}; accepted: LABEL=RUN, such as control=runs/demo-control.")
        found.append(Subject(label, weights_after(RunDir(Path(folder)))))
    return found


def passes(live: Any, every: dict[str, Any], sizes: list[int]) -> tuple[dict[str, dict[int, Any]], dict[int, float]]:
    """(label -> resolution -> predictions, resolution -> images/s of the pass over all models)."""
    from fixres_dist.training.predict import predict

    curves: dict[str, dict[int, Any]] = {label: {} for label in every}
    speeds, worked, started = {}, 0, time.monotonic()
    for k, res in enumerate(sizes, 1):
        since = time.monotonic()
        found = predict(live, list(every.values()), res, f"{res} px")
        speeds[res] = len(live.val) / (time.monotonic() - since)
        for curve, predictions in zip(curves.values(), found, strict=True):
            curve[res] = predictions
        worked += res**2  # what a pass costs, nearly
        left = (time.monotonic() - started) * (sum(size**2 for size in sizes) / worked - 1)
        if live.ranks.is_main:
            scores = ", ".join(f"{label} {curve[res].summary()['top1']:.2f}" for label, curve in curves.items())
            eta = f" | eta {duration(left)}" if k < len(sizes) else ""
            print(f"{k}/{len(sizes)} {res} px: {scores} | {speeds[res]:,.0f} img/s{eta}", flush=True)
    return curves, speeds


def bests(table: Any, costs: dict[int, dict[str, float]], gmacs: float | None, speed: float | None) -> dict[str, Any]:
    """{best_res: label -> resolution}, and under limits of cost {limit: {.., best_res: label -> resolution or None}}."""

    def best(allowed: list[int]) -> dict[str, int | None]:
        ranked = {label: [(curve[res]["top1"], -res) for res in allowed] for label, curve in table.items()}
        return {label: -max(rows)[1] if rows else None for label, rows in ranked.items()}

    found: dict[str, Any] = {"best_res": best(list(costs))}
    if gmacs is not None or speed is not None:
        within = [
            res
            for res, cost in costs.items()
            if (gmacs is None or cost["gmacs"] <= gmacs) and (speed is None or cost["images_per_second"] >= speed)
        ]
        found["limit"] = {"max_gmacs": gmacs, "min_images_per_second": speed, "best_res": best(within)}
    return found


def gains_over(curves: dict[str, dict[int, Any]], best: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Best of `after` minus best of each other curve, paired: label -> {points, ci95, n}."""
    if not {"before", "after"} <= set(curves):
        return {}
    after, found = curves["after"][best["after"]], {}
    for label in (name for name in curves if name != "after"):
        before = curves[label][best[label]]
        gain = after.gain_over(before)
        n = int((after.counted & before.counted).sum())
        found[label] = {"points": gain["delta_top1"], "ci95": gain["delta_ci95"], "n": n}
    return found


def training_resolution(config: Config) -> int:
    """Where the weights come from: stage one's resolution, else the recipe's, else timm's."""
    if config.pretrain:
        return config.pretrain.res
    from fixres_dist.models.build import native_size

    facts = recipes.find(config.model.name).facts
    return facts.train_res if facts else native_size(config.model.timm_name)


def features(live: Any, every: dict[str, Any]) -> dict[str, Any]:
    """Pooled features as in training, and of each model at training and test resolution; on every rank."""
    from fixres_dist.evaluation import activations

    stage, low = live.config.pretrain, training_resolution(live.config)
    transform = stage.train_transform if stage else "random_resized_crop"
    found = {(activations.REFERENCE, low): activations.collect(live, next(iter(every.values())), low, transform)}
    for label, parts in every.items():
        for res in dict.fromkeys((low, live.config.data.res)):
            found[label, res] = activations.collect(live, parts, res, "test")
    return {"features": found, "statistics": activations.statistics(found)}


def draw_activations(explained: dict[str, Any], config: Config, out: Path, run: Path | None) -> dict[str, Any]:
    """activations.png and TensorBoard's histograms; returns what sweep.json keeps."""
    from fixres_dist.publishing import figures, tables
    from fixres_dist.runs import tracking

    found = explained["features"]
    figures.activation_plot(found, f"{config.model.name}: what enters the classifier", out / "activations.png")
    if run:
        for name in dict.fromkeys(label for label, _ in found):
            values = {size: rows for (label, size), rows in found.items() if label == name}
            tracking.write_histograms(RunDir(run), name, "pooled_features", values)
    n, channels = next(iter(found.values())).shape
    print("\n".join(tables.activation_lines(explained["statistics"])))
    print(f"activations: {out / 'activations.png'}")
    return {"n": n, "channels": channels, "statistics": explained["statistics"]}
