"""Measuring in turns: each variant has a process of its own that stays alive, and the processes take turns.

So other load on the machine slows all variants alike, no variant inherits another's memory, and one that runs out of
memory, hangs or crashes fails alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

# Imported once, by the server from which the variants' processes are forked.
PRELOADED = ["fixres_dist.bench.step", "fixres_dist.bench.end_to_end"]


# Called in its process; yields a value, such as a Turn, each time it is asked.
Variant = Callable[[], Iterator[Any]]


class Turn(NamedTuple):
    images: int
    wall_s: float
    cpu_s: float  # of the process and its loader workers
    peak_mib: float
    batch: int = 0  # images of a step
    waited_s: float = 0.0  # for data


class Failed(Exception):
    """A variant failed; the message is its exception or its exit code."""


class Worker:
    """A variant in its own process, which ends with the `with` block."""

    def __init__(self, variant: Variant) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, far = context.Pipe()
        # No daemon: a daemon may not start loader workers.
        self.process = context.Process(target=serve, args=(far, variant))
        self.process.start()
        far.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def next(self, timeout_s: float | None = None) -> Any:
        """The variant's next value; raises Failed, and ends the process, if it fails or takes longer than `timeout_s`."""
        try:
            self.pipe.send(True)
            if not self.pipe.poll(timeout_s):
                raise Failed(f"no answer within {timeout_s:.0f} s")
            value, error = self.pipe.recv()
            if error:
                raise Failed(error)
            return value
        except (EOFError, OSError):
            self.process.join(10)
            raise Failed(f"its process ended with exit code {self.process.exitcode}") from None
        except Failed:
            self.process.kill()
            raise


def serve(pipe: Connection, variant: Variant) -> None:
    faulthandler.enable()  # a crash in a library prints where it was called
    values = variant()
    try:
        while pipe.recv():
            pipe.send((next(values), ""))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))


def once(variant: Variant, timeout_s: float | None = None) -> Any:
    """The variant's first value, from a process that ends with it; raises Failed."""
    with Worker(variant) as worker:
        return worker.next(timeout_s)


def alternate(variants: Mapping[str, Variant], repeat: int, note: str) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """(`repeat` turns of each variant, why others failed); a first turn of each warms caches and is not counted."""
    found: dict[str, list[Turn]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    with ExitStack() as stack, tqdm(total=(repeat + 1) * len(variants), desc=note, unit="turn", disable=None) as bar:
        workers = {name: stack.enter_context(Worker(variant)) for name, variant in variants.items()}
        for k in range(repeat + 1):
            for name in [name for name in variants if name not in failed]:
                try:
                    turn = workers[name].next()
                    found[name] += [turn] if k else []
                except Failed as error:
                    failed[name] = str(error)
                    print(f"{note}: {name} failed: {error}", file=sys.stderr)
                bar.update()
    return {name: turns for name, turns in found.items() if turns}, failed


def cpu_seconds() -> float:
    """CPU time of this process, its ended children, and its loader workers that are alive."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time, proc(5)
    return sum(u.ru_utime + u.ru_stime for u in used) + ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(peak: bool = False, code: bool = True) -> float:
    """Resident memory of this program, now or at most; getrusage's figure would include the process that started it.

    Without `code`: less the pages mapped from files, which a forked process gets one by one as it runs.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "VmRSS:", "RssFile:")}
    return (kib["VmHWM:" if peak else "VmRSS:"] - (0 if code else kib["RssFile:"])) / 1024


def forget_peak() -> None:
    """Return free memory to the system and restart the peak: building a model is no part of a step."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the peak resident set size
