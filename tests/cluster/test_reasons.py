"""The first cause of a failure, from logs as Slurm 22.05 writes them and from errors as ranks leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixres_dist.base.files import write_text
from fixres_dist.cluster import reasons, requeue, slurm
from fixres_dist.config import reading
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

CLEANS_UP = "srun: launch/slurm: _step_signal: Terminating StepId=5.0\n"
EXITED, KILLED = "srun: error: n1: task 0: Exited with exit code 1\n", "srun: error: n2: task 1: Killed\n"
OOM = "slurmstepd-n2: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n"
RESET = "rank 0 on n1: ConnectionResetError: [Errno 104] Connection reset by peer"
VALUE = "rank 0 on n1: ValueError: bad luck"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name, value in {"SLURM_JOB_ID": "5", "FIXRES_JOB": "5"}.items():
        monkeypatch.setenv(name, value)
    run = RunDir(tmp_path / "runs" / "r")
    (run.root / "submitit" / "5").mkdir(parents=True)
    write_text(run.config_file, reading.dump(Config()))
    run.update_state(Event.STARTED, job_id="5")
    return run


def write_log(run: RunDir, rank: int, text: str) -> None:
    (run.root / "submitit" / "5" / f"5_{rank}_log.err").write_text(text)


@pytest.mark.parametrize(
    ("log", "said", "cause"),
    [
        (EXITED + CLEANS_UP + KILLED, VALUE, VALUE),  # srun killed the rank that was left
        (EXITED + CLEANS_UP + KILLED, "", "n1: task 0: Exited with exit code 1"),
        (EXITED + CLEANS_UP + KILLED, RESET, f"n2: task 1: Killed (by hand, or out of memory); {RESET}"),
        (KILLED + CLEANS_UP + EXITED, RESET, f"n2: task 1: Killed (by hand, or out of memory); {RESET}"),
        (EXITED + KILLED + CLEANS_UP, "", "n2: task 1: Killed (by hand, or out of memory)"),
        (OOM + KILLED + CLEANS_UP, "", "n2: task 1: Killed (out of memory, by the node's kernel or the job's limit)"),
        (
            "srun: error: n2: task 1: Out Of Memory\n" + CLEANS_UP,
            "",
            "n2: task 1: Out Of Memory",
        ),
        ("srun: error: n2: task 1: Segmentation fault\n" + CLEANS_UP, "", "n2: task 1: Segmentation fault"),
        ("", VALUE, f"srun ended with 1; {VALUE}"),
        (
            "srun: Job 5 step creation still disabled, retrying (Requested nodes are busy)\n"
            "srun: error: Unable to create step for job 5: Requested nodes are busy\n",
            RESET,  # of the start before
            "srun has started no rank: Unable to create step for job 5: Requested nodes are busy",
        ),
    ],
)
def test_the_first_cause(log: str, said: str, cause: str, run: RunDir) -> None:
    write_log(run, 0, log)
    assert reasons.first_cause(run, "5", 1, said) == cause


def test_a_step_that_ended_with_0_did_not_end_by_itself(run: RunDir) -> None:
    assert reasons.first_cause(run, "5", 0, "") == "Slurm ended the step"


def test_a_rank_that_could_leave_no_error_is_quoted_from_its_log(run: RunDir) -> None:
    write_log(run, 0, "srun: error: n2: task 3: Exited with exit code 127\n" + CLEANS_UP)
    write_log(run, 3, "starting\npython: error while loading shared libraries: libc.so\n\nslurmstepd-n2: error: done\n")
    text = reasons.first_cause(run, "5", 127, "")
    assert (
        text
        == "n2: task 3: Exited with exit code 127; its log ends: python: error while loading shared libraries: libc.so"
    )


def test_a_rank_says_who_it_is_and_a_cause_replaces_its_consequence(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, node, why in (
        (0, "n1", "RuntimeError: Connection closed by peer"),
        (3, "n2", "ValueError: x"),
        (1, "n1", "EOFError: "),
    ):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURMD_NODENAME", node)
        requeue.broke(run, why, "")
    assert (run.root / requeue.BROKEN).read_text() == "rank 3 on n2: ValueError: x"


def test_a_node_that_failed_twice_is_left_out_by_the_next_command(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(slurm, "requeue", lambda job, patience_s: asked.append(job) or "")
    write_log(run, 0, KILLED + CLEANS_UP)
    (run.checkpoints / "step_00000040").mkdir(parents=True)
    (run.checkpoints / "step_00000040" / "meta.json").write_text("{}")
    requeue.failed(run, "5", 1, 20, 0.0)
    assert asked == ["5"]
    requeue.failed(run, "5", 1, 20, 0.0)
    assert "n2: task 1: Killed" in run.failed.read_text()
    assert run.command("resume", "cluster.exclude=n2") in run.failed.read_text()
    # A person tries again all the same: it is the third time; and what is left out stays left out.
    write_text(run.config_file, reading.dump(Config(cluster=Cluster(exclude="n[7-9]"))))
    run.failed.unlink()
    write_log(run, 0, "srun: error: n[2,5]: tasks 1,4: Killed\n" + CLEANS_UP)
    requeue.failed(run, "5", 1, 20, 0.0)
    assert run.command("resume", "cluster.exclude=n[7-9],n2") in run.failed.read_text()


def test_nodes_that_fail_all_at_once_are_not_left_out(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "requeue", lambda job, patience_s: "")
    run.update_state(nodes=("n1", "n2"))
    write_log(run, 0, "srun: error: n[1-2]: tasks 0-1: Exited with exit code 1\n")
    for _ in range(2):
        requeue.failed(run, "5", 1, 20, 0.0)
    assert "n[1-2]: tasks 0-1: Exited with exit code 1" in run.failed.read_text()
    assert "exclude" not in run.failed.read_text()


@pytest.mark.parametrize(
    ("why", "nodes"),
    [
        ("n2: task 1: Killed", ["n2"]),
        ("no progress since its start, so no retry: n2: task 1: Killed", ["n2"]),
        ("20 restarts after failures reached cluster.max_restarts; the last: rank 3 on n2: EOFError: ", ["n2"]),
        ("rank 3 on gpu-07.site: ValueError: x", ["gpu-07.site"]),
        ("n[1-2]: tasks 0-1: Killed", ["n1", "n2"]),
        ("gpu[08-10,12],login: tasks 0-4: Killed", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[3,5]-ib: tasks 0-3: Killed", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("ValueError: no task", []),
        ("", []),
    ],
)
def test_the_nodes_of_a_cause(why: str, nodes: list[str]) -> None:
    assert reasons.nodes_of(why) == nodes
