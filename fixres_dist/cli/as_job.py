"""A command as a job of Slurm, or in several processes of this machine: the same words, carried out by its ranks.

The job has a run directory of its own, RUN/jobs/NAME, or runs/NAME for a command on no run. So `status`, `logs`, `cancel` and
`resume` take it as they take a run, and what happens at a stop signal or a failure is the same (cluster/requeue.py).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE, UserError, only_prints
from fixres_dist.cli import submission
from fixres_dist.cluster import gpus, jobs
from fixres_dist.config.schema import Config
from fixres_dist.runs import names, preparation
from fixres_dist.runs.rundir import JOBS, START_LOCK, RunDir
from fixres_dist.runs.states import Event
from fixres_dist.runs.task import Task

OF_JOB = ("--nodes", "--gpus-per-node")
WHERE = ("--cluster", "--profile", *OF_JOB)


def asked(args: argparse.Namespace, of_job: Sequence[str] = OF_JOB) -> bool:
    """Whether the command is to become a job; within one it does its work.

    Raises UserError for an option that is `of_job` where none is asked for. A profile is not: it also says where data is.
    """
    if args.job:
        return False
    if args.cluster != "inline" or args.dry_run:
        return True
    for name in of_job:
        if value := getattr(args, name.removeprefix("--").replace("-", "_")):
            raise UserError(
                f"{name} {value} is of a job, and {args.command} works in this process; accepted: with --cluster. "
                f"Next: --cluster slurm {name} {value}, or --cluster local for processes of this machine"
            )
    return False


def start(
    args: argparse.Namespace, config: Config, result: str, passes: int, first: Path | None = None, after: Sequence[str] = ()
) -> int:  # fmt: skip
    """Submit the command as a job, or follow it in processes of this machine; returns the exit code.

    `config`: what the command will compute, and how its job is asked for; checked. `result`: where that will be, in words.
    `passes`: over images, for `status`. `first`: the job's directory, if it is free; by default that of the command's name.
    `after`: ids of Slurm jobs that have to end before. The same command again finds its job, or begins anew where that
    is finished.
    """
    if args.cluster == "local":
        if config.cluster.nodes != "1":
            raise UserError(f"--nodes {config.cluster.nodes} needs a cluster. Next: --cluster slurm")
        gpus.check(config.cluster.gpus_per_node, "--gpus-per-node ")
    jobs.requested(config.cluster)
    first, task = first or jobs_folder(args) / args.command, Task(args.command, tuple(args.words), os.getcwd(), result)
    names.check(first)
    queued = in_turn(config, after)
    if args.dry_run:
        return only_prints(lambda: dry_run(RunDir(place(first, task)), queued, submission.shows_sbatch(args)))
    first.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as owned:
        with RunDir(first.parent).lock(".jobs.lock", wait_s=60):
            run = RunDir(place(first, task))
            if run.config_file.exists() and not run.done.exists() and submission.needs_no_job(run):
                return EXIT_DONE
            if args.cluster == "slurm":
                submission.check_slurm(queued, run)
            prepare(run, config, task, passes)
            run.event(Event.SUBMITTED, cluster=args.cluster, command=run.typed)
            if args.cluster == "slurm":
                submission.start_slurm([run], queued)
                submission.print_next([run])
                print(f"its result: {result}")
                return EXIT_DONE
            owned.enter_context(run.lock(START_LOCK))
        return submission.start_here(run, config, args.cluster)


def jobs_folder(args: argparse.Namespace) -> Path:
    return Path(args.run) / JOBS if args.run else Path("runs")


def in_turn(config: Config, after: Sequence[str]) -> Config:
    """`config` for a job that waits for others to end, whatever came of them; `resume` of it waits for none of them."""
    if not after:
        return config
    waits = {"dependency": f"afterany:{':'.join(after)}"}
    return replace(config, cluster=replace(config.cluster, sbatch={**config.cluster.sbatch, **waits}))


def place(first: Path, task: Task) -> Path:
    """The directory of the job of this command: the one that it has, or the first that is free, such as `sweep-2`."""
    for k in itertools.count(1):
        root = first if k == 1 else first.with_name(f"{first.name}-{k}")
        if not root.exists() or same(RunDir(root).task, task):
            return root
    raise AssertionError


def same(one: Task | None, other: Task) -> bool:
    return one is not None and (one.command, one.folder) == (other.command, other.folder) and what(one) == what(other)


def what(task: Task) -> list[str]:
    """The command's words without those that say where it runs."""
    kept, words = [], iter(task.words)
    for word in words:
        if word in WHERE:
            next(words, None)
        elif not word.startswith((*(f"{name}=" for name in WHERE), "cluster.")):
            kept.append(word)
    return kept


def prepare(run: RunDir, config: Config, task: Task, passes: int) -> None:
    """The job's directory; of one that is finished nothing is taken up again."""
    if run.done.exists():
        run.done.unlink()
        shutil.rmtree(run.partial, ignore_errors=True)
        run.state_file.unlink(missing_ok=True)
    run.root.mkdir(exist_ok=True)
    task.write(run.task_file)
    preparation.write(run.root, config, task.typed())
    run.update_state(total_steps=passes)


def dry_run(run: RunDir, config: Config, with_sbatch: bool) -> int:
    print(f"{run.root}: {run.root.name} on {config.cluster.nodes} node(s) x {config.cluster.gpus_per_node}")
    if with_sbatch:
        submission.print_sbatch(config, [run])
    return EXIT_DONE
