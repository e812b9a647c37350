"""Decisions that need no Slurm: why a job stops, whether a failure is retried, what status says, the stop deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.clock import own_clock

from fixres_dist.base import watchdog
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.cluster import jobs, reasons, requeue, slurm, status
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

RUNNING = {"JobState": "RUNNING", "Restarts": "0", "PreemptTime": "None", "EndTime": "Unknown", "Reason": "None"}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ({"PreemptTime": "2026-01-02T03:04:05"}, slurm.Stop("preempted")),
        ({"JobState": "COMPLETING"}, slurm.Stop("cancelled")),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-01-02T03:04:05"}, slurm.Stop("cancelled")),
        (  # PreemptMode=CANCEL, measured with Slurm 22.05
            {"JobState": "COMPLETING", "PreemptTime": "2026-01-02T03:04:05", "EndTime": "2026-01-02T03:04:05"},
            slurm.Stop("preempted"),
        ),
        (  # cancelled by its owner in the grace time
            {"JobState": "COMPLETING", "PreemptTime": "2026-01-02T03:04:05", "EndTime": "2026-01-02T03:04:12"},
            slurm.Stop("cancelled"),
        ),
        ({"JobState": "PREEMPTED"}, slurm.Stop("preempted")),
        ({"JobState": "COMPLETING", "Restarts": "1"}, slurm.Stop("preempted", by_slurm=True)),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, slurm.Stop("timeout")),
        (
            {"JobState": "SIGNALING", "EndTime": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(1100))},
            slurm.Stop("timeout"),
        ),
        ({"EndTime": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(99_000))}, slurm.Stop("asked")),
        ({}, slurm.Stop("asked")),
    ],
)
def test_why_a_job_is_told_to_stop(
    shown: dict[str, str], expected: slurm.Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    own_clock(monkeypatch, slurm, time=lambda: 1000.0)
    assert slurm.why_stopped(RUNNING | shown, signal_delay_s=30) == expected


def test_the_id_of_an_array_task_is_never_the_raw_one() -> None:
    array = {"SLURM_JOB_ID": "4", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1", "FIXRES_JOB": "4"}
    assert slurm.own_job(array) == "4_1"
    assert slurm.own_job({"SLURM_JOB_ID": "7", "FIXRES_JOB": "7"}) == "7"
    assert slurm.own_job({}) is None


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Stand-ins for Slurm's programs, alone in PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that works, as job 5, and this process in the job's batch script."""
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("FIXRES_JOB", "5")
    run = RunDir(tmp_path / "runs" / "r")
    run.root.mkdir(parents=True)
    write_text(run.root / "config.yaml", reading.dump(reading.parse(Config, {"cluster": {"max_restarts": "2"}})))
    run.update_state(Event.STARTED, job_id="5")
    return run


def saved(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")


def shows(state: str) -> str:
    """scontrol that notes each requeue and shows the job like this."""
    return f'[ $1 = requeue ] && echo $2 >> "$0.requeued" || echo "JobId=5 JobState={state} Reason=None Restarts=0 PreemptTime=None"'


def test_a_failure_is_retried_only_with_progress_and_within_the_limit(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, scontrol=shows("RUNNING"))
    for step, failures in ((0, 1), (40, 2)):
        saved(run, step)
        requeue.ended(run, 1)
        assert run.state().state == "requeued"
        assert run.state().restarts["failure"] == failures
        requeue.begin(run, 2, ["n1"])
    saved(run, 80)
    requeue.broke(run, "ValueError: bad luck", "")
    requeue.ended(run, 1)
    assert (tmp_path / "bin" / "scontrol.requeued").read_text().split() == ["5", "5"]
    told = run.failed.read_text()
    assert (
        "2 restarts after failures reached cluster.max_restarts; the last: srun ended with 1; ValueError: bad luck"
        in told
    )
    assert f"Next: {run.command('logs')}" in told
    assert run.command("resume") in str(run.state().reason)


def test_the_task_that_was_killed_is_named_before_those_that_broke_because_of_it(run: RunDir) -> None:
    log = run.root / "submitit" / "5" / "5_0_log.err"
    log.parent.mkdir(parents=True)
    broken = "srun: error: n2: tasks 2-3: Exited with exit code 1\n"
    log.write_text(
        "srun: error: n9: task 9: Killed\n"
        "slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-02T03:04:05 DUE TO JOB REQUEUE ***\n"
        f"{broken}srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Terminated\n"
    )
    assert reasons.culprit(run, "5") == "n1: task 1: Killed (by hand, or out of memory)"
    log.write_text(f"{broken}srun: error: n1: task 0: Exited with exit code 2\n")
    assert reasons.culprit(run, "5") == "n2: tasks 2-3: Exited with exit code 1"


@pytest.mark.parametrize(("preempted", "counted"), [("None", "failure"), ("2026-01-02T03:04:05", "preempted")])
def test_a_rank_that_breaks_in_a_job_that_slurm_requeued(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: str, counted: str
) -> None:
    """A node is lost: Slurm may notice before the ranks do. Without a preemption that is a failure."""
    shown = f"JobId=5 JobState=COMPLETING Reason=None Restarts=1 PreemptTime={preempted}"
    programs(tmp_path / "bin", monkeypatch, scontrol=f'[ $1 = requeue ] && echo $2 >> "$0.requeued" || echo "{shown}"')
    requeue.broke(run, "RuntimeError: connection closed by peer", "")
    requeue.ended(run, 1)
    assert run.state().state == "requeued"
    assert {reason: n for reason, n in run.state().restarts.items() if n} == {counted: 1}
    assert not (tmp_path / "bin" / "scontrol.requeued").exists(), "Slurm has done it"


@pytest.mark.parametrize(("preempted", "counted"), [("None", "failure"), ("2026-01-02T03:04:05", "preempted")])
def test_a_start_that_was_killed_before_it_could_save(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: str, counted: str
) -> None:
    """The grace time is shorter than a step: Slurm has forgotten the preemption at the next start, rank 0 has noted it."""
    programs(tmp_path / "bin", monkeypatch, scontrol=f"echo JobId=5 JobState=RUNNING PreemptTime={preempted}")
    for rank in ("1", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        requeue.warned(run)
        assert (run.root / requeue.PREEMPTED).exists() is (rank == "0" and counted == "preempted")
    requeue.begin(run, 2, ["n1"])
    assert {reason: n for reason, n in run.state().restarts.items() if n} == {counted: 1}
    assert not (run.root / requeue.PREEMPTED).exists()


def test_no_progress_is_no_retry(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, scontrol=shows("RUNNING"))
    saved(run, 40)
    requeue.ended(run, 1)
    requeue.begin(run, 2, ["n1"])
    requeue.ended(run, 1)
    assert "no progress since the failure before, so no retry" in run.failed.read_text()
    assert run.state().restarts["failure"] == 1


def test_a_failing_rank_of_a_cancelled_job_does_not_bring_it_back(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch, scontrol=shows("COMPLETING"))
    saved(run, 40)
    requeue.ended(run, 143)
    assert run.state().state == "cancelled"
    assert not (tmp_path / "bin" / "scontrol.requeued").exists()


def test_in_a_container_the_batch_script_asks_and_requeues(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path / "bin", monkeypatch)  # the ranks have no scontrol
    assert "the batch script asks Slurm why" in requeue.stopped(run, signal.SIGUSR2, 40, 30)
    assert run.state().state == "stopping"
    programs(tmp_path / "bin", monkeypatch, scontrol=shows("RUNNING"))
    requeue.ended(run, 0)
    assert run.state().state == "requeued"
    assert run.state().restarts == {"preempted": 1, "timeout": 0, "failure": 0}
    assert (tmp_path / "bin" / "scontrol.requeued").read_text() == "5\n"


def away_for(calls: int, what: str, state: str = "RUNNING") -> str:
    """scontrol of a controller that gives no answer to the first so many calls of `what` (show or requeue)."""
    away = f'n=$(cat "$0.n" 2>/dev/null || echo 0); echo $((n + 1)) > "$0.n"; [ $n -ge {calls} ] || {{ echo {AWAY_SAID} >&2; exit 1; }}'
    return f"if [ $1 = {what} ]; then {away}; fi; {shows(state)}"


AWAY_SAID = "slurm_load_jobs error: Unable to contact slurm controller"


@pytest.mark.parametrize("what", ["show", "requeue"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_controller_that_is_away_at_a_stop_is_asked_again(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, calls: int
) -> None:
    """It restarts, or is overloaded: first rank 0 asks again, then the batch script, and the stop is counted once."""
    clock = iter(range(0, 10_000, 20))
    own_clock(monkeypatch, slurm, monotonic=lambda: float(next(clock)), sleep=lambda s: None)
    programs(tmp_path / "bin", monkeypatch, scontrol=away_for(calls, what))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    saved(run, 40)
    said = requeue.stopped(run, signal.SIGUSR2, 40, 120)
    by_batch_script = calls == 3
    assert ("the batch script ask" in said) == by_batch_script, said
    requeue.ended(run, 0)
    assert run.state().state == "requeued", run.state().reason
    assert (tmp_path / "bin" / "scontrol.requeued").read_text() == "5\n"
    assert {reason: n for reason, n in run.state().restarts.items() if n} == {"preempted": 1}
    assert "SIGUSR2" in str(run.state().reason)


def test_a_stop_that_slurm_never_explains_is_still_requeued(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 20))
    own_clock(monkeypatch, slurm, monotonic=lambda: float(next(clock)), sleep=lambda s: None)
    programs(tmp_path / "bin", monkeypatch, scontrol=away_for(10**6, "show"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    requeue.stopped(run, signal.SIGUSR2, 0, 30)
    requeue.ended(run, 0)
    assert (run.state().state, run.state().restarts["failure"]) == ("requeued", 0)
    assert (tmp_path / "bin" / "scontrol.requeued").read_text() == "5\n"


def test_starts_that_are_lost_again_and_again_end(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm requeues the job of a lost node by itself, and no batch script is left to judge it."""
    programs(tmp_path / "bin", monkeypatch)
    for losses in (1, 2):  # max_restarts
        requeue.begin(run, 2, ["n1"])
        assert run.state().restarts["failure"] == losses
    saved(run, 40)
    requeue.begin(run, 2, ["n1"])  # with progress since
    with pytest.raises(UserError, match=r"4 starts .* the last one on n1.* no progress since step 40.*fixres logs r"):
        requeue.begin(run, 2, ["n1"])
    monkeypatch.delenv("FIXRES_JOB")
    requeue.begin(run, 2, ["n1"])  # a person's start is theirs


def test_a_start_outside_of_slurm_has_left_slurms_job(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIXRES_JOB")
    requeue.begin(run, 1, ["here"])
    assert run.state().job_id is None
    run.update_state(job_id="local-7")
    requeue.begin(run, 1, ["here"])
    assert run.state().job_id == "local-7"


def test_a_hang_is_not_blamed_on_the_rank_that_tells_it_first(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    why = watchdog.reason([watchdog.Standing(k, f"n{k}", "x" if k == 1 else "y", 0.0) for k in range(4)], 4, 600)
    requeue.broke(run, why, "")
    assert (run.root / requeue.BROKEN).read_text() == why
    assert "rank 1 on n1 in x; rank 0, 2, 3 in y" in why
    assert reasons.nodes_of(why) == []


def test_a_persons_defaults_for_slurms_programs_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, squeue='echo "5|PENDING|$SQUEUE_STATES$SLURM_CLUSTERS$SLURM_TIME_FORMAT|"')
    for name in ("SQUEUE_STATES", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "x")
    assert (slurm.queue(["me"]) or {})["5"].reason == ""
    assert jobs.told_of_the_shell() == ["SLURM_CLUSTERS=x"]


def test_a_refused_requeue_is_a_failure_with_the_next_command(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = shows("RUNNING").replace('echo $2 >> "$0.requeued"', "{ echo disabled for job 5 >&2; exit 1; }")
    programs(tmp_path / "bin", monkeypatch, scontrol=refuses)
    requeue.stopped(run, signal.SIGTERM, 40, 30)
    assert run.state().state == "failed"
    assert "Slurm refused to requeue job 5: disabled for job 5" in run.failed.read_text()
    assert run.command("resume") in run.failed.read_text()


def test_a_duplicate_job_does_not_judge_the_run(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, scontrol=shows("RUNNING"))
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    monkeypatch.setenv("FIXRES_JOB", "6")
    before = run.state()
    requeue.ended(run, 2)
    assert run.state() == before


def test_status_explains_the_requeue_hold_and_vanished_jobs(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.update_state(Event.REQUEUED, reason="preempted: SIGUSR2 at step 40", step=40, total_steps=80)
    programs(tmp_path / "bin", monkeypatch, squeue="echo x >> $0.calls; echo '5|PENDING|BeginTime|'")
    (row,) = status.rows([run])
    assert (row.state, row.percent) == ("requeued", 50.0)
    assert (
        "held for about two minutes after a requeue, or to the time that was asked for; then it starts by itself (BeginTime)"
        in row.reason
    )
    status.rows([run, run, run])
    assert (tmp_path / "bin" / "squeue.calls").read_text() == "x\nx\n", "one call for all runs"
    programs(tmp_path / "bin", monkeypatch, squeue="exit 0")
    (row,) = status.rows([run])
    assert row.state == "failed"
    assert f"job 5 has left the queue. Next: {run.command('resume')}" in row.reason
    programs(tmp_path / "bin", monkeypatch, squeue="exit 1")
    (row,) = status.rows([run])
    assert row.state == "requeued"
    assert "squeue does not answer" in row.reason


def test_submission_is_not_influenced_by_the_job_it_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    leaking = (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND",
        "SBATCH_PARTITION",
        "PMIX_RANK",
        "RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
    )
    for name in (*leaking, "SLURM_CONF", "RANKING"):
        monkeypatch.setenv(name, "1")
    with jobs.clean_environment():
        assert not set(leaking) & set(os.environ)
        assert {"SLURM_CONF", "RANKING", "PATH"} <= set(os.environ)
    assert set(leaking) <= set(os.environ)


HANGS = """
import ctypes, sys, threading
from fixres_dist.base import watchdog
from fixres_dist.base.signals import StopFlag
watchdog.GIVE_UP_S = 0.5
def heard():
    print("heard", flush=True)
    {heard}
def give_up():
    print("gave up", flush=True)
    {give_up}
flag = StopFlag().install()
flag.deadline(0.5, give_up, heard)
mutex = ctypes.create_string_buffer(64)
c = ctypes.CDLL(None)
c.pthread_mutex_init(mutex, None)
print("hangs", flush=True)
c.pthread_mutex_lock(mutex)
c.pthread_mutex_lock(mutex)  # as in a collective with a dead peer: in C, without the interpreter's lock
"""


AWAY = "raise OSError('the file system is away')"


@pytest.mark.parametrize(
    ("heard", "give_up"),
    [("pass", "pass"), (AWAY, AWAY), ("pass", "threading.Event().wait()")],
    ids=["", "fail", "hang"],
)
def test_a_rank_that_hangs_ends_after_the_stop_deadline(heard: str, give_up: str) -> None:
    """Also where nothing can be written down any more."""
    root = Path(__file__).parents[2]
    code = HANGS.format(heard=heard, give_up=give_up)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "hangs\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)  # it hangs for good while nobody wants it to stop
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out == "heard\ngave up\n"
    assert "no common batch 0 s after the stop signal" in err
    assert err.count("the file system is away") == (heard == AWAY) + (give_up == AWAY)


def test_slurm_is_asked_again_where_the_stop_signal_ended_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm signals all processes of a step, and the job's scontrol is one of them."""
    killed_once = '[ -e "$0.asked" ] || { : > "$0.asked"; kill -TERM $$; }; echo "JobId=5 JobState=COMPLETING"'
    programs(tmp_path / "bin", monkeypatch, scontrol=killed_once)
    assert slurm.show("5") == {"JobId": "5", "JobState": "COMPLETING"}
