"""Jobs through submitit: the callable that a job runs, the sbatch text, and several processes on this machine.

The pickle that submitit writes holds the run directory's path and nothing else: what a job does follows from the run
directory, at its first start and at every requeue. submitit is imported where it is used: slurm/train.sbatch does without.
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
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

Job = Callable[[str], Callable[[], int]]  # from a run directory's path to what each task of its job calls
LEAKING = re.compile(
    r"(SLURM|SBATCH|SRUN|SALLOC|PMI|PMIX|OMPI|SUBMITIT|TORCHELASTIC|MASTER)_|(LOCAL_|GROUP_|NODE_)?(RANK|WORLD_SIZE)$"
)


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


def slurm_parameters(config: Config, runs: Sequence[RunDir], at_once: int = 0) -> dict[str, Any]:
    """submitit's Slurm parameters; every option that a preempted job needs is set, whatever the site's defaults.

    Several runs are the tasks of one array, `at_once` of them at a time (0: all).
    """
    c = config.cluster
    least, _ = c.node_range()
    extra: dict[str, Any] = {
        "requeue": True,  # sites with JobRequeue=0 cancel preempted jobs otherwise
        "chdir": str(runs[0].root.parent.resolve()),
    }
    tasks: int | None = c.gpus_per_node
    cpus, srun_args = c.cpus_per_task, ["--kill-on-bad-exit=1"]
    if "-" in c.nodes:
        # Slurm 22.05 gives a job at most as many nodes as it has tasks at its fewest nodes, so a job that may grow asks
        # for nodes alone, and only srun is told of ranks.
        extra["nodes"] = c.nodes
        srun_args += [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]
        tasks, cpus = None, c.gpus_per_node * cpus
    folders = [shlex.quote(str(run.root.resolve())) for run in runs]
    exports = {"NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **c.env}
    parameters = {
        "job_name": runs[0].name if len(runs) == 1 else f"{runs[0].name}-and-{len(runs) - 1}",
        "nodes": least,
        "ntasks_per_node": tasks,
        "gpus_per_node": c.gpus_per_node,
        "cpus_per_task": cpus,
        "mem": c.mem,
        "time": minutes(c.time),
        "partition": c.partition or None,
        "account": c.account or None,
        "qos": c.qos or None,
        "constraint": c.constraint or None,
        "exclude": c.exclude or None,
        "signal_delay_s": c.signal_delay_s,
        "array_parallelism": at_once or len(runs),
        "srun_args": [*srun_args, *c.srun_args],  # without kill-on-bad-exit the others run on when a task dies
        "setup": [
            f"run={folders[0]}"
            if len(runs) == 1
            else f"runs=({' '.join(folders)}); run=${{runs[$SLURM_ARRAY_TASK_ID]}}",
            'cd "$run/code" || exit 1',  # python -m puts it first on sys.path: the job imports the snapshot
            "trap : TERM",  # Slurm tells this shell to stop as well; it has to see how srun ends
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",  # srun 22.05 to 23.02 does not inherit it
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *c.setup,
        ],
        # The job's exit code is srun's, not the last line's; lifecycle retries ranks that died.
        "teardown": ["rc=$?", f'{shlex.quote(sys.executable)} -m fixres_dist.cluster.requeue "$run" $rc', "exit $rc"],
        "additional_parameters": extra,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def submission_folder(runs: Sequence[RunDir]) -> Path:
    """Where submitit keeps logs and files of a submission: in the run, or beside the runs of an array."""
    root = runs[0].root.resolve()
    return root / "submitit" / "%j" if len(runs) == 1 else root.parent / ".arrays" / "%j"


def sbatch_text(config: Config, *runs: RunDir, at_once: int = 0) -> str:
    """The exact text that submitit gives to sbatch; needs no Slurm."""
    from submitit.slurm import slurm as submitit_slurm

    folder = submission_folder(runs)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return submitit_slurm._make_sbatch_string(
        command=command,
        folder=folder,
        map_count=len(runs) if len(runs) > 1 else None,
        **slurm_parameters(config, runs, at_once),
    )


def sbatch_options(config: Config) -> str:
    """What slurm/train.sbatch cannot know, as options on sbatch's command line."""
    c = config.cluster
    named = {
        "partition": c.partition,
        "account": c.account,
        "qos": c.qos,
        "constraint": c.constraint,
        "exclude": c.exclude,
    }
    options = [f"--nodes={c.nodes}", f"--ntasks-per-node={c.gpus_per_node}", f"--gpus-per-node={c.gpus_per_node}"]
    options += [f"--cpus-per-task={c.cpus_per_task}", f"--mem={c.mem}", f"--time={c.time}"]
    options += [f"--signal=USR2@{c.signal_delay_s}", *(f"--{k}={shlex.quote(v)}" for k, v in named.items() if v)]
    return " ".join(options)


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """Without the variables of a job that we are started from: sbatch and srun would take them for options.

    SLURM_CONF says where Slurm is, so it stays (submitit's own clean_env drops it).
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
    """What `sbatch --test-only` says of a submission; empty where Slurm does not answer. Raises UserError if it refuses."""
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
    """Hand the prepared runs to Slurm, several as one array; returns their job ids, which state.json holds too."""
    import submitit

    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine. Next: a login node of the cluster, or --cluster local.")
    text = sbatch_text(config, *runs, at_once=at_once)
    for run in runs:
        write_text(run.submission, text)
        run.failed.unlink(missing_ok=True)
        # A person has decided to go on, so failures are counted anew.
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
