"""The origin of a result: versions, processor, host, git commit; and the folder of caches. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fixres_dist.base.secrets import redacted

RECORDED = (
    *("torch", "torchvision", "timm", "submitit", "tensorboard"),
    *("nvidia-dali-cuda130", "numpy", "numba", "pillow", "safetensors"),
)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def processor() -> str:
    """The CPU's name, for results that depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """The content of environment.json: versions, host, and the checkout's commit and diff."""
    checkout = Path(__file__).parents[2]
    return {
        "versions": versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "executable": sys.executable,
        "folder": os.getcwd(),
        "git": {
            "commit": git(checkout, "rev-parse", "HEAD"),
            "diff": redacted(git(checkout, "diff", "HEAD") or "") or None,
        },
    }


def git(checkout: Path, *arguments: str) -> str | None:
    """The output of a git command; None where `checkout` is no git checkout, or git fails."""
    if not (checkout / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def shipped(name: str) -> Path:
    """The folder `configs` or `slurm` of this project: inside an installed package, else beside the package's sources."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def slurm_file(name: str) -> Path:
    """A file of slurm/ as people would type it: relative to the current directory if it lies below."""
    path = shipped("slurm") / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def cache_folder(setting: str = "") -> Path:
    """The folder of indexes, features and the built-in example: `setting`, $FIXRES_CACHE, or ~/.cache/fixres_dist.

    It need not be writable: see `writable`. Where a user has no home it is `scratch_folder`.
    """
    named = os.path.expanduser(setting or os.environ.get("FIXRES_CACHE") or "~/.cache/fixres_dist")
    return scratch_folder() if named.startswith("~") else Path(named)


def scratch_folder() -> Path:
    """A folder of this user on this machine, for what only one machine needs."""
    return Path(tempfile.gettempdir()) / f"fixres_dist-{os.getuid()}"


def writable(folder: Path) -> bool:
    """Whether this user can write files in `folder`, or can make it."""
    while not os.path.exists(folder):  # of what this user may not look at, too
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
