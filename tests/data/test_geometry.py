"""Windows against torchvision's own arithmetic."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T

from fixres_dist.config.schema import ResizeRule
from fixres_dist.data import geometry

SIZES = [(375, 500), (500, 375), (333, 500), (224, 224), (97, 411), (1200, 1600), (65, 64)]


def reference_size(height: int, width: int, size: int) -> tuple[int, int]:
    image = T.Resize(size)(torch.zeros(1, height, width))
    return image.shape[1], image.shape[2]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("res", [64, 224, 320, 475])
@pytest.mark.parametrize("rule", ["fixefficientnet", "fixres", "timm"])
def test_test_view_is_torchvisions_resize_and_centre_crop(rule: str, res: int, height: int, width: int) -> None:
    resize = geometry.resize_of(rule, res, 0.875, "bicubic")
    assert resize.size == {"fixefficientnet": res, "fixres": int(256 / 224 * res), "timm": int(res / 0.875)}[rule]
    view = geometry.test_view(height, width, res, resize)
    assert view.size == reference_size(height, width, resize.size)
    rows = torch.arange(view.size[0]).view(1, -1, 1).expand(1, *view.size)
    columns = torch.arange(view.size[1]).view(1, 1, -1).expand(1, *view.size)
    cropped = T.CenterCrop(res)(torch.cat([rows, columns]))
    assert view.offset == (int(cropped[0, 0, 0]), int(cropped[1, 0, 0]))


def test_every_rule_that_the_settings_accept_is_in_the_table() -> None:
    assert set(geometry.RULES) == set(get_args(ResizeRule))


def test_height_rule_pads_portraits_with_black() -> None:
    """Measured on the original: 375x500 (width x height) at 384 has 14.6 % black pixels."""
    resize = geometry.resize_of("fixres_height", 384, 0.875, "bicubic")
    view = geometry.test_view(500, 375, 384, resize)
    assert view.size == (438, 328)
    assert view.offset[1] < 0
    assert 1 - view.size[1] / 384 == pytest.approx(0.146, abs=5e-4)


@pytest.mark.parametrize(
    ("res", "target"),
    [
        *((128, 146), (160, 182), (224, 256), (288, 329), (320, 365), (384, 438)),
        *((420, 480), (448, 512), (472, 539), (600, 685), (800, 914)),
    ],
)
def test_published_resize_targets(res: int, target: int) -> None:
    """The original rule int(256/224 * s), as listed for its resolutions."""
    assert geometry.resize_of("fixres", res, 0.875, "bilinear").size == target


def views(transform: str, epoch: int, samples: np.ndarray, size: tuple[int, int] = (200, 300)) -> list[geometry.View]:
    sizes = np.tile(np.array([size]), (len(samples), 1))
    resize = geometry.resize_of("fixefficientnet", 128, 0.875, "bicubic")
    return geometry.train_views(transform, sizes, samples, 128, resize, 11, epoch)


@pytest.mark.parametrize("transform", ["test", "test_flip", "test_aug", "random_resized_crop"])
def test_a_view_depends_on_seed_epoch_and_sample_alone(transform: str) -> None:
    some = views(transform, 2, np.array([3, 77, 9]))
    assert some == [views(transform, 2, np.array([sample]))[0] for sample in (3, 77, 9)]
    if transform != "test":
        assert some != views(transform, 3, np.array([3, 77, 9]))


def test_flipped_test_crop_is_one_of_two_pictures() -> None:
    plain, found = views("test", 0, np.arange(4000)), views("test_flip", 0, np.arange(4000))
    assert [v._replace(flip=False) for v in found] == plain
    assert abs(np.mean([v.flip for v in found]) - 0.5) < 0.03


def test_shifted_crop_moves_sideways_only() -> None:
    found = views("test_aug", 0, np.arange(4000))
    assert {v.offset[0] for v in found} == {0}
    xs = [v.offset[1] for v in found]
    assert (min(xs), max(xs)) == (0, 192 - 128)
    assert abs(np.mean([v.flip for v in found]) - 0.5) < 0.03
    jitter = np.array([v.jitter for v in found])
    assert jitter.min() > 0.95 - 1e-9
    assert jitter.max() < 1.05 + 1e-9
    assert jitter.std() > 0.02


def test_random_crop_has_torchvisions_distribution() -> None:
    boxes = np.array([v.box for v in views("random_resized_crop", 0, np.arange(6000), (375, 500))])
    image = torch.zeros(1, 375, 500)
    torch.manual_seed(0)
    transform = T.RandomResizedCrop(128)
    reference = []
    for _ in range(6000):
        p = transform.make_params([image])
        reference.append([p["top"], p["left"], p["height"], p["width"]])
    for mine, theirs in zip(features(boxes), features(np.array(reference)), strict=True):
        assert kolmogorov_smirnov(mine, theirs) < 0.0356  # 99.9 % limit for two samples of 6,000
    assert (boxes[:, 0] + boxes[:, 2] <= 375).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 500).all()


def features(boxes: np.ndarray) -> list[np.ndarray]:
    y, x, h, w = boxes.T
    return [h * w, np.log(w / h), y + h / 2, x + w / 2]


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    grid = np.sort(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), grid, "right") / len(a) - np.searchsorted(np.sort(b), grid, "right") / len(b)
        ).max()
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3000), (3000, 2), (1, 400)])
def test_extreme_shapes_get_a_window_inside(size: tuple[int, int]) -> None:
    for v in views("random_resized_crop", 0, np.arange(50), size):
        y, x, h, w = v.box
        assert h >= 1
        assert w >= 1
        assert 0 <= y <= size[0] - h
        assert 0 <= x <= size[1] - w
