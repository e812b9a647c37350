"""A run's ranks as processes of this machine, followed to their end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base import memory
from fixres_dist.base.commands import smaller_batch
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, printable
from fixres_dist.base.files import FULL
from fixres_dist.base.signals import SIGNALS, StopFlag
from fixres_dist.base.small_files import read_note
from fixres_dist.base.watchdog import NO_PROGRESS
from fixres_dist.cluster import gpus, logs
from fixres_dist.cluster.jobs import Job
from fixres_dist.cluster.reasons import last_words
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED, State

if TYPE_CHECKING:
    import submitit


ALONE_S = 90.0  # longer than a rank that ends by itself after another one's error needs (training/ranks.py)
SAID_WHY = re.compile(r"error|exception|abort|fatal|terminate called", re.IGNORECASE)  # of the last line of a log
NO_TIMEOUT_MIN = 60 * 24 * 365  # submitit's local executor insists on a limit


def run_local(run: RunDir, processes: int, job: Job, smaller: int = 1) -> int:
    """Run `processes` ranks and follow them to their end; returns the highest of their exit codes.

    `smaller`: images per forward pass to go on with where the kernel kills a rank because memory ran out.

    A stop signal to this process, or to all of them, makes the ranks save and leave; submitit's controller, a process
    between this one and the ranks, ignores it.
    """
    import submitit

    devices = gpus.for_ranks(processes)
    executor = submitit.LocalExecutor(run.root.resolve() / "submitit" / "%j")
    executor.update_parameters(
        tasks_per_node=processes,
        gpus_per_node=len(devices),
        timeout_min=NO_TIMEOUT_MIN,
        stderr_to_stdout=True,
    )
    executor.parameters["visible_gpus"] = devices  # update_parameters takes numbers only, and these may be UUIDs
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    killed_before = memory.kills_for_memory()
    task = job(str(run.root.resolve()))  # before the change of directory: --runs-dir may be relative
    flag = StopFlag().install()  # before there are ranks: a stop must not end this process and leave them
    with ignored_signals(), contextlib.chdir(run.code):
        started = executor.submit(task)
    run.update_state(job_id=f"local-{started.job_id}")
    ended_some = follow(run, started, flag)
    with contextlib.suppress(OSError):
        executor.folder.rmdir()  # submitit leaves an empty folder named %j beside the job's
    tasks = [started.task(rank) for rank in range(processes)]
    codes = [exit_code(task) for task in tasks]
    if run.done.exists():
        return EXIT_DONE
    if flag.signal and run.state().state in UNFINISHED:  # no rank had come so far as to save
        run.cancel("cancelled; the same command goes on")
    else:
        out_of_memory = memory.kills_for_memory() > killed_before
        name_lost_ranks(run, tasks, codes, ended_some, smaller if out_of_memory else 0)
    if said := read_note(run.failed):
        print(printable(said), file=sys.stderr)
    return max(codes)


def log_of_main(run: RunDir) -> Path:
    """Rank 0's log in the run's last local start."""
    job = (run.state().job_id or "").removeprefix("local-")
    return run.root / "submitit" / job / f"{job}_0_log.out"


def exit_code(task: submitit.Job[int]) -> int:
    try:
        return int(task.result())
    except Exception:  # submitit raises several kinds for a task that left no result; FAILED has the reason
        return EXIT_FAILED


def name_lost_ranks(
    run: RunDir, tasks: Sequence[submitit.Job[int]], codes: Sequence[int], ended_some: bool = False, smaller: int = 0
) -> None:
    """Write FAILED for ranks that could not write it themselves; other ranks may have failed because of them.

    `ended_some`: ranks were ended by this process, so an error that a rank has written down came first. `smaller`: the
    images per forward pass to go on with, where the kernel has killed a process meanwhile because memory ran out.
    """
    again = run.again()
    state = run.state()
    said = read_note(run.failed).partition("\n")[0]
    gone = [task.paths for task in tasks if not task.paths.result_pickle.exists()]
    if (
        state.final
        or state.state == State.CANCELLED
        or said.startswith((*FULL.values(), NO_PROGRESS))
        or (said and (ended_some or not gone))
    ):
        return  # explained already; on a full disk a rank cannot leave a result either
    if gone:
        ranks = ", ".join(str(paths.task_id) for paths in gone)
        why = "killed by hand or out of memory"
        if smaller:
            why, again = "and the kernel has killed a process because memory ran out", smaller_batch(again, smaller)
        words = last_words(gone[0].stdout)
        if SAID_WHY.search(words) and not smaller:
            why = f"and its log ends: {words}"
        lost = f"rank {ranks} left no result, {why} (log: {gone[0].stdout})"
    else:
        folder = tasks[0].paths.stdout.parent
        lost = f"a process of the run ended without a message (exit codes {list(codes)}); its log: {folder}"
    if said:
        known = said.partition(". This is typically caused by")[0]  # without gloo's guess: the cause is known here
        lost += f"; after it: {known}"
        run.failed.unlink()
    run.fail(lost, f"again, from the last checkpoint: {again}")


@contextlib.contextmanager
def ignored_signals() -> Iterator[None]:
    """Processes started inside inherit the ignored signals; the ranks install handlers of their own."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def follow(run: RunDir, job: submitit.Job[int], flag: StopFlag) -> bool:
    """Copy rank 0's log to this terminal until the job ends, and pass a stop signal on to the ranks.

    Returns whether ranks were ended here, ALONE_S after another one broke.
    """
    log = Path(str(job.paths.stdout).replace("%t", "0"))
    position, told, asked = 0, False, False
    broken_at, ended_some = math.inf, False
    while True:
        ended = job.done()
        position = copy_new(log, position)
        if ended:
            return ended_some
        broken_at = min(broken_at, time.monotonic()) if one_broke(run, job) else math.inf
        if time.monotonic() > broken_at + ALONE_S:
            print(f"a rank has ended, and the others have not followed it in {ALONE_S:.0f} s: ending them", flush=True)
            for rank in living_ranks(job):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            ended_some, broken_at = True, math.inf
        if flag.signal and not told:
            again = "; Ctrl-C again ends them without saving" if flag.signal == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # a terminal that has hung up
                print(f"stopping {run.name}: its ranks save and leave{again}", flush=True)
            told = True
        if told and not asked and run.is_locked():  # then rank 0 has met the others, and all have their handlers
            os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller, our child, passes it on
            asked = True
        time.sleep(0.2)


def living_ranks(job: submitit.Job[int]) -> list[int]:
    """Process ids of the ranks that are alive: the children of submitit's controller."""
    try:
        return [int(pid) for pid in Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()]
    except OSError:  # the controller has ended
        return []


def one_broke(run: RunDir, job: submitit.Job[int]) -> bool:
    """Whether a rank has ended with an error, or without a result, while others live.

    Those may wait for it on a GPU, where only their watchdog ends them.
    """
    alive, started = len(living_ranks(job)), len(list(job.paths.folder.glob("*_log.out")))
    left = len(list(job.paths.folder.glob("*_result.pkl")))
    return 0 < alive < started and (alive + left < started or run.failed.exists())


def copy_new(log: Path, position: int) -> int:
    """Print the log from the byte `position` on; returns its new end."""
    try:
        with open(log, errors="replace") as file:
            file.seek(position)
            text = file.read()
            sys.stdout.write("".join(x for x in text.splitlines(keepends=True) if not logs.ASIDE.match(x)))
            sys.stdout.flush()
            return file.tell()
    except OSError:  # no log yet, or nobody reads us any more: the ranks go on
        return position
