"""Scaling that equals Pillow's bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fixres_dist.data import resampling

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pillow(pixels: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], INTERPOLATIONS[interpolation]))


def one_by_one(pixels: NDArray[np.uint8], size: tuple[int, int], vertical_first: bool, kind: str) -> NDArray[np.uint8]:
    """Pillow scales one axis at a call, so its own choice of order does not matter."""
    for axis in (0, 1) if vertical_first else (1, 0):
        now = (size[0], pixels.shape[1]) if axis == 0 else (pixels.shape[0], size[1])
        pixels = pillow(pixels, now, kind)
    return pixels


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("seed", range(20))
def test_equals_pillow(seed: int, interpolation: str) -> None:
    """Any sizes, shrunk, enlarged or kept, any part of the result, either order; noise, and black beside white."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 400, 2))
    size = (int(rng.integers(1, 300)), width if seed % 5 == 0 else int(rng.integers(1, 300)))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if seed % 2:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    lines = [range(*sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in size]
    for vertical_first in (False, True):
        want = one_by_one(pixels, size, vertical_first, interpolation)
        got = resampling.resize_as_pillow(
            torch.from_numpy(pixels).permute(2, 0, 1), size, lines, vertical_first, interpolation
        )
        assert np.array_equal(
            got.permute(1, 2, 0).numpy(), want[lines[0].start : lines[0].stop, lines[1].start : lines[1].stop]
        )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_pillow_for_a_shrink_of_two_hundred(interpolation: str) -> None:
    """800 taps: sums of fp32 stay exact because the weights are split."""
    pixels = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 40_000, 3))
    got = resampling.resize_as_pillow(
        torch.from_numpy(pixels).permute(2, 0, 1), (3, 200), [range(3), range(200)], False, interpolation
    )
    assert np.array_equal(got.permute(1, 2, 0).numpy(), pillow(pixels, (3, 200), interpolation))
