"""Preempted, timed out, cancelled: what was saved, what Slurm does with the job, and that nothing is lost or repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.slurm_service import LONG, ROOT, Service, need_slurm, service, slurm_here


def assert_exact(devcluster: Service, name: str, job: str, reason: str, stops: int) -> None:
    """Each start began at the step of the stop before it, in the same job; the end is that of the undisturbed run."""
    begun, stopped = devcluster.events(name, "started"), devcluster.events(name, "stop requested")
    assert [stop["reason"] for stop in stopped] == [reason] * stops
    assert [start["step"] for start in begun] == [-1, *(stop["step"] for stop in stopped)]
    assert {start["job_id"] for start in begun} == {job}
    assert devcluster.state(name)["restarts"] == {"preempted": 0, "timeout": 0, "failure": 0, reason: stops}
    assert devcluster.job(job, "Restarts") == str(stops)
    assert devcluster.head(name) == devcluster.head("reference")
    assert not list((devcluster.runs / name / "submitit").glob("*/*_result.pkl")), "neither a success nor an error"


def test_two_preemptions_with_the_user_signal(undisturbed: Service) -> None:
    job = undisturbed.submit("preempted", "--nodes", 2, *LONG)
    for start in (1, 2):
        undisturbed.until_working("preempted", start)
        undisturbed.hold(job)
        undisturbed.preempt()
        undisturbed.until("preempted", lambda n=start: len(undisturbed.events("preempted", "requeued")) == n)
        if start == 1:
            table = undisturbed.launch("status", "preempted")
            assert "1 preempted" in table
            assert "requeued" in table
            assert "held for about two minutes after a requeue" in table
    undisturbed.until_state("preempted", "done")
    assert_exact(undisturbed, "preempted", job, "preempted", 2)
    assert {stop["signal"] for stop in undisturbed.events("preempted", "stop requested")} == {"SIGUSR2"}
    steps = [event["step"] for event in undisturbed.events("preempted", "saved")]
    assert steps == sorted(steps)


def test_preempted_without_the_user_signal(undisturbed: Service, tmp_path: Path) -> None:
    need_slurm()
    with slurm_here.DevCluster(nodes=2, user_signal=False) as cluster:
        other = service(tmp_path, cluster)
        # The same data set at another place: the sample list, and so the run, is the same.
        job = other.submit("reference", "--nodes", 2, *LONG)
        other.until_working("reference")
        other.hold(job)
        other.preempt()
        other.until_state("reference", "done")
        assert_exact(other, "reference", job, "preempted", 1)
        assert other.events("reference", "stop requested")[0]["signal"] == "SIGTERM"
        assert other.head("reference") == undisturbed.head("reference")


def test_the_time_limit(undisturbed: Service, tmp_path: Path) -> None:
    """With a command that is told of the requeue and hangs then."""
    told = tmp_path / "told"
    hook = f'echo "$FIXRES_STATE: $FIXRES_REASON" >> {told}; echo told; [ $FIXRES_STATE = done ] || sleep 600'
    job = undisturbed.submit("timeout", "--nodes", 2, *LONG, f"cluster.on_change={hook}")
    undisturbed.until_working("timeout")
    undisturbed.hold(job)
    undisturbed.slurm("scontrol", "update", f"jobid={job}", "timelimit=1")  # the warning is due 30 s before the minute
    undisturbed.until("timeout", lambda: len(undisturbed.events("timeout", "requeued")) == 1)
    longer = ("scontrol", "update", f"jobid={job}", "timelimit=60")
    undisturbed.until("timeout", lambda: undisturbed.tried(*longer).returncode == 0)
    undisturbed.until_state("timeout", "done")
    assert_exact(undisturbed, "timeout", job, "timeout", 1)
    undisturbed.until("timeout", lambda: len(undisturbed.events("timeout", "on_change")) == 2)
    stop = undisturbed.events("timeout", "stop requested")[0]
    assert told.read_text().splitlines() == [f"requeued: timeout: {stop['signal']} at step {stop['step']}", "done: "]
    assert [event["exit_code"] for event in undisturbed.events("timeout", "on_change")] == [None, 0]
    first = undisturbed.launch("logs", "timeout", "--start", 1)
    assert "was ended after 3 s; the run goes on: told" in first
    newest = undisturbed.launch("logs", "timeout")
    assert f"start 2 of job {job}" in newest
    assert "step 720/720" in newest
    assert "requeued" not in newest


@pytest.mark.parametrize("how", ["scancel", "cancel.py"])
def test_cancelled_is_saved_and_stays_cancelled(undisturbed: Service, how: str) -> None:
    job = undisturbed.submit(how, "--nodes", 2, *LONG)
    undisturbed.until_working(how)
    undisturbed.hold(job)
    if how == "scancel":
        undisturbed.slurm("scancel", job)
    else:
        assert f"{how} is cancelled at step" in undisturbed.launch("cancel", how)
    undisturbed.until_state(how, "cancelled")
    undisturbed.until(how, lambda: job not in undisturbed.slurm("squeue", "-h", "-o", "%i").split())
    assert undisturbed.job(job, "JobState") == "CANCELLED"
    stop = undisturbed.events(how, "stop requested")[-1]
    assert stop["reason"] == "cancelled"
    assert stop["step"] == undisturbed.events(how, "saved")[-1]["step"]
    assert undisturbed.events(how, "requeued") == []
    assert undisturbed.state(how)["restarts"] == {"preempted": 0, "timeout": 0, "failure": 0}
    if how == "cancel.py":
        assert "nothing to cancel" in undisturbed.launch("cancel", how)
        undisturbed.launch("resume", how)
        fresh = undisturbed.state(how)["job_id"]
        assert fresh != job
        undisturbed.until_state(how, "done")
        assert undisturbed.events(how, "started")[-1]["step"] == stop["step"]
        assert undisturbed.head(how) == undisturbed.head("reference")


def test_a_sweep_as_a_job_goes_on_with_the_resolutions_that_are_left(undisturbed: Service, tmp_path: Path) -> None:
    """Preempted in the middle of its passes: the same job, no pass made twice, the result of the undisturbed command."""
    run, profile = undisturbed.runs / "reference", ROOT / "slurm" / "profiles" / "devcluster.yaml"

    def sweep(out: str, *more: object) -> None:
        sizes = ",".join(map(str, range(32, 96, 8)))
        words = ["sweep", "--run", run, "--res", sizes, "--out", tmp_path / out, "--profile", profile, *more]
        command = [sys.executable, "-m", "fixres_dist", *map(str, words)]
        env = {**undisturbed.env, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, timeout=200)

    sweep("job", "--cluster", "slurm", "--nodes", 2, "--gpus-per-node", 1)
    name = "reference/jobs/sweep"
    job, partial = undisturbed.state(name)["job_id"], undisturbed.runs / name / "partial"
    undisturbed.until(name, lambda: len(list(partial.glob("*.npz"))) >= 2)
    undisturbed.hold(job)
    undisturbed.preempt()
    undisturbed.until_state(name, "done")
    assert undisturbed.state(name)["restarts"] == {"preempted": 1, "timeout": 0, "failure": 0}
    assert [start["job_id"] for start in undisturbed.events(name, "started")] == [job, job]
    passes = undisturbed.events(name, "stop requested")[0]["step"]
    assert 2 <= passes < 8
    assert undisturbed.launch("logs", name).count("images are done already") == passes
    assert name in undisturbed.launch("status")
    sweep("here")
    found, wanted = (json.loads((tmp_path / out / "sweep.json").read_text()) for out in ("job", "here"))
    assert found["best_res"] == wanted["best_res"]
    for label, curve in wanted["curves"].items():
        for res, point in curve.items():  # one rank makes other batches than two
            assert found["curves"][label][res] == pytest.approx(point, abs=1e-4)
