"""A cluster as its site runs it, on the real Slurm: drained nodes, other jobs, preemption of all kinds, QOS limits, wckeys."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

from support.slurm_service import LONG, ROOT, SHORT, Service


def test_a_run_is_queued_while_its_nodes_are_drained(devcluster: Service) -> None:
    nodes = f"NodeName=n[1-{devcluster.cluster.nodes}]"
    devcluster.slurm("scontrol", "update", nodes, "State=DRAIN", "Reason=maintenance")
    try:
        told = devcluster.launch("submit", *devcluster.arguments("--name", "drained", "--nodes", 2, *SHORT))
        assert "out of service: n1, n2" in told
        job = str(devcluster.state("drained")["job_id"])
        assert f"submitted drained as job {job}" in told
        again = devcluster.launch("submit", *devcluster.arguments("--name", "drained", "--nodes", 2, *SHORT))
        assert f"drained is in the queue already, as job {job}" in again
        deadline = time.monotonic() + 60
        while "down, drained or reserved; it starts when they are back" not in (
            table := devcluster.launch("status", "drained")
        ):
            assert time.monotonic() < deadline, table
            time.sleep(0.5)
        refused = devcluster.launch("submit", *devcluster.arguments("--name", "large", "--nodes", 8, *SHORT), code=2)
        assert "change --nodes" in refused
        assert "Asked: " in refused
    finally:
        devcluster.slurm("scontrol", "update", nodes, "State=RESUME")
    devcluster.until_state("drained", "done")


def test_a_run_inside_a_notebooks_job_leaves_that_job_alone(devcluster: Service, tmp_path: Path) -> None:
    """`inline` under srun -n2, of which one task runs: no second rank is waited for, and Ctrl-C requeues nothing."""
    command = [sys.executable, f"{ROOT}/launch/submit.py", *devcluster.arguments("--name", "inside", *LONG)]
    command += ["--cluster", "inline", "--runs-dir", str(devcluster.runs), "data.workers=0"]
    inside = f"[ $SLURM_PROCID = 1 ] && exec sleep 600; {shlex.join(command)}; echo ended with $?"
    script = tmp_path / "notebook.sh"
    script.write_text(f"#!/bin/bash\nsrun -n2 bash -c {shlex.quote(inside)}\n")
    options = ["--parsable", "--requeue", "--export=ALL,OMP_NUM_THREADS=1", "-N1", "-n2", "-o", str(tmp_path / "out")]
    job = devcluster.slurm("sbatch", *options, str(script)).strip()
    deadline = time.monotonic() + 120
    while not devcluster.events("inside", "saved"):
        assert time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.2)
    assert devcluster.events("inside", "started")[0]["world_size"] == 1
    devcluster.launch("cancel", "inside")
    assert devcluster.state("inside")["state"] == "cancelled"
    assert devcluster.state("inside")["job_id"] is None
    assert devcluster.job(job, "JobState") == "RUNNING"
    assert devcluster.job(job, "Restarts") == "0"
    devcluster.slurm("scancel", job)


def test_a_job_that_preempt_mode_cancel_ends_goes_on(undisturbed: Service) -> None:
    job = undisturbed.submit("cancelmode", "--nodes", 2, "cluster.partition=cancel", *LONG)
    undisturbed.until_working("cancelmode")
    undisturbed.hold(job)
    undisturbed.preempt()
    undisturbed.until_state("cancelmode", "done")
    assert [event["reason"] for event in undisturbed.events("cancelmode", "requeued")] == ["preempted"]
    assert undisturbed.events("cancelmode", "started")[-1]["job_id"] == job
    assert undisturbed.state("cancelmode")["restarts"] == {"preempted": 1, "timeout": 0, "failure": 0}
    assert undisturbed.head("cancelmode") == undisturbed.head("reference")


def test_a_suspended_job_is_shown_so_and_ends_in_the_same_bits(undisturbed: Service) -> None:
    """Its ranks are bound to a CPU each, which is also seen by data.workers=auto."""
    bound = ["cluster.srun_args=[--cpu-bind=cores]", "data.workers=auto"]
    job = undisturbed.submit("suspended", "--nodes", 2, "cluster.partition=suspend", *bound, *LONG)
    undisturbed.until_working("suspended")
    pid = undisturbed.rank_process(job, 1)
    assert len(os.sched_getaffinity(pid)) == 1
    assert len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) == 1, "a loader"
    on_all_cpus = ["-N", str(undisturbed.cluster.nodes), "--ntasks-per-node=1", "-c16", "--mem=1G", "-o/dev/null"]
    other = undisturbed.slurm("sbatch", "--parsable", "-p", "high", *on_all_cpus, "--wrap", "sleep 600").strip()
    undisturbed.until("suspended", lambda: "suspended, for a job" in undisturbed.launch("status", "suspended"))
    (row,) = json.loads(undisturbed.launch("status", "suspended", "--json"))
    assert (row["state"], row["eta_s"], row["images_per_second"]) == ("running", None, None)
    undisturbed.slurm("scancel", other)
    undisturbed.until_state("suspended", "done")
    assert undisturbed.state("suspended")["restarts"] == {"preempted": 0, "timeout": 0, "failure": 0}
    assert len(undisturbed.events("suspended", "started")) == 1
    assert undisturbed.head("suspended") == undisturbed.head("reference")


def test_limits_of_a_qos_in_words_with_the_command_that_shows_them(accounts: Service) -> None:
    def asked(*more: object, code: int = 2) -> str:
        return accounts.launch("submit", *accounts.arguments("--name", "limited", *more, *SHORT), code=code)

    long = asked("cluster.qos=small")
    assert "asks for more time than the QOS allows a job: change cluster.time, or cluster.qos" in long
    assert "QOSMaxWallDurationPerJobLimit" in long
    assert "Asked: --cpus-per-task=1" in long
    shown = accounts.slurm(*shlex.split(long.partition("Next, the limits: ")[2]))
    assert re.search(r"small\s+00:10:00\s+1 ", shown)
    first = accounts.slurm("sbatch", "--parsable", "--qos=small", "-t1", "-H", "--wrap=true").strip()
    assert "the QOS takes no more jobs of yours before one of them has ended: see them: squeue --me" in asked(
        "cluster.qos=small", "cluster.time=5"
    )
    accounts.slurm("scancel", first)
    asked("cluster.qos=shared", "--nodes", 2, code=0)
    accounts.until("limited", lambda: "QOSGrpNodeLimit" in accounts.launch("status", "limited"))
    assert "it asks for more nodes than the QOS allows at once" in accounts.launch("status", "limited")
    accounts.launch("cancel", "limited")


def test_wckeys_and_the_time_limit_of_a_partition(accounts: Service) -> None:
    def asked(*more: object, code: int = 2) -> str:
        return accounts.launch("submit", *accounts.arguments("--name", "keyed", *more, *SHORT), code=code)

    assert "this cluster wants a wckey of yours: cluster.sbatch={wckey: NAME}" in asked("cluster.sbatch={wckey: no}")
    above = asked("cluster.partition=short", "cluster.time=1:00:00", "cluster.sbatch={wckey: paper}")
    assert "cluster.time is 1:00:00, above the limit of partition short, 00:30:00. Next: cluster.time=00:30:00" in above
    asked("cluster.partition=short", "cluster.time=00:30:00", "cluster.sbatch={wckey: paper, hold: true}", code=0)
    assert accounts.job(str(accounts.state("keyed")["job_id"]), "WCKey") == "paper"
    accounts.launch("cancel", "keyed")
