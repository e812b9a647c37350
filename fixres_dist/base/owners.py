"""Whose files are believed: this user's, the administrator's, and those of owners that the caller names, as long as nobody
else can write to them. A checksum tells damage, not who has written. No torch."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def believed(path: Path, *owners: int) -> bool:
    """Whether only this user, the administrator and `owners` (numbers) can have written the file, or put it in the folder."""
    try:
        found = path.stat()
    except OSError:
        return False
    return not found.st_mode & OTHERS and ours(found.st_uid, path.parent, *owners)


def ours(uid: int, folder: Path, *owners: int) -> bool:
    """A file server may give the files of this user another owner (NFS with root_squash): a new file in `folder` tells."""
    if uid in (os.geteuid(), 0, *owners):
        return True
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, prefix=".owner-") as file:
        return os.fstat(file.fileno()).st_uid == uid
    return False


def owner_of(path: Path) -> int:
    """The number of the owner; this user's where it cannot be told."""
    try:
        return path.stat().st_uid
    except OSError:
        return os.geteuid()


def close_to_others(path: Path) -> None:
    """Take the right to write from others, which a umask such as 002 gives them, as far as this user may."""
    with contextlib.suppress(OSError):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS)


def of_this_user(path: Path) -> Path:
    """A path beside `path` that no other user's file or folder has, where `path` itself is not believed."""
    return path.with_name(f"{path.stem}-{os.geteuid()}{path.suffix}")
