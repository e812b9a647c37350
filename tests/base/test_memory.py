"""Freed memory is used again, not given back to the system; and how much memory a process may take."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from fixres_dist.base import memory

FAULTS = """
import resource, sys, threading, torch
from fixres_dist.base import memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
def counted():
    for k in range(10):  # first the heap grows
        fill()
    before = faults()
    for k in range(10):
        fill()
    print(faults() - before)
assert "keep" not in sys.argv or memory.keep_freed_memory()
counted()
thread = threading.Thread(target=counted)
thread.start()
thread.join()
before = faults()
memory.release_freed_memory()
fill()
print(faults() - before)
"""


def test_freed_memory_is_used_again() -> None:
    """A large tensor's pages come from the kernel once, not each time: in the main thread, and in another, which reads
    features. Given back before a fork, they come anew."""

    def faults(*how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", FAULTS, *how], capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    pages = (1 << 26) // resource.getpagesize()
    main, thread, released = faults("keep")
    assert main < pages / 10
    assert thread < pages / 10
    assert released > pages / 2
    main, thread, _ = faults()
    assert min(main, thread) > 10 * pages / 2


GIB = 1 << 30


def machine(root: Path, available: int, cgroup: str, swap: int = 0) -> None:
    """/proc of a machine with `available` GiB, and the cgroup of this process."""
    (root / "proc" / "self").mkdir(parents=True)
    kib = f"MemTotal: {64 << 20} kB\nMemAvailable: {available << 20} kB\nSwapFree: {swap << 20} kB\n"
    (root / "proc" / "meminfo").write_text(kib)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    (root / "proc" / "vmstat").write_text("pgfault 7\noom_kill 3\n")


def limit(folder: Path, most: str, used: int, cache: int, v1: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    for name, value in zip(names, (most, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' * v1}inactive_file {cache}\n")


def test_available_memory_of_a_machine_and_of_its_cgroups(tmp_path: Path) -> None:
    free = tmp_path / "free"
    machine(free, 20, "0::/user.slice\n", swap=2)
    assert memory.available_bytes(free) == 22 * GIB
    assert memory.kills_for_memory(free) == 3
    second = tmp_path / "v2"
    machine(second, 20, "0::/slurm/job_7/step_0\n")
    cgroups = second / "sys" / "fs" / "cgroup"
    limit(cgroups / "slurm" / "job_7" / "step_0", "max", 3 * GIB, 0)
    limit(cgroups / "slurm" / "job_7", str(8 * GIB), 5 * GIB, GIB)
    limit(cgroups / "slurm", str(40 * GIB), 6 * GIB, 0)
    assert memory.available_bytes(second) == 4 * GIB, "the job's limit, of which the file cache is no part"
    first = tmp_path / "v1"
    machine(first, 20, "9:cpuset:/\n4:memory:/job_7\n0::/\n")
    cgroups = first / "sys" / "fs" / "cgroup" / "memory"
    limit(cgroups / "job_7", str(6 * GIB), 2 * GIB, 0, v1=True)
    limit(cgroups, str(2**63 - 4096), 9 * GIB, 0, v1=True)
    assert memory.available_bytes(first) == 4 * GIB
    container = tmp_path / "container"  # its own cgroup is mounted as the root
    machine(container, 20, "0::/system.slice/docker-1.scope\n")
    limit(container / "sys" / "fs" / "cgroup", str(3 * GIB), 4 * GIB, 0)
    assert memory.available_bytes(container) == 0
    assert memory.available_bytes(tmp_path / "nothing") is None
    assert memory.kills_for_memory(tmp_path / "nothing") == 0
    here = memory.available_bytes()
    assert here is None or here > 0
