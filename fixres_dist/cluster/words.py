"""Slurm's words for people: why a job waits, or was refused, with the setting or the command that helps. No torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from fixres_dist.cluster import slurm

RELEASE = "Next: scontrol release {job}"
RESERVATION_GONE = "its reservation is gone. Next: scontrol update jobid={job} reservationname="
# squeue's reasons in words; `status` shows others as Slurm spells them. {job}: its id.
WORDS = {
    "BeginTime": "held for about two minutes after a requeue, or to the time that was asked for; then it starts by itself",
    "Resources": "waits for free nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that has failed, so it never starts. Next: scancel {job}",
    "JobArrayTaskLimit": "waits for the concurrency limit of its array",
    "JobHeldUser": f"held by its owner. {RELEASE}",
    "JobHeldAdmin": "held by an administrator, who alone can release it",
    "job requeued in held state": f"held after a requeue. {RELEASE}",
    "launch failed requeued held": f"held because a node could not start it. {RELEASE}",
    "JobHoldMaxRequeue": f"held after too many requeues. {RELEASE}",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved; it starts when they are back",
    "Nodes required for job are DOWN": "nodes that it needs are down, drained or reserved; it starts when they are back",
    "Reservation": "waits for its reservation to begin",
    "ReservationDeleted": RESERVATION_GONE,
    "ResvDeleted": RESERVATION_GONE,
    "Licenses": "waits for licenses",
    "NodeDown": "a node that it needs is down",
    "Cleaning": "its last start is being cleaned up",
    "PartitionDown": "the partition starts no jobs now",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionTimeLimit": "asks for more time than the partition allows. Next: scontrol update jobid={job} timelimit=LIMIT",
    "PartitionNodeLimit": "asks for more nodes than the partition has, so it never starts. Next: scancel {job}",
    "PartitionConfig": "asks for more than the partition has or allows, so it never starts. Next: scancel {job}",
    "BadConstraints": "no node can give what it asks for, so it never starts. Next: scancel {job}",
    "QOSNotAllowed": "its partition does not take its QOS. Next: scontrol update jobid={job} qos=NAME",
    "JobLaunchFailure": "a node could not start it; Slurm tries again",
    "InvalidAccount": "its account may no longer submit here. Next: scontrol update jobid={job} account=NAME",
    "InvalidQOS": "its QOS is no longer yours. Next: scontrol update jobid={job} qos=NAME",
}


class Limit(NamedTuple):
    """A limit of a QOS or of an account (which Slurm calls an association)."""

    part: str  # of the dozens of names that Slurm has for them
    words: str
    change: str = ""  # what to ask for instead, where no waiting helps


LESS = "--nodes, --gpus-per-node, cluster.cpus_per_task or cluster.mem"
# The first that fits counts.
LIMITS = (
    Limit("MaxWall|TimeLimit|MinutesPerJob", "asks for more time than {whose} allows a job", "cluster.time"),
    Limit("Submit", "{whose} takes no more jobs of yours before one of them has ended"),
    Limit("Min(?!ute)", "asks for fewer {what} than {whose} wants of a job", LESS),
    Limit("PerJob|PerNode", "asks for more {what} than {whose} allows a job", LESS),
    Limit("Minutes|GrpWall|Usage", "the computing time of {whose} is used up"),
    Limit(
        "Jobs?(Per[A-Z][a-z]+)?Limit",
        "{whose} has as many jobs running as it may: it starts when one of them has ended",
    ),
    Limit(
        "", "with what runs already it asks for more {what} than {whose} allows at once: it starts when enough is free"
    ),
)
COUNTED = {"GRES": "GPUs", "cpu": "CPUs", "node": "nodes", "mem": "memory", "licen": "licenses"}
SHOW = {
    "QOS": "sacctmgr show qos format=name%20,maxwall,maxsubmitpu,maxjobspu,maxtres%20,maxtrespu%20,grptres%20",
    "Assoc": "sacctmgr show assoc format=account%20,user,maxwall,maxsubmit,maxjobs,maxtres%20,grptres%20",
}
STATES = {
    "COMPLETING": "leaving its nodes",
    "CONFIGURING": "its nodes are being set up",
    "SUSPENDED": "suspended, for a job of higher priority or by an administrator (scontrol resume {job}); it keeps its state",
    "STOPPED": "stopped by a signal. Next: scancel --signal=CONT {job}",
    "RESV_DEL_HOLD": RESERVATION_GONE,
    "REQUEUE_HOLD": f"held after a requeue. {RELEASE}",
    "SPECIAL_EXIT": f"held after a requeue. {RELEASE}",
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
    "accounting": "a limit of the QOS or of your account: change cluster.qos, cluster.account or what is asked",
    "invalid feature": "no node has the features of cluster.constraint",
    "invalid node name": "cluster.exclude names a node that does not exist",
    "partition not available": "the partition takes no jobs now: wait, or change cluster.partition",
    "reservation": "the reservation is not there, or not for you: change cluster.sbatch",
    "wckey": "this cluster wants a wckey of yours: cluster.sbatch={wckey: NAME}",
    "unrecognized option": "this sbatch has no such option: change cluster.sbatch",
    "invalid generic resource": "no node has such GPUs: change cluster.gpus_per_node, or gres in cluster.sbatch",
    "invalid license": "there are no such licenses: change cluster.sbatch",
}


def named_limit(text: str) -> tuple[str, Limit] | None:
    """Slurm's name of a limit in `text`, such as QOSMaxWallDurationPerJobLimit, and its meaning with the words filled in."""
    if not (found := re.search(r"\b((QOS|Assoc)(Grp|Max|Min|Job|Resource|Time|Usage|iation)|Max)[A-Z]?\w+", text)):
        return None
    kind = "Assoc" if found[0].startswith("Assoc") else "QOS"
    whose = "your account" if kind == "Assoc" else "the QOS"
    what = next((word for part, word in COUNTED.items() if part.lower() in found[0].lower()), "resources")
    limit = next(limit for limit in LIMITS if re.search(limit.part, found[0]))
    return kind, limit._replace(words=limit.words.format(whose=whose, what=what))


def refusal(said: str, asked: str = "") -> str:
    """sbatch's refusal `said` in plain words, with what was asked and this cluster's partitions."""
    reason = " ".join(said.split()).rstrip(".")
    was = f" Asked: {asked}." if asked else ""
    if limited := named_limit(said):
        kind, limit = limited
        change = (
            f"change {limit.change}, or cluster.qos and cluster.account" if limit.change else "see them: squeue --me"
        )
        return f"{limit.words}: {change}. Slurm says: {reason}.{was} Next, the limits: {SHOW[kind]}"
    text = next((words for part, words in REFUSALS.items() if part in said.lower()), "Slurm refuses the submission")
    answer = slurm.call("sinfo", "-h", "-o", "%R: %D nodes with %c CPUs, %G, %m MB, time limit %l")
    accepted = "; ".join(sorted(set(answer.stdout.splitlines()))) if answer and answer.returncode == 0 else ""
    return f"{text}. Slurm says: {reason}.{was}" + (f" Accepted: partition {accepted}." if accepted else "")


def in_words(number: str, job: slurm.Queued) -> str:
    """What job `number` does or waits for, and what its owner can do about it, in commands that can be pasted."""
    if job.state in ("RUNNING", "SIGNALING"):
        return f"job {number}" + (f" has used {job.used} of {job.limit}" if job.used else "")
    if job.state != "PENDING":
        return f"job {number}: {STATES.get(job.state, job.state).format(job=number)}"
    reason, _, more = job.reason.partition(",")
    words = WORDS.get(reason, "").format(job=number)
    if not words and (limited := named_limit(reason)):
        words = limit_in_words(number, *limited)
    start = f", expected to start {job.start}" if job.start not in ("", "N/A", "Unknown") else ""
    if reason in ("", "None"):
        return f"job {number} is in the queue, and Slurm has not looked at it yet" + start
    return f"job {number}: " + (f"{words} ({reason}{',' if more else ''}{more})" if words else job.reason) + start


def limit_in_words(number: str, kind: str, limit: Limit) -> str:
    """Why job `number` waits for a limit, and what helps where waiting does not."""
    if not limit.change:
        return f"{limit.words}; the limits: {SHOW[kind]}"
    other = f"scontrol update jobid={number} timelimit=LIMIT" if limit.change == "cluster.time" else f"scancel {number}"
    return f"{limit.words}, so it never starts. Next: {other}, with the limits of: {SHOW[kind]}"
