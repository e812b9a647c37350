"""A process's memory: how glibc gives it, how much there is, and whether an error says that there is too little. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt(3), glibc


def keep_freed_memory() -> bool:
    """Let this process, and those it forks, reuse freed memory instead of returning it to the system; False: no glibc.

    glibc maps a large tensor anew each time, and the kernel fills it with zeros page by page: in a forward pass of
    tf_efficientnet_b0 at 320 px, batch 16, that took 20 to 38 % of the CPU time (2 cores of an AMD EPYC, torch 2.15).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # no glibc
        return False
    # One arena: those of other threads return memory whatever the threshold.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_ARENA_MAX, 1))


def release_freed_memory() -> None:
    """Return freed memory to the system; does nothing without glibc.

    Before a fork: otherwise parent and child share those pages, and the kernel copies each one that the parent reuses.
    The first forward pass after the start of two loader workers took 2.1 s instead of 0.4 s (on the machine named above).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# Of torch, cuDNN, cuBLAS, DALI and C++; and of CUDA kernels that count a tensor's elements in 32 bits, which is no lack of
# memory but has the same remedy.
BITS, LIMIT = (
    r"\b(int32(_t)?|32-?bit)\b",
    r"\b(exceed|overflow|larger|smaller|too large|too big|greater|fit|limit|numel)",
)
TOO_LITTLE = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|_ALLOC_FAILED|CUDA allocation failed|std::bad_alloc|"
    r"2\s*(\*\*|\^)\s*31|canUse32BitIndexMath|INT_MAX|too many elements|numeric_limits<int(32_t)?>|"
    rf"{LIMIT}\w*\b[^.]{{0,80}}{BITS}|{BITS}[^.]{{0,80}}{LIMIT}",
    re.IGNORECASE,
)


def does_not_fit(error: BaseException) -> bool:
    """Whether fewer images at once would have avoided `error`: memory ran out, or a tensor is too large for 32-bit indices."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and TOO_LITTLE.search(str(error)) is not None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process and its children can still take before the kernel kills one; None where nothing tells.

    The least of the machine's available memory with its swap, and of what each enclosing cgroup (v1 or v2) leaves below
    its limit; a cgroup's file cache counts as free, since the kernel drops it first. `root`: where proc/ and sys/ are.
    """
    found = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines if len(words) > 1}
        found.append(1024 * (kib["MemAvailable:"] + kib.get("SwapFree:", 0)))
    found += [left for folder in own_cgroups(root) if (left := left_below_limit(folder)) is not None]
    return max(0, min(found)) if found else None


def own_cgroups(root: Path) -> list[Path]:
    """The folders of this process's memory cgroup and of those around it. In a container its own may be mounted as the root."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for number, controllers, path in lines:
        if number == "0" and not controllers:
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = mount / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder == mount or mount in folder.parents]
    return found


def left_below_limit(cgroup: Path) -> int | None:
    """Bytes below the cgroup's limit; None where it has none, or no such files."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (cgroup / limit).read_text().strip(), int((cgroup / used).read_text())
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max" and int(most) < 1 << 60:  # v1 writes a number near 2^63 for no limit
            return int(most) - now + int(stat.get(cache, 0))
    return None


def kills_for_memory(root: Path = Path("/")) -> int:
    """How many processes of this machine the kernel has killed because memory ran out; 0 where it does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (line.split() for line in (root / "proc/vmstat").read_text().splitlines())
        return next(int(words[1]) for words in lines if words[0] == "oom_kill")
    return 0
