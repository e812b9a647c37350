"""When the lines of a log were written: beside LOG, a rank keeps LOG.times, lines of a size in bytes and a Unix time. No torch.

The lines themselves have no time, and libraries write to the same file without our knowledge.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

LOG = re.compile(r"_(\d+)_log\.(out|err)$")  # how submitit and slurm/train.sbatch call the logs of a rank
noted: dict[str, str] = {}  # by log: the last line


def note() -> None:
    """Keep how long the logs of this process are and since when, if they have grown."""
    for number in (1, 2):
        with contextlib.suppress(OSError):  # a full disk, or streams that are no files
            log = os.readlink(f"/proc/self/fd/{number}")
            if not LOG.search(log):
                continue
            now = os.fstat(number)
            line = f"{now.st_size} {now.st_mtime:.3f}\n"
            if noted.get(log) != line:
                with open(f"{log}.times", "a") as file:
                    file.write(line)
                noted[log] = line


def read(log: Path) -> list[tuple[int, float]]:
    """(size in bytes, Unix time at which the log had it), in this order, up to the log's own size and time of change."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(f"{log}.times").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                size, time = line.split()
                found.append((int(size), float(time)))
    now = log.stat()
    return [*sorted(pair for pair in found if pair[0] < now.st_size), (now.st_size, now.st_mtime)]
