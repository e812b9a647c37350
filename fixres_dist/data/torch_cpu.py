"""The backend for CPUs: torchvision's JPEG decoder and Pillow's arithmetic on tensors, in worker processes.

The same pixels as PIL's decoder and torchvision's transforms on PIL images, for a quarter to a half of their CPU time.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import signal
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fixres_dist.base.memory import release_freed_memory
from fixres_dist.base.signals import ignore_stop_signals
from fixres_dist.data import pixels
from fixres_dist.data.decoding import Bad, Batch, Undecodable, load, rows
from fixres_dist.data.geometry import Resize, View, vertical_first
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request

PR_SET_PDEATHSIG = 1


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


class Batches(Dataset[Batch]):
    """A data set whose indices are requests and whose items are batches: a worker makes a whole batch."""

    def __init__(self, index: Index, res: int, resize: Resize) -> None:
        self.index, self.res, self.resize = index, res, resize

    def __getitem__(self, request: Request) -> Batch:
        images = empty_batch(len(request.samples), self.res)
        good: list[int] = []
        bad: list[Bad] = []
        for row, (sample, view) in enumerate(zip(request.samples.tolist(), request.views, strict=True)):
            try:
                draw(load(self.index, sample), view, self.resize, images[len(good)])
                good.append(row)
            except Undecodable as error:
                bad.append(Bad(sample, str(error)))
        return Batch(images[: len(good)], *rows(self.index, request.samples[good]), tuple(bad))


def empty_batch(n: int, res: int) -> torch.Tensor:
    """uint8 [n, 3, res, res], channels last in memory, as files are decoded; in a worker process in shared memory, so
    that the training process gets it without a copy."""
    size = (n, res, res, 3)
    if n and get_worker_info():
        storage: Any = torch.UntypedStorage
        shared = storage._new_shared(math.prod(size))  # as torch's own default_collate does
        return torch.empty(0, dtype=torch.uint8).set_(shared).view(size).permute(0, 3, 1, 2)
    return torch.empty(size, dtype=torch.uint8).permute(0, 3, 1, 2)


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
    started = iter(loader)
    atexit.register(end_workers, weakref.ref(started))
    return started


def end_workers(loader: weakref.ref[Any]) -> None:
    """End the workers at exit, even if an error's traceback still refers to the loader. multiprocessing would send them
    the SIGTERM that they ignore, and wait for them."""
    getattr(loader(), "_shutdown_workers", lambda: None)()
