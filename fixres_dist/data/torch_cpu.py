"""The backend for CPUs: torchvision's JPEG decoder and Pillow's arithmetic on tensors, in worker processes.

The same pixels as PIL's decoder and torchvision's transforms on PIL images, for a quarter to a half of their CPU time.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fixres_dist.base.errors import StorageError, UserError
from fixres_dist.base.memory import release_freed_memory
from fixres_dist.base.signals import ignore_stop_signals
from fixres_dist.data import augment, pixels
from fixres_dist.data.decoding import Bad, Batch, Undecodable, load
from fixres_dist.data.geometry import Resize, View, vertical_first
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request

PR_SET_PDEATHSIG = 1
SHARED = "/dev/shm"
SPARED = 16 * 2**20  # bytes of it that are left to others: locks, NCCL


def draw(image: torch.Tensor, view: View, resize: Resize, canvas: torch.Tensor) -> None:
    """One view of a decoded image, on `canvas`: uint8 [3, res, res], channels last in memory."""
    res = canvas.shape[-1]
    y, x, h, w = view.box
    lines = [range(max(0, start), min(size, start + res)) for size, start in zip(view.size, view.offset, strict=True)]
    shown = pixels.resize(image[:, y : y + h, x : x + w], view.size, lines, vertical_first(view), resize.interpolation)
    top, left = (max(0, -offset) for offset in view.offset)
    if view.flip:
        shown, left = shown.flip(-1), res - left - shown.shape[2]
    if shown.shape != canvas.shape:
        canvas.copy_(torch.tensor(resize.fill, dtype=torch.uint8).view(3, 1, 1))  # where the window leaves the image
    canvas[:, top : top + shown.shape[1], left : left + shown.shape[2]] = shown
    pixels.jitter(canvas, view.jitter)
    if view.augment:
        augment.apply(canvas, view.augment)


class Packed(NamedTuple):
    """A batch on its way from a worker. Arrays travel through a pipe; a tensor lies in shared memory and is not copied."""

    images: torch.Tensor | NDArray[np.uint8]  # as an array [n, res, res, 3]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    skipped: tuple[Bad, ...]


class Batches(Dataset[Packed]):
    """A data set whose indices are requests and whose items are batches: a worker makes a whole batch."""

    def __init__(self, index: Index, res: int, resize: Resize) -> None:
        self.index, self.res, self.resize = index, res, resize

    def __getitem__(self, request: Request) -> Packed:
        images, shared = empty_batch(len(request.samples), self.res)
        good: list[int] = []
        bad: list[Bad] = []
        for row, (sample, view) in enumerate(zip(request.samples.tolist(), request.views, strict=True)):
            try:
                draw(load(self.index, sample), view, self.resize, images[len(good)])
                good.append(row)
            except Undecodable as error:
                bad.append(Bad(sample, str(error)))
        images, samples = images[: len(good)], request.samples[good]
        labels = self.index.labels[samples].astype(np.int64)
        copied = get_worker_info() and not shared
        return Packed(images.permute(0, 2, 3, 1).numpy() if copied else images, labels, samples, tuple(bad))


def empty_batch(n: int, res: int) -> tuple[torch.Tensor, bool]:
    """(uint8 [n, 3, res, res], channels last in memory, as files are decoded; whether it lies in shared memory).

    It does in a worker process, so that the training process gets it without a copy, unless too little is free.
    """
    size = (n, res, res, 3)
    shared = shared_memory(math.prod(size)) if n and get_worker_info() else None
    if shared is not None:
        return torch.empty(0, dtype=torch.uint8).set_(shared).view(size).permute(0, 3, 1, 2), True
    return torch.empty(size, dtype=torch.uint8).permute(0, 3, 1, 2), False


def shared_memory(length: int) -> Any:
    """`length` bytes, which are there: a process that touches a page that is not is killed. None if too few are free.

    Docker gives 64 MB to all processes of a container.
    """
    storage: Any = torch.UntypedStorage
    try:
        state = os.statvfs(SHARED)
        if state.f_bavail * state.f_frsize < length + SPARED:
            return None
        shared = storage._new_shared(length)  # as torch's own default_collate does
        os.posix_fallocate(shared._share_fd_cpu_()[0], 0, length)
    except (OSError, RuntimeError):
        return None
    return shared


def unpacked(packed: Packed) -> Batch:
    images, labels, samples, skipped = packed
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        if len(images):
            say_copied()
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(samples), skipped)


@cache
def say_copied() -> None:
    print(
        f"{SHARED} has too little room for batches, which are copied through pipes instead: the same pictures, more slowly. "
        "Next: more of it (docker run --shm-size=8g or --ipc=host), fewer data.workers, or a smaller run.batch_per_device",
        file=sys.stderr,
        flush=True,
    )


def as_is(batch: Any) -> Any:
    return batch


def start_worker(_: int) -> None:
    """A worker ignores the stop signals, which the training process handles, and ends with that process."""
    gc.freeze()  # never run destructors of the parent's objects here: DALI's wait for threads that only the parent has
    ignore_stop_signals()
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere the loader's watchdog ends the worker
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def batches(index: Index, requests: Iterable[Request], res: int, resize: Resize, workers: int) -> Iterator[Batch]:
    """The batch of every request, in their order, `workers` processes ahead of the caller."""
    if workers:
        release_freed_memory()
    loader = DataLoader(
        Batches(index, res, resize),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        collate_fn=as_is,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,  # the index is shared, not copied
    )
    try:
        started = iter(loader)
    except OSError as error:  # its locks lie there too
        raise UserError(
            f"no loader process can be started: {error.strerror or error} ({SHARED}). Accepted: data.workers=0, or more "
            "shared memory (docker run --shm-size=8g or --ipc=host)."
        ) from None
    atexit.register(end_workers, weakref.ref(started))
    return map(unpacked, explained(started))


def explained(loader: Any) -> Iterator[Any]:
    """The same; errors of worker processes are raised as what they are."""
    try:
        yield from loader
    except StorageError as error:  # torch gives the worker's whole traceback as its text
        raise StorageError(str(error).rstrip().rpartition(f"{StorageError.__name__}: ")[2]) from None
    except Exception as error:
        # The pipes of a killed worker break before torch's watchdog notices, in one of several ways.
        if isinstance(error, UserError) or not (killed := lost_workers(loader)):
            raise
        raise RuntimeError(f"loader worker {killed}; after it: {type(error).__name__}: {error}") from error


def lost_workers(loader: Any) -> str:
    """`process 4711 was killed by SIGKILL (by hand, or out of memory)` of the first one that a signal has ended."""
    deadline = time.monotonic() + 1.0
    workers = getattr(loader, "_workers", [])
    while workers and all(worker.exitcode is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in workers:
        if (worker.exitcode or 0) < 0:
            why = " (by hand, or out of memory)" if worker.exitcode == -signal.SIGKILL else ""
            return f"process {worker.pid} was killed by {signal.Signals(-worker.exitcode).name}{why}"
    return ""


def end_workers(loader: weakref.ref[Any]) -> None:
    """End the workers at exit, even if an error's traceback still refers to the loader. multiprocessing would send them
    the SIGTERM that they ignore, and wait for them."""
    getattr(loader(), "_shutdown_workers", lambda: None)()
