"""Files that exist whole or not at all, and full disks: the one way in which this project writes. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_LINE = 1 << 16  # bytes of a list's line: a path and a name fit, and a file that is no list is not read whole
FULL = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up"}
PART = re.compile(r"\.(?P<name>.+)\.\d+(\.[0-9a-f]{8}\.part)?")  # temporary names: of this version, and of older ones
ABANDONED_S = 600.0  # since the last write to a temporary file whose writer may be on another machine


@contextmanager
def whole(path: Path, mode: int = 0o666, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`; what was written to it, a file or a folder, replaces `path` at the
    end of the block, once it is on the disk. `mode`: of files, before the umask. `durable=False`: for one of thousands,
    after the last of which the caller calls os.sync: each fsync may cost 10 ms.

    After an error it is deleted, which on a full disk leaves room to report the error. A full disk is raised as an
    OSError that names `path`, whichever error a library (safetensors, shutil, torch) raised for it.
    """
    sweep(path.parent, path.name)
    part = temporary(path)
    try:
        yield part
        publish(part, path, mode, durable)
    except BaseException as error:
        remove(part)
        if number := full(error):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def temporary(path: Path) -> Path:
    """A name beside `path` that `sweep` knows for a temporary one."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")


def publish(part: Path, path: Path, mode: int = 0o666, durable: bool = True) -> None:
    """Put what was written to `part`, a file or a folder, on the disk, and in the place of `path`.

    Libraries have modes of their own (safetensors makes its files private): files get `mode` as the umask leaves it, and
    stay executable where they are.
    """
    allowed, folder = mode & ~umask(), part.is_dir() and not part.is_symlink()
    for entry in [part, *part.rglob("*")] if folder else [part]:
        found = entry.lstat().st_mode
        if stat.S_ISREG(found):
            wanted = allowed | (found & (allowed & 0o444) >> 2)
            if stat.S_IMODE(found) != wanted:
                with contextlib.suppress(PermissionError):  # a file system with modes of its own
                    entry.chmod(wanted)
        if durable and not stat.S_ISLNK(found):
            sync(entry)
    if not folder:
        os.replace(part, path)
        return
    old = temporary(path)
    with contextlib.suppress(FileNotFoundError):
        # A rename takes no place of a folder with something in it, and a deletion lasts long enough for a kill to leave a part.
        os.replace(path, old)
    os.replace(part, path)
    remove(old)


def umask() -> int:
    """Of this process; read, since setting it to see it would be seen by other threads."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1], 8)
    os.umask(mask := os.umask(0o077))
    return mask


def sweep(folder: Path, name: str = "", age_s: float = ABANDONED_S) -> None:
    """Delete what killed writers left in `folder` under temporary names, of the file `name` or of all; `age_s`: only what
    nobody has written to for so long. 0 is for who alone may write there."""
    with contextlib.suppress(OSError):  # a folder that is not there or not ours
        for entry in list(os.scandir(folder)):
            found = PART.fullmatch(entry.name)
            if found and name in ("", found["name"]):
                written = entry.stat(follow_symlinks=False).st_mtime
                if not age_s or time.time() - written > age_s:
                    remove(Path(entry.path))


def owner(path: Path) -> str:
    """The user name of the owner, or the number where it has none: in a container, or of a colleague who left."""
    try:
        return path.owner()
    except KeyError:
        return str(path.stat().st_uid)


def lines_of(path: Path) -> list[str]:
    """The lines of a list as people save them: without a byte order mark, blanks around, empty lines and comments.

    Bytes of other encodings stay as os.fsdecode has them. Raises OSError, also for a line that no list has.
    """
    found: list[str] = []
    with open(path, "rb") as file:
        while data := file.readline(LONGEST_LINE + 1):
            if len(data) > LONGEST_LINE:
                raise OSError(errno.EFBIG, f"line {len(found) + 1} has more than {LONGEST_LINE:,} bytes", str(path))
            found += os.fsdecode(data if found else data.removeprefix(b"\xef\xbb\xbf")).splitlines() or [""]
    lines = (line.strip() for line in found)
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


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of writes within name `path`, which those of a file that is open already do not."""
    try:
        yield
    except OSError as error:
        if error.errno:  # one with only a message would lose it
            error.filename = error.filename or str(path)
        raise


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
    """Write by rename, so that a reader sees the old text or the new one; `private`: only its owner may ever read it."""
    mode = 0o600 if private else 0o666
    with (
        whole(path, mode) as part,
        open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file,
    ):
        file.write(text)


def create(path: Path, text: str) -> None:
    """Write a new file; raises FileExistsError, for all but one where several try at once, and leaves nothing torn."""
    with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
        try:
            with named(path):
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
