"""`fixres cancel`"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError
from fixres_dist.base.files import owner
from fixres_dist.base.locks import holder
from fixres_dist.base.small_files import read_lines
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import slurm, status
from fixres_dist.runs.rundir import START_LOCK, RunDir
from fixres_dist.runs.states import Event

EXAMPLES = ("b0-320", "b0-320 b1-384 --runs-dir /scratch/runs", "mygrid")
FIRST_S = 0.5
WAIT_S = 120.0  # Slurm kills what has not left after KillWait, 30 s by default


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "names", nargs="+", metavar="NAME", help="runs, or a grid or table by its name; resume goes on from there"
    )
    add_runs_dir(p)


def run(args: argparse.Namespace) -> int:
    runs = status.named(args.names, args.runs_dir)
    starters = {run: process(run, START_LOCK) for run in runs if is_to_come(run)}
    for pid, of_it in {pid: run for run, pid in starters.items()}.items():
        check_others(of_it, pid, runs)
    told = [(run, stop(run, starters.get(run, 0))) for run in runs]  # all, before one is waited for
    return max(wait_for(run, left) for run, left in told)


def stop(run: RunDir, starter: int = 0) -> Callable[[], bool] | None:
    """Tell the run to stop; returns what waits for that, None where nothing is to be stopped.

    `starter`: the process on this machine that is to start the run, if there is one.
    """
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
        os.kill(process(run, ".lock"), signal.SIGTERM)  # its ranks agree on the signal
        return lambda: wait(lambda: not run.is_locked(), most_s=FIRST_S)
    if starter:
        stop_starter(run, starter)
        return lambda: wait(lambda: stop_starter(run, starter), most_s=FIRST_S)
    print(f"{run.name} is {status.rows([run])[0].state}, so there is nothing to cancel")
    return None


def process(run: RunDir, lock: str) -> int:
    """The id of the process that holds the run's `lock`; raises UserError where that is another machine's."""
    host, pid = holder(run.root / lock)
    if host != socket.gethostname():
        raise UserError(f"{run.name} runs on {host}, outside of Slurm. Next: the same command there.")
    return pid


def is_to_come(run: RunDir) -> bool:
    """Whether a command on a machine is about to start the run. It has START_LOCK of all its runs until the last has ended."""
    if run.is_locked() or not run.is_locked(START_LOCK):
        return False
    events = read_lines(run.events, event=str)
    return not events or events[-1]["event"] not in (Event.DONE, Event.FAILED, Event.CANCELLED)


def check_others(run: RunDir, pid: int, named: Sequence[RunDir]) -> None:
    """Say which runs beside the `named` stop with this one, as process `pid` starts them in turn; raises UserError where it
    is at work on one of them."""
    known = {one.whole_path for one in named}
    others = [
        other
        for other in status.every(run.whole_path.parent)
        if other.whole_path not in known
        and (other.is_locked() or is_to_come(other))
        and holder(other.root / START_LOCK) == holder(run.root / START_LOCK)
    ]
    for other in others:
        if other.is_locked():
            both = run.command("cancel", others=[other.name])
            raise UserError(
                f"{run.name} waits until {other.name} has ended: process {pid} starts both, and a stop ends both. Next: {both}"
            )
    if others:
        print(f"process {pid} starts these too, so they stop with {run.name}: {', '.join(o.name for o in others)}")


def stop_starter(run: RunDir, pid: int) -> bool:
    """Tell process `pid`, which is to start the run, to stop; returns whether it has left. Once is not enough: it is deaf while
    it makes ranks."""
    if not run.is_locked(START_LOCK) or holder(run.root / START_LOCK) != (socket.gethostname(), pid):
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)  # ends it, or it passes that on once its ranks have met
    return False


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
