"""A cluster as its site runs it, on the real Slurm: drained nodes, jobs of another purpose, PreemptMode=CANCEL."""

from __future__ import annotations

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
    undisturbed.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=CANCEL")
    try:
        job = undisturbed.submit("cancelmode", "--nodes", 2, *LONG)
        undisturbed.until_working("cancelmode")
        undisturbed.hold(job)
        undisturbed.preempt()
        undisturbed.until_working("cancelmode", starts=2)
    finally:
        undisturbed.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=REQUEUE")
    undisturbed.until_state("cancelmode", "done")
    assert undisturbed.events("cancelmode", "started")[-1]["job_id"] == job
    assert undisturbed.state("cancelmode")["restarts"]["preempted"] == 1
    assert undisturbed.head("cancelmode") == undisturbed.head("reference")
