"""`fixres export`"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.files import write_text
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import parse_sizes
from fixres_dist.cli import as_job
from fixres_dist.cli.arguments import add_job, add_overrides
from fixres_dist.config import reading
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.data import class_maps
from fixres_dist.evaluation import exported
from fixres_dist.evaluation.inputs import weights_after, weights_before, with_cluster
from fixres_dist.publishing import model_card
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir

FORMATS = {
    "safetensors": "model.safetensors",
    "hub": "model.safetensors",
    "torch": "model.pth",
    "onnx": "model_{}.onnx",
}


EXAMPLES = (
    "--run runs/b0-320",
    "--run runs/b0-320 --format onnx --res 288,320",
    "--run runs/b0-320 --temperature-from val",
    "--run runs/b0-320 --format hub --push me/fixefficientnet_b0",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", type=Path, required=True, metavar="DIR", help="a finished run directory")
    p.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: export/ in the run directory")
    p.add_argument("--res", metavar="A,B,...", help="onnx: a file for each resolution; default: the run's")
    p.add_argument("--alpha", type=float, default=1.0, help="0: the starting weights, 1: the fixed ones (default)")
    p.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder; nothing is uploaded without it")
    text = "fit the temperature on a split that nothing was trained on, or on a folder of class folders"
    p.add_argument("--temperature-from", metavar="SPLIT|DIR", help=text)
    add_job(p)
    add_overrides(p, "cluster.time=1:00:00, of its job")


def run(args: argparse.Namespace) -> int:
    run = RunDir(args.run)
    config, res = run.config(), Results.read(run).res
    check(args, config)
    own = run.root / "export"
    out = args.out or (own if args.alpha == 1 else run.root / f"export_alpha_{args.alpha:g}")
    if args.alpha != 1 and out.resolve() == own.resolve():
        raise UserError(f"{own} holds the fixed weights themselves. Next: another --out, or leave it out.")
    sizes = parse_sizes(args.res) if args.res else [res]
    files = [FORMATS[args.format].format(size) for size in (sizes if args.format == "onnx" else [res])]
    weights_after(run)
    job = None if args.job else job_config(args, config)  # in this process too: it refuses what an export does not take
    if job and as_job.asked(args, (*as_job.OF_JOB, "--profile")):
        return as_job.start(args, job, str(out), len(files))
    from fixres_dist.evaluation.interpolation import interpolated, starting_state
    from fixres_dist.models import weights
    from fixres_dist.models.resizing import for_size
    from fixres_dist.publishing import export

    classes = list(class_maps.trained_classes(config, run.root, "val"))
    starting = args.alpha != 1 and weights_before(run) is None and not run.head_before.exists()
    model = for_size(weights.open_model(config, classes, with_weights=starting), res)
    state = weights.read_state(weights_after(run))
    if args.alpha != 1:
        state = interpolated(starting_state(run, model), state, args.alpha)
    weights.fill(model, state, str(run.root))
    out.mkdir(parents=True, exist_ok=True)
    for file, size in zip(files, sizes, strict=True):
        if args.job:
            args.job.ranks.check_stop()
        if args.format == "onnx":
            print(f"writing {out / file}, then comparing its logits with torch's", flush=True)
            off = export.write_onnx(model, out / file, size)
            print(f"{out / file}: logits equal torch's to {off:.0e} of the largest")
            if export.data_file(out / file).exists():
                print(f"{export.data_file(out / file)}: its weights; the two belong into one folder")
        else:
            weights.write_weights(model, out / file, config, size, classes)
    digest = weights.state_digest(model.state_dict())
    fitted = None if args.temperature_from else kept_temperature(args, out, digest)
    export.write_config(model, out / "config.json", config, res, classes, fitted.temperature if fitted else 1.0)
    if args.temperature_from:
        fitted = fit_temperature(out / files[0], args.temperature_from, run, digest)
        export.write_config(model, out / "config.json", config, res, classes, fitted.temperature)
    there = sorted(file.name for file in out.glob("model*"))  # other formats too
    card = model_card.text(run, there, export.licence(config), args.alpha, args.push or "", fitted)
    write_text(out / "README.md", card)
    if not export.timm_transform(config, res)[1]:
        note = f"timm cannot express data.resize_rule={config.data.resize_rule}: its own evaluation will differ"
        print(f"warning: {note}; README.md says so.", file=sys.stderr)
    print(f"{out}: {', '.join([*files, 'config.json', 'README.md'])}")
    if args.push:
        print(f"pushed: {export.push(out, args.push)}")
    return EXIT_DONE


def check(args: argparse.Namespace, config: Config) -> None:
    """Refuse options that do not go together."""
    parse_alphas(str(args.alpha))
    if args.res and args.format != "onnx":
        raise UserError(f"--res goes with --format onnx: {args.format} holds for every resolution. Next: leave it out.")
    if args.push and args.format != "hub":
        raise UserError("--push goes with --format hub. Next: --format hub --push " + args.push)
    if args.temperature_from and args.format == "onnx":
        raise UserError("--temperature-from goes with weights that predict reads. Next: --format safetensors")
    if args.temperature_from:
        exported.place(args.temperature_from, config.data)


def kept_temperature(args: argparse.Namespace, out: Path, digest: str) -> exported.Fitted | None:
    """Of an earlier export in `out`, which holds for its weights in every format. One of other weights is removed, and said."""
    found = exported.fitted_temperature(out)
    if not found or found.weights == digest:
        return found
    (out / exported.TEMPERATURE).unlink()
    words = ["--run", args.run, *(["--alpha", f"{args.alpha:g}"] if args.alpha != 1 else [])]
    words += ["--out", args.out] if args.out else []
    words += ["--format", args.format] if args.format == "torch" else []  # predict reads no ONNX
    print(
        f"warning: {out / exported.TEMPERATURE} ({found.temperature:.4f}) is of other weights, or of an older version, and is "
        f"removed: the temperature is 1. Next: {command('export', *words, '--temperature-from', 'val')} fits one",
        file=sys.stderr,
    )
    return None


def fit_temperature(file: Path, place: str, run: RunDir, digest: str) -> exported.Fitted:
    """Of the exported weights in `file`, which have the `digest`, on the split or folder `place`; kept beside them."""
    record = file.with_name(exported.TEMPERATURE)
    record.unlink(missing_ok=True)
    from fixres_dist.evaluation.classifier import load
    from fixres_dist.evaluation.temperature import fit

    data = run.config().data
    fitted = replace(fit(load(file, settings=[f"data.workers={data.workers}"]), place, data, run), weights=digest)
    write_json(record, asdict(fitted), sealed=True)
    print(fitted.sentence())
    return fitted


def job_config(args: argparse.Namespace, config: Config) -> Config:
    """The run's settings with those of the export's job: one process, whatever the run had."""
    given = reading.overrides(args.overrides)
    if set(given) - {"cluster"}:
        raise UserError(
            f"{' '.join(args.overrides)}: an export takes settings of its job alone, such as cluster.time=1:00:00."
        )
    if (args.nodes or "1", args.gpus_per_node or "1") != ("1", "1"):
        raise UserError("an export is one process. Next: leave out --nodes and --gpus-per-node.")
    one = argparse.Namespace(**{**vars(args), "gpus_per_node": "1"})
    cluster = reading.merge(with_cluster(one, {"cluster": asdict(config.cluster)}), given)["cluster"]
    return replace(config, cluster=reading.parse(Cluster, cluster, "cluster"))


def parse_alphas(text: str) -> list[float]:
    try:
        alphas = [float(part) for part in text.split(",")]
    except ValueError:
        alphas = [-1.0]
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"alpha is {text!r}; accepted: 0 (the starting head) to 1 (the fixed one), such as 0,0.5,1.")
    return alphas
