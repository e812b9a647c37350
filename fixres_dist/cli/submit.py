"""`fixres submit`: prepare run directories and start them. The same command again goes on with them."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fixres_dist.base.commands import command
from fixres_dist.base.environment import shipped, slurm_file
from fixres_dist.base.errors import EXIT_DONE, UserError, only_prints
from fixres_dist.base.files import write_text
from fixres_dist.base.secrets import REDACTED, redacted
from fixres_dist.base.small_files import read_note
from fixres_dist.base.text import duration, table
from fixres_dist.cli import submission
from fixres_dist.cli.arguments import add_accept_change, add_overrides, add_profile, add_runs_dir, add_show
from fixres_dist.cli.settings import Settings, settle
from fixres_dist.cluster import grid, jobs
from fixres_dist.cluster.gpus import check as check_gpus
from fixres_dist.cluster.gpus import ranks_here, visible
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation, rundir, starts
from fixres_dist.runs.rundir import START_LOCK
from fixres_dist.runs.states import Event, State
from fixres_dist.training import plan

EXAMPLES = (
    "--list",
    "--data demo --cluster inline",
    "--model l2 --res 600 --nodes 4 --dry-run",
    "--model b0 --res 320 --data /data/imagenet --weights ap --profile site.yaml",
    "--model b0 --res 320 --data DIR --cluster local --gpus-per-node 2 tune.epochs=3",
    "--model b0 --data DIR                  # classes of its own: trained first, then fixed",
    "--model b0 --res 320 --data DIR --grid tune.base_lr=1e-3,1e-4 --at-once 2",
    "--table 1 --data /data/imagenet --nodes 4",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.usage = f"{command('submit')} --model M --res PX --data DIR [options] [section.key=value ...]"
    what = p.add_argument_group("what")
    what.add_argument("--model", metavar="M", help="a recipe (--list) or any timm model name")
    what.add_argument("--res", metavar="PX", help="the test resolution that is fixed; default: the recipe's, or timm's")
    text = "ns, ap, pretrained, none, or a file; default: the recipe's"
    what.add_argument("--weights", default="", metavar="W", help=text)
    what.add_argument("--data", metavar="DIR", help="with train/ and val/, a folder per class; or demo")
    text = f"settings laid over the recipe: {', '.join(recipes.presets())}; none: nothing is added; repeatable"
    what.add_argument("--preset", action="append", default=[], metavar="NAME", help=text)
    where = p.add_argument_group("where")
    where.add_argument("--nodes", metavar="N", help="a number, or MIN-MAX: start with what there is")
    where.add_argument("--gpus-per-node", metavar="G", help="ranks per node; on a machine without GPUs: processes")
    add_profile(where)
    text = "default: slurm where sbatch is found, else local"
    where.add_argument("--cluster", choices=("slurm", "local", "inline"), help=text)
    where.add_argument("--name", help="of the run directory; default: MODEL-RES")
    add_runs_dir(where)
    add_accept_change(where)
    several = p.add_argument_group("several runs, as one job array")
    text = "a run for each value; repeatable"
    several.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help=text)
    several.add_argument("--sweep", action="append", dest="grid", help=argparse.SUPPRESS)  # the older name of --grid
    several.add_argument("--table", choices=("1", "2"), help="all recipes of a published table")
    several.add_argument("--at-once", type=int, default=0, metavar="N", help="runs at the same time; default: all")
    only = p.add_argument_group("without a start")
    only.add_argument("--list", action="store_true", help="show the recipes with starting and published accuracy")
    text = "print the plan, on Slurm also the sbatch text and what Slurm says; write nothing"
    only.add_argument("--dry-run", action="store_true", help=text)
    add_show(only)
    text = f"only make the run directory, for {slurm_file('train.sbatch')}"
    only.add_argument("--prepare", action="store_true", help=text)
    add_overrides(p, "tune.epochs=3")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return only_prints(list_recipes)
    if args.at_once < 0:
        raise UserError(f"--at-once is {args.at_once}; accepted: 0 (all) or more.")
    kind = args.cluster or jobs.default_cluster()
    elsewhere = args.dry_run and args.cluster is None and submission.means_slurm(args)
    targets = asked_for(args, "slurm" if elsewhere else kind)
    for target in targets:
        submission.check(target.run, target.config, dry=args.dry_run)
    if args.dry_run:
        return only_prints(lambda: dry_run(targets, args.at_once, submission.shows_sbatch(args)))
    code = work(targets, kind, args)
    if closing := grid.closing_table([target.run for target in targets]):
        print(f"\n{closing}")
    return code


def work(targets: list[Target], kind: str, args: argparse.Namespace) -> int:
    """Start the checked runs that need it, on this machine to their end; returns the exit code."""
    for target in targets:
        preparation.mend_config(target.run, target.config)
    targets = [target for target in targets if not submission.needs_no_job(target.run)]
    for target in targets:
        starts.check(target.run, target.config.data, args.accept_change)
        submission.check_model(target.config, target.recipe)
    if kind == "slurm" and not args.prepare:
        for group in same_job(targets):
            submission.check_slurm(group[0].config, *(t.run for t in group), at_once=args.at_once)
    return start(targets, kind, args) if targets else EXIT_DONE


def dry_run(targets: list[Target], at_once: int, with_sbatch: bool) -> int:
    print("\n".join(targets[0].plan()))
    if len(targets) > 1:
        known = [(t.run.root, t.config, t.recipe.facts, t.settings.costs) for t in targets]
        print("\n".join(plan.several(known, targets[0].on_cpu)))
    for group in same_job(targets) if with_sbatch else ():
        submission.print_sbatch(group[0].config, [target.run for target in group], at_once)
    return EXIT_DONE


def same_job(targets: list[Target]) -> list[list[Target]]:
    """The runs that ask Slurm for the same, and so can be the tasks of one array."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(str(target.config.cluster), []).append(target)
    return list(groups.values())


def start(targets: list[Target], kind: str, args: argparse.Namespace) -> int:
    """Prepare the run directories of the runs that need a job, and start them."""
    with contextlib.ExitStack() as owned:
        with contextlib.ExitStack() as stack:
            # Of two submissions of one run, the second waits here, then finds the first one's job.
            for target in targets:
                target.run.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(target.run.lock(".submit.lock", wait_s=60))
            targets = [target for target in targets if not submission.needs_no_job(target.run)]
            if not targets:
                return EXIT_DONE
            typed = command(args.command, *(public(word, targets[0].config) for word in args.words))
            for target in targets:
                preparation.prepare(target.run.root, target.config, typed)
                write_text(
                    target.run.root / "plan.txt", redacted("\n".join(target.plan()), target.config.cluster.env) + "\n"
                )
            print(read_note(targets[0].run.root / "plan.txt"), flush=True)
            if args.prepare:
                script = shipped("slurm") / "train.sbatch"
                for target in targets:
                    jobs.write_prepared(target.run, target.config)
                    line = jobs.sbatch_command(target.run, target.config, script)
                    print(f"Next: {redacted(line, target.config.cluster.env)}")
                return EXIT_DONE
            for target in targets:
                target.run.event(Event.SUBMITTED, cluster=kind, command=typed)
                if kind != "slurm":
                    owned.enter_context(target.run.lock(START_LOCK))
            if kind == "slurm":
                for group in same_job(targets):
                    submission.start_slurm([target.run for target in group], group[0].config, args.at_once)
                names = {target.grid for target in targets}
                submission.print_next([target.run for target in targets], names.pop() if len(names) == 1 else "")
                return EXIT_DONE
        return max(start_in_turn(targets, kind))


def start_in_turn(targets: list[Target], kind: str) -> Iterator[int]:
    """Work on one run after another on this machine; yields their exit codes."""
    costs, started = [target.config.data.res**2 for target in targets], time.monotonic()
    for k, target in enumerate(targets, 1):
        yield submission.start_here(target.run, target.config, kind)
        if target.run.state().state == State.CANCELLED:  # a stop is meant for the runs after it too
            return
        if k < len(targets):
            eta_s = (time.monotonic() - started) * sum(costs[k:]) / sum(costs[:k])
            print(f"{k} of {len(targets)} runs have ended | eta {duration(eta_s)}", flush=True)


def public(word: str, config: Config) -> str:
    """A word of the command as others may read it; the address that on_change calls is often a secret."""
    key, _, value = word.partition("=")
    return f"{key}={REDACTED}" if key == "cluster.on_change" and value else redacted(word, config.cluster.env)


def list_recipes() -> int:
    rows = []
    for recipe in recipes.every():
        row = recipe.published
        assert row is not None
        start = f"{row['timm_base_top1']} @{row['train_res']}"
        rows.append((recipe.name, recipe.weights, row["fix_test_res"], start, row["fix_top1"], row["timm_name"]))
    print(table(("--model", "--weights", "--res", "timm starts at", "published, fixed", "timm name"), rows))
    print("demo: the built-in example, trained and fixed from new weights in minutes on a CPU")
    print("r50: ResNet-50 from new weights at 128 px with repeated augmentation, then fixed at 224 px")
    print("Published: top-1 in arXiv 2003.08237, Tables 1 and 2. Any other timm model name works too.")
    return EXIT_DONE


@dataclass(frozen=True)
class Target:
    """One run that the command asks for."""

    run: rundir.RunDir
    config: Config
    recipe: recipes.Recipe
    on_cpu: bool  # of this machine
    grid: str  # the name that stands for all runs of its grid or table; empty for a run alone
    settings: Settings

    def plan(self) -> list[str]:
        world_size = self.config.cluster.node_range()[0] * self.config.cluster.gpus_per_node
        counts, more = plan.count(self.config), plan.More(self.settings.why, self.settings.costs)
        return plan.lines(self.config, self.recipe.facts, counts, self.run.root, world_size, self.on_cpu, more)


def asked_for(args: argparse.Namespace, kind: str) -> list[Target]:
    """The run the command asks for, or those of a grid or a table, each with a directory of its own."""
    variants: list[dict[str, str]] = [{}]
    if args.table:
        if args.model or args.res or args.weights:
            raise UserError("--table is every recipe of it, so it excludes --model, --res and --weights.")
        rows = [key for key, row in recipes.published().items() if row["table"] == args.table]
        variants = [{"model": model, "weights": weights} for model, weights in rows]
    if args.name and ("/" in args.name or args.name in (".", "..")):  # status lists the folders of one runs directory
        raise UserError(
            f"--name is {args.name!r}; accepted: a name without slashes. Next: --runs-dir for another folder."
        )
    found = []
    for variant, chosen in itertools.product(variants, itertools.product(*map(choices, args.grid))):
        one = argparse.Namespace(**{**vars(args), **variant})
        one.overrides = [*args.overrides, *(f"{key}={value}" for key, value in chosen)]
        one.res = args.res or (recipes.find(one.model, one.weights).values["data"]["res"] if args.table else None)
        settings = configure(one, kind)
        config, recipe = settings.config, settings.recipe
        name = "-".join([recipes.run_name(config.model.name, config.data.res, config.model.weights), *settings.presets])
        if args.name:
            name = f"{args.name}-{name}" if args.table else args.name
        group = (args.name if args.table else name if chosen else "") or ""
        name = "-".join([name, *(f"{key.rpartition('.')[2]}={value.replace('/', '_')}" for key, value in chosen)])
        run = rundir.RunDir(args.runs_dir / name)
        found.append(Target(run, config, recipe, on_cpu(kind), group, settings))
    return found


def on_cpu(kind: str) -> bool:
    """Whether the ranks are to be processes on this machine's CPU."""
    return kind != "slurm" and not visible()


def choices(text: str) -> list[tuple[str, str]]:
    """The (key, value) pairs of one --grid."""
    key, equals, values = text.partition("=")
    if not (equals and "." in key and all(values.split(","))):
        raise UserError(f"--grid is {text!r}; accepted: section.key=v1,v2, such as tune.base_lr=1e-3,1e-4.")
    return [(key, value) for value in values.split(",")]


def configure(args: argparse.Namespace, kind: str) -> Settings:
    """Defaults < recipe < preset < profile < flags < section.key=value."""
    name = args.model or ("demo" if args.data == "demo" else None)
    if name is None:
        raise UserError("no --model given. Next: --model b0 --res 320, or --list for the recipes, or --data demo.")
    recipe = recipes.find(name, args.weights)
    given: dict[str, Any] = {}
    if args.profile:
        given = reading.read_profile(args.profile)
    gpus = args.gpus_per_node
    if gpus is None and kind != "slurm":
        gpus = str(ranks_here() if kind == "local" else 1)
    if args.res and not args.res.isdigit():
        square = "a whole number of pixels, the side of a square, such as 224"
        raise UserError(f"--res is {args.res!r}; accepted: {square}. Next: --grid data.res=224,256 for several.")
    sections = {"data": {"res": args.res, "root": args.data}, "cluster": {"nodes": args.nodes, "gpus_per_node": gpus}}
    flags = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in sections.items()}
    given = reading.merge(reading.merge(given, flags), reading.overrides(args.overrides))
    settings = settle(recipe, args.preset, given, on_cpu(kind))
    config = settings.config
    nodes, gpus = config.cluster.nodes, config.cluster.gpus_per_node
    if kind != "slurm" and nodes != "1":
        raise UserError(
            f"--nodes {nodes} needs a cluster; --cluster {kind} is this machine alone. Next: --cluster slurm"
        )
    if kind == "inline" and gpus != 1:
        raise UserError(f"--cluster inline is one process. Next: --cluster local --gpus-per-node {gpus}")
    if kind == "local":
        check_gpus(config.cluster.gpus_per_node, "--gpus-per-node ")
    return settings
