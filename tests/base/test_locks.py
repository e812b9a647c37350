"""Locks with and without flock: one holder, freed by its end, taken over only from a holder that is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fixres_dist.base import locks

HOLDS = """
import errno, fcntl, os, signal, sys
from pathlib import Path
from fixres_dist.base import locks
def no_flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "no flock": fcntl.flock = no_flock
with locks.lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["flock", "no flock"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", no_flock)
    return str(request.param)


def other(path: Path, kind: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLDS, str(path), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    return process


def test_one_process_holds_a_lock_and_its_end_frees_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not locks.is_held(path)
    for number in (None, signal.SIGKILL):
        with other(path, kind) as process:
            assert locks.is_held(path)
            assert locks.holder(path)[1] == process.pid
            with pytest.raises(locks.Held, match=f"process {process.pid}"), locks.lock(path):
                pass
            if number:
                process.send_signal(number)
            else:
                process.communicate("")
            process.wait()
        assert not locks.is_held(path), number
        with locks.lock(path):
            assert locks.is_held(path)
        assert not locks.is_held(path)


def test_a_lock_is_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with other(path, kind) as process:
        timer = threading.Timer(0.3, lambda: process.stdin and process.stdin.close())
        timer.start()
        with locks.lock(path, wait_s=60):
            process.wait()


def write_holder(path: Path, host: str, age_s: float, start: str = "1") -> None:
    boot = locks.own_name().split(" ")[2]
    locks.beside(path).write_text(f"{host} 4711 {boot} elsewhere {start}")
    os.utime(locks.beside(path), (time.time() - age_s,) * 2)


@pytest.mark.parametrize(
    ("write", "held"),
    [
        (lambda p: write_holder(p, "n7", 5), True),
        (lambda p: write_holder(p, "n7", locks.STALE_S + 5), False),
        (lambda p: locks.beside(p).write_text(""), True),  # just made, its text is on its way
        (lambda p: locks.beside(p).write_text(f"{locks.own_name()}0"), False),  # another process had our number
        (lambda p: locks.beside(p).write_text(locks.own_name().replace(locks.own_name().split(" ")[2], "boot")), False),
    ],
)
def test_a_lock_file_is_stale_when_its_process_is_gone_or_silent(
    write: Callable[[Path], None], held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    path = tmp_path / ".lock"
    path.touch()
    write(path)
    assert locks.is_held(path) is held
    if held:
        with pytest.raises(locks.Held), locks.lock(path):
            pass
    else:
        with locks.lock(path):
            assert locks.holder(path)[1] == os.getpid()
    assert [file.name for file in tmp_path.iterdir() if file.name not in (".lock", ".lock.held")] == []


def test_the_holder_of_a_lock_file_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(locks, "TOUCH_S", 0.01)
    path = tmp_path / ".lock"
    with locks.lock(path):
        os.utime(locks.beside(path), (1, 1))
        deadline = time.monotonic() + 30
        while locks.beside(path).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_new_lock_is_not_put_aside_for_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / ".lock.held"
    path.write_text("the new one")
    locks.put_aside(path, "the stale one")
    assert path.read_text() == "the new one"
    assert list(tmp_path.iterdir()) == [path]


def test_another_error_is_not_taken_for_a_held_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), locks.lock(tmp_path / ".lock"):
        pass


def test_a_stale_lock_that_another_waiter_has_taken_over_stays_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All waiters see a lost holder's lock go stale in the same second."""
    path, judge = tmp_path / ".lock.held", locks.stale
    path.write_text("the lost one")
    os.utime(path, (1, 1))

    def taken_over_when_judged(path: Path) -> bool:
        found = judge(path)
        path.write_text("another waiter")
        return found

    monkeypatch.setattr(locks, "stale", taken_over_when_judged)
    (tmp_path / ".lock").touch()
    assert locks.take(path) is None
    assert path.read_text() == "another waiter"


@pytest.mark.parametrize("what", ["the file system is away", "it is released meanwhile"])
def test_a_holder_that_has_lost_nothing_goes_on(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread looks after the lock file, and would end the process if another one had taken it over."""
    ended, looked, real, path = [], threading.Event(), Path.read_text, tmp_path / ".lock.held"
    monkeypatch.setattr(locks, "TOUCH_S", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    release = locks.take(path)
    assert release
    (keeper,) = (thread for thread in threading.enumerate() if thread.name == "lock file")

    def read_text(self: Path, *rest: str) -> str:
        if self != path or threading.current_thread() is not keeper:
            return real(self, *rest)
        if looked.is_set():
            return real(self, *rest)
        looked.set()
        if what == "the file system is away":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        release()
        return real(self, *rest)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert looked.wait(30)
    if what == "the file system is away":
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 2:  # it looks again, and touches
            assert time.monotonic() < deadline
            time.sleep(0.01)
        release()
    keeper.join(30)
    assert not keeper.is_alive()
    assert not ended


def test_a_look_at_a_free_lock_refuses_nobody(tmp_path: Path) -> None:
    """`status --watch` looks all the time, on a network file system for milliseconds each."""
    path = tmp_path / ".lock"
    path.touch()
    with open(path) as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        threading.Timer(0.1, looks.close).start()
        with locks.lock(path):
            assert locks.holder(path)[1] == os.getpid()
