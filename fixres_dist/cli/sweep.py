"""`fixres sweep`"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import parse_sizes, table
from fixres_dist.cli import as_job
from fixres_dist.cli.arguments import add_job, add_source
from fixres_dist.config import reading
from fixres_dist.config.schema import Config, Data
from fixres_dist.evaluation.inputs import (
    OWN_LABELS,
    Subject,
    check,
    model_config,
    opened,
    parts_with,
    subjects,
    weights_after,
)
from fixres_dist.runs.rundir import RunDir

if TYPE_CHECKING:
    from fixres_dist.evaluation.activations import Statistics
    from fixres_dist.evaluation.sweep import Sweep


EXAMPLES = (
    "--run runs/b0-320 --res 224,256,288,320,352",
    "--run runs/demo --res 96,128,160 --also control=runs/demo-control --activations",
    "--model b0 --checkpoint ns --data /data/imagenet --res 224,320 --max-gmacs 0.8",
    "--model resnet50.a1_in1k --checkpoint pretrained --data DIR --res 224,288 --crop-pct 0.875,1 data.resize_rule=timm,fixres",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_source(p, "--res A,B,...")
    p.add_argument("--res", required=True, metavar="A,B,...", help="test resolutions, such as 224,256,288")
    text = "also with each of these data.crop_pct; data.resize_rule=A,B varies the rule"
    p.add_argument("--crop-pct", default="", metavar="A,B,...", help=text)
    text = "another run's curve, such as a control; repeatable"
    p.add_argument("--also", action="append", default=[], metavar="LABEL=RUN", help=text)
    p.add_argument("--max-gmacs", type=float, metavar="G", help="also the best within G 1e9 multiply-adds per image")
    text = "also the best at N images/s or more, as measured here"
    p.add_argument("--min-images-per-second", type=float, metavar="N", help=text)
    text = "also statistics of the classifier's inputs, beside those in training"
    p.add_argument("--activations", action="store_true", help=text)
    text = "for sweep.json and the PNGs; default: the run directory"
    p.add_argument("--out", type=Path, metavar="DIR", help=text)
    add_job(p)


def run(args: argparse.Namespace) -> int:
    """Evaluate every model at every resolution, one pass over the images for each and each crop; table, sweep.json, PNG."""
    sizes, choices = parse_sizes(args.res), varied(args)
    config = uncompiled(model_config(args))
    own = subjects(args.run)
    chosen = [*own, *others(args.also)]
    settings, out = crop_settings(config, choices), args.out or args.run or Path(".")
    if as_job.asked(args):
        check(config, args.run, sizes=sizes)
        return as_job.start(args, config, str(out / "sweep.json"), len(sizes) * max(1, len(settings)))
    from fixres_dist.evaluation import activations
    from fixres_dist.evaluation.sweep import Crop, Limit, sweep
    from fixres_dist.models.resizing import check_resolutions
    from fixres_dist.publishing import figures
    from fixres_dist.runs import board

    crops = [Crop(data.resize_rule, data.crop_pct) for data in settings]
    limit = Limit(args.max_gmacs, args.min_images_per_second)
    with opened(config, chosen, args.run, job=args.job, by="sweep") as session:
        check_resolutions(session.model, sizes)
        models = {subject.label: parts_with(session, subject.weights) for subject in chosen}
        swept = sweep(session, models, sizes, limit if limit != Limit() else None, crops)
        inputs = activations.collect_all(session, {s.label: models[s.label] for s in own}) if args.activations else {}
        if not session.ranks.is_main:
            return EXIT_DONE
    out.mkdir(parents=True, exist_ok=True)
    print(sweep_text(swept))
    record = {"model": config.model.name, "fixed_at": config.data.res, **swept.record()}
    figures.sweep_plot(swept.curves, config, out / "sweep.png")
    if inputs:
        rows, (n, channels) = activations.statistics(inputs), next(iter(inputs.values())).shape
        record["activations"] = {"n": n, "channels": channels, "statistics": [asdict(row) for row in rows]}
        figures.activation_plot(inputs, f"{config.model.name}: what enters the classifier", out / "activations.png")
        print(f"{activations_text(rows)}\nactivations: {out / 'activations.png'}")
    if args.run:
        for label, curve in swept.curves.items():
            points = {res: summary.top1 for res, summary in curve.items()}
            board.write_curve(RunDir(args.run), label, "eval_by_res/top1", points)
        for label in dict.fromkeys(label for label, _ in inputs):
            values = {res: rows for (one, res), rows in inputs.items() if one == label}
            board.write_histograms(RunDir(args.run), label, "pooled_features", values)
    write_json(out / "sweep.json", record)
    print(f"curve: {out / 'sweep.png'}")
    return EXIT_DONE


def uncompiled(config: Config) -> Config:
    """`config` without compiling, unless it is asked for: one pass at a resolution does not pay for its graph.

    So the speeds of all resolutions are of the same arrangement, and none contains the compiler's minutes.
    """
    return replace(config, run=replace(config.run, compile=config.run.compile is True))


def varied(args: argparse.Namespace) -> dict[str, list[str]]:
    """The keys of the crop that the command gives several values for; they are taken out of its settings."""
    args.overrides += [f"data.crop_pct={args.crop_pct}"] if args.crop_pct else []
    found: dict[str, list[str]] = {}
    for item in args.overrides:
        key, _, values = item.partition("=")
        if key in ("data.resize_rule", "data.crop_pct") and "," in values:
            found[key.removeprefix("data.")] = values.split(",")
    args.overrides = [item for item in args.overrides if item.partition("=")[0].removeprefix("data.") not in found]
    return found


def crop_settings(config: Config, choices: dict[str, list[str]]) -> list[Data]:
    """The data settings of each combination of `choices`; raises UserError for a value that is not accepted."""
    products = itertools.product(*choices.values()) if choices else ()
    own = asdict(config.data)
    return [reading.parse(Data, own | dict(zip(choices, values, strict=True)), "data") for values in products]


def others(items: list[str]) -> list[Subject]:
    """The runs of --also; raises UserError for a label that another curve has, since one would take the other's place."""
    found: list[Subject] = []
    for item in items:
        label, equals, folder = item.partition("=")
        if not (equals and label):
            raise UserError(f"--also is {item!r}; accepted: LABEL=RUN, such as control=runs/demo-control.")
        taken = (*OWN_LABELS, *(subject.label for subject in found))
        if label in taken:
            raise UserError(
                f"--also is {item!r}, and {label} is another curve's label; accepted: any but {', '.join(taken)}. "
                f"Next: --also another-{item}"
            )
        found.append(Subject(label, weights_after(RunDir(Path(folder)))))
    return found


def sweep_text(swept: Sweep) -> str:
    """A table of top-1 and cost by resolution; the best resolutions, and the gain between them."""
    if swept.points:
        return points_text(swept)
    curves, best = swept.curves, swept.best()
    rows = []
    for res, cost in swept.costs.items():
        top1 = [f"{curve[res].top1:.2f}" for curve in curves.values()]
        rows.append([res, *top1, f"{cost.gmacs:.3g}", f"{cost.images_per_second:.0f}"])

    def named(found: dict[str, int]) -> str:
        texts = [f"{label} {res} px ({curves[label][res].top1:.2f})" for label, res in found.items()]
        return ", ".join(texts) or "none of these resolutions"

    lines = [table(["test px", *curves, "GMACs", "images/s"], rows), f"best resolution: {named(best)}"]
    if swept.limit:
        lines.append(f"best with {swept.limit}: {named(swept.best(swept.limit))}")
    for label, (gain, n) in swept.gains.items():
        what = f"best after fixing ({best['after']} px) minus best {label} ({best[label]} px)"
        lines.append(f"{what}: {gain.phrase()}, n {n}")
    return "\n".join(lines)


def points_text(swept: Sweep) -> str:
    """As `sweep_text`, for several crops: a row for each resolution, rule and crop_pct."""
    models = list(dict.fromkeys(point.model for point in swept.points))
    rows: dict[tuple[int, str, float], dict[str, str]] = {}
    for point in swept.points:
        row = rows.setdefault((point.res, point.resize_rule, point.crop_pct), {})
        row[point.model] = f"{point.summary.top1:.2f}"
    cells = [
        [*key[:2], f"{key[2]:g}", *(row[model] for model in models), f"{swept.costs[key[0]].gmacs:.3g}"]
        for key, row in rows.items()
    ]
    lines = [table(["test px", "rule", "crop_pct", *models, "GMACs"], cells)]
    lines.append(f"best: {', '.join(map(str, swept.best_points()))}")
    if swept.limit:
        allowed = ", ".join(map(str, swept.best_points(swept.limit)))
        lines.append(f"best with {swept.limit}: {allowed or 'none of these'}")
    for label, (gain, n) in swept.gains.items():
        lines.append(f"best after fixing minus best {label}: {gain.phrase()}, n {n}")
    return "\n".join(lines)


def activations_text(rows: Sequence[Statistics]) -> str:
    cells = []
    for r in rows:
        plain = [f"{r.mean:.4f}", f"{r.std:.4f}", f"{r.near_zero_percent:.1f} %"]
        cells.append([f"{r.weights}, {r.res} px", *plain, f"{r.channel_shift:.3f}", f"{r.distance:.3f}"])
    note = "(shift of a channel's mean and distance of its distribution from training's, in standard deviations)"
    return table(["classifier inputs", "mean", "std", "near zero", "shift", "distance"], cells) + "\n" + note
