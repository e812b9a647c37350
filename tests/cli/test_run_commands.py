"""status, logs, cancel and board on run directories as jobs leave them, without Slurm."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from support.clock import own_clock
from support.in_process import handlers_kept

from fixres_dist.base.files import write_text
from fixres_dist.cli import board, submission
from fixres_dist.cli import status as status_command
from fixres_dist.cli.main import main
from fixres_dist.cluster import status
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import START_LOCK, RunDir
from fixres_dist.runs.states import Event


def make(runs: Path, name: str, **state: object) -> RunDir:
    run = RunDir(runs / name)
    run.root.mkdir(parents=True)
    write_text(run.config_file, reading.dump(reading.parse(Config, {"model": {"name": "b0"}})))
    run.update_state(**state)
    return run


def write_log(run: RunDir, rank: int, text: str, stream: str = "out") -> None:
    folder = run.root / "submitit" / "7"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"7_{rank}_log.{stream}").write_text(text)


def test_status_lists_runs_with_their_reasons_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = make(tmp_path, "done", total_steps=40, step=40)
    done.finish()
    make(tmp_path, "broken", total_steps=1200, step=30).fail("no space", "make room")
    assert main(["status", "--runs-dir", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATE", "STEP", "%", "ETA", "IMG/S", "TOP-1", "RESTARTS", "NODES", "LOG"]
    assert lines[0].split()[:5] == ["done", "done", "40/40", "100", "0s"]
    assert lines[1].split()[:4] == ["broken", "failed", "30/1200", "2"]
    assert lines[2] == "  no space. Next: make room"
    assert main(["status", "done", "--runs-dir", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["percent"]) == ("done", "done", 100.0)


def test_watch_is_a_table_in_place_that_ends_with_the_last_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    make(tmp_path, "done", total_steps=40, step=40).finish()
    broken = make(tmp_path, "broken", total_steps=1200, step=30)

    def passes(seconds: float) -> None:
        assert seconds == 1.0
        broken.fail("no [bold]space", "make room")

    own_clock(monkeypatch, status_command, sleep=passes)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["status", "--watch", "--every", "0", "--runs-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for text in ("RESTARTS", "40/40", "30/1200", "━", "no [bold]space. Next: make room"):
        assert text in told


@pytest.mark.parametrize(("width", "wide"), [(80, False), (120, True)])
def test_watch_leaves_room_for_names_on_a_narrow_terminal(width: int, wide: bool, tmp_path: Path) -> None:
    """At 80 columns a name stood two letters to a line, and NODES one letter."""
    name = "tf_efficientnet_lite0-288-own_classes"
    run = make(tmp_path, name, total_steps=1200, step=30, eta_s=60.0, images_per_second=1234.0, nodes=("n[1-2]",))
    console = Console(width=width, file=io.StringIO())
    console.print(status_command.picture(status.rows([run]), "", width))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.rstrip() for line in said.splitlines()]
    assert lines[0].startswith("NAME"), "a head of one line"
    assert sum(bool(line) and line.split()[0] in name for line in lines) <= 2
    assert ("NODES" in lines[0]) == wide


def test_status_of_an_empty_folder_and_of_a_wrong_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--runs-dir", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    make(tmp_path, "b0-320")
    assert main(["status", "b0-230", "--runs-dir", str(tmp_path)]) == 2
    assert "Did you mean 'b0-320'?" in capsys.readouterr().err


def test_logs_print_both_streams_of_a_rank_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    assert main(["logs", "r", "--runs-dir", str(tmp_path)]) == 2
    assert f"r has no log yet. Next: fixres status r --runs-dir {tmp_path}" in capsys.readouterr().err
    for rank in (0, 1):
        write_log(run, rank, f"step 1 of rank {rank}\n")
    write_log(run, 1, "a warning\n", "err")
    assert main(["logs", "r", "--rank", "1", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("step 1 of rank 1\na warning\n", "")
    assert main(["logs", "r", "--rank", "2", "--runs-dir", str(tmp_path)]) == 2
    assert "r has no rank 2; accepted: 0 .. 1" in capsys.readouterr().err


def test_logs_follow_a_run_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    write_log(run, 0, "begun\n")
    run.finish()
    assert main(["logs", "r", "--follow", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "begun\n"


def test_cancel_of_a_run_that_has_ended_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    run.finish()
    before = run.state_file.read_text()
    assert main(["cancel", "r", "--runs-dir", str(tmp_path)]) == 0
    assert "r is done, so there is nothing to cancel" in capsys.readouterr().out
    assert run.state_file.read_text() == before


def test_cancel_stops_a_local_run_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    run.update_state(Event.STARTED)
    holder = "import sys, signal; from pathlib import Path; from fixres_dist.runs.rundir import RunDir\n"
    holder += "with RunDir(Path(sys.argv[1])).lock(): print('locked', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", holder, run.root], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        assert main(["cancel", "r", "--runs-dir", str(tmp_path)]) == 0
    assert process.returncode == -signal.SIGTERM
    assert f"r is cancelled at step 0. Next: fixres resume r --runs-dir {tmp_path}" in capsys.readouterr().out
    assert run.state().state == "cancelled"


def test_cancel_leaves_a_run_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    with run.lock():
        (run.root / ".lock").write_text("elsewhere 1\n")
        assert main(["cancel", "r", "--runs-dir", str(tmp_path)]) == 2
    assert "r runs on elsewhere, outside of Slurm. Next: the same command there." in capsys.readouterr().err


STARTER = """import signal, sys; from contextlib import ExitStack; from pathlib import Path
from fixres_dist.runs.rundir import START_LOCK, RunDir
with ExitStack() as stack:
    for path in sys.argv[1:]:
        RunDir(Path(path)).event("submitted")
        stack.enter_context(RunDir(Path(path)).lock(START_LOCK))
    print("locked", flush=True)
    signal.pause()
"""


@contextlib.contextmanager
def starting(*runs: RunDir) -> Iterator[subprocess.Popen[str]]:
    """A command that has prepared these runs and has started none of them."""
    words = [sys.executable, "-c", STARTER, *(str(run.root) for run in runs)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("named", [["g-lr=1", "g-lr=2"], ["g-lr=1"]])
def test_cancel_of_a_run_that_is_starting_here_ends_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], named: list[str]
) -> None:
    runs = [make(tmp_path, name) for name in ("g-lr=1", "g-lr=2")]
    with starting(*runs) as process:
        assert main(["cancel", *named, "--runs-dir", str(tmp_path)]) == 0
        assert process.wait(timeout=30) == -signal.SIGTERM
    said = capsys.readouterr().out
    assert "nothing to cancel" not in said
    for name in named:
        assert f"{name} is cancelled at step 0. Next: fixres resume" in said
    together = f"process {process.pid} starts these too, so they stop with g-lr=1: g-lr=2"
    assert (together in said) == (len(named) == 1)


def test_cancel_of_a_queued_run_does_not_stop_the_one_before_it_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, first, second = (make(tmp_path, name) for name in ("g-lr=0", "g-lr=1", "g-lr=2"))
    with starting(done, first, second) as process:
        done.finish()
        with first.lock():
            assert main(["cancel", "g-lr=0", "--runs-dir", str(tmp_path)]) == 0
            assert "g-lr=0 is done, so there is nothing to cancel" in capsys.readouterr().out
            assert main(["cancel", "g-lr=2", "--runs-dir", str(tmp_path)]) == 2
        assert process.poll() is None
    refused = f"g-lr=2 waits until g-lr=1 has ended: process {process.pid} starts both, and a stop ends both. Next: "
    assert f"{refused}fixres cancel g-lr=2 g-lr=1 --runs-dir {tmp_path}" in capsys.readouterr().err


def test_cancel_leaves_a_run_that_starts_on_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "r")
    with run.lock(START_LOCK):
        (run.root / START_LOCK).write_text("elsewhere 1\n")
        assert main(["cancel", "r", "--runs-dir", str(tmp_path)]) == 2
    assert "r runs on elsewhere, outside of Slurm. Next: the same command there." in capsys.readouterr().err


def test_board_shows_the_runs_under_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["board", "--runs-dir", str(tmp_path)]) == 2
    assert f"no runs in {tmp_path}. Next: --runs-dir DIR" in capsys.readouterr().err
    for name in ("a", "b"):
        make(tmp_path, name)
    started: list[list[str]] = []

    class Server:
        def __init__(self, arguments: list[str]) -> None:
            folder = Path(arguments[arguments.index("--logdir") + 1])
            assert {link.name: link.resolve() for link in folder.iterdir()} == {
                name: tmp_path / name / "tb" for name in ("a", "b")
            }
            started.append(arguments)
            self.folder = folder

        def terminate(self) -> None:
            self.stopped = True

        def wait(self) -> int:
            make(tmp_path, "later")
            deadline = time.monotonic() + 30
            while not (self.folder / "later").is_symlink():  # as TensorBoard looks again and again
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)  # as a user stops the command; the handler ends the server
            assert self.stopped
            return -signal.SIGTERM

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(subprocess, "Popen", Server)
    monkeypatch.setattr(board, "LOOK_EVERY_S", 0.01)
    with handlers_kept():
        assert main(["board", "--runs-dir", str(tmp_path), "--port", "6007"]) == 0
    assert started[0][-4:] == ["--host", "localhost", "--port", "6007"]
    told = capsys.readouterr().out
    assert "TensorBoard of a, b; Ctrl-C ends it" in told
    assert (
        f"ssh -N -L 6007:localhost:6007 {getpass.getuser()}@{socket.gethostname()}, then http://localhost:6007" in told
    )
    assert "open http://10.0.0.1:6006" in board.address("10.0.0.1", "6006", "me")


def test_a_snapshot_of_an_earlier_version_is_replaced_before_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was started when the package was one flat folder: its job would import modules that its code/ lacks."""
    old = RunDir(tmp_path / "r")
    (old.code / "fixres_dist").mkdir(parents=True)
    (old.code / "fixres_dist" / "train.py").touch()
    submission.renew_old_snapshot(old)
    assert "earlier version" in capsys.readouterr().out
    assert (old.code / "fixres_dist" / "training" / "job.py").is_file()
    assert not (old.code / "fixres_dist" / "train.py").exists()
    submission.renew_old_snapshot(old)
    assert not capsys.readouterr().out
