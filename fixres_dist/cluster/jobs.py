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
from fixres_dist.base.files import remove, write_text
from fixres_dist.cluster import logs, node_memory, slurm, words
from fixres_dist.config import reading
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.config.shell_values import LEFT_OUT
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

Job = Callable[[str], Callable[[], int]]  # takes a run directory's path, returns the callable of each task of its job
# Variables of a job or a distributed launcher.
LEAKING = re.compile(
    rf"(SLURM|SBATCH|SRUN|SALLOC|PMI|PMIX|OMPI|SUBMITIT|TORCHELASTIC|MASTER)_|{slurm.OUR_JOB}$|"
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)$"
)
TAKEN_OVER = re.compile(r"SBATCH_(?!\w*_BIND)|SLURM_CLUSTERS$")
GPUS = "gpus-per-node"
HERE = shlex.quote(sys.executable)
# Options of cluster.sbatch that say in other words what a job asks anyway.
REPLACED = {"gpus-per-task": GPUS, "mem-per-gpu": "mem", "mem-per-cpu": "mem", "cpus-per-gpu": "cpus-per-task"}


def minutes(text: str) -> int:
    """Minutes, rounded up, of Slurm's formats M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; raises UserError for another."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"cluster.time is {text!r}; accepted: minutes, H:M:S, or D-H:M:S, such as 24:00:00.")
    days, *clock = (int(group or 0) for group in match.groups())
    hours, mins, seconds = clock if match[1] or match[4] else (0, *clock[:2])
    return max(1, -(-(((days * 24 + hours) * 60 + mins) * 60 + seconds) // 60))


def check_times(cluster: Cluster) -> None:
    """Raises UserError for a time that Slurm does not read, and for a warning before the time limit that is too early."""
    if cluster.signal_delay_s >= 60 * minutes(cluster.time):
        raise UserError(
            f"cluster.signal_delay_s is {cluster.signal_delay_s} with cluster.time={cluster.time}: every start would be told "
            "to stop when it begins. Accepted: fewer seconds than the time limit has."
        )


def requested(c: Cluster) -> tuple[dict[str, str | int], list[str]]:
    """What a job asks of sbatch, by the long names of its options, and srun's arguments.

    cluster.sbatch comes last: it also takes away an option, and replaces one that says the same in other words.
    """
    check_times(c)
    values: dict[str, str | int] = {
        "nodes": c.nodes,
        "ntasks-per-node": c.gpus_per_node,
        "gpus-per-node": c.gpus_per_node,
        "cpus-per-task": c.cpus_per_task,
        "mem": "",  # below: it depends on the other options
        "time": minutes(c.time),
        "partition": c.partition,
        "account": c.account,
        "qos": c.qos,
        "constraint": c.constraint,
        "exclude": c.exclude,
        "signal": f"USR2@{c.signal_delay_s}",
        "open-mode": "append",
    }
    # Else the other tasks run on when one dies, and srun waits for ever for nodes that Slurm takes for busy (seen in 22.05).
    srun_args = ["--kill-on-bad-exit=1", "--immediate=1800"]  # seconds: nodes that boot take minutes
    if "-" in c.nodes:
        # Slurm 22.05 gives a job at most as many nodes as it has tasks at its fewest nodes. So a job that may grow asks
        # for nodes alone, and srun gets the numbers of tasks.
        srun_args += [f"--ntasks-per-node={values.pop('ntasks-per-node')}", f"--cpus-per-task={c.cpus_per_task}"]
        values["cpus-per-task"] = c.gpus_per_node * c.cpus_per_task
    if "export" in c.sbatch:
        srun_args.append("--export=ALL")  # of the batch script, whose variables the ranks need
    given = {name: value for name, value in c.sbatch.items() if value not in LEFT_OUT}
    for name in {REPLACED.get(name, name) for name in c.sbatch} | ({GPUS} if "gpu" in given.get("gres", "") else set()):
        values.pop(name, None)
    if "mem" in values:
        values["mem"] = node_memory.of(c).mem
    return {name: value for name, value in {**values, **given}.items() if value}, [*srun_args, *c.srun_args]


def option(name: str, value: object) -> str:
    """An option as sbatch's command line and its `#SBATCH` lines have it; the value `true` is a flag."""
    return f"--{name}" if str(value).lower() == "true" else f"--{name}={shlex.quote(str(value))}"


def sbatch_command(run: RunDir, config: Config, script: Path) -> str:
    """The command that submits slurm/train.sbatch for a prepared run; it may be pasted in any folder."""
    root = run.root.resolve()
    fixed = {"requeue": "true", "job-name": run.name, "output": root / "slurm-%j.out"}
    options = [option(name, value) for name, value in {**requested(config.cluster)[0], **fixed}.items()]
    return " ".join(["sbatch", *options, shlex.quote(str(script.resolve())), shlex.quote(str(root))])


def shell_lines(config: Config) -> list[str]:
    """Lines of the batch script before srun: the site's environment, and a mark by which the job is known as ours."""
    exports = {"NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **config.cluster.env}
    return [
        *logs.MARK_LINES,
        f"export {slurm.OUR_JOB}=$SLURM_JOB_ID",
        "trap : TERM",  # Slurm signals this shell too, which has to see how srun ends
        # srun 22.05 to 23.02 does not inherit it; an empty one would be refused
        "[ -z $SLURM_CPUS_PER_TASK ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        *config.cluster.setup,
    ]


def write_prepared(run: RunDir, config: Config) -> None:
    """The part of slurm/train.sbatch that is the run's own: its shell lines, interpreter and srun arguments."""
    srun_args = " ".join(map(shlex.quote, requested(config.cluster)[1]))
    lines = [f"python=${{PYTHON:-{HERE}}}", f"srun_args=({srun_args})", *shell_lines(config)]
    text = "\n".join([*lines, "rank_python=(" + (config.cluster.python or '"$python"') + ")\n"])
    write_text(run.prepared, text, private=reading.has_secrets(config))


def slurm_parameters(config: Config, runs: Sequence[RunDir], at_once: int = 0) -> dict[str, Any]:
    """submitit's Slurm parameters; every option that a preempted job needs is set, whatever the site's defaults.

    Several runs are the tasks of one array, `at_once` of them at a time (0: all).
    """
    asked, srun_args = requested(config.cluster)
    folders = [shlex.quote(str(run.root.resolve())) for run in runs]
    return {
        "nodes": config.cluster.node_range()[0],
        "time": minutes(config.cluster.time),
        "job_name": runs[0].name if len(runs) == 1 else f"{runs[0].name}-and-{len(runs) - 1}",
        "array_parallelism": at_once or len(runs),
        "wckey": None,  # submitit's own would be refused where wckeys are enforced
        "srun_args": srun_args,
        "setup": [
            f"run={folders[0]}"
            if len(runs) == 1
            else f"runs=({' '.join(folders)}); run=${{runs[$SLURM_ARRAY_TASK_ID]}}",
            'cd "$run/code" || exit 1',  # python -m puts it first on sys.path: the job imports the snapshot
            *shell_lines(config),
        ],
        # The job's exit code is srun's, not the last line's; cluster/requeue.py retries ranks that died.
        "teardown": ["rc=$?", f'{HERE} -m fixres_dist.cluster.requeue "$run" $rc', "exit $rc"],
        "additional_parameters": {
            **{name: True if str(value).lower() == "true" else value for name, value in asked.items()},
            "requeue": True,  # sites with JobRequeue=0 cancel preempted jobs otherwise
            "chdir": str(runs[0].root.parent.resolve()),
        },
    }


def submission_folder(runs: Sequence[RunDir]) -> Path:
    """The folder of submitit's logs and files for a submission: in the run, or beside the runs of an array."""
    root = runs[0].root.resolve()
    return root / "submitit" / "%j" if len(runs) == 1 else root.parent / ".arrays" / "%j"


def sbatch_text(config: Config, *runs: RunDir, at_once: int = 0) -> str:
    """The exact text that submitit gives to sbatch; needs no Slurm."""
    from submitit.slurm import slurm as submitit_slurm

    folder = submission_folder(runs)
    command = f"{config.cluster.python or HERE} -u -m submitit.core._submit {shlex.quote(str(folder))}"
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


def told_of_the_shell() -> list[str]:
    """sbatch's variables of this shell, which a submission leaves out: sbatch would take them over the run's settings."""
    return [f"{name}={os.environ[name]}" for name in sorted(os.environ) if TAKEN_OVER.match(name)]


def asked(text: str) -> str:
    """The options of a submission script in one line, without paths."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return " ".join(line for line in lines if not line.startswith(("--chdir", "--error", "--output", "--open-mode")))


def ask_slurm(text: str, cluster: Cluster) -> str:
    """The answer of `sbatch --test-only`; empty where Slurm does not answer. Raises UserError if Slurm refuses.

    Nodes that are drained, down or reserved now are no refusal: the job waits for them.
    """
    with clean_environment(), tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        answer = slurm.call("sbatch", "--test-only", file.name)
    if answer is None or (answer.returncode and slurm.unanswered(answer.stderr)):
        return ""
    said = answer.stderr.strip().replace("sbatch: ", "").replace("error: ", "")
    if answer.returncode == 0:
        return said.splitlines()[-1] if said else "it can start"
    gpus = cluster.gpus_per_node if GPUS in requested(cluster)[0] else 0  # 0: asked in words of cluster.sbatch
    need = slurm.Need(cluster.node_range()[0], gpus, cluster.gpus_per_node * cluster.cpus_per_task)
    if waits := slurm.waits_for_nodes(said, cluster.partition, need):
        return waits
    raise UserError(words.refusal(said, asked(text)))


def check_limits(cluster: Cluster) -> list[str]:
    """Notes on the job's times; raises UserError for a time above its partition's limit, where Slurm tells it.

    Most sites queue such a job, and never start it.
    """
    partition, kill_wait_s = slurm.partition(cluster.partition), slurm.kill_wait_s()
    limit = partition.get("MaxTime", "UNLIMITED")
    if limit not in ("UNLIMITED", "NONE") and minutes(cluster.time) > minutes(limit):
        raise UserError(
            f"cluster.time is {cluster.time}, above the limit of partition {partition['PartitionName']}, {limit}. "
            f"Next: cluster.time={limit}; at the limit the run saves, requeues itself and goes on."
        )
    if cluster.signal_delay_s < kill_wait_s:
        return [
            f"cluster.signal_delay_s is {cluster.signal_delay_s}, below this cluster's KillWait of {kill_wait_s} s: the "
            "ranks give up before Slurm would end them"
        ]
    return []


def submit_slurm(config: Config, runs: Sequence[RunDir], task: Job, at_once: int = 0) -> list[str]:
    """Submit the prepared runs to Slurm, several as one array; returns their job ids, which state.json holds too.

    Raises UserError where there is no Slurm, or Slurm refuses.
    """
    import submitit

    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine. Next: a login node of the cluster, or --cluster local.")
    text, private = sbatch_text(config, *runs, at_once=at_once), reading.has_secrets(config)
    for run in runs:
        write_text(run.submission, text, private)
        remove(run.failed)
        # A person has submitted it again, so failures are counted anew.
        fresh = {"final": False, "last_failure_step": -1, "restarts": {**run.state().restarts, "failure": 0}}
        run.update_state(Event.SUBMITTED, reason=None, job_id=None, **fresh)
    # Requeues are ours to count.
    executor = submitit.SlurmExecutor(
        submission_folder(runs), max_num_timeout=10**6, python=config.cluster.python or HERE
    )
    executor.update_parameters(**slurm_parameters(config, runs, at_once))
    try:
        with clean_environment(), private_files(private), executor.batch():
            jobs = [executor.submit(task(str(run.root.resolve()))) for run in runs]
    except submitit.core.utils.FailedJobError as error:
        refused = words.refusal(str(error), asked(text))
        for run in runs:
            run.fail(refused, run.again())
        raise UserError(refused) from None
    for run, job in zip(runs, jobs, strict=True):
        run.update_state(job_id=job.job_id)
        if len(runs) > 1:
            (run.root / "submitit").mkdir(exist_ok=True)
            (run.root / "submitit" / job.job_id).symlink_to(job.paths.folder)
    return [job.job_id for job in jobs]


@contextlib.contextmanager
def private_files(private: bool) -> Iterator[None]:
    """submitit keeps the batch script beside the logs: only its owner may read the folder, if the script holds secrets."""
    before = os.umask(0o077) if private else None
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)


def default_cluster() -> str:
    return "slurm" if shutil.which("sbatch") else "local"
