"""Files that exist whole or not at all, and full disks. No torch."""

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
    """Yields a temporary path in the folder of `path`; what was written to it replaces `path` at the end of the block.

    After an error it is deleted, which on a full disk leaves room to report the error. A full disk is raised as an
    OSError that names `path`, whichever error a library (safetensors, shutil, torch) raised for it.
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


def owner(path: Path) -> str:
    """The user name of the owner, or the number where it has none: in a container, or of a colleague who left."""
    try:
        return path.owner()
    except KeyError:
        return str(path.stat().st_uid)


def lines_of(path: Path) -> list[str]:
    """The lines of a list as people save them: without a byte order mark, blanks around, empty lines and comments.

    Bytes of other encodings stay as os.fsdecode has them. Raises OSError.
    """
    lines = (os.fsdecode(line).strip() for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def full(error: BaseException | None) -> int:
    """The errno of a full disk or quota if `error` is about one, else 0.

    Some libraries put the number into the text only, and torch.save raises another error while it handles this one.
    """
    while error:
        for number in FULL:
            if getattr(error, "errno", None) == number or re.search(rf"(os error|Errno) {number}\b", str(error)):
                return number
        error = error.__context__
    return 0


def no_room(error: BaseException) -> str:
    """`no space is left on the disk: PATH` if `error` is about a full disk or quota, else an empty text."""
    number, path = full(error), getattr(error, "filename", None)
    return FULL.get(number, "") + (f": {path}" if number and path else "")


def sync(path: Path) -> None:
    """Write `path` to the disk before a rename is: after a loss of power the old file is there or the new one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write by rename, so that a reader sees the old text or the new one; `private`: only its owner may read it."""
    with whole(path) as part:
        part.touch(mode=0o600 if private else 0o666)
        part.write_text(text)
        sync(part)
