"""Ranks that die, lost nodes, duplicate jobs, other numbers of nodes: the run goes on, or says why it cannot."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load
from support.slurm_service import LONG, SHORT, Service


def test_a_killed_rank_ends_the_job_at_once_and_it_is_retried(undisturbed: Service) -> None:
    job = undisturbed.submit("killed", "--nodes", 2, *LONG)
    undisturbed.until_working("killed")
    os.kill(undisturbed.rank_process(job, 1), signal.SIGKILL)
    killed = time.monotonic()
    undisturbed.until("killed", lambda: bool(undisturbed.events("killed", "requeued")))
    assert time.monotonic() - killed < 15
    requeued = undisturbed.events("killed", "requeued")[0]
    assert requeued["reason"] == "failure"
    undisturbed.until_state("killed", "done")
    assert not (undisturbed.runs / "killed" / "FAILED").exists()
    assert undisturbed.state("killed")["restarts"] == {"preempted": 0, "timeout": 0, "failure": 1}
    first, second = undisturbed.events("killed", "started")
    saved = [e["step"] for e in undisturbed.events("killed", "saved") if e["time"] < second["time"]]
    assert second["step"] == saved[-1] == requeued["step"], "from the last checkpoint"
    assert second["job_id"] == first["job_id"] == job
    assert undisturbed.head("killed") == undisturbed.head("reference")


def test_a_rank_that_always_dies_is_declared_failed(devcluster: Service, tmp_path: Path) -> None:
    """Rank 1 gets SIGKILL while Python starts, each time."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nif os.environ.get('SLURM_PROCID') == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = f"cluster.env={{PYTHONPATH: {tmp_path}, OMP_NUM_THREADS: 1}}"
    job = devcluster.submit("dies", "--nodes", 2, *SHORT, env)
    failed = devcluster.runs / "dies" / "FAILED"
    deadline = time.monotonic() + 60
    while not failed.exists() or devcluster.job(job, "JobState") in ("RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, devcluster.log("dies", 1)
        time.sleep(0.1)
    assert devcluster.job(job, "JobState") == "FAILED"
    assert devcluster.job(job, "ExitCode") != "0:0", "srun's exit code is the job's"
    assert (
        "no progress since its start, so no retry: n2: task 1: Killed (by hand, or out of memory)" in failed.read_text()
    )
    assert f"python launch/resume.py dies --runs-dir {devcluster.runs}" in failed.read_text()
    table = devcluster.launch("status", "dies")
    assert "n2: task 1: Killed" in table
    assert "launch/resume.py dies" in table
    # Mended, the fresh job goes on in the same run directory.
    devcluster.launch("resume", "dies", "cluster.env={OMP_NUM_THREADS: 1}")
    assert not failed.exists()
    devcluster.until_state("dies", "done")


def test_a_lost_node(undisturbed: Service) -> None:
    job = undisturbed.submit("lost", "--nodes", 2, *LONG)
    undisturbed.until_working("lost")
    lost = undisturbed.events("lost", "started")[0]["nodes"][1]
    undisturbed.cluster.kill_node(lost)
    try:
        undisturbed.until_state("lost", "done", 180)
    finally:
        undisturbed.cluster.revive_node(lost)
    first, last = undisturbed.events("lost", "started")[0], undisturbed.events("lost", "started")[-1]
    assert lost in first["nodes"]
    assert lost not in last["nodes"]
    assert last["step"] > 0
    assert last["job_id"] == job
    assert undisturbed.state("lost")["restarts"]["failure"] >= 1
    assert undisturbed.head("lost") == undisturbed.head("reference")


def test_nodes_that_slurm_thinks_busy(devcluster: Service) -> None:
    """srun waited for ever after a lost node had come back; the job held its nodes, and no rank was there to notice."""
    busy = "srun --nodes=2 --ntasks=2 sleep 100 & until squeue -h -s -j $SLURM_JOB_ID -o %i | grep -q [.]0; do sleep 0.1; done"
    setup = f"[ ${{SLURM_RESTART_COUNT:-0}} -gt 0 ] || {{ {busy}; }}"  # at the first start alone
    job = devcluster.submit(
        "busy", "--nodes", 2, *SHORT, f"cluster.setup=[{json.dumps(setup)}]", "cluster.srun_args=[--immediate=1]"
    )
    devcluster.until_state("busy", "done")
    assert devcluster.state("busy")["restarts"]["failure"] == 1
    (requeued,) = devcluster.events("busy", "requeued")
    assert requeued["why"] == f"srun has started no rank: Unable to create step for job {job}: Requested nodes are busy"


def test_submitted_twice_and_two_runs_on_the_same_nodes(devcluster: Service) -> None:
    devcluster.slurm("scontrol", "update", "PartitionName=low", "State=DOWN")  # it waits, however fast jobs start here
    try:
        job = devcluster.submit("twice", "--nodes", 2, *LONG)
        again = devcluster.launch("submit", *devcluster.arguments("--name", "twice", "--nodes", 2, *LONG))
        assert f"twice is in the queue already, as job {job}" in again
    finally:
        devcluster.slurm("scontrol", "update", "PartitionName=low", "State=UP")
    other = devcluster.submit("beside", "--nodes", 2, *LONG)
    devcluster.until_working("twice")
    devcluster.hold(job)  # else it may be done before the other works
    devcluster.until_working("beside")
    assert devcluster.events("twice", "started")[0]["nodes"] == devcluster.events("beside", "started")[0]["nodes"]
    assert sorted(devcluster.slurm("squeue", "-h", "-o", "%i").split()) == sorted([job, other])
    again = devcluster.launch("submit", *devcluster.arguments("--name", "twice", "--nodes", 2, *LONG))
    assert "twice is running already" in again
    devcluster.let_go(job)
    # A duplicate job, by sbatch typed by hand, say: it leaves the run alone.
    duplicate = devcluster.slurm("sbatch", "--parsable", str(devcluster.runs / "twice" / "submission.sh")).strip()
    link = devcluster.runs / "twice" / "submitit" / duplicate
    link.mkdir(exist_ok=True)
    pickle = devcluster.runs / "twice" / "submitit" / job / f"{job}_submitted.pkl"
    (link / f"{duplicate}_submitted.pkl").write_bytes(pickle.read_bytes())
    for name in ("twice", "beside"):
        devcluster.until_state(name, "done")
    devcluster.until("twice", lambda: devcluster.job(duplicate, "JobState") not in ("RUNNING", "PENDING", "COMPLETING"))
    assert len(devcluster.events("twice", "started")) == 1
    assert not (devcluster.runs / "twice" / "FAILED").exists()
    assert devcluster.head("twice") == devcluster.head("beside")
    assert "twice is finished" in devcluster.launch(
        "submit", *devcluster.arguments("--name", "twice", "--nodes", 2, *LONG)
    )


def samples(run: Path) -> dict[int, list[int]]:
    """Which samples each step saw, over all ranks."""
    seen: dict[int, list[int]] = {}
    for file in (run / "samples").glob("rank_*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            seen.setdefault(line["step"], []).extend(line["samples"])
    return {step: sorted(found) for step, found in seen.items()}


def test_elastic_over_another_number_of_nodes(undisturbed: Service) -> None:
    """First one node is free, then two: the same job, the same batches, the same end."""
    busy = ["sbatch", "--parsable", "--gpus-per-node=8", "-o", "/dev/null", "--wrap", "sleep 600"]
    kept, released = (undisturbed.slurm(*busy, f"--nodes={n}").strip() for n in (2, 1))
    try:
        job = undisturbed.submit("elastic", "--nodes", "1-4", "run.record_samples=true", *LONG)
        undisturbed.until_working("elastic")
        undisturbed.slurm("scancel", released)
        undisturbed.until("elastic", lambda: undisturbed.job(released, "JobState") == "CANCELLED")
        undisturbed.slurm("scontrol", "requeue", job)
        undisturbed.until_state("elastic", "done")
    finally:
        undisturbed.slurm("scancel", kept, released)
    worlds = [start["world_size"] for start in undisturbed.events("elastic", "started")]
    assert worlds == [1, 2]
    assert json.loads((undisturbed.runs / "elastic" / "results.json").read_text())["world_size"] == 2
    assert samples(undisturbed.runs / "elastic") == samples(undisturbed.runs / "reference")
    mine, others = (load(undisturbed.head(name)) for name in ("elastic", "reference"))
    for name, value in others.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_plain_path_without_submitit(devcluster: Service) -> None:
    printed = devcluster.launch("submit", *devcluster.arguments("--name", "plain", "--nodes", 2, "--prepare", *LONG))
    command = shlex.split(printed.strip().splitlines()[-1].removeprefix("Next: "))
    python = ["--parsable", "--export=ALL,OMP_NUM_THREADS=1,PYTHON=" + sys.executable, "-o", "/dev/null"]
    job = devcluster.slurm(command[0], *python, *command[1:]).strip()
    devcluster.until_working("plain")
    devcluster.slurm("scontrol", "requeue", job)  # by an administrator, say: Slurm requeues it, we only save
    devcluster.until_state("plain", "done")
    first, second = devcluster.events("plain", "started")
    stop = devcluster.events("plain", "stop requested")[0]
    assert (first["step"], second["step"]) == (-1, stop["step"])
    assert first["job_id"] == second["job_id"] == job
    assert devcluster.state("plain")["restarts"]["preempted"] == 1
    assert "step 720/720" in devcluster.launch("logs", "plain")
