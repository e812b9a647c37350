"""Scaling and jitter that equal PIL's bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support import pictures as p

from fixres_dist.data import pixels
from fixres_dist.data.geometry import View

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in pixels.FILTERS}


def tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def pillow(image: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize(size[::-1], INTERPOLATIONS[interpolation]))


def axis_by_axis(
    image: NDArray[np.uint8], size: tuple[int, int], axes: tuple[int, int], kind: str
) -> NDArray[np.uint8]:
    """Pillow scales one axis at a call, so its own choice of order does not matter."""
    for axis in axes:
        now = (size[0], image.shape[1]) if axis == 0 else (image.shape[0], size[1])
        image = pillow(image, now, kind)
    return image


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("seed", range(20))
def test_resize_equals_pillow(seed: int, interpolation: str) -> None:
    """Any sizes, shrunk, enlarged or kept, any part of the result, either order; noise, and black beside white."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 400, 2))
    size = (int(rng.integers(1, 300)), width if seed % 5 == 0 else int(rng.integers(1, 300)))
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    if seed % 2:
        image = np.where(image > 127, 255, 0).astype(np.uint8)
    rows, columns = (range(*sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in size)
    for height_first, axes in ((False, (1, 0)), (True, (0, 1))):
        want = axis_by_axis(image, size, axes, interpolation)[rows.start : rows.stop, columns.start : columns.stop]
        got = pixels.resize(tensor(image), size, (rows, columns), height_first, interpolation)
        assert torch.equal(got, tensor(want.copy()))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_equals_pillow_for_a_shrink_of_two_hundred(interpolation: str) -> None:
    """Sums of 800 weights, of black and white, which pass 8 bits on both sides."""
    image = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 40_000, 3))
    got = pixels.resize(tensor(image), (3, 200), (range(3), range(200)), False, interpolation)
    assert torch.equal(got, tensor(pillow(image, (3, 200), interpolation).copy()))


def test_a_planar_picture_is_scaled_alike() -> None:
    """torchvision's decoder hands out other layouts than Pillow's for some files."""
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    want = pixels.resize(
        tensor(image.permute(1, 2, 0).numpy().copy()), (20, 31), (range(20), range(31)), True, "bicubic"
    )
    assert torch.equal(pixels.resize(image, (20, 31), (range(20), range(31)), True, "bicubic"), want)


@pytest.mark.parametrize(
    "factors", [(1.3, 1.3, 1.3), (0.7, 0.7, 0.7), (0.95, 1.05, 1.02), (1.0, 1.0, 1.3), (1.0, 0.7, 1.0)]
)
def test_jitter_equals_pils(factors: tuple[float, float, float]) -> None:
    view = View(False, (0, 0, 80, 80), (80, 80), (0, 0), factors)
    for kind in (p.photograph(80, 80, 1), Image.new("RGB", (80, 80), (200, 30, 77)), Image.effect_noise((80, 80), 200)):
        image = kind.convert("RGB")
        ours = np.array(image)
        pixels.jitter(tensor(ours), factors)
        assert np.array_equal(ours, p.expected(image, view, 80, "bilinear"))
