"""A wrong order of classes is noticed by what the predictions say, and nothing is said of right ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fixres_dist.data import class_names
from fixres_dist.data.index import Index
from fixres_dist.training import class_order
from fixres_dist.training.predictions import Predictions

NUMBERS = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2 ..
TREES = ["ash", "birch", "cedar", "elm", "fir"]


def doubt(predicted: NDArray[np.integer], labels: NDArray[np.integer], classes: list[str]) -> str:
    n = len(labels)
    index = Index(Path("val"), tuple(classes), b"", np.zeros(n, np.int64), labels.astype(np.int32), np.ones((n, 2), np.int32),
                  np.zeros(n, np.uint32))  # fmt: skip
    hits = predicted == labels
    loss, confidence = np.zeros(n, np.float32), np.ones(n, np.float32)
    made = Predictions(predicted.astype(np.int32), hits, hits, loss, confidence, labels.astype(np.int32))
    return class_order.doubt(made, index, range(len(classes)), classes)


def noisy(right: NDArray[np.integer], classes: int, share: float, seed: int = 0) -> NDArray[np.integer]:
    """`right` for `share` of the images, any class for the others."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(right)) < share, right, rng.integers(0, classes, len(right)))


def test_timms_order_is_found_with_one_image_of_a_class() -> None:
    labels = np.arange(12)
    by_timm = np.array([class_names.natural(NUMBERS).index(name) for name in NUMBERS])
    said = doubt(noisy(by_timm, 12, 0.9), labels, NUMBERS)
    assert said.startswith("warning: top-1 is ")
    assert said.endswith("in another order. Next: data.class_map=natural (the order of timm's scripts)")


def test_torchvisions_order_is_found_under_a_class_map() -> None:
    classes = class_names.natural(NUMBERS)
    labels = np.repeat(np.arange(12), 4)
    theirs = np.array([sorted(classes).index(name) for name in classes])
    assert doubt(theirs[labels], labels, classes).endswith("Next: leave out data.class_map (torchvision's order)")


def test_imagenets_order_is_found_for_folders_by_number() -> None:
    classes = sorted(map(str, range(1000)))
    labels = np.arange(1000)
    said = doubt(noisy(np.array([int(name) for name in classes]), 1000, 0.7), labels, classes)
    assert "Next: data.class_map=natural" in said, "which is the same order"


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_any_other_permutation_is_found_by_half_of_the_images(share: float) -> None:
    labels = np.repeat(np.arange(5), 60)
    said = doubt(noisy(np.array([1, 2, 0, 4, 3])[labels], 5, share), labels, TREES)
    assert "if 5 of 5 classes are exchanged (ash is predicted as birch, birch is predicted as cedar, cedar" in said
    assert "Next: data.class_map=FILE" in said


def test_two_exchanged_classes_of_a_good_model_are_found() -> None:
    labels = np.repeat(np.arange(5), 60)
    said = doubt(noisy(np.array([0, 1, 2, 4, 3])[labels], 5, 0.95), labels, TREES)
    assert "if 2 of 5 classes are exchanged (elm is predicted as fir, fir is predicted as elm)" in said


def test_guessing_is_said() -> None:
    labels = np.repeat(np.arange(5), 60)
    assert "guessing among 5 classes gives 20.00 %" in doubt(np.zeros(300, int), labels, TREES)


@pytest.mark.parametrize("classes", [TREES, ["1", "10", "2", "3", "4"]])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("each", [1, 3, 10, 200])
def test_nothing_is_said_of_right_orders_however_good_the_model(classes: list[str], share: float, each: int) -> None:
    labels = np.repeat(np.arange(5), each)
    for seed in range(10):
        predicted = noisy(labels, 5, share, seed)
        if (predicted == labels).mean() > 0.2:
            assert not doubt(predicted, labels, classes)
