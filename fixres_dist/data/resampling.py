"""Pillow's antialiased resize of 8-bit pictures, bit for bit, from tensors to tensors.

Pillow sums weights of 22 bits in integers. torchvision's own resize has 16-bit ones: one value in 250 is a grey level
off, which an evaluation never notices and which colour jitter makes four. So pictures that are jittered are scaled here.

An output line is a weighted sum of whole input lines, which is what torch's embedding_bag does fastest. It sums in fp32,
exact for integers to 2^24, hence two sums: of the weights' upper bits and of their lower ones.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

WEIGHT_BITS = 22  # Pillow's PRECISION_BITS
LOW_BITS = 7  # of them summed apart: neither sum passes 2^24 below 1,028 taps, so below a 257-fold shrink
RADIUS = {"bilinear": 1.0, "bicubic": 2.0}  # of the filter, in output pixels where it shrinks


def resize_as_pillow(
    image: torch.Tensor, size: tuple[int, int], lines: Sequence[range], height_first: bool, interpolation: str
) -> torch.Tensor:
    """These lines [rows, columns] of uint8 [3, height, width] scaled to `size`; the second axis sees 8 bits of the first."""
    for axis in (0, 1) if height_first else (1, 0):
        if image.shape[axis + 1] == size[axis]:
            image = image.narrow(axis + 1, lines[axis].start, len(lines[axis]))
        else:
            image = scaled_lines(image, axis, size[axis], lines[axis], interpolation)
    return image


def scaled_lines(image: torch.Tensor, axis: int, size: int, wanted: range, interpolation: str) -> torch.Tensor:
    """The `wanted` lines of uint8 [3, height, width] scaled to `size` along `axis` (0: height, 1: width)."""
    taps = filter_taps(image.shape[axis + 1], size, wanted, interpolation)
    weights, lines = torch.frombuffer(taps.memory, dtype=torch.float32).view(2, -1, taps.per_line)
    needed = image.narrow(axis + 1, taps.first, taps.last - taps.first).permute((1, 0, 2) if axis == 0 else (2, 0, 1))
    table = torch.from_numpy(np.ascontiguousarray(needed.numpy())).flatten(1).float()
    sums = embedding_bag(lines.view(torch.int32), table, per_sample_weights=weights, mode="sum")
    high, low = sums.chunk(2)
    high.add_(low.floor_(), alpha=2.0 ** (LOW_BITS - WEIGHT_BITS)).add_(0.5).clamp_(0, 255)
    # numpy casts float to uint8 many at a time, torch one by one.
    made = torch.from_numpy(high.numpy().astype(np.uint8)).unflatten(1, needed.shape[1:])
    return made.permute((1, 0, 2) if axis == 0 else (1, 2, 0))


class Taps(NamedTuple):
    """Which input lines make n output lines, and by how much.

    `memory`: weights, fp32 [2 n, per_line], upper bits before lower ones; then their lines, counted from `first`, int32.
    """

    memory: mmap.mmap
    per_line: int
    first: int
    last: int  # the line after the last one needed


# An eighth of a picture's time without the cache; 512 hold random_resized_crop's windows of ImageNet in 13 MB.
@lru_cache(512)
def filter_taps(length: int, size: int, wanted: range, interpolation: str) -> Taps:
    """For the `wanted` lines of `length` lines scaled to `size`, with Pillow's arithmetic."""
    scale = length / size
    stretch = max(scale, 1.0)
    radius = RADIUS[interpolation] * stretch
    centres = (np.asarray(wanted)[:, None] + 0.5) * scale
    begin = np.maximum((centres - radius + 0.5).astype(np.int64), 0)
    end = np.minimum((centres + radius + 0.5).astype(np.int64), length)
    taps = begin + np.arange((end - begin).max())
    x = np.abs((taps - centres + 0.5) * (1 / stretch))
    if interpolation == "bilinear":
        weights = np.maximum(1 - x, 0)
    else:  # Keys' cubic with a = -1/2
        weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0))
    weights *= taps < end
    weights /= np.cumsum(weights, 1)[:, -1:]  # summed from left to right, as in Pillow's loop
    weights = np.trunc(weights * 2**WEIGHT_BITS + np.copysign(0.5, weights)) / 2**LOW_BITS
    high = np.rint(weights)
    first, last = int(begin[0, 0]), int(end[-1, 0])
    # Pages of their own: small blocks kept between the megabytes of pictures would pin holes in the allocator's memory.
    memory = mmap.mmap(-1, 2 * 2 * weights.size * 4)
    kept = np.frombuffer(memory, np.float32).reshape(2, 2, *weights.shape)
    kept[0] = high * 2.0 ** (LOW_BITS - WEIGHT_BITS), weights - high
    kept[1].view(np.int32)[:] = np.minimum(taps, last - 1) - first
    return Taps(memory, taps.shape[1], first, last)
