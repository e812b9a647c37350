"""`fixres resume`: from the last checkpoint, with the code snapshot of the run; submit takes a new one."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import asdict

from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.base.small_files import read_lines
from fixres_dist.cli import submission
from fixres_dist.cli.arguments import add_accept_change, add_overrides, add_runs_dir, settings_and_names
from fixres_dist.cluster import gpus, grid, jobs, status
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation, starts
from fixres_dist.runs.rundir import START_LOCK, RunDir
from fixres_dist.runs.states import UNFINISHED, Event, State

KINDS = ("slurm", "local", "inline")
EXAMPLES = ("b0-320", "b0-320 cluster.exclude=n7", "b0-320 --nodes 1-4 --gpus-per-node 4 --runs-dir /scratch/runs")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", help="a run, or a grid or table; more may follow")
    p.add_argument("--nodes", metavar="N", help="a number, or MIN-MAX; default: as before")
    p.add_argument("--gpus-per-node", metavar="G", help="ranks per node; default: as before")
    p.add_argument("--cluster", choices=KINDS, help="default: as before")
    add_runs_dir(p)
    add_accept_change(p)
    add_overrides(p, "cluster.exclude=n7")


def run(args: argparse.Namespace) -> int:
    settings, others = settings_and_names(args.overrides)
    names = [args.name, *others]
    runs, codes = status.named(names, args.runs_dir), []
    for run in runs:
        codes.append(resume(run, args, settings))
        if run.state().state == State.CANCELLED:  # here, and a stop is meant for the runs after it too
            break
    if queued := [run for run in runs if run.state().slurm_job and run.state().state in UNFINISHED]:
        submission.print_next(queued, names[0] if len(names) == 1 and len(runs) > 1 else "")
    if closing := grid.closing_table(runs):
        print(f"\n{closing}")
    return max(codes)


def resume(run: RunDir, args: argparse.Namespace, settings: list[str]) -> int:
    given = {"cluster.nodes": args.nodes, "cluster.gpus_per_node": args.gpus_per_node}
    where = [f"{key}={value}" for key, value in given.items() if value]
    values = reading.merge(asdict(run.submitted()), reading.overrides([*where, *settings]))
    config = reading.parse(Config, recipes.with_absolute_paths(values))
    submission.check(run, config)
    submitted = [
        e for e in read_lines(run.events, event=str) if e["event"] == Event.SUBMITTED and e.get("cluster") in KINDS
    ]
    kind = args.cluster or (submitted[-1]["cluster"] if submitted else jobs.default_cluster())
    if submission.needs_no_job(run):
        return EXIT_DONE
    starts.check(run, config.data, args.accept_change)
    if kind == "local":
        gpus.check(config.cluster.gpus_per_node, f"{run.command('resume')} --gpus-per-node ")
    if kind == "slurm":
        submission.check_slurm(config, run)
    with contextlib.ExitStack() as owned:
        with run.lock(".submit.lock", wait_s=60):
            if submission.needs_no_job(run):  # another submission was faster
                return EXIT_DONE
            submission.renew_old_snapshot(run)
            preparation.write_config(run, config)
            run.event(Event.SUBMITTED, cluster=kind, command=run.command("resume"))
            if kind == "slurm":
                return submission.start_slurm([run], config)
            owned.enter_context(run.lock(START_LOCK))
        return submission.start_here(run, config, kind)
