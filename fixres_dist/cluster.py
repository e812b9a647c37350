"""Jobs through submitit: the callable that a job runs, the sbatch text, and several processes on this machine.

The pickle that submitit writes holds the run directory's path and nothing else: what a job does follows from the run
directory, at its first start and at every requeue.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm import slurm

from fixres_dist import config as cfg
from fixres_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from fixres_dist.rundir import RunDir

NO_TIMEOUT_MIN = 60 * 24 * 365  # submitit's local executor insists on a limit


class TrainJob:
    """What every task of a job calls. Importable and stateless, so that a requeue runs it again from the snapshot."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> int:
        from fixres_dist import train  # torch is imported in the job, not on the login node

        return train.run(Path(self.folder))

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def minutes(text: str) -> int:
    """Slurm's time format (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"cluster.time is {text!r}; accepted: minutes, H:M:S, or D-H:M:S, such as 24:00:00.")
    days, a, b, c = (int(group or 0) for group in match.groups())
    if match.group(1):
        seconds = ((days * 24 + a) * 60 + b) * 60 + c
    elif match.group(4):
        seconds = (a * 60 + b) * 60 + c
    else:
        seconds = a * 60 + b
    return max(1, -(-seconds // 60))


def slurm_parameters(config: cfg.Config, run: RunDir) -> dict[str, Any]:
    """submitit's Slurm parameters; every option that a preempted job needs is set, whatever the site's defaults."""
    c = config.cluster
    least, _ = c.node_range()
    extra: dict[str, Any] = {
        "requeue": True,  # sites with JobRequeue=0 cancel preempted jobs otherwise
        "chdir": str(run.code.resolve()),  # python -m puts it first on sys.path: the job imports the snapshot
    }
    if "-" in c.nodes:
        extra["nodes"] = c.nodes
    exports = {"NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **c.env}
    return {
        "job_name": run.name,
        "nodes": least,
        "ntasks_per_node": c.gpus_per_node,
        "gpus_per_node": c.gpus_per_node,
        "cpus_per_task": c.cpus_per_task,
        "mem": c.mem,
        "time": minutes(c.time),
        "partition": c.partition or None,
        "account": c.account or None,
        "qos": c.qos or None,
        "constraint": c.constraint or None,
        "exclude": c.exclude or None,
        "signal_delay_s": c.signal_delay_s,
        "srun_args": ["--kill-on-bad-exit=1", *c.srun_args],  # plain srun lets the others run on when a task dies
        "setup": [
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",  # srun 22.05 to 23.02 does not inherit it
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *c.setup,
        ],
        "teardown": ["rc=$?", "exit $rc"],  # the job's exit code is srun's, not the last line's
        "additional_parameters": extra,
    }


def sbatch_text(config: cfg.Config, run: RunDir) -> str:
    """The exact text that submitit gives to sbatch; needs no Slurm."""
    folder = run.root.resolve() / "submitit" / "%j"
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return slurm._make_sbatch_string(command=command, folder=folder, **slurm_parameters(config, run))


def default_cluster() -> str:
    return "slurm" if shutil.which("sbatch") else "local"


def local_devices() -> int:
    """GPUs of this machine, counted without a driver library; 1 without any."""
    return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def run_local(run: RunDir, processes: int) -> int:
    """`processes` ranks on this machine, followed to their end; returns the exit code.

    Ctrl-C reaches the ranks, which save and leave; submitit's controller must not kill them meanwhile.
    """
    executor = submitit.LocalExecutor(run.root.resolve() / "submitit" / "%j")
    executor.update_parameters(
        tasks_per_node=processes,
        gpus_per_node=processes if list(Path("/dev").glob("nvidia[0-9]*")) else 0,
        timeout_min=NO_TIMEOUT_MIN,
        stderr_to_stdout=True,
    )
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    task = TrainJob(str(run.root.resolve()))  # before the change of directory: --runs-dir may be relative
    with ignored_interrupt(), contextlib.chdir(run.code):
        job = executor.submit(task)
    run.update_state(job_id=f"local-{job.job_id}")
    follow(run, job)
    codes = []
    for rank in range(processes):
        try:
            codes.append(int(job.task(rank).result()))
        except Exception:  # submitit raises several kinds for a task that left no result; FAILED has the reason
            codes.append(EXIT_FAILED)
    if run.done.exists():
        return EXIT_DONE
    if run.failed.exists():
        print(run.failed.read_text(), file=sys.stderr, end="")
    elif run.state().get("state") != "cancelled":
        lost = f"a process of the run died without a word (exit codes {codes}); its log: {job.paths.stdout.parent}"
        run.fail(lost, (run.root / "command.txt").read_text().strip())
        print(run.failed.read_text(), file=sys.stderr, end="")
    return max(codes)


@contextlib.contextmanager
def ignored_interrupt() -> Iterator[None]:
    """Children started inside inherit the ignored signal; the training ranks install their own handler."""
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept)


def follow(run: RunDir, job: submitit.Job[int]) -> None:
    """Copy rank 0's log to this terminal until the job ends."""
    log = Path(str(job.paths.stdout).replace("%t", "0"))
    position, told = 0, False
    while True:
        try:
            ended = job.done()
            position = copy_new(log, position)
            if ended:
                return
            time.sleep(0.2)
        except KeyboardInterrupt:
            if told:
                raise
            told = True
            print(f"stopping {run.name}: its ranks save and leave; Ctrl-C again leaves them alone", flush=True)


def copy_new(log: Path, position: int) -> int:
    try:
        with open(log) as file:
            file.seek(position)
            text = file.read()
            sys.stdout.write("".join(x for x in text.splitlines(keepends=True) if not x.startswith("submitit INFO")))
            sys.stdout.flush()
            return file.tell()
    except FileNotFoundError:
        return position
