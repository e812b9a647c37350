"""torch.compile's results: on the node's own disk while a run works, kept in the cache folder between runs. No torch.

A compiler reads and writes thousands of small files and locks them, which network file systems do badly; and what it
reads it executes, so that nobody else may write there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from fixres_dist.base import owners
from fixres_dist.base.environment import cache_folder, writable
from fixres_dist.base.files import whole

COMPILER, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
OWN = "fixres_dist-compiled-"  # the node's folder: this and the user's number
SEEDED = ".seeded"  # in the node's folder: what was kept has been copied


def use_node_folder(cache: str = "") -> None:
    """Let the compiler work in a folder of this user on this node, which starts with what is kept in `cache` (data.cache).

    A person's own setting stands, and nothing is copied. The ranks of a node share the folder.
    """
    torchs = f"{tempfile.gettempdir()}/torchinductor_"  # importing torch has set its default
    settings = [os.environ[name] for name in (COMPILER, TRITON) if name in os.environ]
    if any(not (value.startswith(torchs) or OWN in value) for value in settings):
        return
    folder, kept = node_folder(), kept_folder(cache)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one rank copies, the others wait
        if not (folder / SEEDED).exists():
            if kept.is_dir():
                if private(kept):
                    copy_new(kept, folder, durable=False, own=True)
                else:
                    print(f"{kept} is not read, because others can write there. Next: chmod -R go-w {kept}", flush=True)
            (folder / SEEDED).touch()
    os.environ[COMPILER], os.environ[TRITON] = str(folder), str(folder / "triton")


def kept_folder(cache: str) -> Path:
    """Of this user: in a cache that several share, each has one."""
    return cache_folder(cache).absolute() / f"compiled-{os.getuid()}"


def node_folder() -> Path:
    """A folder that only this user can enter, on a disk of this node: Slurm's, $TMPDIR or /tmp."""
    base = Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    folder = base / f"{OWN}{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    # In /tmp anybody may have made that folder before.
    return folder if private(folder) else Path(tempfile.mkdtemp(prefix=OWN, dir=base))


def private(folder: Path) -> bool:
    """Whether it is a folder of this user, no link to one, in which nobody else can write."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def keep(cache: str = "") -> None:
    """Copy what was compiled since the start to the cache folder; by rank 0. A failure costs time at the next start only."""
    folder, kept = Path(os.environ.get(COMPILER, "")), kept_folder(cache)
    if not folder.name.startswith(OWN) or not writable(kept):
        return
    with contextlib.suppress(OSError):
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        if private(kept):
            copy_new(folder, kept, durable=True)


def copy_new(source: Path, target: Path, durable: bool, own: bool = False) -> None:
    """Copy the files that `target` lacks, each whole or not at all. Their names are digests of what they hold.

    `durable`: as base/files.py's `whole`; the node's own folder does not outlive a loss of power.
    """
    for folder, folders, files in os.walk(source):
        if own:  # what this user, and nobody else, can have written
            folders[:] = [name for name in folders if private(Path(folder, name))]
            files = [name for name in files if owners.believed(Path(folder, name))]
        there = target / os.path.relpath(folder, source)
        for name in files:
            if name.startswith(".") or name.endswith((".lock", ".tmp")) or (there / name).exists():
                continue
            there.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), whole(there / name, 0o600, durable) as part:
                # the compiler may remove a file
                shutil.copy2(Path(folder) / name, part, follow_symlinks=False)
