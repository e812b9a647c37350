"""`python -m fixres_dist export | interpolate | report`: a run's model and its numbers for others."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fixres_dist import card, evalsets, subjects
from fixres_dist.errors import EXIT_DONE, UserError
from fixres_dist.rundir import RunDir, versions, write

FORMATS = {
    "safetensors": "model.safetensors",
    "hub": "model.safetensors",
    "torch": "model.pth",
    "onnx": "model_{}.onnx",
}


def add_parsers(commands: Any) -> None:
    p = commands.add_parser("export", help="a run's whole model for timm, onnxruntime or the hub, with its model card")
    p.add_argument("--run", type=Path, required=True, help="a finished run directory")
    p.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    p.add_argument("--out", type=Path, help="folder to write to; default: export/ in the run directory")
    p.add_argument("--res", help="onnx: comma-separated resolutions, a file for each; default: the run's")
    p.add_argument("--alpha", type=float, default=1.0, help="0: the starting head, 1: the fixed one (default)")
    p.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder; nothing is uploaded without it")
    p.set_defaults(func=export)
    p = commands.add_parser("interpolate", help="top-1 between a run's starting head and its fixed one: table, PNG")
    subjects.add_source(p, models=False)  # weights before and after
    p.add_argument(
        "--alpha", default="0,0.25,0.5,0.75,1", help="0: the starting head, 1: the fixed; default: %(default)s"
    )
    p.add_argument("--eval-set", action="append", default=[], metavar="NAME=DIR", help="also on these class folders")
    p.add_argument("--out", type=Path, help="where alpha.json and alpha.png go; default: the run directory")
    p.set_defaults(func=interpolate)
    p = commands.add_parser("report", help="runs beside the published numbers: table, plots, the figures of each run")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, finished or not")
    p.add_argument("--out", type=Path, help="folder of report.md and report.png; default: report/ beside the first run")
    p.add_argument("--json", action="store_true", help="print the rows as JSON; write nothing")
    p.set_defaults(func=report)


def export(args: argparse.Namespace) -> int:
    run = RunDir(args.run)
    config, res = run.config(), card.results(run)["res"]
    parse_alphas(str(args.alpha))
    if args.res and args.format != "onnx":
        raise UserError(f"--res goes with --format onnx: {args.format} holds for every resolution. Next: leave it out.")
    if args.push and args.format != "hub":
        raise UserError("--push goes with --format hub. Next: --format hub --push " + args.push)
    own = run.root / "export"
    out = args.out or (own if args.alpha == 1 else run.root / f"export_alpha_{args.alpha:g}")
    if args.alpha != 1 and out.resolve() == own.resolve():
        raise UserError(f"{own} holds the fixed weights themselves. Next: another --out, or leave it out.")
    sizes = subjects.parse_sizes(args.res) if args.res else [res]
    files = [FORMATS[args.format].format(size) for size in (sizes if args.format == "onnx" else [res])]
    from fixres_dist import export as exporting
    from fixres_dist import models

    classes = card.class_names(run)
    model = models.build(config.model.timm_name, len(classes), config.run.seed)
    state = models.read_state(subjects.weights_after(run))
    if args.alpha != 1:
        if subjects.weights_before(run) is None:
            models.load_weights(model, config.model.timm_name, config.model.weights, new_classifier=False)
        state = exporting.interpolated(starting_state(run, model), state, args.alpha)
    models.fill(model, state, str(run.root))
    out.mkdir(parents=True, exist_ok=True)
    for file, size in zip(files, sizes, strict=True):
        if args.format == "onnx":
            off = exporting.write_onnx(model, out / file, size)
            print(f"{out / file}: logits equal torch's to {off:.0e} of the largest")
        else:
            exporting.write_weights(model, out / file, config, size)
    exporting.write_config(model, out / "config.json", config, res, classes)
    there = sorted(file.name for file in out.glob("model*"))  # other formats too
    write(out / "README.md", card.text(run, there, exporting.licence(config), args.alpha))
    if not exporting.timm_transform(config, res)[1]:
        note = f"timm cannot express data.resize_rule={config.data.resize_rule}: its own evaluation will differ"
        print(f"warning: {note}; README.md says so.", file=sys.stderr)
    print(f"{out}: {', '.join([*files, 'config.json', 'README.md'])}")
    if args.push:
        print(f"pushed: {exporting.push(out, args.push)}")
    return EXIT_DONE


def parse_alphas(text: str) -> list[float]:
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = [-1.0]
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"alpha is {text!r}; accepted: 0 (the starting head) to 1 (the fixed one), such as 0,0.5,1.")
    return alphas


def starting_state(run: RunDir, model: Any) -> dict[str, Any]:
    """The whole model before fixing, on the CPU; without stage one that is `model`, which holds the starting weights."""
    from fixres_dist import models

    file = subjects.weights_before(run)
    return models.read_state(file) if file else {name: value.cpu() for name, value in model.state_dict().items()}


def interpolate(args: argparse.Namespace) -> int:
    """Top-1 of several mixtures of the starting and the fixed weights: one pass over the images, one trunk if it was frozen."""
    from fixres_dist import export as exporting
    from fixres_dist import figures, models, results

    alphas, config = parse_alphas(args.alpha), subjects.source(args, None)
    run, before = RunDir(args.run), subjects.subjects(args, config)[0]
    sets = evalsets.named(args.eval_set, "val")
    with subjects.opened(config, [before], args.run, sets=sets) as live:
        start, end = starting_state(run, live.model), models.read_state(subjects.weights_after(run))
        every = [subjects.split_with(live, exporting.interpolated(start, end, alpha)) for alpha in [0.0, *alphas]]
        found = {split: live.evaluate_all(every, config.data.res, f"alpha on {split}", split) for split in live.splits}
        if not live.ranks.is_main:
            return EXIT_DONE
        hardware = results.hardware(live)
    curves = {
        split: [{"alpha": a, **p.summary(), **p.gain_over(first)} for a, p in zip(alphas, predictions, strict=True)]
        for split, (first, *predictions) in found.items()
    }
    for split, rows in curves.items():
        print(f"{split}, n {rows[0]['n']}\n{'alpha':>6}{'top-1':>8}{'top-5':>8}   gain over alpha 0 (paired 95 %)")
        for row in rows:
            gain = card.accuracy({**row, "before": row, "after": row})[-1]
            print(f"{row['alpha']:>6g}{row['top1']:>8.2f}{row['top5']:>8.2f}   {gain}")
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    data = {"data": config.data.root, "res": config.data.res, "resize_rule": config.data.resize_rule}
    made = {"model": config.model.name, **data, "curves": curves}
    write(out / "alpha.json", json.dumps({**made, "hardware": hardware, "versions": versions()}, indent=1) + "\n")
    figures.alpha_plot(curves, config, out / "alpha.png")
    print(f"curve: {out / 'alpha.png'}")
    return EXIT_DONE


def report(args: argparse.Namespace) -> int:
    """One row for each finished run, beside what was published for its model; the state of the others."""
    from fixres_dist import comparison, figures

    runs = [RunDir(root) for root in args.runs if (root / "config.yaml").is_file()]
    if not runs:
        RunDir(args.runs[0]).config()  # refuses what is no run directory
    if others := [str(root) for root in args.runs if RunDir(root) not in runs]:  # as a report that runs/* names too
        print(f"left out, no run directories: {', '.join(others)}", file=sys.stderr)
    rows = [comparison.row(run) for run in runs if run.results.exists()]
    if args.json:
        print(json.dumps({"runs": rows, "unfinished": comparison.unfinished(runs)}, indent=1))
        return EXIT_DONE
    out = args.out or runs[0].root.parent / "report"
    text = comparison.markdown(runs, rows, out)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "report.md", text)
    figures.published_plot(comparison.published_curves(), rows, out / "report.png")
    print(f"{text}\n{out / 'report.md'}")
    return EXIT_DONE
