"""Writes that fail while a run works: tried again where that may help; else the run ends with the file and the reason, nothing
hangs, and the next start ends in the same bits."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import IO, Any

import pytest
from safetensors.torch import load_file
from support.in_process import called

from fixres_dist.base import files, small_files, storage
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import State


@pytest.fixture
def half(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the half-finished run; no write waits before it is tried again."""
    shutil.copytree(runs / "half", tmp_path / "half", symlinks=True)
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    return RunDir(tmp_path / "half" / "r")


def resume(run: RunDir) -> tuple[int, str]:
    return called("resume", "r", "--runs-dir", run.root.parent, "--cluster", "inline")


def ends_as(run: RunDir, undisturbed: Path) -> None:
    """The next start ends as the undisturbed run did, bit by bit."""
    code, text = resume(run)
    assert code == EXIT_DONE, text
    same(run, undisturbed)


def same(run: RunDir, undisturbed: Path) -> None:
    weights = [load_file(root / "export" / "model.safetensors") for root in (run.root, undisturbed)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    assert run.state().state == State.DONE


def failing(name: str, number: int, times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writes to the file called `name` raise the error `number`, the first `times` times; returns the list of them."""
    seen: list[str] = []
    publish = files.publish

    def check(path: Path) -> None:
        if path.name.startswith(name) and len(seen) < times:
            seen.append(path.name)
            raise OSError(number, os.strerror(number), str(path))

    def published(part: Path, path: Path, *more: Any) -> None:
        check(path)
        publish(part, path, *more)

    def opened(path: Path, mode: str) -> IO[bytes]:
        check(path)
        return open(path, mode)

    monkeypatch.setattr(files, "publish", published)
    monkeypatch.setattr(small_files, "open", opened, raising=False)
    return seen


@pytest.mark.parametrize("name", ["state.json", "events.jsonl"])
def test_a_file_system_that_is_away_for_a_moment_costs_nothing(
    name: str, half: RunDir, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = failing(name, errno.ESTALE, 2, monkeypatch)
    code, text = resume(half)
    assert (code, len(seen)) == (EXIT_DONE, 2), text
    same(half, runs / "runs" / "r")


@pytest.mark.parametrize(
    ("name", "number", "says"),
    [
        ("metrics.jsonl", errno.ENOSPC, "no space is left on the disk"),
        ("step_", errno.EIO, "Input/output error"),
    ],
)
def test_a_write_that_fails_ends_the_run_by_name_and_the_next_start_goes_on(
    name: str, number: int, says: str, half: RunDir, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(name, number, 1000, patch)
        code, text = resume(half)
    assert (code, says in text, name in text, "Traceback" in text) == (EXIT_FAILED, True, True, False), text
    assert says in half.failed.read_text()
    assert "Next: " in half.failed.read_text()
    assert half.state().state == State.FAILED
    ends_as(half, runs / "runs" / "r")


def test_a_run_directory_that_vanishes(half: RunDir, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount that goes away; it comes back with the checkpoint that it had."""
    away = half.root.with_name("away")
    append = small_files.append

    def vanish(path: Path, line: dict[str, Any]) -> None:
        if path.name == "metrics.jsonl":
            half.root.rename(away)
        append(path, line)

    with monkeypatch.context() as patch:
        patch.setattr("fixres_dist.runs.tracking.append", vanish)
        code, text = resume(half)
    assert (code, "Traceback" in text, str(half.root) in text) == (EXIT_FAILED, False, True), text
    shutil.rmtree(half.root, ignore_errors=True)
    away.rename(half.root)
    ends_as(half, runs / "runs" / "r")
