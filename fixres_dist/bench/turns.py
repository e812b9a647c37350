"""Measuring in turns: every variant has a process of its own that stays alive, and they take turns.

So whatever else the machine does falls on all of them, no variant inherits another's memory, and one that runs out of
memory, hangs or crashes costs only itself. No torch.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm

from fixres_dist.base.commands import command
from fixres_dist.base.environment import processor, versions

PRELOADED = ("fixres_dist.bench.model", "fixres_dist.bench.pipeline")  # imported once, by the server that forks


class Turn(NamedTuple):
    images: int
    wall_s: float
    cpu_s: float  # of the process and its loader workers
    peak_mib: float
    batch: int = 0  # images of a step
    waited_s: float = 0.0  # for data


class Variant(NamedTuple):
    """`function(*arguments)` yields a Turn each time it is asked; what it builds lives as long as its process."""

    function: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...]


class Failed(Exception):
    """The last words of a variant's process."""


class Worker:
    """A variant in its own process."""

    def __init__(self, variant: Variant, bare: bool = False) -> None:
        context: Any = multiprocessing.get_context("spawn" if bare else "forkserver")
        if not bare:  # spawn would import torch anew for every variant
            context.set_forkserver_preload(list(PRELOADED))
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, variant))  # no daemon: loaders have children
        self.process.start()
        far.close()

    def turn(self, timeout_s: float | None = None) -> Any:
        """The variant's next value; raises Failed with its reason."""
        try:
            self.pipe.send(True)
            if not self.pipe.poll(timeout_s):
                raise Failed(f"no answer within {timeout_s:.0f} s")
            value, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise Failed(f"its process ended with exit code {self.process.exitcode}") from None
        if error:
            raise Failed(error)
        return value

    def end(self) -> None:
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, variant: Variant) -> None:
    values = variant.function(*variant.arguments)
    try:
        while pipe.recv():
            pipe.send((next(values), ""))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))


def once(variant: Variant, bare: bool = False, timeout_s: float | None = None) -> Any:
    """The variant's first value, from a process that ends with it; a `bare` one starts without torch."""
    worker = Worker(variant, bare)
    try:
        return worker.turn(timeout_s)
    except Failed:
        worker.process.kill()
        raise
    finally:
        worker.end()


def alternate(
    variants: dict[str, Variant], repeat: int, note: str, until: float = float("inf")
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """(`repeat` turns of each variant, why others failed); a first turn of each warms caches and is not counted.

    `until`: on time.monotonic()'s clock; after it no turn begins, and one that still runs is given up.
    """
    found: dict[str, list[Turn]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    bar = tqdm(total=(repeat + 1) * len(variants), desc=note, unit="turn", disable=None)
    try:
        for k in range(repeat + 1):
            for name, variant in variants.items():
                if name not in failed and (k == 0 or time.monotonic() < until):
                    try:
                        if name not in workers:
                            workers[name] = Worker(variant)
                        timeout = None if until == float("inf") else max(1.0, until - time.monotonic())
                        turn = workers[name].turn(timeout)
                        found[name] += [turn] if k else []
                    except Failed as error:
                        failed[name] = str(error)
                        workers[name].process.kill()
                        print(f"{note}: {name} failed: {error}", file=sys.stderr)
                bar.update()
    finally:
        bar.close()
        for worker in workers.values():
            worker.end()
    failed |= {name: "no time was left for it" for name, turns in found.items() if not turns and name not in failed}
    return {name: turns for name, turns in found.items() if turns}, failed


def row(name: str, turns: list[Turn], batch: int = 0) -> dict[str, Any]:
    """Medians over the turns; the highest peak; `n` images in all. A batch other than `batch` is told in the name."""
    found = turns[-1].batch
    return {
        "name": name if found == batch or not batch else f"{name}, batch {found}",
        "images_per_second": round(median(t.images / t.wall_s for t in turns), 2),
        "cpu_ms_per_image": round(median(1000 * t.cpu_s / t.images for t in turns), 3),
        "peak_memory_mib": round(max(t.peak_mib for t in turns), 1),
        "n": sum(t.images for t in turns),
    }


def result(stage: str, rows: list[dict[str, Any]], ratios: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "hardware": hardware(),
        "versions": versions(),
        "command": command("bench", *sys.argv[2:]),
        "rows": rows,
        "ratios": ratios,
        **more,
    }


def hardware() -> dict[str, Any]:
    """What a number depends on; the load average tells how quiet the machine was."""
    import torch

    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    found: dict[str, Any] = {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def table(found: dict[str, Any]) -> str:
    """The rows for people, with the ratios that are given by row as columns."""
    names = {row["name"] for row in found["rows"]}
    given = found["ratios"] | found.get("rows_vs", {})
    columns = {head: v for head, v in given.items() if isinstance(v, dict) and names & set(v)}
    machine, installed = found["hardware"], found["versions"]
    where = f"{machine['cpus']} CPUs of {machine['processor']}, {machine['threads']} threads"
    where = machine.get("gpu", where) + f", load {machine['load_average'][0]}"
    packages = ", ".join(f"{name} {installed[name]}" for name in ("torch", "timm"))
    width = max(len(row["name"]) for row in found["rows"]) + 2
    heads = "".join(f"{head:>{len(head) + 2}}" for head in columns)
    lines = [f"{where}; {packages}", f"{'':{width}}{'images/s':>10}{'CPU-ms/image':>14}{'peak MiB':>10}{'n':>8}{heads}"]
    for row in found["rows"]:
        line = f"{row['name']:{width}}{row['images_per_second']:10.1f}{row['cpu_ms_per_image']:14.2f}"
        line += f"{row['peak_memory_mib']:10.0f}{row['n']:8}"
        for head, values in columns.items():
            line += f"{values[row['name']]:{len(head) + 2}.2f}" if row["name"] in values else " " * (len(head) + 2)
        lines.append(line.rstrip())
    return "\n".join(lines)


def cpu_seconds() -> float:
    """Of this process, its ended children, and its loader workers that are alive."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time, proc(5)
    return sum(u.ru_utime + u.ru_stime for u in used) + ticks / os.sysconf("SC_CLK_TCK")


def memory_mib(peak: bool = False, code: bool = True) -> float:
    """Resident memory of this program, now or at most; getrusage's figure would include the process that started it.

    Without `code`: less what is mapped from files, which a forked process gets page by page as it runs.
    """
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "VmRSS:", "RssFile:")}
    return (kib["VmHWM:" if peak else "VmRSS:"] - (0 if code else kib["RssFile:"])) / 1024


def forget_peak() -> None:
    """Give back what is free and start the peak anew: building a model is no part of a step."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset the peak resident set size
