"""Slurm's words for people: why a job waits, or was refused, with the setting or the command that helps. No torch."""

from __future__ import annotations

from fixres_dist.cluster import slurm

RELEASE = "Next: scontrol release {job}"
# squeue's reasons in words; `status` shows others as Slurm spells them. {job}: its id.
WORDS = {
    "BeginTime": "held for about two minutes after a requeue, then it starts by itself",
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
    "ReservationDeleted": "its reservation is gone. Next: scontrol update jobid={job} reservationname=",
    "ResvDeleted": "its reservation is gone. Next: scontrol update jobid={job} reservationname=",
    "Licenses": "waits for licenses",
    "NodeDown": "a node that it needs is down",
    "Cleaning": "its last start is being cleaned up",
    "PartitionDown": "the partition starts no jobs now",
    "PartitionInactive": "the partition takes no jobs now",
    "PartitionTimeLimit": "asks for more time than the partition allows. Next: scontrol update jobid={job} timelimit=LIMIT",
    "PartitionNodeLimit": "asks for more nodes than the partition has, so it never starts. Next: scancel {job}",
    "PartitionConfig": "asks for more than the partition has or allows, so it never starts. Next: scancel {job}",
    "BadConstraints": "no node can give what it asks for, so it never starts. Next: scancel {job}",
    "QOSMaxGRESPerUser": "your GPU limit is used up",
    "QOSMaxJobsPerUserLimit": "your job limit is used up",
    "AssocGrpGRES": "your account's GPU limit is used up",
    "JobLaunchFailure": "a node could not start it; Slurm tries again",
    "InvalidAccount": "its account may no longer submit here. Next: scontrol update jobid={job} account=NAME",
    "InvalidQOS": "its QOS is no longer yours. Next: scontrol update jobid={job} qos=NAME",
}
# Beginnings of reasons, of which Slurm has dozens.
KINDS = {"QOS": "a limit of the QOS is used up", "Assoc": "a limit of your account is used up"}
STATES = {
    "COMPLETING": "leaving its nodes",
    "CONFIGURING": "its nodes are being set up",
    "SUSPENDED": "suspended, for a job of higher priority or by an administrator (scontrol resume {job}); it keeps its state",
    "STOPPED": "stopped by a signal. Next: scancel --signal=CONT {job}",
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
    "invalid feature": "no node has the features of cluster.constraint",
    "invalid node name": "cluster.exclude names a node that does not exist",
    "partition not available": "the partition takes no jobs now: wait, or change cluster.partition",
    "reservation": "the reservation is not there, or not for you: change cluster.sbatch",
    "wckey": "this cluster wants a wckey of yours: cluster.sbatch={wckey: NAME}",
    "unrecognized option": "this sbatch has no such option: change cluster.sbatch",
    "invalid generic resource": "no node has such GPUs: change cluster.gpus_per_node, or gres in cluster.sbatch",
    "invalid license": "there are no such licenses: change cluster.sbatch",
}


def refusal(said: str, asked: str = "") -> str:
    """sbatch's refusal `said` in plain words, with what was asked and this cluster's partitions."""
    text = next((words for part, words in REFUSALS.items() if part in said.lower()), "Slurm refuses the submission")
    answer = slurm.call("sinfo", "-h", "-o", "%R: %D nodes with %c CPUs, %G, %m MB, time limit %l")
    accepted = "; ".join(sorted(set(answer.stdout.splitlines()))) if answer and answer.returncode == 0 else ""
    reason = " ".join(said.split()).rstrip(".")
    was = f" Asked: {asked}." if asked else ""
    return f"{text}. Slurm says: {reason}.{was}" + (f" Accepted: partition {accepted}." if accepted else "")


def in_words(number: str, job: slurm.Queued) -> str:
    """What job `number` does or waits for, and what its owner can do about it, in commands that can be pasted."""
    if job.state in ("RUNNING", "SIGNALING"):
        return f"job {number}" + (f" has used {job.used} of {job.limit}" if job.used else "")
    if job.state != "PENDING":
        return f"job {number}: {STATES.get(job.state, job.state).format(job=number)}"
    reason, _, more = job.reason.partition(",")
    kind = next((words for start, words in KINDS.items() if reason.startswith(start)), "")
    words = WORDS.get(reason, kind).format(job=number)
    start = f", expected to start {job.start}" if job.start not in ("", "N/A", "Unknown") else ""
    return f"job {number}: " + (f"{words} ({reason}{',' if more else ''}{more})" if words else job.reason) + start
