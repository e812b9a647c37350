"""JPEG to uint8 pictures on the CPU: torchvision v2 on tensors, in worker processes.

The same pixels as PIL decode and torchvision transforms to within rounding, for about half of their CPU time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_image, read_file

from fixres_dist.data.geometry import View
from fixres_dist.data.index import Index
from fixres_dist.data.plan import Request
from fixres_dist.errors import UserError
from fixres_dist.preempt import ignore_stop_signals


class Batch(NamedTuple):
    images: torch.Tensor  # uint8 [n, 3, res, res]
    labels: torch.Tensor  # int64 [n]
    samples: torch.Tensor  # int64 [n]: positions in the index


def decode(path: os.PathLike[str] | str) -> torch.Tensor:
    """uint8 [3, height, width] as PIL's convert("RGB") gives it; EXIF rotation is not applied, as in timm.

    What torchvision's decoders refuse (rare formats, odd colour spaces) goes through PIL itself.
    """
    try:
        return decode_image(read_file(os.fspath(path)), ImageReadMode.RGB)
    except RuntimeError:
        try:
            with Image.open(path) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot decode {path}: {error}. Move it away, and run the same command again.") from None


def picture(image: torch.Tensor, view: View, res: int, interpolation: str) -> torch.Tensor:
    """One view of a decoded image: uint8 [3, res, res]."""
    y, x, h, w = view.box
    image = image[:, y : y + h, x : x + w]
    if view.size != (h, w):
        mode = F.InterpolationMode(interpolation)
        image = F.resize(image, list(view.size), mode, antialias=True)
    if view.size != (res, res):
        image = F.crop(image, *view.offset, res, res)  # black where the window leaves the image
    if view.flip:
        image = F.horizontal_flip(image)
    brightness, contrast, saturation = view.jitter
    if view.jitter != (1.0, 1.0, 1.0):
        image = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, brightness), contrast), saturation)
    return image


class Pictures(Dataset[Batch]):
    """A request is the index of this data set: one worker makes a whole batch, so nothing is collated twice."""

    def __init__(self, index: Index, res: int, interpolation: str) -> None:
        self.index, self.res, self.interpolation = index, res, interpolation

    def __getitem__(self, request: Request) -> Batch:
        images = torch.empty(len(request.samples), 3, self.res, self.res, dtype=torch.uint8)
        for i, (sample, view) in enumerate(zip(request.samples.tolist(), request.views, strict=True)):
            path = self.index.path(sample)
            image = decode(path)
            if tuple(image.shape[1:]) != tuple(self.index.sizes[sample]):
                was = "x".join(map(str, self.index.sizes[sample]))
                now = "x".join(map(str, image.shape[1:]))
                raise UserError(
                    f"{path} was {was} pixels when it was indexed and is {now} now. Run the same command again."
                )
            images[i] = picture(image, view, self.res, self.interpolation)
        labels = torch.from_numpy(self.index.labels[request.samples].astype(np.int64))
        return Batch(images, labels, torch.from_numpy(request.samples))


class Requests(Sampler[Request]):
    def __init__(self, requests: Iterable[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def batches(index: Index, requests: Iterable[Request], res: int, interpolation: str, workers: int) -> Iterator[Batch]:
    """The batch of every request, in their order, `workers` processes ahead of the caller."""
    loader = DataLoader(
        Pictures(index, res, interpolation),
        batch_size=None,
        sampler=Requests(requests),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=lambda _: ignore_stop_signals(),
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
