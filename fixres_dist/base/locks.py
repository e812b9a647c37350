"""Locks that end with their process: the kernel's, or a file that shows signs of life where a file system has none.

Lustre without `-o flock`, some NFS and FUSE mounts know no flock. There the lock is a file of its own beside, made by
O_EXCL, which names host, process and boot, and which its holder touches every TOUCH_S seconds. It is stale when that
process is gone, as far as this host can tell, or after STALE_S seconds without a sign of life. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

TOUCH_S, STALE_S = 15.0, 120.0
LOOK_S = 1.0  # `is_held` has a free lock for a moment, longer on a network file system: no reason to refuse a start
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Held(Exception):
    """Another process has the lock; the text says which one, as far as that is known."""


@contextmanager
def lock(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock at `path`; raises Held after waiting `wait_s` seconds, or LOOK_S, for another process."""
    with open(path, "a+") as file:
        # A forked loader worker outlives a killed parent by seconds and must not hold its lock meanwhile.
        os.register_at_fork(after_in_child=file.close)
        deadline = time.monotonic() + max(wait_s, LOOK_S)
        while not (release := attempt(file, path)):
            if time.monotonic() > deadline:
                host, pid = holder(path)
                raise Held(f"{host}, process {pid}" if pid else "unknown")
            time.sleep(0.2)
        try:
            yield
        finally:
            release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at `path`."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in NO_FLOCK or (beside(path).exists() and not stale(beside(path)))
    return False


def holder(path: Path) -> tuple[str, int]:
    """(host, process id) of the process that holds the lock, or held it last; 0 where it has not said."""
    text = read(beside(path)) or read(path)
    host, pid = [*text.split(" "), "", ""][:2]
    return host, int(pid) if pid.strip().isdigit() else 0


def beside(path: Path) -> Path:
    """The lock file of a file system without flock."""
    return path.with_name(f"{path.name}.held")


def attempt(file: IO[str], path: Path) -> Callable[[], None] | None:
    """Take the lock if it is free; returns what releases it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return take(beside(path))
    file.truncate(0)
    file.write(f"{own_name()}\n")
    file.flush()
    return lambda: None  # closing the file releases it


def take(path: Path) -> Callable[[], None] | None:
    """The same with a lock file, which a thread of this process keeps fresh."""
    seen = read(path)  # before it is judged: another waiter may take it over in between
    if stale(path):
        put_aside(path, seen)
    mine, done = own_name(), threading.Event()
    try:
        with open(path, "x") as file:
            file.write(mine)
    except FileExistsError:
        return None

    def keep_fresh() -> None:
        while not done.wait(TOUCH_S):
            with contextlib.suppress(OSError):  # the file system is away: it will be back, or the lock gets stale
                if held_by(path) != mine and not done.is_set():
                    print(f"{path}: taken over while this process stood still; it leaves", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(path)

    def release() -> None:
        done.set()
        with contextlib.suppress(OSError):
            if held_by(path) == mine:
                path.unlink(missing_ok=True)

    threading.Thread(target=keep_fresh, name="lock file", daemon=True).start()
    return release


def held_by(path: Path) -> str:
    """The text of a lock file, empty where there is none; raises OSError where the file system does not tell."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def stale(path: Path) -> bool:
    """Whether the holder of a lock file is gone."""
    try:
        text, seen = path.read_text(), path.stat().st_mtime
    except OSError:
        return False
    host, pid, boot, space, start = [*text.split(" "), *5 * [""]][:5]
    here = own_name().split(" ")
    if host == here[0] and start:
        if boot != here[2]:
            return True
        if space == here[3]:
            return started(pid) != start
    probe = path.with_name(path.name.removesuffix(".held"))
    with contextlib.suppress(OSError):
        os.utime(probe)  # by the clock that also dates the lock file
        return probe.stat().st_mtime - seen > STALE_S
    return False


def put_aside(path: Path, seen: str) -> None:
    """Remove a stale lock file with the text `seen`; a new one that another process has put there meanwhile stays."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if read(aside) != seen:
            os.rename(aside, path)
        aside.unlink(missing_ok=True)


def own_name() -> str:
    """Host, process id, and what tells this process from a later one of the same number: boot, namespace, start time."""
    pid = str(os.getpid())
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(
        (socket.gethostname(), pid, read(Path("/proc/sys/kernel/random/boot_id")).strip(), space, started(pid))
    )


def started(pid: str) -> str:
    """A process's start time in ticks since the boot; empty if there is no such process."""
    return [*read(Path("/proc", pid, "stat")).rpartition(")")[2].split(), *20 * [""]][19]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
