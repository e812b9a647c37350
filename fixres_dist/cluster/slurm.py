"""Questions to Slurm: one scontrol call inside a job, one squeue call for all runs. No torch; needs no accounting.

Measured with Slurm 22.05: when a job gets a stop signal, `PreemptTime` is set if it is preempted, its state is
COMPLETING if it is cancelled, and `Restarts` is already higher if Slurm requeues it by itself.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

ANSWERS: dict[tuple[str, ...], tuple[float, dict[str, Queued] | None]] = {}  # of squeue by users: when, what
OUR_JOB = "FIXRES_JOB"  # set by our batch scripts to their job's raw id: other jobs are somebody's notebook or shell
ANSWER_S = 20  # clients of a controller that is down wait for minutes
PATIENCE_S, AGAIN_S = 5.0, 1.0  # how long, and how often, a controller that does not answer is asked again
UNANSWERED = re.compile(
    r"does not answer|ended with -|unable to contact|timed out|zero bytes|connect failure|connection refused|"
    r"configuration (source|file)",
    re.IGNORECASE,
)
# What a person's shell asks of Slurm's clients by default: other rows, columns, clusters and formats of time.
DEFAULTS = re.compile(r"(SQUEUE|SINFO|SACCT|SCONTROL|SCANCEL)_|SLURM_(CLUSTERS|TIME_FORMAT)$")
EARLY_S = 90  # Slurm may warn of the time limit a minute early
ALIVE = ("RUNNING", "SIGNALING", "STOPPED", "SUSPENDED", "CONFIGURING")

# sbatch --test-only's words for nodes that are not there now; sbatch itself queues the job.
NOT_NOW = re.compile(
    r"node configuration is not available|DOWN, DRAINED|nodes are busy|reserved for jobs", re.IGNORECASE
)
IN_SERVICE = re.compile(r"(idle|mixed|allocated|completing|planned)[^*]*$")  # sinfo's states; *: does not answer


class Need(NamedTuple):
    """What a job needs at least: nodes, and of each node GPUs and CPUs."""

    nodes: int
    gpus: int
    cpus: int


@dataclass(frozen=True)
class Stop:
    """Why a job got a stop signal, and whether Slurm requeues it by itself."""

    # asked: a signal by hand, and Slurm lets the job run on
    reason: Literal["preempted", "timeout", "cancelled", "asked", "failure"]
    by_slurm: bool = False


class Queued(NamedTuple):
    """A row of squeue."""

    state: str
    reason: str
    nodes: str
    start: str = ""  # of a job that waits: when Slurm expects to start it; N/A if it does not know yet
    used: str = ""  # wall time, such as 3:02:11
    limit: str = ""


def call(*command: str) -> subprocess.CompletedProcess[str] | None:
    """A Slurm client's answer; None where there is no such program (a container) or it does not answer."""
    env = {name: value for name, value in os.environ.items() if not DEFAULTS.match(name)}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_S, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None


def insist(*command: str, patience_s: float) -> subprocess.CompletedProcess[str] | None:
    """`call`, for `patience_s` seconds again where the controller does not answer, since it restarts or is overloaded, or
    where a stop signal, which goes to every process of a step, has ended the client."""
    ends = time.monotonic() + patience_s
    while True:
        answer = call(*command)
        if answer is None:
            again = shutil.which(command[0]) is not None
        else:
            again = answer.returncode < 0 or (answer.returncode > 0 and unanswered(answer.stderr))
        if not again or time.monotonic() > ends:
            return answer
        time.sleep(AGAIN_S)


def unanswered(said: str) -> bool:
    """Whether a client's error, or `requeue`'s, says only that it got no answer."""
    return bool(UNANSWERED.search(said))


def own_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The job that was made for the run of this process; None outside of Slurm, and in a job of another purpose, such
    as a notebook's: that one must not be requeued.

    Never the raw id of an array's task: the last task's equals the array's, and `scontrol requeue` of that one
    requeues all tasks, finished ones too.
    """
    if not environ.get(OUR_JOB) or environ[OUR_JOB] != environ.get("SLURM_JOB_ID"):
        return None
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def show(job: str, patience_s: float = PATIENCE_S) -> dict[str, str] | None:
    """`scontrol show job`; None where Slurm cannot be asked, or has forgotten the job."""
    answer = insist("scontrol", "show", "job", "-o", job, patience_s=patience_s)
    if answer is None or answer.returncode:
        return None
    return {key: value for key, equals, value in (item.partition("=") for item in answer.stdout.split()) if equals}


def last_state(job: str) -> dict[str, str]:
    """JobState, Reason, ExitCode and NodeList of a job that has left the queue; empty where neither scontrol nor the
    accounting knows it."""
    if shown := show(job):
        return shown
    answer = call("sacct", "-nPX", "-j", job, "-o", "State,Reason,ExitCode,NodeList")
    told = answer.stdout.splitlines()[-1:] if answer and answer.returncode == 0 else []
    return {
        key: value
        for line in told
        for key, value in zip(("JobState", "Reason", "ExitCode", "NodeList"), line.split("|"), strict=False)
    }


def why_stopped(job: Mapping[str, str], signal_delay_s: float) -> Stop:
    """Why `job`, the one of this process as `show` returns it, got a stop signal.

    `signal_delay_s`: how long before the time limit Slurm was asked to warn.
    """
    state = job.get("JobState")
    if requeued_meanwhile(job):
        return Stop("preempted", by_slurm=True)
    if state not in ALIVE:
        if state == "PREEMPTED" or ended_by_preemption(job):
            return Stop("preempted")  # PreemptMode=CANCEL: Slurm ends the job, which may be requeued all the same
        return Stop("timeout" if job.get("Reason") == "TimeLimit" or state == "TIMEOUT" else "cancelled")
    if was_preempted(job):
        return Stop("preempted")
    return Stop("timeout" if seconds_left(job) <= signal_delay_s + EARLY_S else "asked")


def requeued_meanwhile(job: Mapping[str, str]) -> bool:
    """Whether `job` waits again, or has been started again, since the start of this process."""
    starts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return job.get("JobState") == "PENDING" or int(job.get("Restarts", 0)) > starts


def was_preempted(job: Mapping[str, str]) -> bool:
    return job.get("PreemptTime", "None") not in ("None", "Unknown", "(null)")


def ended_by_preemption(job: Mapping[str, str]) -> bool:
    """Whether `job` ended when it was preempted; one that is cancelled later has another EndTime."""
    times = (job.get("PreemptTime", ""), job.get("EndTime", ""))
    try:
        preempted, end = (time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")) for text in times)
    except ValueError:
        return False
    return abs(end - preempted) <= 2


def seconds_left(job: Mapping[str, str]) -> float:
    try:
        return time.mktime(time.strptime(job["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    except (KeyError, ValueError):  # no time limit: EndTime=Unknown
        return float("inf")


def requeue(job: str, patience_s: float) -> str:
    """Put `job` back into the queue. Slurm kills it for that, so everything must be saved before.

    Returns Slurm's refusal, or that it does not answer (`unanswered`); empty if it complied, or has requeued the job already.
    """
    answer = insist("scontrol", "requeue", job, patience_s=patience_s)
    if answer is None:
        return "scontrol does not answer"
    if answer.returncode == 0:
        return ""
    if requeued_meanwhile(show(job) or {}):
        return ""
    return answer.stderr.strip() or f"scontrol requeue ended with {answer.returncode}"


def queue(users: Iterable[str], max_age_s: float = 0.0) -> dict[str, Queued] | None:
    """The queued and running jobs of `users` by id (N or N_TASK), with one call; None where squeue does not answer.

    An answer that is at most `max_age_s` seconds old is good enough. Users without a name are not known to squeue: then
    all jobs are listed.
    """
    names = sorted(set(users))
    asked_at, known = ANSWERS.get(tuple(names), (-math.inf, None))
    if time.monotonic() - asked_at <= max_age_s:
        return known
    whose = [] if any(name.isdigit() for name in names) else ["-u", ",".join(names)]
    answer = call("squeue", "-r", "-h", *whose, "-o", "%i|%T|%r|%N|%S|%M|%l")
    found = None
    if answer and answer.returncode == 0:
        rows = (line.split("|") for line in answer.stdout.splitlines())
        found = {row[0]: Queued(*row[1:7]) for row in rows if len(row) >= 4}
    ANSWERS[tuple(names)] = (time.monotonic(), found)
    return found


def waits_for_nodes(said: str, partition: str, need: Need) -> str:
    """A sentence, if `said` (by sbatch --test-only) is about nodes that are out of service, and the job may be queued.

    Empty where the partition has too few such nodes even if all were back, or `said` is about something else.
    """
    if not NOT_NOW.search(said):
        return ""
    where = ["-p", partition] if partition else []
    answer = call("sinfo", "-h", "-N", *where, "-o", "%N|%T|%c|%G")
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer and answer.returncode == 0 else []
    nodes = {row[0]: row[1:] for row in rows if len(row) == 4}
    large = {name: state for name, (state, cpus, gres) in nodes.items() if fits(cpus, gres, need)}
    away = [name for name, state in large.items() if not IN_SERVICE.match(state)]
    if "node configuration" in said.lower() and nodes and (len(large) < need.nodes or not away):
        return ""
    out = f"; out of service: {', '.join(away[:8])}{', ..' if len(away) > 8 else ''}" if away else ""
    return f"{' '.join(said.split())}{out}. The job is queued, and waits for nodes."


def fits(cpus: str, gres: str, need: Need) -> bool:
    """Whether a node with sinfo's `cpus` and `gres`, such as gpu:h100:8(S:0-1), is large enough."""
    return count_gpus(gres) >= need.gpus and int(re.match(r"\d*", cpus)[0] or 0) >= need.cpus  # type: ignore[index]


def count_gpus(gres: str) -> int:
    return sum(map(int, re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres)))


def partition(name: str) -> dict[str, str]:
    """`scontrol show partition`, of the default one for an empty name; empty where Slurm does not tell."""
    answer = call("scontrol", "show", "partition", "-o", *filter(None, [name]))
    lines = answer.stdout.splitlines() if answer and answer.returncode == 0 else []
    shown = [{key: value for key, _, value in (item.partition("=") for item in line.split())} for line in lines]
    return next((values for values in shown if name or values.get("Default") == "YES"), {})


class Node(NamedTuple):
    """What a node has, for jobs."""

    cpus: int
    gpus: int
    memory_mb: int


def nodes(partition: str) -> list[Node]:
    """The nodes of a partition; none where Slurm does not tell."""
    answer = call("scontrol", "show", "node", "-o")
    lines = answer.stdout.splitlines() if answer and answer.returncode == 0 else []
    shown = [{key: value for key, _, value in (item.partition("=") for item in line.split())} for line in lines]
    here = [
        values for values in shown if partition in values.get("Partitions", "").split(",") and "RealMemory" in values
    ]
    return [
        Node(
            cpus=int(values.get("CPUTot", 0)),
            gpus=count_gpus(values.get("Gres", "")),
            memory_mb=int(values["RealMemory"]) - int(values.get("MemSpecLimit", 0)),
        )
        for values in here
    ]


def config() -> dict[str, str]:
    """`scontrol show config`; empty where Slurm does not tell."""
    answer = call("scontrol", "show", "config")
    lines = answer.stdout.splitlines() if answer and answer.returncode == 0 else []
    return {key.strip(): value.strip() for key, equals, value in (line.partition("=") for line in lines) if equals}


def kill_wait_s() -> int:
    """Seconds between SIGTERM and SIGKILL of a job that is cancelled; 0 where Slurm does not tell."""
    found = re.match(r"\d+", config().get("KillWait", ""))
    return int(found[0]) if found else 0
