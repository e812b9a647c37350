"""Precision, recall, F1, confusion, calibration and temperature against other people's code, or a plain computation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics

from fixres_dist.training import pictures
from fixres_dist.training.calibration import HOTTEST, fit_temperature, reliability
from fixres_dist.training.confusion import by_class, confusion_matrix


def some(n: int, classes: int, seed: int, scale: float = 3.0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(logits, labels) of a model that is right more often than not, too sure by the factor `scale`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.5
    return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize(("classes", "absent"), [(5, 0), (7, 2), (40, 10)])
def test_precision_recall_f1_and_confusion_equal_scikit_learns(classes: int, absent: int) -> None:
    """Also where classes have no image, no prediction or neither."""
    logits, labels = some(300, classes, seed=classes)
    labels, predicted = labels % (classes - absent), logits.argmax(1) // 2
    found, numbers = by_class(labels, predicted, classes), list(range(classes))
    options = {"average": None, "labels": numbers, "zero_division": 0}
    for own, theirs in (
        ("precision", metrics.precision_score),
        ("recall", metrics.recall_score),
        ("f1", metrics.f1_score),
    ):
        assert getattr(found, own) == pytest.approx(theirs(labels, predicted, **options), abs=1e-12)
        mean = theirs(labels, predicted, average="macro", zero_division=0)
        assert getattr(found.macro(), f"macro_{own}") == pytest.approx(100 * mean, abs=1e-4)
    matrix = confusion_matrix(labels, predicted, classes)
    assert (matrix == metrics.confusion_matrix(labels, predicted, labels=numbers)).all()
    assert found.images.tolist() == matrix.sum(1).tolist()
    assert found.predicted.tolist() == matrix.sum(0).tolist()


def test_calibration_error_by_bins_equals_a_loop_over_the_images() -> None:
    logits, labels = some(400, 6, seed=1)
    shares = softmax(logits.astype(np.float64), 1)
    confidence, hits = shares.max(1), shares.argmax(1) == labels
    bins: dict[int, list[int]] = {}
    for image, value in enumerate(confidence):
        place = next(k for k in range(15) if k / 15 < value <= (k + 1) / 15)
        bins.setdefault(place, []).append(image)
    expected = sum(
        len(inside) / 400 * abs(np.mean([hits[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
        for inside in bins.values()
    )
    found = reliability(confidence, hits)
    assert found.ece == pytest.approx(expected, abs=1e-9)
    assert found.n.tolist() == [len(bins.get(k, ())) for k in range(15)]
    for k, inside in bins.items():
        assert found.accuracy[k] == pytest.approx(np.mean(hits[inside]))


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 12.0])
def test_temperature_equals_a_search_by_scipy(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fixres_dist.training.calibration.CHUNK", 6 * 70)  # in several pieces
    logits, labels = some(500, 6, seed=2, scale=scale)

    def loss(log_t: float) -> float:
        scores = log_softmax(logits.astype(np.float64) / np.exp(log_t), 1)
        return float(-scores[np.arange(500), labels].mean())

    bounds = (np.log(1 / HOTTEST), np.log(HOTTEST))
    best = float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x))
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(best, rel=1e-6)
    assert loss(np.log(found)) <= loss(0.0)
    assert fit_temperature(logits / found, labels) == pytest.approx(1.0, rel=1e-5)


def test_temperature_of_pictures_all_right_or_all_wrong_is_bounded() -> None:
    logits = np.array([[9.0, 0.0], [0.0, 9.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(1 / HOTTEST)
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(HOTTEST)
    assert fit_temperature(np.zeros((3, 2)), np.array([1, 0, 1])) > 0  # nothing to learn from


def test_a_confusion_sheet_has_every_number_however_long() -> None:
    """Counts from 100 on had no room in a cell, and were left out."""
    sheet = np.asarray(pictures.confusion_sheet(1234 * np.eye(13, dtype=np.int64), [f"class {k}" for k in range(13)]))
    y, x = (int(found[0]) for found in np.nonzero((sheet == (0, 68, 136)).all(2)))
    assert sheet[y : y + 30, x : x + 30].min(2).max() > 200, "nearly white on the darkest cell"
