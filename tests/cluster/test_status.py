"""What status says of jobs as squeue shows them, of damaged runs, and how often Slurm is asked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.clock import own_clock
from support.fake_slurm import calls, fake_slurm

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.cli import cancel, resume
from fixres_dist.cli.main import main
from fixres_dist.cluster import slurm, status
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event, State


def make(folder: Path, name: str = "r", job: str = "5", event: Event | None = Event.STARTED, **state: object) -> RunDir:
    run = RunDir(folder / "runs" / name)
    run.root.mkdir(parents=True)
    write_text(run.config_file, reading.dump(Config()))
    run.update_state(event, job_id=job, **state)
    return run


@pytest.fixture(autouse=True)
def _no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ANSWERS", {})


def seen(run: RunDir, folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str) -> status.Row:
    fake_slurm(folder / "bin", monkeypatch, squeue=f"echo '{squeue}'")
    (row,) = status.rows([run])
    return row


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("PENDING|JobHeldUser|", "job 5: held by its owner. Next: scontrol release 5 (JobHeldUser)"),
        ("PENDING|job requeued in held state|", "held after a requeue. Next: scontrol release 5"),
        (
            "PENDING|ReqNodeNotAvail, UnavailableNodes:n[1-2]|",
            "are down, drained or reserved; it starts when they are back (Req",
        ),
        (
            "PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions|",
            "job 5: nodes that it needs are down, drained or reserved; it starts when they are back (Nodes",
        ),
        ("PENDING|ReservationDeleted|", "Next: scontrol update jobid=5 reservationname= (ReservationDeleted)"),
        (
            "PENDING|QOSMaxGRESPerUser|",
            "it asks for more GPUs than the QOS allows at once: it starts when enough is free",
        ),
        (
            "PENDING|AssocGrpCpuLimit|",
            "more CPUs than your account allows at once: it starts when enough is free; the lim",
        ),
        (
            "PENDING|QOSMaxJobsPerUserLimit|",
            "the QOS has as many jobs running as it may: it starts when one of them has",
        ),
        (
            "PENDING|AssocGrpCPUMinutesLimit|",
            "the computing time of your account is used up; the limits: sacctmgr show as",
        ),
        (
            "PENDING|QOSMaxNodePerJobLimit|",
            "more nodes than the QOS allows a job, so it never starts. Next: scancel 5, with",
        ),
        (
            "PENDING|QOSMaxWallDurationPerJobLimit|",
            "Next: scontrol update jobid=5 timelimit=LIMIT, with the limits of: sacctmgr",
        ),
        ("PENDING|MaxGRESPerAccount|", "more GPUs than the QOS allows at once"),
        ("PENDING|PartitionConfig|", "so it never starts. Next: scancel 5"),
        ("PENDING|SomethingNew|", "job 5: SomethingNew"),
        ("PENDING|None|", "job 5 is in the queue, and Slurm has not looked at it yet"),
        ("PENDING|Resources||2026-11-28T15:00:00|0:00|1:00:00", "(Resources), expected to start 2026-11-28T15:00:00"),
        ("SUSPENDED|None|n1|2026-11-28T15:00:00|3:02|1:00:00", "(scontrol resume 5)"),
        ("STOPPED|None|n1", "Next: scancel --signal=CONT 5"),
        ("REQUEUE_HOLD|None|", "Next: scontrol release 5"),
        (
            "RESV_DEL_HOLD|Reservation x was deleted|",
            "reservation is gone. Next: scontrol update jobid=5 reservationname=",
        ),
        ("PENDING|BeginTime|", "or to the time that was asked for"),
        ("RUNNING|None|n1|2026-11-28T15:00:00|3:02|1:00:00", "job 5 has used 3:02 of 1:00:00"),
    ],
)
def test_squeues_states_and_reasons_in_words(
    shown: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    run.progress.touch()
    os.utime(run.progress, (1, 1))
    row = seen(run, tmp_path, monkeypatch, f"5|{shown}")
    assert words in row.reason
    assert ("no progress for" in row.reason) == shown.startswith("RUNNING"), "a job that stands cannot make any"
    assert row.job_id == "5"


def test_numbers_of_a_running_job_are_not_shown_for_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm requeued it after a lost node, so nobody could write that."""
    run = make(tmp_path, eta_s=60.0, images_per_second=400.0, nodes=("n1",))
    row = seen(run, tmp_path, monkeypatch, "5|PENDING|Resources||2026-11-28T15:00:00|0:00|1:00:00")
    assert (row.state, row.eta_s, row.images_per_second, row.nodes) == (State.REQUEUED, None, None, [])
    assert row.expected_start == "2026-11-28T15:00:00"
    row = seen(run, tmp_path, monkeypatch, "5|SUSPENDED|None|n1|2026-11-28T15:00:00|3:02|1:00:00")
    assert (row.state, row.eta_s, row.images_per_second) == (State.RUNNING, None, None)
    row = seen(run, tmp_path, monkeypatch, "5|RUNNING|None|n1|2026-11-28T15:00:00|3:02|1:00:00")
    assert (row.state, row.eta_s, row.images_per_second, row.nodes) == (State.RUNNING, 60.0, 400.0, ["n1"])
    assert (row.time_used, row.time_limit) == ("3:02", "1:00:00")


def test_a_job_that_starts_is_not_said_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, event=Event.REQUEUED, reason="preempted: SIGUSR2 at step 40")
    assert seen(run, tmp_path, monkeypatch, "5|RUNNING|None|n7").reason == "job 5 is starting on n7"


DAMAGES: dict[str, Callable[[RunDir], object]] = {
    "torn state": lambda run: run.state_file.write_text('{"state": "runn'),
    "state of another encoding": lambda run: run.state_file.write_bytes('{"reason": "größe"}'.encode("utf-16")),
    "state of another kind": lambda run: run.state_file.write_text("[1]"),
    "state with other types": lambda run: run.state_file.write_text(
        '{"step": "x", "total_steps": 3, "updated": "today"}'
    ),
    "numbers as text": lambda run: run.state_file.write_text('{"step": "x", "total_steps": 3}'),
    "metrics of another encoding": lambda run: run.metrics.write_bytes(b'{"step": 1, "top1": 3}\n\xff\xfe\n7\n'),
    "nodes with ends of lines and escapes": lambda run: run.state_file.write_text(
        '{"state": "running", "nodes": ["a\\nb\\u001b[2J\\u2028"], "reason": "\\u001b[2J"}'
    ),
    "state is a folder": lambda run: (run.state_file.unlink(), run.state_file.mkdir()),
    "an odd log": lambda run: (
        (run.root / "submitit" / "7").mkdir(parents=True),
        (run.root / "submitit" / "7" / "x_log.out").touch(),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_run_among_others(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    for name in ("a", "b"):
        make(tmp_path, name, job="").finish()
    DAMAGES[damage](make(tmp_path, "damaged", job=""))
    shown = {row.name: row for row in status.rows(status.every(tmp_path / "runs"))}
    assert {name: row.state for name, row in shown.items() if name != "damaged"} == {"a": "done", "b": "done"}
    assert status.as_table(list(shown.values())).count("\n") >= 3
    assert "\x1b" not in status.as_table(list(shown.values()))
    if damage.startswith("torn"):
        assert "state.json cannot be read" in shown["damaged"].reason


def test_a_damaged_state_is_taken_from_the_other_files(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.event(Event.STARTED, job_id="5")
    (run.checkpoints / "step_00000040").mkdir(parents=True)
    (run.checkpoints / "step_00000040" / "meta.json").write_text("{}")
    run.state_file.write_text("{")
    assert (run.state().state, run.state().step, run.state().job_id) == (State.CANCELLED, 40, "5")
    run.failed.write_text("why\n")
    assert run.state().state == State.FAILED
    run.done.write_text("finished\n")
    assert run.state().state == State.DONE


def test_an_owner_without_a_name_is_looked_up_among_all_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue -u takes no number without an account: it lists nothing, and the job seemed to be gone."""
    folder = fake_slurm(
        tmp_path / "bin", monkeypatch, squeue="case \"$*\" in *-u*) :;; *) echo '5|RUNNING|None|n1';; esac"
    )
    monkeypatch.setattr(status, "owner", lambda _: "98765")
    (row,) = status.rows([make(tmp_path)])
    assert row.state == State.RUNNING
    assert "-u" not in calls(folder, "squeue")[0]


def test_skipped_images_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    (run.root / "skipped").mkdir()
    lines = [{"name": f"train/a/{i % 3}.jpg", "reason": "torn"} for i in range(5)]
    (run.root / "skipped" / "rank_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = seen(run, tmp_path, monkeypatch, "5|RUNNING|None|n1")
    assert row.skipped_images == 3
    assert "3 images skipped" in row.reason


def test_a_job_that_squeues_last_answer_does_not_know_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    assert seen(run, tmp_path, monkeypatch, "4|RUNNING|None|n1").state == State.FAILED
    fake_slurm(tmp_path / "bin", monkeypatch, squeue="echo '5|RUNNING|None|n1'")
    (row,) = status.rows([run], status.SLURM_EVERY_S)
    assert row.state == State.RUNNING


def test_a_job_that_is_gone_is_not_asked_for_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`logs --follow` looks every second, for hours where other runs of a grid go on."""
    run = make(tmp_path)
    now = time.time() + 60
    own_clock(monkeypatch, status, time=lambda: now)
    for answer, state in ((":", State.FAILED), ("exit 1", State.RUNNING)):
        monkeypatch.setattr(slurm, "ANSWERS", {})
        folder = fake_slurm(tmp_path / state, monkeypatch, squeue=answer)
        for _ in range(5):
            (row,) = status.rows([run], status.SLURM_EVERY_S)
        assert row.state == state
        assert len(calls(folder, "squeue")) == 1


def test_cancel_asks_slurm_less_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a second before; here the job leaves after ten questions."""
    count = 'n=$(wc -l < "$0.calls"); [ $n -gt 9 ] || echo "5|RUNNING|None|n1"'
    folder = fake_slurm(tmp_path / "bin", monkeypatch, squeue=count, scancel=":")
    pauses: list[float] = []
    own_clock(monkeypatch, cancel, sleep=pauses.append)
    run = make(tmp_path)
    assert cancel.wait_for(run, cancel.stop(run)) == 0
    assert pauses[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert calls(folder, "scancel") == ["5"]


def test_a_grid_is_one_thing_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, squeue='printf "7_0|RUNNING|None|n1\\n7_1|RUNNING|None|n2\\n"')
    for k, name in enumerate(("g-base_lr=1e-3", "g-base_lr=1e-4", "g-other", "gg-base_lr=1")):
        make(tmp_path, name, job=f"7_{k}" if k < 2 else "")
    runs = tmp_path / "runs"
    assert [run.name for run in status.named(["g"], runs)] == ["g-base_lr=1e-3", "g-base_lr=1e-4"]
    assert main(["status", "g", "--runs-dir", str(runs), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    with pytest.raises(UserError, match="unknown run 'x'"):
        status.named(["x"], runs)
    make(tmp_path, "g", job="")
    assert [run.name for run in status.named(["g", "g"], runs)] == ["g"], "a run of that name comes first"


def test_all_of_a_grid_is_cancelled_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 'printf "7_0|PENDING|None|\\n7_1|PENDING|None|\\n"'
    gone = f'n=$(grep -c . "$(dirname "$0")/scancel.calls" 2>/dev/null); [ "${{n:-0}}" = 2 ] || {rows}'
    folder = fake_slurm(tmp_path / "bin", monkeypatch, squeue=gone, scancel=":")
    made = [make(tmp_path, f"g-epochs={k}", job=f"7_{k}", event=Event.SUBMITTED) for k in range(2)]
    assert main(["cancel", "g", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert calls(folder, "scancel") == ["7_0", "7_1"]
    assert [run.state().state for run in made] == ["cancelled", "cancelled"]


def test_several_runs_and_settings_are_resumed_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "g-base_lr=1e-3", "g-base_lr=1e-4"):
        make(tmp_path, name, job="")
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(resume, "resume", lambda run, args, settings: seen.append((run.name, settings)) or 0)
    assert main(["resume", "a", "g", "cluster.exclude=n7", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert seen == [(name, ["cluster.exclude=n7"]) for name in ("a", "g-base_lr=1e-3", "g-base_lr=1e-4")]
