"""cluster.on_change: run once for each change, by whoever follows the ranks, and harmless to the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.fake_slurm import calls, fake_slurm

from fixres_dist.base.errors import UserError
from fixres_dist.cli import submission, submit
from fixres_dist.cli.main import main
from fixres_dist.cluster import local, notify, requeue, slurm
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

SHOWS = 'echo "$FIXRES_RUN|$FIXRES_STATE|$FIXRES_REASON|$FIXRES_TOP1|$FIXRES_DIRECTORY" >> ../told; echo to the log'
SECRET = "hf_abcdefghijklmnopqrstuvwx"


def make(folder: Path, on_change: str = SHOWS, **cluster: object) -> RunDir:
    run = RunDir(folder / "r")
    run.root.mkdir(parents=True)
    values = {"cluster": {"on_change": on_change, "env": {"HF_TOKEN": SECRET}, **cluster}}
    run.config_file.write_text(reading.dump(reading.parse(Config, values)))
    run.update_state(Event.STARTED)
    run.event(Event.STARTED)
    return run


def told(run: RunDir) -> list[list[str]]:
    file = run.root.parent / "told"
    return [line.split("|") for line in file.read_text().splitlines()] if file.exists() else []


def events(run: RunDir) -> list[dict[str, object]]:
    return [e for e in map(json.loads, run.events.read_text().splitlines()) if e["event"] == notify.TOLD]


def test_it_is_told_what_changed_once_and_without_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    notify.tell(run)
    assert not told(run), "a start is none of the changes"
    lines = [
        {"step": 0, "evaluation": "before", "top1": 61.0, "res": 64},
        {"step": 0, "evaluation": "before, at another size", "top1": 99.0, "res": 32},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.fail(f"OSError: https://user:{SECRET}@host/x\n\0torn", f"fixres submit 'cluster.env={{HF_TOKEN: {SECRET}}}'")
    for _ in range(2):
        notify.tell(run)
    (line,) = told(run)
    assert line[:2] == ["r", "failed"]
    assert line[2].startswith("OSError: https://")
    assert SECRET not in (tmp_path / "told").read_text()
    assert "submit" not in (tmp_path / "told").read_text(), "the next command has what its user typed"
    assert line[2].endswith("host/x \\x00torn")
    assert line[3:] == ["61.00", str(run.root)]
    assert capsys.readouterr().out == "cluster.on_change: to the log\n"
    assert [(e["of"], e["exit_code"]) for e in events(run)] == [("failed", 0)]
    run.event(Event.STARTED)
    run.finish()
    notify.tell(run)
    assert told(run)[-1] == ["r", "done", "", "61.00", str(run.root)]


def alive(*pids: str) -> list[str]:
    """Those that run; one that has ended may wait for its parent."""
    stats = [file for pid in pids if (file := Path(f"/proc/{pid}/stat")).exists()]
    return [file.parent.name for file in stats if file.read_text().rpartition(")")[2].split()[0] != "Z"]


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("echo torn >&2; exit 3", 3, "ended with exit code 3; the run goes on: torn"),
        ("no-such-program https://hooks.example.org/T0/B1", 127, "ended with exit code 127"),
        ("sleep 600 & echo $! >> ../pids; echo begun; wait", None, "was ended after 0 s; the run goes on: begun"),
        ("trap '' TERM INT; while :; do sleep 1; done", None, "was ended after 0 s"),
        ("echo $HF_TOKEN https://hooks.example.org/T0/B1", 0, "REDACTED REDACTED"),
        ("sleep 600 &", 0, ""),  # what it leaves behind does not hold anybody
        ("yes", None, "was ended after 0 s; the run goes on: y"),
        ("kill -9 $$", -9, "ended with exit code -9"),
    ],
)
def test_a_command_that_fails_or_hangs_is_an_event(
    command: str,
    code: int | None,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = make(tmp_path, f"echo $$ >> ../pids; {command}")
    run.finish()
    begun = time.monotonic()
    notify.tell(run, 0.4)
    assert time.monotonic() - begun < 60
    said = capsys.readouterr().out
    assert words in said
    assert "hooks.example" not in said
    assert [e["exit_code"] for e in events(run)] == [code]
    assert run.state().state == "done"
    if code is None:
        assert not alive(*(tmp_path / "pids").read_text().split())


def test_nothing_that_goes_wrong_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    run.fail("x" * 10**6, "again")
    notify.tell(run)
    assert len(told(run)[0][2]) == notify.LONGEST
    run.event(Event.REQUEUED)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: 1 / 0)
    notify.tell(run)
    run.config_file.write_text("{")
    notify.tell(run)
    assert len(told(run)) == 1


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    for name, value in {"SLURM_JOB_ID": "5", slurm.OUR_JOB: "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    run = make(tmp_path, f"{SHOWS}; scontrol told")
    run.update_state(job_id="5")
    return run


PREEMPTED = "echo 'JobId=5 JobState=RUNNING Restarts=0 PreemptTime=2026-11-28T10:00:00 EndTime=2030-01-01T00:00:00'"


def test_a_requeue_is_told_before_it_ends_the_job(job: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_slurm(tmp_path / "bin", monkeypatch, scontrol=PREEMPTED)
    requeue.stopped(job, 12, 40, 120)
    assert [line[:3] for line in told(job)] == [["r", "requeued", "preempted: SIGUSR2 at step 40"]]
    assert [call.split()[0] for call in calls(folder, "scontrol")] == ["show", "told", "requeue"]
    requeue.main(job, 0)  # the batch script, which finds it settled
    assert len(told(job)) == 1


def test_the_batch_script_tells_of_the_end(job: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, scontrol="echo 'JobId=5 JobState=RUNNING Restarts=0'")
    job.update_state(last_failure_step=7)
    requeue.main(job, 1)
    assert told(job)[0][1:3] == ["failed", "no progress since its start, so no retry: srun ended with 1"]
    job.event(Event.STARTED)
    job.finish()
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    monkeypatch.setenv(slurm.OUR_JOB, "6")
    requeue.main(job, 0)
    assert len(told(job)) == 1, "a duplicate job has nothing to tell"


@pytest.mark.parametrize("kind", ["inline", "local"])
def test_a_local_run_is_told_of_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    log = run.root / "submitit" / "77" / "77_0_log.out"
    log.parent.mkdir(parents=True)
    log.touch()

    def work(*_: object) -> int:
        run.update_state(job_id="local-77")
        run.fail("a rank's reason", "again")
        run.failed.unlink()
        run.fail("the better one of the controller", "again")
        raise RuntimeError

    monkeypatch.setattr("fixres_dist.training.worker.train", work)
    monkeypatch.setattr("fixres_dist.cluster.local.run_local", work)
    with pytest.raises(RuntimeError):
        submission.start_here(run, run.config(), kind)
    assert [line[1:3] for line in told(run)] == [["failed", "the better one of the controller"]]
    assert log.read_text() == ("cluster.on_change: to the log\n" if kind == "local" else "")
    assert local.log_of_main(run) == log


def test_the_worker_alone_tells_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("fixres_dist.training.worker.train", lambda folder: run.finish() or 0)
    assert main(["train", "--run", str(run.root)]) == 0
    assert told(run)[0][1] == "done"


def test_the_command_is_kept_from_others(tmp_path: Path) -> None:
    assert (
        submit.public("cluster.on_change=curl https://hooks.example.org/T0/B1", Config())
        == "cluster.on_change=REDACTED"
    )
    config = make(tmp_path, "curl https://hooks.example.org/T0/B1").config()
    assert reading.has_secrets(config)
    assert "hooks.example" not in reading.dump(config, public=True)
    for command in ("curl REDACTED", "a\x1bb"):
        with pytest.raises(UserError, match="on_change"):
            reading.parse(Config, {"cluster": {"on_change": command}})
