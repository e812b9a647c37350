"""JPEG to uint8 pictures on the CPU: torchvision v2 on tensors, in worker processes.

The same pixels as PIL decode and torchvision transforms to within rounding, for about half of their CPU time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from fixres_dist.allocator import release_freed_memory
from fixres_dist.data import headers
from fixres_dist.data.geometry import View, vertical_first
from fixres_dist.data.index import Index
from fixres_dist.data.plan import Request
from fixres_dist.preempt import ignore_stop_signals


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
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise Undecodable("empty file" if not len(data) else str(error).replace(f" {io.BytesIO!r}", "")) from None


def check_size(indexed: tuple[int, int], found: tuple[int, int]) -> None:
    if indexed != found:
        was, now = ("x".join(map(str, size)) for size in (indexed, found))
        raise Undecodable(f"it was {was} pixels (height x width) when it was indexed and is {now} now")


def picture(image: torch.Tensor, view: View, res: int, interpolation: str) -> torch.Tensor:
    """One view of a decoded image: uint8 [3, res, res]."""
    y, x, h, w = view.box
    image = image[:, y : y + h, x : x + w]
    # One call scales the width, rounds to 8 bits and scales the height. Another order, or a scaled image many times
    # larger than its crop, takes a call for each axis, cut in between.
    vertical = vertical_first(view, res)
    for axes in ((0,), (1,)) if vertical else ((1,), (0,)) if view.size[1] > 32 * res else ((0, 1),):
        size = [view.size[k] if k in axes else int(image.shape[k + 1]) for k in (0, 1)]
        if size != list(image.shape[1:]):
            image = F.resize(image, size, F.InterpolationMode(interpolation), antialias=True)
        for k in axes:
            start = max(0, view.offset[k])
            image = image.narrow(k + 1, start, min(view.size[k], view.offset[k] + res) - start)
    if image.shape[1:] != (res, res):  # black where the window leaves the image
        top, left = (max(0, -offset) for offset in view.offset)
        below, right = res - top - image.shape[1], res - left - image.shape[2]
        image = torch.nn.functional.pad(image, (left, right, top, below))
    if view.flip:
        image = image.flip(-1)
    if view.jitter != (1.0, 1.0, 1.0):
        image = jitter(image[None], torch.tensor([view.jitter]))[0]
    return image


def jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of uint8 [n, 3, h, w] by `factors` [n, 3], in this order; the same as PIL's.

    Every step truncates to whole numbers like PIL does, in fp32, which holds all of them exactly: on any device the
    result is equal. torchvision's own tensor version rounds otherwise and is a grey level off for strong factors.
    """
    brightness, contrast, saturation = factors.float().view(-1, 3, 1, 1, 1).unbind(1)
    # A plane a colour: `grey` reads them twice as fast as channels last.
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    x = x.mul_(brightness).clamp_(0, 255).floor_()
    mean = grey(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().float()
    x = x.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 255).floor_()
    base = grey(x)
    x = x.sub_(base).mul_(saturation).add_(base).clamp_(0, 255)
    # By way of int32, because torch casts float to uint8 value by value.
    return x.contiguous(memory_format=torch.channels_last).to(torch.int32).to(torch.uint8)


def grey(x: torch.Tensor) -> torch.Tensor:
    """PIL's convert("L") of whole numbers in fp32 [n, 3, h, w]: [n, 1, h, w]."""
    r, g, b = x.unbind(1)
    return (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471).add_(32768).div_(65536).floor_()[:, None]


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
                images[len(good)] = picture(load(self.index, sample), view, self.res, self.interpolation)
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
    return iter(loader)


def worker_count(setting: int | str, local_size: int) -> int:
    """`auto`: this process's share of the CPUs the node gives it, one left for the training process where there is one."""
    if setting != "auto":
        return int(setting)
    return (
        max(1, len(os.sched_getaffinity(0)) // local_size - 1)
        if local_size > 1
        else max(1, len(os.sched_getaffinity(0)))
    )
