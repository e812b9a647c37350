"""`python -m fixres_dist export | interpolate | report`: a run's model and its numbers for others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.files import write_text
from fixres_dist.base.text import parse_sizes
from fixres_dist.evaluation.inputs import add_source, weights_after, weights_before
from fixres_dist.publishing import model_card
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir

FORMATS = {
    "safetensors": "model.safetensors",
    "hub": "model.safetensors",
    "torch": "model.pth",
    "onnx": "model_{}.onnx",
}


def add_parsers(commands: Any) -> None:
    from fixres_dist.cli.interpolate import interpolate
    from fixres_dist.cli.report import report

    p = commands.add_parser("export", help="a run's whole model for timm, onnxruntime or the hub, with its model card")
    p.add_argument("--run", type=Path, required=True, help="a finished run directory")
    p.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    p.add_argument("--out", type=Path, help="folder to write to; default: export/ in the run directory")
    p.add_argument("--res", help="onnx: comma-separated resolutions, a file for each; default: the run's")
    p.add_argument("--alpha", type=float, default=1.0, help="0: the starting head, 1: the fixed one (default)")
    p.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder; nothing is uploaded without it")
    p.set_defaults(func=export)
    p = commands.add_parser("interpolate", help="top-1 between a run's starting head and its fixed one: table, PNG")
    add_source(p, models=False)  # weights before and after
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
    config, res = run.config(), Results.read(run).res
    parse_alphas(str(args.alpha))
    if args.res and args.format != "onnx":
        raise UserError(f"--res goes with --format onnx: {args.format} holds for every resolution. Next: leave it out.")
    if args.push and args.format != "hub":
        raise UserError("--push goes with --format hub. Next: --format hub --push " + args.push)
    own = run.root / "export"
    out = args.out or (own if args.alpha == 1 else run.root / f"export_alpha_{args.alpha:g}")
    if args.alpha != 1 and out.resolve() == own.resolve():
        raise UserError(f"{own} holds the fixed weights themselves. Next: another --out, or leave it out.")
    sizes = parse_sizes(args.res) if args.res else [res]
    files = [FORMATS[args.format].format(size) for size in (sizes if args.format == "onnx" else [res])]
    from fixres_dist.evaluation.interpolation import interpolated, starting_state
    from fixres_dist.models import weights
    from fixres_dist.publishing import export

    classes = model_card.class_names(run)
    starting = args.alpha != 1 and weights_before(run) is None
    model = weights.open_model(config, len(classes), with_weights=starting)
    state = weights.read_state(weights_after(run))
    if args.alpha != 1:
        state = interpolated(starting_state(run, model), state, args.alpha)
    weights.fill(model, state, str(run.root))
    out.mkdir(parents=True, exist_ok=True)
    for file, size in zip(files, sizes, strict=True):
        if args.format == "onnx":
            off = export.write_onnx(model, out / file, size)
            print(f"{out / file}: logits equal torch's to {off:.0e} of the largest")
        else:
            weights.write_weights(model, out / file, config, size)
    export.write_config(model, out / "config.json", config, res, classes)
    there = sorted(file.name for file in out.glob("model*"))  # other formats too
    write_text(out / "README.md", model_card.text(run, there, export.licence(config), args.alpha))
    if not export.timm_transform(config, res)[1]:
        note = f"timm cannot express data.resize_rule={config.data.resize_rule}: its own evaluation will differ"
        print(f"warning: {note}; README.md says so.", file=sys.stderr)
    print(f"{out}: {', '.join([*files, 'config.json', 'README.md'])}")
    if args.push:
        print(f"pushed: {export.push(out, args.push)}")
    return EXIT_DONE


def parse_alphas(text: str) -> list[float]:
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = [-1.0]
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"alpha is {text!r}; accepted: 0 (the starting head) to 1 (the fixed one), such as 0,0.5,1.")
    return alphas
