"""Reads from file systems that fail for a while: tried again, and then an error of the file system, not of the file. No torch."""

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
)
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def patiently(read: Callable[[], T], path: Path, root: Path) -> T:
    """What `read` returns; tried again after PAUSES_S while an error may pass: the file system's, or all of `root` is gone.

    Raises OSError where the file at `path` is at fault, StorageError where no try has helped.
    """
    for pause in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None or (error.errno in OF_THE_FILE and os.access(root, os.R_OK | os.X_OK)):
                raise
            if pause is None:
                raise StorageError(
                    f"{os.fsencode(path).decode(errors='backslashreplace')} cannot be read: {os.strerror(error.errno)}, "
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
