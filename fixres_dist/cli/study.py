"""`fixres study`: models at several resolutions, before and after fixing, and which is best at each cost.

Each point is a run, called NAME-model=M-res=PX; the runs of a model share stage one. The same command again does what is left.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError, only_prints
from fixres_dist.base.files import write_text
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import duration, parse_sizes, table
from fixres_dist.cli import as_job, submission, submit
from fixres_dist.cli.arguments import add_accept_change, add_profile, add_runs_dir, settings_and_names
from fixres_dist.cli.submit import Target
from fixres_dist.cluster import jobs, status
from fixres_dist.config import recipes
from fixres_dist.config.recipes import Costs
from fixres_dist.models import sizes
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import State
from fixres_dist.training import estimates, plan
from fixres_dist.training.stages import stages

EXAMPLES = (
    "--data demo --dry-run",
    "--model b0 --data DIR",
    "--models b0,b1,b2 --data DIR --res 224,256,288,320 --max-gmacs 0.8",
    "--models b0,resnet50.a1_in1k --data DIR --cluster slurm --profile site.yaml --speed",
    "runs/b0-320 runs/b0-384 --name b0            # the report alone, of runs that there are",
)
STEPS = (8 / 7, 9 / 7, 10 / 7)  # default resolutions over the weights' own: 224, 256, 288, 320


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.usage = (
        f"{command('study')} (--model M[,M2...] --data DIR | RUN ...) [--res A,B,...] [options] [section.key=value ...]"
    )
    what = p.add_argument_group("what")
    text = "recipes or timm model names"
    what.add_argument("--model", "--models", default="", metavar="M,M2,...", help=text)
    text = "test resolutions; default: four from the weights' own on, such as 224,256,288,320"
    what.add_argument("--res", metavar="A,B,...", help=text)
    what.add_argument("--weights", default="", metavar="W", help="as in submit, of all models")
    what.add_argument("--data", metavar="DIR", help="with train/ and val/, a folder per class; or demo")
    what.add_argument("--preset", action="append", default=[], metavar="NAME", help="as in submit; repeatable")
    cost = p.add_argument_group("cost")
    cost.add_argument("--max-gmacs", type=float, metavar="G", help="say the best within G 1e9 multiply-adds per image")
    text = "measure images/s of each network too, where the report is written"
    cost.add_argument("--speed", action="store_true", help=text)
    text = "say the best at N images/s or more; measures them"
    cost.add_argument("--min-images-per-second", type=float, metavar="N", help=text)
    where = p.add_argument_group("where")
    text = "slurm: an array, and a last job that writes the report; default: slurm where sbatch is found, else local"
    where.add_argument("--cluster", choices=("slurm", "local", "inline"), help=text)
    where.add_argument("--nodes", metavar="N", help="of each point; default: 1")
    where.add_argument("--gpus-per-node", metavar="G", help="ranks per node; on a machine without GPUs: processes")
    add_profile(where)
    where.add_argument("--at-once", type=int, default=0, metavar="N", help="points at the same time; default: all")
    where.add_argument("--name", default="study", help="of the study, whose report is RUNS/NAME/; default: study")
    add_runs_dir(where)
    add_accept_change(where)
    text = "print points, time, memory and what Slurm says; write nothing"
    p.add_argument("--dry-run", action="store_true", help=text)
    text = "runs or grids that are points too; any setting, such as tune.epochs=3"
    p.add_argument("overrides", nargs="*", default=[], metavar="RUN | section.key=value", help=text)
    p.set_defaults(job=None, run=None, grid=[], table=None, prepare=False)


def run(args: argparse.Namespace) -> int:
    """Start the points that are missing, or go on with them, then report; on a cluster the last job reports."""
    args.overrides, names = settings_and_names(args.overrides)
    if args.data == "demo":
        args.model = args.model or "demo"
    check(args, names)
    others = status.named(names, args.runs_dir) if names else []
    if args.job or not args.model:
        return report(args, [*points(args), *others])
    kind = args.cluster or jobs.default_cluster()
    targets = targets_of(args, kind)
    for target in targets:
        submission.check(target.run, target.config, dry=args.dry_run)
    known = [costs_of(target) for target in targets]
    if args.dry_run:
        return only_prints(lambda: dry_run(args, targets, known, kind))
    print(plan_text(targets, known), flush=True)
    code = submit.work(targets, kind, args)
    waiting = [target.run for target in targets if not target.run.done.exists()]
    if any(run.state().state == State.CANCELLED for run in waiting):
        return code
    if kind == "slurm" and (waiting or measures(args)):
        return last_job(args, targets[0], waiting)
    return max(code, report(args, [*(target.run for target in targets), *others]))


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Raises UserError for options that are wrong by themselves."""
    if not args.model and not names:
        raise UserError(
            f"nothing to study was given. Accepted: --model M,M2 --data DIR, or runs that are finished. "
            f"Next: {command('study', '--model', 'b0', '--data', 'DIR', '--dry-run')}"
        )
    if not args.model and (args.data or args.res or args.overrides):
        given = next(
            x for x in (args.data and f"--data {args.data}", args.res and f"--res {args.res}", *args.overrides) if x
        )
        raise UserError(f"{given} is for points to train, and no --model is given. Next: --model M, or leave it out.")
    if args.dry_run and not args.model:
        raise UserError(
            "--dry-run is the plan of points to train, and no --model is given: the report of runs is written at once. "
            "Next: --model M, or leave it out."
        )
    if args.model and not all(models(args)):
        raise UserError(f"--model is {args.model!r}; accepted: names between commas, such as b0,b1.")
    if "/" in args.name or args.name in ("", ".", ".."):
        raise UserError(
            f"--name is {args.name!r}; accepted: a name without slashes. Next: --runs-dir for another folder."
        )
    for name in ("max_gmacs", "min_images_per_second"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; accepted: a number above 0.")
    if args.at_once < 0:
        raise UserError(f"--at-once is {args.at_once}; accepted: 0 (all) or more.")


def measures(args: argparse.Namespace) -> bool:
    return bool(args.speed or args.min_images_per_second)


def models(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(args.model.split(","))) if args.model else []


def resolutions(args: argparse.Namespace, model: str) -> list[int]:
    """Those of --res, ascending; by default four from the weights' own on."""
    if args.res:
        return sorted(set(parse_sizes(args.res)))
    recipe = recipes.find(model, args.weights)
    if recipe.facts:
        own = recipe.facts.train_res
        return sorted({own, *(round(own * step / 32) * 32 for step in STEPS)})
    name = recipe.values["model"]["timm_name"]
    return sorted({sizes.sizes(name).train, *(sizes.enlarged(name, step) for step in STEPS)} - {0})


def name_of(args: argparse.Namespace, model: str) -> str:
    return f"{args.name}-model={model.replace('/', '_')}"


def points(args: argparse.Namespace) -> list[RunDir]:
    """The runs of the study, whether they are there or not."""
    return [
        RunDir(args.runs_dir / f"{name_of(args, model)}-res={res}")
        for model in models(args)
        for res in resolutions(args, model)
    ]


def targets_of(args: argparse.Namespace, kind: str) -> list[Target]:
    """The runs of the study with their configurations. Those of a model have one stage one, at the largest of the sizes
    that they would have alone: the weights' own, or the largest test size where that is less."""
    found = []
    for model in models(args):
        grid = f"data.res={','.join(map(str, resolutions(args, model)))}"
        one = argparse.Namespace(
            **{**vars(args), "model": model, "res": None, "grid": [grid], "name": name_of(args, model)}
        )
        targets = submit.asked_for(one, kind)
        first = {target.config.pretrain.res for target in targets if target.config.pretrain}
        if len(first) > 1:
            one.overrides = [*args.overrides, f"pretrain.res={max(first)}"]
            targets = submit.asked_for(one, kind)
        found += [replace(target, grid=args.name) for target in targets]
    return found


def costs_of(target: Target) -> Costs:
    """What a picture costs the point's network; raises UserError for a resolution that it does not take."""
    if target.recipe.facts:
        return target.recipe.facts
    from fixres_dist.models import costs

    name, res, classes = target.config.model.timm_name, target.config.data.res, len(plan.classes(target.config))
    try:
        return costs.costs(name, classes, res)
    except UserError:
        import torch

        from fixres_dist.models.build import build_model
        from fixres_dist.models.resizing import check_resolutions

        with torch.device("meta"):
            check_resolutions(build_model(name, classes), [res])  # which says what it takes near that
        raise


def plan_text(targets: list[Target], known: list[Costs]) -> str:
    """A line for each point: multiply-adds, steps, memory, time, state; and the sum, in which a model's stage one is once."""
    rows, total_s, trained = [], 0.0, set()
    for target, costs in zip(targets, known, strict=True):
        config, on_cpu, counts = target.config, target.on_cpu, plan.count(target.config)
        ranks = config.cluster.node_range()[0] * config.cluster.gpus_per_node
        todo = stages(config, counts.train)
        pictures = plan.engine_plan(config, target.recipe.facts, counts, todo[-1])[2]
        alone = replace(config, pretrain=None) if config.model.name in trained else config
        trained.add(config.model.name)
        time_s = estimates.seconds(alone, costs, counts, pictures, ranks, on_cpu)[0]
        gib = (
            estimates.cpu_memory_gib(config, costs, counts, ranks, ranks)
            if on_cpu
            else estimates.memory_gib(config, costs, counts, ranks)
        )
        state = target.run.state().state.value if target.run.config_file.exists() else ""
        total_s += 0 if state == State.DONE else time_s
        gmacs = costs.multiply_adds_g * (config.data.res / costs.res) ** 2
        rows.append((target.run.name, f"{gmacs:.3g}", todo[-1].stop, f"{gib:.1f} GiB", duration(time_s), state))
    where = "on this machine's CPUs, a third to three times" if targets[0].on_cpu else "on H200, +-40 %"
    head = ("POINT", "G MULTIPLY-ADDS", "STEPS", "MEMORY", "TIME", "STATE")
    return (
        f"{table(head, rows)}\n{len(rows)} points, about {duration(total_s)} one after another ({where}; estimates)\n"
    )


def dry_run(args: argparse.Namespace, targets: list[Target], known: list[Costs], kind: str) -> int:
    print(plan_text(targets, known))
    print("the first of them:\n" + "\n".join(targets[0].plan()))
    for group in submit.same_job(targets) if kind == "slurm" else []:
        submission.print_sbatch(group[0].config, [target.run for target in group], args.at_once)
    print(f"\nthen the report: {args.runs_dir / args.name / 'report.html'}" + ", by a last job" * (kind == "slurm"))
    return EXIT_DONE


def last_job(args: argparse.Namespace, target: Target, waiting: list[RunDir]) -> int:
    """Submit the job that writes the report once the jobs of these points have ended."""
    ids = {(run.state().slurm_job or "").partition("_")[0] for run in waiting}
    config = replace(target.config, cluster=replace(target.config.cluster, nodes="1", gpus_per_node=1))
    first, result = args.runs_dir / f"{args.name}-job=report", args.runs_dir / args.name / "report.html"
    job = argparse.Namespace(**{**vars(args), "cluster": "slurm"})
    return as_job.start(job, config, str(result), 1, first, sorted(ids - {""}))


def report(args: argparse.Namespace, runs: list[RunDir]) -> int:
    """Write report.md, report.html, study.json and the pictures from the runs that are finished; 1 where some are not."""
    from fixres_dist.bench import forward
    from fixres_dist.evaluation.sweep import Limit
    from fixres_dist.publishing import study, study_report
    from fixres_dist.publishing.html_page import html_page

    if args.job and not args.job.ranks.is_main:
        return EXIT_DONE
    out: Path = args.runs_dir / args.name
    found = study.read(runs)
    out.mkdir(parents=True, exist_ok=True)
    if measures(args):
        networks = {(p.timm_name, p.res): forward.Network(p.timm_name, p.res, p.classes) for p in found.points}
        forward.measure(list(networks.values()), out / "speeds.jsonl")
    speeds, how = forward.speeds(forward.turns(out / "speeds.jsonl"))
    found = found.with_speeds(speeds)
    limit = Limit(args.max_gmacs, args.min_images_per_second)
    study_report.draw(found, limit, out)
    text = study_report.markdown(args.name, found, limit, how)
    write_text(out / "report.md", text)
    write_text(out / "report.html", html_page(f"{args.name}: accuracy against resolution and cost", text, out))
    write_json(out / "study.json", found.record())
    print(f"\n{study_report.console(found, limit)}\nreport: {out / 'report.html'}, {out / 'report.md'}")
    return EXIT_FAILED if found.unfinished else EXIT_DONE
