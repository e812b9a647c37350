"""`logs`: starts, the order of time over ranks and the batch script, grids, and jobs that left no line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.clock import own_clock
from support.fake_slurm import calls, fake_slurm

from fixres_dist.base import log_times
from fixres_dist.base.files import write_text
from fixres_dist.cli import logs as logs_command
from fixres_dist.cli.main import main
from fixres_dist.cluster import local, logs, slurm
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

DAY = time.mktime(time.strptime("2026-11-28 12:00:00", "%Y-%m-%d %H:%M:%S"))


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(DAY + seconds))


def mark(start: int, seconds: float) -> str:
    return f"{logs.MARK} {start} of job 5 on n[1-2] at {at(seconds)}\n"


@pytest.fixture(autouse=True)
def _no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ANSWERS", {})


def make(folder: Path, name: str = "r", job: str | None = "5", event: Event | None = Event.STARTED) -> RunDir:
    run = RunDir(folder / "runs" / name)
    run.root.mkdir(parents=True)
    write_text(run.config_file, reading.dump(Config()))
    run.update_state(event, job_id=job)
    return run


def write(run: RunDir, file: str, text: str, seconds: float, notes: tuple[tuple[str, float], ...] = ()) -> None:
    """A log that was last written `seconds` after DAY, with the notes (text up to which, seconds) of its times."""
    path = run.root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    lines = [f"{text.index(last) + len(last)} {DAY + when}\n" for last, when in notes]
    if lines:
        path.with_name(f"{path.name}.times").write_text("".join(lines))
    os.utime(path, (DAY + seconds, DAY + seconds))


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Job 5 with two starts of two ranks, of which the first was preempted."""
    fake_slurm(tmp_path / "bin", monkeypatch)
    run = make(tmp_path)
    out = mark(1, 0) + "step 1\nstep 2\n" + mark(2, 60) + "step 3\nstep 4\n"
    write(run, "submitit/5/5_0_log.out", out, 90, (("step 1\n", 10), ("step 2\n", 20), ("step 3\n", 70)))
    preempted = f"slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT {at(30)} DUE TO PREEMPTION ***\n"
    write(run, "submitit/5/5_0_log.err", mark(1, 0) + preempted + mark(2, 60), 60)
    info = "submitit INFO ({},123) - Starting with JobEnvironment\n"
    ends = "submitit ERROR ({},500) - Submitted job triggered an exception\n"
    aside = f"submitit WARNING ({at(66).replace('T', ' ')},123) - Bypassing signal SIGCONT\n"
    begun = info.format(at(5).replace("T", " ")), info.format(at(65).replace("T", " "))
    ended = ends.format(at(75).replace("T", " "))
    write(run, "submitit/5/5_1_log.out", f"{begun[0]}{begun[1]}{aside}", 66)
    write(run, "submitit/5/5_1_log.err", f"a warning\n{ended}ValueError: x\n", 76, (("a warning\n", 15),))
    run.finish()
    return run


def shown(runs: Path, capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> tuple[list[str], str]:
    assert main(["logs", *more, "--runs-dir", str(runs)]) == code
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


def test_the_newest_start_is_one_stream_in_the_order_of_time(twice: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    lines, said = shown(twice.root.parent, capsys, "r")
    error = f"[rank 1] submitit ERROR ({at(75).replace('T', ' ')},500) - Submitted job triggered an exception"
    assert lines == [mark(2, 60).strip(), "step 3", error, "[rank 1] ValueError: x", "step 4"]
    assert f"r: start 2; earlier ones: fixres logs r --runs-dir {twice.root.parent} --all" in said


def test_earlier_starts(twice: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    runs = twice.root.parent
    lines, _ = shown(runs, capsys, "r", "--start", "1")
    assert [line.partition(" AT")[0] for line in lines] == [
        mark(1, 0).strip(),
        "step 1",
        "[rank 1] a warning",
        "step 2",
        "slurmstepd: error: *** JOB 5 ON n1 CANCELLED",
    ]
    every, _ = shown(runs, capsys, "r", "--all")
    assert len(every) == 10
    assert [line.partition("]")[0] for line in every[:4]] == ["[start 1", "[start 1", "[start 1, rank 1", "[start 1"]
    assert every[-1] == "[start 2] step 4"
    assert "r has no start 3; accepted: 1 .. 2." in shown(runs, capsys, "r", "--start", "3", code=2)[1]
    lines, _ = shown(runs, capsys, "r", "--rank", "1", "--start", "1")
    assert lines[1:] == ["a warning"]


def test_starts_count_over_jobs_and_the_batch_scripts_own_file(
    twice: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """As slurm/train.sbatch leaves it: the second job could not enter the run's code/."""
    write(twice, "slurm-6.out", "train.sbatch: line 13: cd: code: No such file or directory", 120)
    lines, said = shown(twice.root.parent, capsys, "r")
    assert lines == ["[batch script] train.sbatch: line 13: cd: code: No such file or directory"]
    assert "start 3" in said


def test_a_grid_is_one_stream(twice: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = twice.root.parent
    for k, seconds in ((1, 20), (2, 10)):
        run = make(tmp_path, f"g-epochs={k}", job=None)
        write(run, "submitit/7/7_0_log.out", f"of {k}\n", seconds)
        write(run, "submitit/7/7_1_log.out", "too\n", 30)
        run.finish()
    make(tmp_path, "g-epochs=3", job=None, event=Event.SUBMITTED)
    lines, said = shown(runs, capsys, "g")
    ends = ["[g-epochs=1, rank 1] too", "[g-epochs=2, rank 1] too"]
    assert lines == ["[g-epochs=2] of 2", "[g-epochs=1] of 1", *ends]
    assert f"g-epochs=3 has no log yet. Next: fixres status g-epochs=3 --runs-dir {runs}" in said


SHOW = "JobId=9 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=0:53 NodeList=n1 StdOut=/x"


@pytest.mark.parametrize(
    ("scripts", "words"),
    [
        (
            {"scontrol": f"echo '{SHOW}'"},
            "Slurm says: FAILED, reason NonZeroExitCode, exit code 0:53 (Slurm could not write its output), on n1.",
        ),
        (
            {"sacct": "echo 'CANCELLED by 0|None|0:0|None assigned'"},
            "Slurm says: CANCELLED by 0, reason None, exit code 0:0, without a node.",
        ),
        ({}, "Slurm does not know it any more."),
    ],
)
def test_a_job_that_died_before_its_first_line(
    scripts: dict[str, str],
    words: str,
    twice: RunDir,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_slurm(twice.root.parents[1] / "bin", monkeypatch, **scripts)
    run = make(twice.root.parents[1], "new", job="9")
    folder = run.root / "submitit" / "9"
    folder.mkdir(parents=True)
    for file in (folder / "9_0_log.out", run.submission):
        file.touch()
    _, said = shown(run.root.parent, capsys, "new", code=2)
    assert f"new: job 9 ended before its first line. {words}" in said
    assert f"Its output would be in {folder}/9_0_log.out. Next: fixres resume new --runs-dir {run.root.parent}" in said
    folder.rename(twice.root / "submitit" / "9")  # of a run that was resumed: what its start before said is still shown
    twice.done.unlink()
    twice.update_state(Event.STARTED, job_id="9")
    lines, said = shown(run.root.parent, capsys, "r")
    assert lines[-1] == "step 4"
    assert f"r: job 9 ended before its first line. {words}" in said


def test_a_job_that_waits_has_no_line_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch, squeue="echo '5|PENDING|Resources|'")
    make(tmp_path, event=Event.SUBMITTED)
    _, said = shown(tmp_path / "runs", capsys, "r", code=2)
    assert "r has no log yet: job 5: waits for free nodes (Resources). Next: fixres status r" in said


def test_following_shows_the_starts_that_begin_meanwhile(
    twice: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks the files at each look, and Slurm every 30 s."""
    folder = fake_slurm(twice.root.parents[1] / "bin", monkeypatch, squeue="echo '5|RUNNING|None|n1'")
    twice.done.unlink()
    twice.update_state(Event.STARTED)
    texts = ["ste", "p 5\n", mark(3, 120), *["step\n"] * 16]

    def sleep(seconds: float) -> None:
        assert seconds == 1
        if not texts:
            twice.finish()
            return
        with open(twice.root / "submitit" / "5" / "5_0_log.out", "a") as log:
            log.write(texts.pop(0))

    own_clock(monkeypatch, logs_command, sleep=sleep)
    lines, _ = shown(twice.root.parent, capsys, "r", "--follow")
    assert lines[4:7] == ["step 4", "step 5", mark(3, 120).strip()]
    assert len(lines) == 23
    assert len(calls(folder, "squeue")) == 1


def test_a_rank_notes_when_its_log_grew(tmp_path: Path) -> None:
    """Whoever wrote: a library may write to the descriptor itself."""
    log = tmp_path / "5_3_log.out"
    code = "import os; from fixres_dist.base.log_times import note; note(); os.write(1, b'one\\n'); note(); note()"
    log.write_text("of the start before\n")
    os.utime(log, (DAY, DAY))
    with open(log, "a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, stderr=out, cwd=Path(__file__).parents[2], check=True)
    (before, when), (end, _) = log_times.read(log)
    assert (before, when, end) == (20, DAY, 24)
    with open(tmp_path / "other.txt", "a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, cwd=Path(__file__).parents[2], check=True)
    assert not (tmp_path / "other.txt.times").exists()


def test_a_log_of_any_bytes_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a character at the end of what is there so far, too: the ranks go on, and so does who follows them."""
    log = tmp_path / "0_0_log.out"
    log.write_bytes(b"caf\xe9\ngr\xc3")
    position = local.copy_new(log, 0)
    with open(log, "ab") as file:
        file.write(b"\xb6\n")
    local.copy_new(log, position)
    assert capsys.readouterr().out.splitlines()[0] == "caf\ufffd"
