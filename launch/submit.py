"""Submit a run: `python launch/submit.py --model l2 --res 600 --nodes 4`. The same command again resumes it."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.base.errors import EXIT_DONE, UserError, exit_code
from fixres_dist.base.files import write_text
from fixres_dist.cluster import jobs, local, slurm
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.runs import rundir
from fixres_dist.runs.states import State
from fixres_dist.training import plan
from fixres_dist.training.job import TrainJob

EXAMPLES = """\
examples:
  python launch/submit.py --list
  python launch/submit.py --model l2 --res 600 --nodes 4 --dry-run
  python launch/submit.py --model b0 --res 320 --data /data/imagenet --weights ap --profile slurm/profiles/generic.yaml
  python launch/submit.py --model b0 --res 320 --data DIR --cluster local --gpus-per-node 2 tune.epochs=3
  python launch/submit.py --data demo --cluster inline
  python launch/submit.py --model b0 --res 320 --data DIR --preset as_coded          # what the original code trains
  python launch/submit.py --model b0 --res 320 --data DIR --preset own_classes       # DIR has classes of its own
  python launch/submit.py --model b0 --res 320 --data DIR --sweep tune.base_lr=1e-3,1e-4 --at-once 2
  python launch/submit.py --table 1 --data /data/imagenet --nodes 4
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="a recipe (--list) or any timm model name")
    p.add_argument("--res", help="test resolution in pixels, the one that is fixed; default: the recipe's")
    p.add_argument("--weights", default="", help="ns, ap, pretrained, none, or a file; default: the recipe's")
    p.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help=f"settings laid over the recipe: {', '.join(recipes.presets())} (configs/presets/); repeatable",
    )
    p.add_argument("--data", help="directory with train/ and val/, a folder per class; or demo")
    p.add_argument("--nodes", help="a number, or MIN-MAX: start with what there is")
    p.add_argument("--gpus-per-node", help="ranks per node; on a machine without GPUs: processes")
    p.add_argument("--profile", type=Path, help="YAML with the site's cluster settings (slurm/profiles/)")
    p.add_argument("--name", help="of the run directory; default: MODEL-RES")
    p.add_argument("--runs-dir", type=Path, default=Path("runs"))
    p.add_argument(
        "--cluster", choices=("slurm", "local", "inline"), help="default: slurm where sbatch is found, else local"
    )
    p.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each value, as one job array; repeatable",
    )
    p.add_argument("--table", choices=("1", "2"), help="all recipes of a published table, as one job array")
    p.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="runs of an array that run at the same time; default: all"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print the plan, the sbatch text and what Slurm says; write nothing"
    )
    p.add_argument("--prepare", action="store_true", help="only make the run directory, for slurm/train.sbatch")
    p.add_argument("--list", action="store_true", help="show the recipes with starting and published accuracy")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting, such as tune.epochs=3")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    try:
        code = exit_code(lambda: list_recipes() if args.list else submit(args))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        if not (args.list or args.dry_run):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail at exit
        code = EXIT_DONE
    return code


def list_recipes() -> int:
    print(f"{'--model':<8}{'--weights':<10}{'--res':>6}   {'timm starts at':<15}{'published, fixed':<18}timm name")
    for recipe in recipes.every():
        row = recipe.published
        assert row is not None
        start = f"{row['timm_base_top1']} @{row['train_res']}"
        print(
            f"{recipe.name:<8}{recipe.weights:<10}{row['fix_test_res']:>6}   {start:<15}{row['fix_top1'] + ' top-1':<18}{row['timm_name']}"
        )
    print("demo    none               the built-in example: trained and fixed from scratch in minutes on a CPU")
    print("r50     none         224   ResNet-50 from scratch at 128 px with repeated augmentation, then fixed at 224")
    print("Published: arXiv 2003.08237, Tables 1 and 2. Any other timm model name works too, with --res.")
    return EXIT_DONE


def configure(args: argparse.Namespace, kind: str) -> tuple[Config, recipes.Recipe]:
    """Defaults < recipe < preset < profile < flags < section.key=value."""
    name = args.model or ("demo" if args.data == "demo" else None)
    if name is None:
        raise UserError("no --model given. Next: --model b0 --res 320, or --list for the recipes, or --data demo.")
    recipe = recipes.find(name, args.weights)
    values = recipe.values
    for preset in args.preset:
        values = reading.merge(values, recipes.preset(preset))
    if args.profile:
        if not args.profile.is_file():
            raise UserError(f"no profile {args.profile}. Accepted: a YAML file such as slurm/profiles/generic.yaml.")
        values = reading.merge(values, reading.read_yaml(args.profile.read_text()) or {})
    flags: dict[str, dict[str, str]] = {"data": {}, "cluster": {}}
    if args.res is not None:
        flags["data"]["res"] = args.res
    if args.data is not None:
        flags["data"]["root"] = args.data
    if args.nodes is not None:
        flags["cluster"]["nodes"] = args.nodes
    if args.gpus_per_node is not None:
        flags["cluster"]["gpus_per_node"] = args.gpus_per_node
    elif kind != "slurm":
        flags["cluster"]["gpus_per_node"] = str(max(1, local.local_gpus()) if kind == "local" else 1)
    values = reading.merge(reading.merge(values, flags), reading.overrides(args.overrides))
    if "res" not in values["data"]:
        raise UserError(
            f"no --res given, and nothing is published for {name}. Next: --res 288, say: above its training resolution."
        )
    if recipe.facts and values.get("pretrain"):
        values["pretrain"].setdefault("res", recipe.facts.train_res)
    config = reading.parse(Config, recipes.with_absolute_paths(values))
    if kind != "slurm" and config.cluster.nodes != "1":
        raise UserError(
            f"--nodes {config.cluster.nodes} needs a cluster; --cluster {kind} is this machine alone. Next: --cluster slurm"
        )
    if kind == "inline" and config.cluster.gpus_per_node != 1:
        raise UserError(
            "--cluster inline is one process. Next: --cluster local --gpus-per-node "
            + str(config.cluster.gpus_per_node)
        )
    return config, recipe


@dataclass(frozen=True)
class Target:
    """One run that the command asks for."""

    run: rundir.RunDir
    config: Config
    recipe: recipes.Recipe

    @property
    def world_size(self) -> int:
        return self.config.cluster.node_range()[0] * self.config.cluster.gpus_per_node

    def plan(self) -> list[str]:
        counts = plan.count(self.config)
        return plan.lines(self.config, self.recipe.facts, counts, self.run.root, self.world_size)


def targets(args: argparse.Namespace, kind: str) -> list[Target]:
    """The run the command asks for, or those of a sweep or a table, each with a directory of its own."""
    if args.table:
        if args.model or args.res or args.weights:
            raise UserError("--table is every recipe of it, so it excludes --model, --res and --weights.")
        rows = [key for key, row in recipes.published().items() if row["table"] == args.table]
        variants = [{"model": model, "weights": weights} for model, weights in rows]
    else:
        variants = [{}]
    if args.name and ("/" in args.name or args.name in (".", "..")):  # status lists the folders of one runs directory
        raise UserError(
            f"--name is {args.name!r}; accepted: a name without slashes. Next: --runs-dir for another folder."
        )
    choices = []
    for item in args.sweep:
        key, equals, values = item.partition("=")
        if not (equals and "." in key and all(values.split(","))):
            raise UserError(f"--sweep is {item!r}; accepted: section.key=v1,v2, such as tune.base_lr=1e-3,1e-4.")
        choices.append([(key, value) for value in values.split(",")])
    found = []
    for variant, chosen in itertools.product(variants, itertools.product(*choices)):
        one = argparse.Namespace(**{**vars(args), **variant})
        one.overrides = [*args.overrides, *(f"{key}={value}" for key, value in chosen)]
        one.res = args.res or (recipes.find(one.model, one.weights).values["data"]["res"] if args.table else None)
        config, recipe = configure(one, kind)
        name = "-".join([recipes.run_name(config.model.name, config.data.res, config.model.weights), *args.preset])
        if args.name:
            name = f"{args.name}-{name}" if args.table else args.name
        name = "-".join([name, *(f"{key.rpartition('.')[2]}={value.replace('/', '_')}" for key, value in chosen)])
        found.append(Target(rundir.RunDir(args.runs_dir / name), config, recipe))
    return found


def submit(args: argparse.Namespace) -> int:
    kind = args.cluster or jobs.default_cluster()
    if args.at_once < 0:
        raise UserError(f"--at-once is {args.at_once}; accepted: 0 (all) or more.")
    todo = targets(args, "slurm" if args.dry_run and args.cluster is None else kind)
    for target in todo:
        least, most = target.config.cluster.node_range()
        plan.check(target.config, target.world_size if least == most else 1, dry=args.dry_run)
        rundir.check(target.run.root, target.config)
        if not (args.dry_run or target.run.done.exists() or target.run.is_locked()):
            check_model(target.config, target.recipe)
    text = jobs.sbatch_text(todo[0].config, *(t.run for t in todo), at_once=args.at_once) if not args.prepare else ""
    if args.dry_run:
        print("\n".join(todo[0].plan()))
        print("".join(f"and        {target.run.root}\n" for target in todo[1:]), end="")
        print(f"\n# what sbatch would get\n{text}")
        said = jobs.ask_slurm(text) if jobs.default_cluster() == "slurm" else ""
        print(f"\n# Slurm says: {said or 'nothing here (sbatch --test-only got no answer)'}")
        return EXIT_DONE
    if kind == "slurm" and not args.prepare and not jobs.ask_slurm(text):
        raise UserError(
            "Slurm does not answer here (sbatch --test-only). Next: a login node of the cluster, or --cluster local."
        )
    with contextlib.ExitStack() as stack:
        for target in todo:  # two submissions of one run at once: the second waits here, then finds the first one's job
            target.run.root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(target.run.lock(".submit.lock", wait_s=60))
        todo = [target for target in todo if not told_already(target.run, kind)]
        if not todo:
            return EXIT_DONE
        command = ["python", "launch/submit.py", *map(shlex.quote, sys.argv[1:])]
        for target in todo:
            rundir.prepare(target.run.root, target.config, command)
        print("\n".join(todo[0].plan()), flush=True)
        if args.prepare:
            for target in todo:
                print(f"Next: sbatch {jobs.sbatch_options(target.config)} slurm/train.sbatch {target.run.root}")
            return EXIT_DONE
        for target in todo:
            target.run.event("submitted", cluster=kind, command=" ".join(command))
        if kind == "slurm":
            return start_slurm([target.run for target in todo], todo[0].config, args.at_once)
    codes = []
    for target in todo:
        codes.append(start_here(target.run, target.config, kind))
        if target.run.state().state == State.CANCELLED:  # a stop is meant for the runs after it too
            break
    return max(codes)


def told_already(run: rundir.RunDir, kind: str) -> bool:
    """Whether `run` is finished, running or queued, and so needs no submission; says which."""
    status = f"Next: {run.command('status')}"
    if run.done.exists():
        print(f"{run.name} is finished; its results: {run.results}")
        return True
    if run.is_locked():
        print(f"{run.name} is running already. {status}")
        return True
    job = run.state().job_id
    queued = (slurm.queue([run.root.owner()]) or {}) if kind == "slurm" and job else {}
    if job in queued:
        print(f"{run.name} is in the queue already, as job {job} ({queued[job].state}). {status}")
    return job in queued


def check_model(config: Config, recipe: recipes.Recipe) -> None:
    """What no recipe vouches for is tried on the meta device here rather than in the queue; this imports torch."""
    if config.model.weights in recipes.WEIGHTS and recipe.facts:
        return
    import torch

    from fixres_dist.models.parts import parts_of
    from fixres_dist.models.weights import open_model

    with torch.device("meta"):
        model = open_model(config, plan.count(config).classes)
    for stage in config.stage_settings():
        parts_of(model, stage.policy)


def start_slurm(runs: list[rundir.RunDir], config: Config, at_once: int) -> int:
    write_demo(config)
    for run, job in zip(runs, jobs.submit_slurm(config, runs, TrainJob, at_once), strict=True):
        print(f"submitted {run.name} as job {job}")
    for script in ("status", "logs", "cancel", "board"):
        print(f"  {runs[0].command(script)}{' --follow' if script == 'logs' else ''}")
    return EXIT_DONE


def write_demo(config: Config) -> None:
    if config.data.root == "demo":
        from fixres_dist.data import dataset  # written here, where its progress bar can be seen

        dataset.folder("demo", config.data.cache)


def start_here(run: rundir.RunDir, config: Config, kind: str) -> int:
    write_demo(config)
    write_text(run.root / "submission.sh", jobs.sbatch_text(config, run))
    if kind == "inline":
        from fixres_dist.training import worker

        return worker.train(run.root)
    return local.run_local(run, config.cluster.gpus_per_node, TrainJob)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
