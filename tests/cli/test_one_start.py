"""One start owns a run from its preparation on: the same command again changes nothing, however early it comes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from support.commands import ROOT, command, environment, run, tiny

from fixres_dist.runs.rundir import START_LOCK, RunDir
from fixres_dist.runs.states import State


@pytest.mark.parametrize("second", ["submit", "resume"])
def test_the_same_command_before_the_ranks_have_met_leaves_the_first_start_alone(
    tmp_path: Path, photos: Path, second: str
) -> None:
    arguments, here = tiny(tmp_path, "once", photos, 1, "tune.epochs=1"), RunDir(tmp_path / "once")
    start = command(*arguments)
    with subprocess.Popen(start, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        while not here.is_locked(START_LOCK):
            assert first.poll() is None
            time.sleep(0.005)
        code = here.code.stat().st_ino
        again = arguments if second == "submit" else ["resume", "once", "--runs-dir", str(tmp_path)]
        done = run(*again)
        assert done.returncode == 0, done.stderr
        assert "once is running already" in done.stdout
        assert here.code.stat().st_ino == code, "the snapshot under the first start"
        said = first.communicate(timeout=300)[0]
        assert first.returncode == 0, said
    assert here.state().state == State.DONE
    assert not here.failed.exists()


@pytest.mark.parametrize("ranks", [False, True], ids=["at once", "ranks import"])
def test_cancel_before_the_ranks_have_met_stops_the_start(tmp_path: Path, photos: Path, ranks: bool) -> None:
    here = RunDir(tmp_path / "once")
    start = command(*tiny(tmp_path, "once", photos, 2, "tune.epochs=1"))
    with subprocess.Popen(start, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        while not (here.state().job_id if ranks else here.is_locked(START_LOCK)):
            assert first.poll() is None
            time.sleep(0.005)
        assert not here.is_locked()
        done = run("cancel", "once", "--runs-dir", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "once is cancelled at step 0. Next: " in done.stdout
        assert first.wait(timeout=60) != 0
    assert here.state().state == State.CANCELLED
    assert not here.is_locked(), "no rank goes on"
    assert not here.results.exists()
