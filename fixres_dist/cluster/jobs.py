"""Jobs for Slurm through submitit: the sbatch text, its test and its submission.

submitit's pickle holds the run directory's path and nothing else: the run directory says what a job does, at its first
start and at every requeue. submitit is imported where it is used: slurm/train.sbatch does without it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.cluster import slurm
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

Job = Callable[[str], Callable[[], int]]  # takes a run directory's path, returns the callable of each task of its job
# Variables of a job or a distributed launcher.
LEAKING = re.compile(
    r"(SLURM|SBATCH|SRUN|SALLOC|PMI|PMIX|OMPI|SUBMITIT|TORCHELASTIC|MASTER)_|(LOCAL_|GROUP_|NODE_)?(RANK|WORLD_SIZE)$"
)


def minutes(text: str) -> int:
    """Minutes, rounded up, of Slurm's formats M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; raises UserError for another."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"cluster.time is {text!r}; accepted: minutes, H:M:S, or D-H:M:S, such as 24:00:00.")
    days, *clock = (int(group or 0) for group in match.groups())
    hours, mins, seconds = clock if match[1] or match[4] else (0, *clock[:2])
    return max(1, -(-(((days * 24 + hours) * 60 + mins) * 60 + seconds) // 60))


def requested(cluster: Cluster) -> dict[str, str | int]:
    """The resources of a job by the names of sbatch's options."""
    values: dict[str, str | int] = {
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.gpus_per_node,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
    }
    return {name: value for name, value in values.items() if value}


def sbatch_options(config: Config) -> str:
    """The options that sbatch's command line needs for slurm/train.sbatch."""
    values = {**requested(config.cluster), "signal": f"USR2@{config.cluster.signal_delay_s}"}
    return " ".join(f"--{name.replace('_', '-')}={shlex.quote(str(value))}" for name, value in values.items())


def slurm_parameters(config: Config, runs: Sequence[RunDir], at_once: int = 0) -> dict[str, Any]:
    """submitit's Slurm parameters; every option that a preempted job needs is set, whatever the site's defaults.

    Several runs are the tasks of one array, `at_once` of them at a time (0: all).
    """
    c = config.cluster
    asked = {**requested(c), "nodes": c.node_range()[0], "time": minutes(c.time)}
    extra: dict[str, Any] = {
        "requeue": True,  # sites with JobRequeue=0 cancel preempted jobs otherwise
        "chdir": str(runs[0].root.parent.resolve()),
    }
    srun_args = ["--kill-on-bad-exit=1", *c.srun_args]  # without it the other tasks run on when one dies
    if "-" in c.nodes:
        # Slurm 22.05 gives a job at most as many nodes as it has tasks at its fewest nodes. So a job that may grow asks
        # for nodes alone, and srun gets the numbers of tasks.
        extra["nodes"] = c.nodes
        srun_args[1:1] = [f"--ntasks-per-node={asked.pop('ntasks_per_node')}", f"--cpus-per-task={c.cpus_per_task}"]
        asked["cpus_per_task"] = c.gpus_per_node * c.cpus_per_task
    folders = [shlex.quote(str(run.root.resolve())) for run in runs]
    exports = {"NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **c.env}
    return {
        **asked,
        "job_name": runs[0].name if len(runs) == 1 else f"{runs[0].name}-and-{len(runs) - 1}",
        "signal_delay_s": c.signal_delay_s,
        "array_parallelism": at_once or len(runs),
        "srun_args": srun_args,
        "setup": [
            f"run={folders[0]}"
            if len(runs) == 1
            else f"runs=({' '.join(folders)}); run=${{runs[$SLURM_ARRAY_TASK_ID]}}",
            'cd "$run/code" || exit 1',  # python -m puts it first on sys.path: the job imports the snapshot
            "trap : TERM",  # Slurm signals this shell too, which has to see how srun ends
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",  # srun 22.05 to 23.02 does not inherit it
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *c.setup,
        ],
        # The job's exit code is srun's, not the last line's; cluster/requeue.py retries ranks that died.
        "teardown": ["rc=$?", f'{shlex.quote(sys.executable)} -m fixres_dist.cluster.requeue "$run" $rc', "exit $rc"],
        "additional_parameters": extra,
    }


def submission_folder(runs: Sequence[RunDir]) -> Path:
    """The folder of submitit's logs and files for a submission: in the run, or beside the runs of an array."""
    root = runs[0].root.resolve()
    return root / "submitit" / "%j" if len(runs) == 1 else root.parent / ".arrays" / "%j"


def sbatch_text(config: Config, *runs: RunDir, at_once: int = 0) -> str:
    """The exact text that submitit gives to sbatch; needs no Slurm."""
    from submitit.slurm import slurm as submitit_slurm

    folder = submission_folder(runs)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = slurm_parameters(config, runs, at_once)
    count = len(runs) if len(runs) > 1 else None
    return str(submitit_slurm._make_sbatch_string(command=command, folder=folder, map_count=count, **parameters))


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """No variables of the job in which this process runs: sbatch and srun would take them for options.

    SLURM_CONF stays, since it says where Slurm is (submitit's own clean_env drops it).
    """
    kept = dict(os.environ)
    for name in kept:
        if name != "SLURM_CONF" and LEAKING.match(name):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def ask_slurm(text: str) -> str:
    """The answer of `sbatch --test-only`; empty where Slurm does not answer. Raises UserError if Slurm refuses."""
    with clean_environment(), tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        answer = slurm.call("sbatch", "--test-only", file.name)
    if answer is None:
        return ""
    said = answer.stderr.strip().replace("sbatch: ", "").replace("error: ", "")
    if answer.returncode == 0:
        return said.splitlines()[-1]
    if any(word in said for word in ("Unable to contact", "configuration source", "configuration file", "timed out")):
        return ""
    raise UserError(slurm.refusal(said))


def submit_slurm(config: Config, runs: Sequence[RunDir], task: Job, at_once: int = 0) -> list[str]:
    """Submit the prepared runs to Slurm, several as one array; returns their job ids, which state.json holds too.

    Raises UserError where there is no Slurm, or Slurm refuses.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine. Next: a login node of the cluster, or --cluster local.")
    text = sbatch_text(config, *runs, at_once=at_once)
    for run in runs:
        write_text(run.submission, text)
        run.failed.unlink(missing_ok=True)
        # A person has submitted it again, so failures are counted anew.
        fresh = {"final": False, "last_failure_step": -1, "restarts": {**run.state().restarts, "failure": 0}}
        run.update_state(Event.SUBMITTED, reason=None, job_id=None, **fresh)
    executor = submitit.SlurmExecutor(submission_folder(runs), max_num_timeout=10**6)  # requeues are ours to count
    executor.update_parameters(**slurm_parameters(config, runs, at_once))
    try:
        with clean_environment(), executor.batch():
            jobs = [executor.submit(task(str(run.root.resolve()))) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(slurm.refusal(str(error))) from None
    for run, job in zip(runs, jobs, strict=True):
        run.update_state(job_id=job.job_id)
        if len(runs) > 1:
            (run.root / "submitit").mkdir(exist_ok=True)
            (run.root / "submitit" / job.job_id).symlink_to(job.paths.folder)
    return [job.job_id for job in jobs]


def default_cluster() -> str:
    return "slurm" if shutil.which("sbatch") else "local"
