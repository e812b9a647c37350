"""A rank that hangs ends the run within run.watchdog_s, with the place where it stands; `status` tells it before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import ROOT, environment, run, tiny

from fixres_dist.base.watchdog import Standing, reason
from fixres_dist.cluster import status
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event, State

HERE = socket.gethostname()
# At the end of the snapshot's training/step.py.
HANGS = """
_backward = backward
def backward(work, head, scale, step, *rest):
    import os, signal, threading
    if step == 2 and work.session.ranks.rank == 1:
        {how}
    return _backward(work, head, scale, step, *rest)
"""
CHILDREN = "f'/proc/{os.getpid()}/task/{os.getpid()}/children'"
RESUME = """
import sys
from fixres_dist.cluster import local
from fixres_dist.cli.main import main
local.ALONE_S = 1.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("threading.Event().wait()", f"rank 1 on {HERE} in training/step.py:"),
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            f"rank 1 does not answer (suspended, or its node is lost); rank 0 on {HERE} in ",
        ),
        (
            f"[os.kill(int(pid), signal.SIGSTOP) for pid in open({CHILDREN}).read().split()]",
            f"rank 1 on {HERE} in data/",
        ),
    ],
    ids=["waits", "suspended", "loader"],
)
def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path: Path, photos: Path, how: str, said: str) -> None:
    prepared = run(*tiny(tmp_path, "hung", photos, 2, "run.watchdog_s=8"), "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    here = RunDir(tmp_path / "hung")
    with open(here.code / "fixres_dist" / "training" / "step.py", "a") as file:
        file.write(HANGS.format(how=how))
    words = [sys.executable, "-c", RESUME, "resume", "hung", "--runs-dir", str(tmp_path), "--cluster", "local"]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    why, following = here.failed.read_text().splitlines()
    assert why.startswith("no progress for 8 s (run.watchdog_s): "), why
    assert said in why
    assert following.startswith("Next: again, from the last checkpoint: ")
    state = here.state()
    assert (state.state, state.final) == (State.FAILED, False), "a retry may help"
    told = [int(file.stem.removeprefix("rank_")) for file in here.hung.iterdir()]
    for rank in told:
        (log,) = here.root.glob(f"submitit/*/*_{rank}_log.out")
        assert "in backward" in log.read_text(), "the stack of the main thread"


def test_the_fewest_ranks_at_a_place_come_first() -> None:
    places = {5: "data/decoding.py:40 load"}
    told = [Standing(k, f"n{k // 4}", places.get(k, "training/ranks.py:80 highest"), 0.0) for k in range(12)]
    text = reason(told, 13, 600)
    assert text.startswith("no progress for 600 s (run.watchdog_s): rank 12 does not answer (suspended, or")
    assert (
        "; rank 5 on n1 in data/decoding.py:40 load; rank 0, 1, 2, 3, 4, 6, 7, 8 and 3 more in training/ranks.py:80"
        in text
    )


def test_a_process_that_was_suspended_is_no_process_that_hangs() -> None:
    code = """
import os, signal, threading
from fixres_dist.base.watchdog import watching
looked = threading.Semaphore(0)
with watching(lambda: 1.0, lambda idle_s: looked.release(), lambda place, limit: print("gave up")):
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(3):
        looked.acquire()
    print("alive")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(2.5)  # longer than the limit
        os.kill(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "alive\n"


@pytest.mark.parametrize("give_up", ["raise OSError('the disk is away')", "threading.Event().wait()"])
def test_a_process_that_hangs_ends_where_nothing_can_be_written_down(give_up: str) -> None:
    code = f"""
import threading
from fixres_dist.base import watchdog
watchdog.GIVE_UP_S = 0.5
def give_up(place, limit):
    {give_up}
with watchdog.watching(lambda: 0.5, lambda idle_s: None, give_up):
    threading.Event().wait()
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no progress for 0 s: the stacks of all threads" in done.stderr
    assert ("cannot be written down: OSError: the disk is away" in done.stderr) == ("raise" in give_up)


def test_status_tells_that_nothing_progresses(tmp_path: Path) -> None:
    here = RunDir(tmp_path / "run")
    preparation.write(here.root, Config(), "test")
    here.update_state(Event.STARTED, eta_s=100.0, images_per_second=50.0, job_id="local-1")
    here.progress.touch()
    with here.lock():
        (row,) = status.rows([here])
        assert (row.eta_s, row.images_per_second, row.reason) == (100.0, 50.0, "")
        at = time.time() - 600
        os.utime(here.progress, (at, at))
        (row,) = status.rows([here])
    assert row.state == State.RUNNING
    assert row.reason.startswith("no progress for 10m0")
    assert (row.eta_s, row.images_per_second) == (None, None)
