"""JPEG to uint8 pictures on the CPU: torchvision's decoder and Pillow's arithmetic on tensors, in worker processes.

The same pixels as PIL decode and torchvision transforms, for a quarter to a half of their CPU time.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from fixres_dist.base.memory import release_freed_memory
from fixres_dist.base.signals import ignore_stop_signals
from fixres_dist.data import headers
from fixres_dist.data.geometry import View, vertical_first
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request


class Bad(NamedTuple):
    """A sample that could not be decoded."""

    sample: int
    reason: str


class Batch(NamedTuple):
    """The pictures of one request. Bad samples have no row: so no loss, metric or statistic can count them."""

    images: torch.Tensor  # uint8 [n, 3, res, res], channels last in memory
    labels: torch.Tensor  # int64 [n]
    samples: torch.Tensor  # int64 [n]: positions in the index
    skipped: tuple[Bad, ...] = ()


class Undecodable(Exception):
    """A sample's bytes cannot be had or are not the picture that was indexed; the text says why."""


def load(index: Index, sample: int) -> torch.Tensor:
    """The whole photograph: uint8 [3, height, width]; raises Undecodable."""
    height, width = index.sizes[sample].tolist()
    if not height:
        raise Undecodable("its header could not be read when it was indexed")
    try:
        return decode(index.read(sample), (height, width))
    except OSError as error:
        raise Undecodable(error.strerror or str(error)) from None


def decode(data: NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, height, width] as PIL's convert("RGB") gives it; EXIF rotation is not applied, as in timm.

    torchvision decodes plain JPEGs; CMYK, 16-bit PNG, GIF under another name and the like go through PIL itself.
    Raises Undecodable, before anything is allocated where the size is not the `size` that was indexed.
    """
    header = headers.header(data.data)
    if header:
        check_size(size, (header.height, header.width))
    if header and header.plain:
        with contextlib.suppress(RuntimeError):  # PIL says what is wrong in words
            return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
    try:
        with Image.open(io.BytesIO(data.data)) as image:
            check_size(size, (image.height, image.width))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Undecodable:
        raise
    except UnidentifiedImageError:
        raise Undecodable("not an image" if len(data) else "empty file") from None
    except Exception as error:  # each of Pillow's plugins has its own kinds
        raise Undecodable(str(error) or type(error).__name__) from None


def check_size(indexed: tuple[int, int], found: tuple[int, int]) -> None:
    if indexed != found:
        was, now = ("x".join(map(str, size)) for size in (indexed, found))
        raise Undecodable(f"it was {was} pixels (height x width) when it was indexed and is {now} now")


def draw(image: torch.Tensor, view: View, interpolation: str, canvas: torch.Tensor) -> None:
    """One view of a decoded image, on `canvas`: uint8 [3, res, res], channels last in memory."""
    from fixres_dist.data import pixels

    res = canvas.shape[-1]
    y, x, h, w = view.box
    lines = [range(max(0, start), min(size, start + res)) for size, start in zip(view.size, view.offset, strict=True)]
    shown = pixels.resize(image[:, y : y + h, x : x + w], view.size, lines, vertical_first(view), interpolation)
    top, left = (max(0, -offset) for offset in view.offset)
    if view.flip:
        shown, left = shown.flip(-1), res - left - shown.shape[2]
    if shown.shape != canvas.shape:
        canvas.zero_()  # black where the window leaves the image
    canvas[:, top : top + shown.shape[1], left : left + shown.shape[2]] = shown
    pixels.jitter(canvas, view.jitter)


class Pictures(Dataset[Batch]):
    """A request is the index of this data set: one worker makes a whole batch, so nothing is collated twice."""

    def __init__(self, index: Index, res: int, interpolation: str) -> None:
        self.index, self.res, self.interpolation = index, res, interpolation

    def __getitem__(self, request: Request) -> Batch:
        images = empty_batch(len(request.samples), self.res)
        good: list[int] = []
        bad: list[Bad] = []
        for row, (sample, view) in enumerate(zip(request.samples.tolist(), request.views, strict=True)):
            try:
                draw(load(self.index, sample), view, self.interpolation, images[len(good)])
                good.append(row)
            except Undecodable as error:
                bad.append(Bad(sample, str(error)))
        return Batch(images[: len(good)], *rows(self.index, request.samples[good]), tuple(bad))


def empty_batch(n: int, res: int) -> torch.Tensor:
    """uint8 [n, 3, res, res], channels last in memory, which is how files are decoded.

    In a loader process it is memory that the training process sees too, so handing it over copies nothing.
    """
    size = (n, res, res, 3)
    if n and get_worker_info():
        shared = torch.UntypedStorage._new_shared(math.prod(size))  # as torch's own default_collate does
        return torch.empty(0, dtype=torch.uint8).set_(shared).view(size).permute(0, 3, 1, 2)
    return torch.empty(size, dtype=torch.uint8).permute(0, 3, 1, 2)


def rows(index: Index, samples: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, samples) of a batch."""
    return torch.from_numpy(index.labels[samples].astype(np.int64)), torch.from_numpy(samples)


class Requests(Sampler[Request]):
    def __init__(self, requests: Iterable[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def as_is(batch: Batch) -> Batch:
    return batch


def start_worker(_: int) -> None:
    """Loader workers outlive the signals that the training process wants to survive, and nothing outlives that process."""
    gc.freeze()  # never run the destructors of the parent's garbage here: DALI's wait for threads that only the parent has
    ignore_stop_signals()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG, Linux; elsewhere the loader's watchdog sees to it


def batches(
    index: Index,
    requests: Iterable[Request],
    res: int,
    interpolation: str,
    workers: int,
    finish: Callable[[Any], Any] = as_is,
) -> Iterator[Batch]:
    """The batch of every request, in their order, `workers` processes ahead of the caller; `finish` runs in them."""
    if workers:
        release_freed_memory()
    loader = DataLoader(
        Pictures(index, res, interpolation),
        batch_size=None,
        sampler=Requests(requests),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        collate_fn=finish,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,  # the index is shared, not copied
    )
    started = iter(loader)
    atexit.register(end_workers, weakref.ref(started))
    return started


def end_workers(loader: weakref.ref[Any]) -> None:
    """At exit: an error that holds the loader keeps its workers too. multiprocessing would send them the SIGTERM that they
    ignore, and wait for them."""
    getattr(loader(), "_shutdown_workers", lambda: None)()


def worker_count(setting: int | str, local_size: int) -> int:
    """`auto`: this process's share of the CPUs the node gives it, one left for the training process where there is one."""
    if setting != "auto":
        return int(setting)
    return (
        max(1, len(os.sched_getaffinity(0)) // local_size - 1)
        if local_size > 1
        else max(1, len(os.sched_getaffinity(0)))
    )
