"""Submission, arrays, refusals, status, logs and board on a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support.slurm_service import LONG, ROOT, SHORT, Service


def test_two_nodes_with_two_tasks_train_to_done(devcluster: Service) -> None:
    more = ["--nodes", 2, "--gpus-per-node", 2, "cluster.mem=auto", *SHORT]
    dry = devcluster.launch("submit", *devcluster.arguments("--name", "four", "--dry-run", *more))
    assert not (devcluster.runs / "four").exists()
    assert "using 4 processors on nodes n[1-2] in partition low" in dry
    assert "asks       for 250000M of the memory of each node (2 of 8 GPUs of a node with 1,000,000 MB)" in dry
    job = devcluster.submit("four", *more)
    waiting = devcluster.launch("status", "four")
    assert "four" in waiting
    devcluster.until_state("four", "done")
    run = devcluster.runs / "four"
    text = (run / "submission.sh").read_text()
    assert text == (run / "submitit" / job / f"{job}_submission.sh").read_text(), "what submitit gave to sbatch"
    assert text in dry
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 4
    assert results["hardware"]["nodes"] == ["n1", "n2"]
    for rank in range(4):
        assert f"global_rank={rank}(4)" in devcluster.launch("logs", "four", "--rank", rank)
    assert "has no rank 4; accepted: 0 .. 3" in devcluster.launch("logs", "four", "--rank", 4, code=2)
    assert "after fixing" in devcluster.launch("logs", "four", "--follow")
    (row,) = json.loads(devcluster.launch("status", "four", "--json"))
    assert (row["state"], row["percent"], row["job_id"]) == ("done", 100.0, job)
    assert row["top1"] == results["after"]["top1"]
    assert row["restarts"] == {"preempted": 0, "timeout": 0, "failure": 0}
    assert 0 <= row["last_log_age_s"] < 120
    assert "four" in devcluster.launch("status", "--watch"), "--watch ends when nothing is left to watch"
    assert "Did you mean 'four'?" in devcluster.launch("status", "fuor", code=2)
    for script in ("logs", "cancel", "resume", "board"):
        assert "Did you mean 'four'?" in devcluster.launch(script, "fuor", code=2)


def test_an_array_of_four_with_one_task_requeued(devcluster: Service) -> None:
    sweep = ["--sweep", "tune.base_lr=1e-3,1e-4", "--sweep", "run.seed=1,2", "--at-once", 2]
    arguments = devcluster.arguments("--name", "sweep", *sweep, *LONG)
    told = devcluster.launch("submit", *arguments)
    names = [f"sweep-base_lr={rate}-seed={seed}" for rate in ("1e-3", "1e-4") for seed in (1, 2)]
    array = str(devcluster.state(names[0])["job_id"]).partition("_")[0]
    for i, name in enumerate(names):
        assert f"submitted {name} as job {array}_{i}" in told
    assert "#SBATCH --array=0-3%2" in (devcluster.runs / names[3] / "submission.sh").read_text()
    devcluster.until_working(names[0])
    table = devcluster.launch("status")
    assert "waits for the concurrency limit of its array (JobArrayTaskLimit)" in table
    devcluster.until_working(names[1])
    devcluster.slurm("scontrol", "requeue", f"{array}_1")
    again = devcluster.launch("submit", *arguments)
    assert again.count("already") + again.count("is finished") == 4
    assert "submitted" not in again, "every run of the sweep is under way"
    for name in names:
        devcluster.until(name, lambda name=name: bool(devcluster.events(name, "done")), 240)  # the last that is written
    before = {name: devcluster.events(name) for name in names}
    assert [len([e for e in before[name] if e["event"] == "started"]) for name in names] == [1, 2, 1, 1]
    # The array's own id is also the id of its last task, and requeues all of them: each says that it is finished.
    devcluster.slurm("scontrol", "requeue", array)
    for name in names:
        devcluster.until(name, lambda name=name: "is already finished" in devcluster.log(name))
    devcluster.until(names[0], lambda: array not in devcluster.slurm("squeue", "-h", "-o", "%F"))
    assert {name: devcluster.events(name) for name in names} == before
    assert devcluster.launch("submit", *arguments).count("is finished") == 4
    assert len({devcluster.head(name) for name in names}) == 4


def test_a_dry_run_says_why_slurm_refuses(devcluster: Service) -> None:
    def refused(*more: object) -> str:
        told = devcluster.launch("submit", *devcluster.arguments("--name", "refused", *more), code=2)
        assert not (devcluster.runs / "refused").exists()
        return told

    for more in (["--dry-run"], []):
        told = refused(*more, "cluster.partition=nope")
        assert "there is no such partition: change cluster.partition" in told
        assert "invalid partition specified: nope" in told
        assert "high: 4 nodes with 16 CPUs, gpu:8" in told.partition("Accepted: partition ")[2]
    assert "no partition has so many nodes" in refused("--dry-run", "--nodes", 8)
    assert "change --nodes, --gpus-per-node" in refused("--dry-run", "--gpus-per-node", 16)


def test_table_of_recipes_is_one_array(tmp_path: Path, devcluster: Service) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "submit.py"),
        "--table",
        "2",
        "--dry-run",
        "--runs-dir",
        str(tmp_path),
    ]
    profile = ["--profile", str(ROOT / "slurm" / "profiles" / "devcluster.yaml"), "--at-once", "3"]
    done = subprocess.run([*command, *profile], env=devcluster.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-8%3" in done.stdout
    assert f"runs=({tmp_path}/b0-320-ap " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_board_serves_the_run(devcluster: Service) -> None:
    """What TensorBoard answers over HTTP names the run."""
    done = [p.parent.name for p in devcluster.runs.glob("*/DONE")]
    if not done:
        devcluster.submit("board", *SHORT)
        devcluster.until_state("board", "done")
        done = ["board"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "launch" / "board.py"),
        done[0],
        "--port",
        str(port),
        "--runs-dir",
        str(devcluster.runs),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as by a shell's background command
    try:
        process = subprocess.Popen(command, env=devcluster.env, **quiet)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline, told = time.monotonic() + 90, ""
        while done[0] not in told:
            assert time.monotonic() < deadline, told
            try:
                told = urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5).read().decode()
            except OSError:
                time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # to the command alone: it ends TensorBoard itself
        assert process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):  # so that nothing is left of it
            socket.create_connection(("127.0.0.1", port))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_study_is_an_array_and_a_last_job_that_reports(devcluster: Service) -> None:
    grid = ["--res", "48,64", "tune.epochs=1", "tune.global_batch=16", "run.precision=fp32"]
    where = ["--profile", ROOT / "slurm" / "profiles" / "devcluster.yaml", "--gpus-per-node", "1"]
    model = ["--model", "test_efficientnet", "--weights", "none", "--data", devcluster.folder / "data"]
    command = [sys.executable, "-m", "fixres_dist", "study", *model, *where, *grid, "--runs-dir", devcluster.runs]
    env = devcluster.env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command)], env=env, cwd="/", capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    points, last = [f"study-model=test_efficientnet-res={res}" for res in (48, 64)], "study-job=report"
    array = str(devcluster.state(points[0])["job_id"]).partition("_")[0]
    assert f"dependency=afterany:{array}" in (devcluster.runs / last / "submission.sh").read_text()
    devcluster.until_state(last, "done", 400)
    assert [devcluster.state(name)["state"] for name in points] == ["done", "done"], "it has waited for both"
    report = (devcluster.runs / "study" / "report.md").read_text()
    assert "4 points on 12 validation images" in report
    assert "Not finished" not in report
    assert (devcluster.runs / "study" / "report.html").read_text().count("data:image/png") == 2
