"""Freed memory is used again, not given back to the system."""

from __future__ import annotations

import resource
import subprocess
import sys

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
