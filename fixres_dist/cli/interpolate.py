"""`fixres interpolate`"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.environment import versions
from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import table
from fixres_dist.cli import as_job
from fixres_dist.cli.arguments import add_eval_sets, add_job, add_source
from fixres_dist.cli.export import parse_alphas
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps
from fixres_dist.evaluation import robustness
from fixres_dist.evaluation.inputs import Subject, check, model_config, opened, subjects, weights_after
from fixres_dist.runs.rundir import RunDir

EXAMPLES = (
    "--run runs/b0-320",
    "--run runs/b0-320 --alpha 0,0.5,1 --eval-set v2=/data/imagenetv2",
    "--run runs/g-0 --average runs/g-1 --average runs/g-2",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_source(p, models=False)  # a run has weights before and after
    text = "0: the starting weights, 1: the fixed ones; default: %(default)s"
    p.add_argument("--alpha", default="0,0.25,0.5,0.75,1", metavar="A,B,...", help=text)
    add_eval_sets(p)
    text = "instead: the mean of the fixed weights of --run and of this run, such as a grid's (soup); repeatable"
    p.add_argument("--average", type=Path, action="append", default=[], metavar="RUN", help=text)
    p.add_argument("--out", type=Path, metavar="DIR", help="for alpha.json and alpha.png; default: the run directory")
    add_job(p)


def average(args: argparse.Namespace, config: Config) -> int:
    """The mean of several runs' weights beside each of them, on val; written to soup/ as `export` writes a model."""
    from fixres_dist.evaluation import soup
    from fixres_dist.models import weights
    from fixres_dist.publishing import export

    runs = [RunDir(path) for path in (args.run, *args.average)]
    if args.eval_set or as_job.asked(args):
        raise UserError(
            "--average measures on val, in this process. Next: leave out --eval-set, --cluster and --dry-run."
        )
    soup.check(runs)
    out, mean = args.out or args.run / "soup", soup.mean(runs)
    with opened(config, [Subject("after", weights_after(runs[0]))], args.run, by="interpolate") as session:
        found, model = soup.measure(session, runs, mean), session.for_size(config.data.res).model
    print(table(["run", "top-1", "top-5"], [(name, f"{s.top1:.2f}", f"{s.top5:.2f}") for name, s in found.rows()]))
    print(
        f"the mean over the best of them, {found.best}: {found.gain.phrase(found.mean.n)}, allowing for the choice of {len(runs)}"
    )
    out.mkdir(parents=True, exist_ok=True)
    weights.fill(model, mean, "the mean")
    weights.write_weights(model, out / "model.safetensors", config, config.data.res, session.classes)
    export.write_config(model, out / "config.json", config, config.data.res, list(session.classes))
    write_json(out / "soup.json", asdict(found), sealed=True)
    print(f"{out}: model.safetensors, config.json, soup.json. Next: {command('predict', out, 'IMAGES')}")
    return EXIT_DONE


def run(args: argparse.Namespace) -> int:
    """Top-1 of several mixtures of the starting and the fixed weights, in one pass over the images of each set."""
    alphas, config = parse_alphas(args.alpha), model_config(args)
    if args.average:
        return average(args, config)
    run, before = RunDir(args.run), subjects(args.run)[0]
    sets, out = class_maps.named_sets(args.eval_set, "val"), args.out or args.run
    weights_after(run)
    if as_job.asked(args):
        check(config, args.run, sets=sets)
        return as_job.start(args, config, str(out / "alpha.json"), 1 + len(sets))
    from fixres_dist.evaluation import interpolation
    from fixres_dist.publishing import figures
    from fixres_dist.runs import board
    from fixres_dist.training.results import hardware

    with opened(config, [before], args.run, sets=sets, job=args.job, by="interpolate") as session:
        curves, device = interpolation.curves(session, run, alphas), hardware(session)
        if not session.ranks.is_main:
            return EXIT_DONE
    for split, mixtures in curves.items():
        rows = [(f"{m.alpha:g}", f"{m.summary.top1:.2f}", f"{m.summary.top5:.2f}", m.gain) for m in mixtures]
        print(f"{split}, n {mixtures[0].summary.n}")
        print(table(["alpha", "top-1", "top-5", "gain over alpha 0 (paired 95 %)"], rows))
    if len(curves) > 1:
        best = robustness.without_losing({name: [(m.alpha, m.gain) for m in line] for name, line in curves.items()})
        found = f"alpha {best[0]:g} gains most on val, {best[1]}, of those that lose on no set" if best else ""
        print(found or "no alpha gains on val and loses on no set (intervals above zero, and not below)")
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "data": config.data.root,
        "res": config.data.res,
        "resize_rule": config.data.resize_rule,
        "crop_pct": config.data.crop_pct,
    }
    records = {split: [mixture.record() for mixture in mixtures] for split, mixtures in curves.items()}
    record = {"model": config.model.name, **data, "curves": records, "hardware": asdict(device), "versions": versions()}
    write_json(out / "alpha.json", record, sealed=True)
    for split, mixtures in curves.items():
        board.write_curve(run, f"alpha-{split}", "alpha/top1", {round(100 * m.alpha): m.summary.top1 for m in mixtures})
    figures.alpha_plot(curves, config, out / "alpha.png")
    print(f"curve: {out / 'alpha.png'}")
    return EXIT_DONE
