"""Questions to Slurm: one scontrol call inside a job, one squeue call for all runs. No torch; needs no accounting.

Measured with Slurm 22.05: when a job gets a stop signal, `PreemptTime` is set if it is preempted, its state is
COMPLETING if it is cancelled, and `Restarts` is already higher if Slurm requeues it by itself.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

ANSWER_S = 20  # clients of a controller that is down wait for minutes
EARLY_S = 90  # Slurm may warn of the time limit a minute early
ALIVE = ("RUNNING", "SIGNALING", "STOPPED", "SUSPENDED", "CONFIGURING")

# squeue's reasons in words; `status` shows others as Slurm spells them.
WORDS = {
    "BeginTime": "held for about two minutes after a requeue, then it starts by itself",
    "Resources": "waits for free nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for another job",
    "JobArrayTaskLimit": "waits for the concurrency limit of its array",
    "JobHeldUser": "held by its owner: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "the nodes it asks for are down or reserved",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "PartitionNodeLimit": "asks for more nodes than the partition has",
    "QOSMaxGRESPerUser": "your GPU limit is used up",
    "QOSMaxJobsPerUserLimit": "your job limit is used up",
    "AssocGrpGRES": "your account's GPU limit is used up",
    "JobLaunchFailure": "a node could not start it; Slurm tries again",
}

# Parts of sbatch's refusals, with the setting to change.
REFUSALS = {
    "invalid partition": "there is no such partition: change cluster.partition",
    "node configuration is not available": "no partition has so many nodes, GPUs, CPUs or so much memory: change --nodes, "
    "--gpus-per-node, cluster.cpus_per_task or cluster.mem",
    "more processors requested": "too many CPUs: change cluster.cpus_per_task",
    "node count specification invalid": "too many nodes: change --nodes",
    "invalid account": "the account may not submit here: change cluster.account",
    "invalid qos": "there is no such QOS for you: change cluster.qos",
    "time limit": "the time limit is above the partition's: change cluster.time",
    "invalid feature": "no node has the features of cluster.constraint",
    "invalid node name": "cluster.exclude names a node that does not exist",
}


@dataclass(frozen=True)
class Stop:
    """Why a job got a stop signal, and whether Slurm requeues it by itself."""

    # asked: a signal by hand, and Slurm lets the job run on
    reason: Literal["preempted", "timeout", "cancelled", "asked", "failure"]
    by_slurm: bool = False


@dataclass(frozen=True)
class Queued:
    """A row of squeue."""

    state: str
    reason: str
    nodes: str


def call(*command: str) -> subprocess.CompletedProcess[str] | None:
    """A Slurm client's answer; None where there is no such program (a container) or it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None


def own_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The job this process belongs to, None outside of Slurm.

    Never the raw id of an array's task: the last task's equals the array's, and `scontrol requeue` of that one
    requeues all tasks, finished ones too.
    """
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def show(job: str) -> dict[str, str] | None:
    """`scontrol show job`; None where Slurm cannot be asked, or has forgotten the job."""
    answer = call("scontrol", "show", "job", "-o", job)
    if answer and answer.returncode < 0:  # the stop signal went to every process of the step, scontrol included
        answer = call("scontrol", "show", "job", "-o", job)
    if answer is None or answer.returncode:
        return None
    return {key: value for key, equals, value in (item.partition("=") for item in answer.stdout.split()) if equals}


def why_stopped(job: Mapping[str, str], signal_delay_s: float) -> Stop:
    """Why `job`, the one of this process as `show` returns it, got a stop signal.

    `signal_delay_s`: how long before the time limit Slurm was asked to warn.
    """
    state = job.get("JobState")
    if requeued_meanwhile(job):
        return Stop("preempted", by_slurm=True)
    if state not in ALIVE:
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


def seconds_left(job: Mapping[str, str]) -> float:
    try:
        return time.mktime(time.strptime(job["EndTime"], "%Y-%m-%dT%H:%M:%S")) - time.time()
    except (KeyError, ValueError):  # no time limit: EndTime=Unknown
        return float("inf")


def requeue(job: str) -> str:
    """Put `job` back into the queue. Slurm kills it for that, so everything must be saved before.

    Returns Slurm's refusal; empty if it complied, or has requeued the job already.
    """
    answer = call("scontrol", "requeue", job)
    if answer is None:
        return "scontrol does not answer"
    if answer.returncode == 0:
        return ""
    if requeued_meanwhile(show(job) or {}):
        return ""
    return answer.stderr.strip() or f"scontrol requeue ended with {answer.returncode}"


def queue(users: Iterable[str]) -> dict[str, Queued] | None:
    """The queued and running jobs of `users` by id (N or N_TASK), with one call; None where squeue does not answer."""
    answer = call("squeue", "-r", "-h", "-u", ",".join(sorted(set(users))), "-o", "%i|%T|%r|%N")
    if answer is None or answer.returncode:
        return None
    rows = (line.split("|") for line in answer.stdout.splitlines())
    return {row[0]: Queued(row[1], row[2], row[3]) for row in rows if len(row) == 4}


def refusal(said: str) -> str:
    """sbatch's refusal `said` in plain words, with this cluster's partitions."""
    text = next((words for part, words in REFUSALS.items() if part in said.lower()), "Slurm refuses the submission")
    answer = call("sinfo", "-h", "-o", "%R: %D nodes with %c CPUs, %G, %m MB, time limit %l")
    accepted = "; ".join(sorted(set(answer.stdout.splitlines()))) if answer and answer.returncode == 0 else ""
    reason = " ".join(said.split())
    return f"{text}. Slurm says: {reason}." + (f" Accepted: partition {accepted}." if accepted else "")


def in_words(job: Queued) -> str:
    """Why the job waits; empty for one that runs."""
    if job.state in ("RUNNING", "SIGNALING"):
        return ""
    if job.state == "COMPLETING":
        return "leaving its nodes"
    words = WORDS.get(job.reason, "")
    return f"{words} ({job.reason})" if words else job.reason
