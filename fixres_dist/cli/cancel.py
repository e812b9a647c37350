"""`fixres cancel`"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError
from fixres_dist.base.files import owner
from fixres_dist.base.locks import holder
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import slurm, status
from fixres_dist.runs.rundir import RunDir

EXAMPLES = ("b0-320", "b0-320 b1-384 --runs-dir /scratch/runs", "mygrid")
FIRST_S = 0.5
WAIT_S = 120.0  # Slurm kills what has not left after KillWait, 30 s by default


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "names", nargs="+", metavar="NAME", help="runs, or a grid or table by its name; resume goes on from there"
    )
    add_runs_dir(p)


def run(args: argparse.Namespace) -> int:
    told = [(run, stop(run)) for run in status.named(args.names, args.runs_dir)]  # all, before one is waited for
    return max(wait_for(run, left) for run, left in told)


def stop(run: RunDir) -> Callable[[], bool] | None:
    """Tell the run to stop; returns what waits for that, None where nothing is to be stopped."""
    job, user = run.state().slurm_job, owner(run.root)
    queued = slurm.queue([user]) if job else {}
    if queued is None:
        raise UserError(f"{run.name} is job {job}, but squeue does not answer. Next: a login node of the cluster.")
    if job in queued:
        answer = slurm.call("scancel", job)
        if answer is None or answer.returncode:
            raise UserError(f"scancel {job}: {answer.stderr.strip() if answer else 'no answer'}")
        return lambda: wait(
            lambda: (now := slurm.queue([user])) is not None and job not in now, most_s=status.SLURM_EVERY_S
        )
    if run.is_locked():
        host, pid = holder(run.root / ".lock")
        if host != socket.gethostname():
            raise UserError(f"{run.name} runs on {host}, outside of Slurm. Next: the same command there.")
        os.kill(pid, signal.SIGTERM)  # its ranks agree on the signal
        return lambda: wait(lambda: not run.is_locked(), most_s=FIRST_S)
    print(f"{run.name} is {status.rows([run])[0].state}, so there is nothing to cancel")
    return None


def wait_for(run: RunDir, left: Callable[[], bool] | None) -> int:
    """Wait until the run has left, and say how to go on; returns the exit code."""
    if left is None:
        return EXIT_DONE
    if not left():
        print(f"{run.name} has not left after {WAIT_S:.0f} s. Next: {run.command('status')}", file=sys.stderr)
        return EXIT_FAILED
    run.cancel("cancelled; the same command goes on")  # where it had not started, or was killed before it could write
    print(f"{run.name} is {run.state().state} at step {max(0, run.saved_step())}. Next: {run.command('resume')}")
    return EXIT_DONE


def wait(ended: Callable[[], bool], most_s: float) -> bool:
    """Whether it has `ended` within WAIT_S; asks after FIRST_S, then after twice as long each time, up to `most_s`."""
    deadline, pause = time.monotonic() + WAIT_S, FIRST_S
    while not ended():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, most_s)
    return True
