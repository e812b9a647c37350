"""Pillow's resize and colour jitter of 8-bit pictures, bit for bit, compiled by numba.

Resize: an output line is a weighted sum of input lines, with 22-bit integer weights. torchvision's resize of tensors
has 16-bit weights: it is as fast, but one value in 250 is off by a grey level, which jitter turns into four. Jitter
takes a third of the time of operations on whole pictures in torch, whose intermediate results do not fit into the CPU's
caches.

Importing this module compiles it, which takes 2 s. So only torch_cpu imports it, before the worker processes are
forked. numba's cache of compiled code is not used: on a shared folder, nodes of several kinds that start together could
load each other's instructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

WEIGHT_BITS = 22  # Pillow's PRECISION_BITS
# Interpolation -> (the number of its filter, how far it reaches): Pillow's antialiased filters, by timm's names.
FILTERS = {"box": (0, 0.5), "bilinear": (1, 1.0), "bicubic": (2, 2.0), "hamming": (3, 1.0), "lanczos": (4, 3.0)}
HAMMING = (float(np.float32(0.54)), float(np.float32(0.46)))  # Pillow has them in single precision
HALF = 1 << (WEIGHT_BITS - 1)
BAND = 64  # rows that are transposed together: as many as fit into the L1 and L2 caches

Bytes = NDArray[np.uint8]
Function = TypeVar("Function", bound=Callable[..., Any])


class Taps(NamedTuple):
    """The source lines that each line of a scaled picture is a sum of, and their weights."""

    first: int  # source lines [first, end) are read by any of them
    end: int
    begin: NDArray[np.int64]  # [lines]: the first one that each reads, counted from `first`
    weights: NDArray[np.int32]  # [lines, taps]: of this and the following source lines; zero at the end


def resize(
    image: torch.Tensor, size: tuple[int, int], lines: Sequence[range], height_first: bool, interpolation: str
) -> torch.Tensor:
    """Scale uint8 [3, height, width] to `size`, and return only `lines` (rows, columns) of the result.

    `interpolation` is one of FILTERS. One axis after the other, rounded to 8 bits in between. The result is uint8
    [3, rows, columns], channels last in memory.
    """
    pixels = image.permute(1, 2, 0).numpy()
    rows, columns = (filter_taps(pixels.shape[k], size[k], lines[k], interpolation) for k in (0, 1))
    pixels = pixels[rows.first : rows.end, columns.first : columns.end]
    pixels = (
        scaled_width(scaled_height(pixels, rows), columns)
        if height_first
        else scaled_height(scaled_width(pixels, columns), rows)
    )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jitter(image: torch.Tensor, factors: tuple[float, float, float]) -> None:
    """Change brightness, contrast and saturation of uint8 [3, height, width], channels last in memory, in place."""
    if factors != (1.0, 1.0, 1.0):
        adjust(image.permute(1, 2, 0).numpy(), *factors)


def filter_taps(length: int, size: int, lines: range, interpolation: str) -> Taps:
    """The taps of `lines` when `length` lines are scaled to `size`, in Pillow's arithmetic."""
    number, support = FILTERS[interpolation]
    radius = support * max(length / size, 1.0)
    begin = np.empty(len(lines), np.int64)
    weights = np.zeros((len(lines), 2 * math.ceil(radius) + 1), np.int32)
    end = fill_taps(length, size, lines.start, number, radius, begin, weights, np.empty(weights.shape[1]))
    first = int(begin[0])
    return Taps(first, end, begin - first, weights)


def scaled_height(pixels: Bytes, taps: Taps) -> Bytes:
    """uint8 [height, width, 3] to uint8 [lines of `taps`, width, 3]."""
    source = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    made = np.empty((len(taps.begin), *pixels.shape[1:]), np.uint8)
    weighted_sums(source, taps.begin, taps.weights, made.reshape(len(made), -1))
    return made


def scaled_width(pixels: Bytes, taps: Taps) -> Bytes:
    """uint8 [height, width, 3] to uint8 [height, lines of `taps`, 3]."""
    made = np.empty((len(pixels), len(taps.begin), 3), np.uint8)
    sideways_sums(pixels, taps.begin, taps.weights, made)
    return made


def compiled(signature: str) -> Callable[[Function], Function]:
    """numba's decorator, which has no types; in `numpy` mode division by zero is no error, which is faster."""
    decorator: Callable[[Function], Function] = njit(signature, error_model="numpy")
    return decorator


@compiled("float64(int64, float64)")
def filter_value(number: int, x: float) -> float:
    """Pillow's filter of that number in FILTERS at `x`, in lines of the larger picture."""
    if number == 0:
        return 1.0 if -0.5 < x <= 0.5 else 0.0
    x = -x if x < 0.0 else x
    if number == 1:
        return 1.0 - x if x < 1.0 else 0.0
    if number == 2:  # Keys' cubic with a = -1/2
        if x < 1.0:
            return (1.5 * x - 2.5) * x * x + 1.0
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0
    if number == 3:
        if x == 0.0 or x >= 1.0:
            return 1.0 if x == 0.0 else 0.0
        return math.sin(x * math.pi) / (x * math.pi) * (HAMMING[0] + HAMMING[1] * math.cos(x * math.pi))
    if x == 0.0 or x >= 3.0:
        return 1.0 if x == 0.0 else 0.0
    return math.sin(x * math.pi) / (x * math.pi) * (math.sin(x / 3.0 * math.pi) / (x / 3.0 * math.pi))


@compiled("int64(int64, int64, int64, int64, float64, int64[::1], int32[:, ::1], float64[::1])")
def fill_taps(
    length: int, size: int, start: int, number: int, radius: float, begin: Any, weights: Any, values: Any
) -> int:
    """Fill in where each line from `start` on begins to read, and its weights; returns the end of what they read."""
    scale = length / size
    stretch = scale if scale > 1.0 else 1.0
    end = 0
    for k in range(len(begin)):
        centre = (start + k + 0.5) * scale
        first = int(centre - radius + 0.5)
        first = first if first > 0 else 0
        end = int(centre + radius + 0.5)
        end = end if end < length else length
        total = 0.0
        for t in range(end - first):
            values[t] = filter_value(number, (first + t - centre + 0.5) * (1.0 / stretch))
            total += values[t]
        for t in range(end - first):
            weight = values[t] / total * (1 << WEIGHT_BITS)
            weights[k, t] = int(weight + (0.5 if weight >= 0.0 else -0.5))
        begin[k] = first
    return end


@compiled("void(int32[::1], uint8[::1], int32)")
def add(sums: Any, line: Any, weight: Any) -> None:
    for i in range(len(sums)):
        sums[i] += np.int32(weight * np.int32(line[i]))


@compiled("void(int32[::1], uint8[::1])")
def to_bytes(sums: Any, line: Any) -> None:
    for i in range(len(sums)):
        value = sums[i] >> WEIGHT_BITS
        line[i] = 0 if value < 0 else 255 if value > 255 else value


@compiled("void(uint8[:, ::1], int64[::1], int32[:, ::1], uint8[:, ::1])")
def weighted_sums(source: Any, begin: Any, weights: Any, made: Any) -> None:
    """Each line of `made` [n, bytes] is a weighted sum of lines of `source` [lines, bytes]."""
    sums = np.empty(made.shape[1], np.int32)
    for k in range(len(begin)):
        for i in range(len(sums)):
            sums[i] = HALF
        for t in range(weights.shape[1]):
            if weights[k, t]:
                add(sums, source[begin[k] + t], weights[k, t])
        to_bytes(sums, made[k])


@compiled("void(uint8[:, :, :], int64[::1], int32[:, ::1], uint8[:, :, ::1])")
def sideways_sums(source: Any, begin: Any, weights: Any, made: Any) -> None:
    """Each column of `made` [height, n, 3] is a weighted sum of columns of `source` [height, columns, 3].

    The picture is transposed in bands; transposing it at once with numpy takes three times as long.
    """
    height, columns = source.shape[:2]
    for top in range(0, height, BAND):
        rows = min(BAND, height - top)
        upright = np.empty((columns, rows * 3), np.uint8)
        for y in range(rows):
            for x in range(columns):
                for c in range(3):
                    upright[x, 3 * y + c] = source[top + y, x, c]
        scaled = np.empty((len(begin), rows * 3), np.uint8)
        weighted_sums(upright, begin, weights, scaled)
        for y in range(rows):
            for x in range(len(begin)):
                for c in range(3):
                    made[top + y, x, c] = scaled[x, 3 * y + c]


@compiled("int32(uint8, uint8, uint8)")
def grey(r: Any, g: Any, b: Any) -> Any:
    """The grey level of a colour, as Pillow's convert("L")."""
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@compiled("uint8(float32, float32, float32)")
def blend(value: Any, base: Any, factor: Any) -> Any:
    """Pillow's blend: the distance of `value` from `base` times `factor`, in fp32, truncated and clipped to 8 bits."""
    return min(max(np.int32((value - base) * factor + base), np.int32(0)), np.int32(255))


@compiled("void(uint8[:, :, ::1], float32, float32, float32)")
def adjust(pixels: Any, brightness: Any, contrast: Any, saturation: Any) -> None:
    """`jitter` of uint8 [height, width, 3]. Brightness and contrast are a table of 256 values. Contrast needs the mean
    grey level after brightness, so the picture is read twice."""
    table = np.empty(256, np.uint8)
    for value in range(256):
        table[value] = blend(value, 0, brightness)
    total = 0
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            total += grey(table[pixels[y, x, 0]], table[pixels[y, x, 1]], table[pixels[y, x, 2]])
    mean = np.floor(total / (pixels.shape[0] * pixels.shape[1]) + 0.5)
    for value in range(256):
        table[value] = blend(table[value], mean, contrast)
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            r, g, b = table[pixels[y, x, 0]], table[pixels[y, x, 1]], table[pixels[y, x, 2]]
            base = grey(r, g, b)
            pixels[y, x, 0] = blend(r, base, saturation)
            pixels[y, x, 1] = blend(g, base, saturation)
            pixels[y, x, 2] = blend(b, base, saturation)
