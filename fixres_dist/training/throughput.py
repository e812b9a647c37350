"""What a stretch of training did: loss, speed, time spent waiting for data; and what came before its first step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fixres_dist.base import watchdog
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.ranks import Ranks

IMPORTED = time.time()


class Meter:
    """Loss, speed and time spent waiting for data since the last reading."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.loss: torch.Tensor | float = 0.0  # on the loss's device: reading it would wait for the step
        self.images, self.wait_s, self.since = 0, 0.0, time.monotonic()
        self.skipped = 0

    def add(self, loss: torch.Tensor, images: int) -> None:
        self.loss, self.images = self.loss + loss, self.images + images

    def waiting(self, batches: Iterator[Loaded]) -> Iterator[Loaded]:
        """`batches`, with the time the caller waits for each one counted."""
        while True:
            watchdog.beat()
            asked = time.monotonic()
            batch = next(batches, None)
            self.wait_s += time.monotonic() - asked
            if batch is None:
                return
            self.skipped += len(batch.skipped)
            yield batch

    def read(self, ranks: Ranks, **values: float) -> dict[str, float]:
        """Scalars over all ranks since the last reading."""
        elapsed = time.monotonic() - self.since
        own = [float(self.loss), self.images, self.wait_s / elapsed, self.skipped, resident_gib()]
        loss, images, wait, skipped, resident = ranks.total(torch.tensor(own, dtype=torch.float64)).tolist()
        memory = torch.cuda.max_memory_allocated() / 2**30 if ranks.device.type == "cuda" else 0.0
        self.restart()
        return {
            "loss": loss / max(1.0, images),
            **values,
            "images_per_second": images / elapsed,
            "data_wait_percent": 100 * wait / ranks.world_size,
            "memory_gib": memory,
            "cpu_memory_gib": resident,  # of all ranks, without their loader processes
            "skipped": skipped,
            **gpu_use(ranks.device),
        }


def resident_gib(statm: Path = Path("/proc/self/statm")) -> float:
    """Memory of this process that is in RAM; 0 where there is no /proc."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return 0.0


def gpu_use(device: torch.device) -> dict[str, float]:
    """How much of the last second rank 0's GPU has computed, in percent; nothing on a CPU, or where the driver does not tell."""
    if device.type != "cuda":
        return {}
    try:
        return {"gpu_utilization_percent": float(torch.cuda.utilization(device))}
    except (RuntimeError, ModuleNotFoundError, OSError):
        return {}


class StartUp:
    """Where the time between this process's start and its first optimizer step goes."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.running = True
        self.marked = process_started()

    def mark(self, phase: str) -> None:
        """`phase` ends now; what came since the mark before is its time."""
        watchdog.beat()
        now = time.time()
        self.phases[phase] = round(self.phases.get(phase, 0.0) + now - self.marked, 3)
        self.marked = now

    def stop(self) -> dict[str, float]:
        """After the first step, whose work on a GPU is waited for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.mark("step")
        self.running = False
        return {
            "time_to_first_step_s": round(sum(self.phases.values()), 3),
            **{f"{k}_s": v for k, v in self.phases.items()},
        }


def process_started() -> float:
    """Unix time of this process's start, to 10 ms; the import of this module where there is no /proc."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return IMPORTED
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
