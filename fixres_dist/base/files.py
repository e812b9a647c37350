"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up"}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write to the name that this gives, beside `path`: it takes `path`'s place at the end of the block.

    After an error nothing is left of it, so that on a full disk there is room to say so. Then this raises an OSError with
    `path` in it, whatever library met it (safetensors and shutil have errors of their own).
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    remove(part)
    try:
        yield part
        if part.is_dir():
            remove(path)  # a rename takes the place of a file, not of a folder with something in it
        os.replace(part, path)
    except BaseException as error:
        remove(part)
        if number := full(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def full(error: BaseException | None) -> int:
    """The number of the system's error where `error` is about a full disk or quota, else 0.

    Some libraries only word it, and torch.save trips over its own clean-up while it handles it.
    """
    while error:
        for number in FULL:
            if getattr(error, "errno", None) == number or re.search(rf"(os error|Errno) {number}\b", str(error)):
                return number
        error = error.__context__
    return 0


def no_room(error: BaseException) -> str:
    """`no space is left on the disk: PATH` if that is what `error` says, else an empty text."""
    number, path = full(error), getattr(error, "filename", None)
    return FULL.get(number, "") + (f": {path}" if number and path else "")


def sync(path: Path) -> None:
    """Reach the disk before the rename does: a node that loses power keeps the old file or the new one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """By rename, so a reader sees the old text or the new one."""
    with whole(path) as part:
        part.write_text(text)
        sync(part)
