"""File systems that fail for a while: reads and small writes are tried again, then an error of the file system. No torch."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fixres_dist.base.errors import StorageError

T = TypeVar("T")
# What a path itself can be wrong about. Any other error number is one of the file system or the network, and may pass.
OF_THE_FILE = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO),
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # of a write: no wait makes room
)
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def patiently(act: Callable[[], T], path: Path, root: Path, done: str = "read") -> T:
    """What `act` returns, by which the file at `path` is `done`; tried again after PAUSES_S while an error may
    pass: the file system's, or all of `root` is gone.

    Raises OSError where the file at `path` is at fault, StorageError where no try has helped.
    """
    for pause in (*PAUSES_S, None):
        try:
            return act()
        except OSError as error:
            if error.errno is None or (error.errno in OF_THE_FILE and os.access(root, os.R_OK | os.X_OK)):
                if error.errno:  # an error of only a message would lose it; a write to an open file knows no name
                    error.filename = error.filename or str(path)
                raise
            if pause is None:
                raise StorageError(
                    f"{os.fsencode(path).decode(errors='backslashreplace')} cannot be {done}: {os.strerror(error.errno)}, "
                    f"{len(PAUSES_S) + 1} times in {sum(PAUSES_S):.0f} s. Its file system fails, or is away"
                ) from None
            time.sleep(pause)
    raise AssertionError


def fill(descriptor: int, buffer: memoryview, offset: int = 0) -> int:
    """Read from the byte `offset` into `buffer` until it is full or the file ends; returns the bytes read."""
    got = 0
    while got < len(buffer) and (n := os.preadv(descriptor, [buffer[got:]], offset + got)):
        got += n
    return got
