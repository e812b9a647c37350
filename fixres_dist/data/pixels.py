"""Pillow's resize and colour jitter of 8-bit pictures, bit for bit, compiled by numba.

Resize: an output line is a weighted sum of input lines, by whole weights of 22 bits. torchvision's has 16-bit ones: as
fast, but one value in 250 is a grey level off, and jitter makes four levels of it. Jitter: a third of the time of
whole-picture operations in torch, whose temporaries leave the caches.

Importing this module compiles it, in 2 s: it is imported where pictures are made, before the processes that make
them are forked. numba's files of compiled code are not used: nodes of several kinds that start together on a shared
folder can be left with each other's instructions.
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
HALF = 1 << (WEIGHT_BITS - 1)
BAND = 64  # rows that are laid on their side together: as many as stay in the first caches

Bytes = NDArray[np.uint8]
Function = TypeVar("Function", bound=Callable[..., Any])


class Taps(NamedTuple):
    """What lines of a scaled picture read of the lines of its source."""

    first: int  # the first line that any of them reads
    end: int  # and the one after the last
    begin: NDArray[np.int64]  # [count]: where each begins to read, counted from `first`
    weights: NDArray[np.int32]  # [count, taps]: zero where it reads no more


def resize(
    image: torch.Tensor, size: tuple[int, int], lines: Sequence[range], height_first: bool, interpolation: str
) -> torch.Tensor:
    """These lines (rows, columns) of uint8 [3, height, width] scaled to `size`; the second axis sees 8 bits of the first.

    `interpolation` is bilinear or bicubic. The result is channels last in memory, as files are decoded.
    """
    pixels = image.permute(1, 2, 0).numpy()
    rows, columns = (filter_taps(pixels.shape[k], size[k], lines[k], interpolation == "bicubic") for k in (0, 1))
    pixels = pixels[rows.first : rows.end, columns.first : columns.end]
    pixels = (
        scaled_width(scaled_height(pixels, rows), columns)
        if height_first
        else scaled_height(scaled_width(pixels, columns), rows)
    )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def jitter(image: torch.Tensor, factors: tuple[float, float, float]) -> None:
    """Brightness, contrast and saturation of uint8 [3, height, width], channels last in memory, in this order, in place."""
    if factors != (1.0, 1.0, 1.0):
        adjust(image.permute(1, 2, 0).numpy(), *factors)


def filter_taps(length: int, size: int, lines: range, cubic: bool) -> Taps:
    """Of `lines` of `length` lines scaled to `size`, with Pillow's arithmetic."""
    radius = (2.0 if cubic else 1.0) * max(length / size, 1.0)
    begin = np.empty(len(lines), np.int64)
    weights = np.zeros((len(lines), 2 * math.ceil(radius) + 1), np.int32)
    end = fill_taps(length, size, lines.start, cubic, begin, weights, np.empty(weights.shape[1]))
    first = int(begin[0])
    return Taps(first, end, begin - first, weights)


def scaled_height(pixels: Bytes, taps: Taps) -> Bytes:
    """uint8 [height, width, 3] to as many rows as `taps` has."""
    source = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    made = np.empty((len(taps.begin), *pixels.shape[1:]), np.uint8)
    weighted_sums(source, taps.begin, taps.weights, made.reshape(len(made), -1))
    return made


def scaled_width(pixels: Bytes, taps: Taps) -> Bytes:
    """uint8 [height, width, 3] to as many columns as `taps` has."""
    made = np.empty((len(pixels), len(taps.begin), 3), np.uint8)
    sideways_sums(pixels, taps.begin, taps.weights, made)
    return made


def compiled(signature: str) -> Callable[[Function], Function]:
    """numba's decorator, which has no types; with `numpy` a division by zero is no error, so loops can be vectorised."""
    decorator: Callable[[Function], Function] = njit(signature, error_model="numpy")
    return decorator


@compiled("int64(int64, int64, int64, boolean, int64[::1], int32[:, ::1], float64[::1])")
def fill_taps(length: int, size: int, start: int, cubic: bool, begin: Any, weights: Any, values: Any) -> int:
    """Where each line from `start` on begins to read, and its weights; returns the line after the last that is read."""
    scale = length / size
    stretch = scale if scale > 1.0 else 1.0
    radius = (2.0 if cubic else 1.0) * stretch
    end = 0
    for k in range(len(begin)):
        centre = (start + k + 0.5) * scale
        first = int(centre - radius + 0.5)
        first = first if first > 0 else 0
        end = int(centre + radius + 0.5)
        end = end if end < length else length
        total = 0.0
        for t in range(end - first):
            x = (first + t - centre + 0.5) * (1.0 / stretch)
            x = -x if x < 0.0 else x
            values[t] = 0.0
            if not cubic:
                values[t] = 1.0 - x if x < 1.0 else 0.0
            elif x < 1.0:  # Keys' cubic with a = -1/2
                values[t] = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                values[t] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
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
    """Each line of `made` [n, bytes] from those of `source` [lines, bytes] that its weights name."""
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
    """Each column of `made` [height, n, 3] from those of `source` [height, columns, 3] that its weights name."""
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
    """Pillow's convert("L")."""
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@compiled("uint8(float32, float32, float32)")
def blend(value: Any, base: Any, factor: Any) -> Any:
    """Pillow's blend: away from `base` by a factor, in fp32, truncated and clipped to 8 bits."""
    return min(max(np.int32((value - base) * factor + base), np.int32(0)), np.int32(255))


@compiled("void(uint8[:, :, ::1], float32, float32, float32)")
def adjust(pixels: Any, brightness: Any, contrast: Any, saturation: Any) -> None:
    """Brightness and contrast map 256 values; between them stands the whole picture's mean, so it is read twice."""
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
