"""How far confidence is to be believed, and the temperature that makes it so (Guo et al., arXiv 1706.04599). No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fixres_dist.training.predictions import Predictions

BINS = 15
HOTTEST = 20.0  # of a temperature; 1 / HOTTEST is the coldest: pictures that are all classified right want 0
CHUNK = 1 << 22  # logits that are taken at once, so that memory does not grow with the split


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error in percentage points, and the mean confidence in percent."""

    ece: float
    mean_confidence: float


@dataclass(frozen=True)
class Reliability:
    """Images by confidence, in equally wide bins, each without its lower edge and with its upper one: arrays [bins]."""

    n: NDArray[np.int64]
    confidence: NDArray[np.float64]  # mean in the bin, 0 to 1; NaN in an empty one
    accuracy: NDArray[np.float64]  # the same

    def percentages(self) -> dict[int, float]:
        """Mean confidence of each bin that has images -> accuracy, both in percent."""
        full = self.n > 0
        return dict(
            zip((100 * self.confidence[full]).round().astype(int).tolist(), 100 * self.accuracy[full], strict=True)
        )

    @property
    def ece(self) -> float:
        """Distance between accuracy and confidence, averaged over the images, 0 to 1."""
        full = self.n > 0
        gaps = np.abs(self.accuracy[full] - self.confidence[full])
        return float((gaps * self.n[full]).sum() / self.n.sum())


def reliability(confidence: NDArray[np.floating], hits: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """`confidence` [n], from 0 to 1, of predictions that are right or not by `hits` [n]."""
    values = confidence.astype(np.float64)
    place = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    n = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(n, np.bincount(place, values, bins) / n, np.bincount(place, hits, bins) / n)


def reliability_of(predictions: Predictions) -> Reliability | None:
    """None where the predictions have no confidence."""
    kept = predictions.counted & np.isfinite(predictions.confidence)
    return reliability(predictions.confidence[kept], predictions.correct1[kept]) if kept.any() else None


def calibration(predictions: Predictions) -> Calibration | None:
    """None where the predictions have no confidence."""
    if not (found := reliability_of(predictions)):
        return None
    mean = float(np.nansum(found.confidence * found.n)) / int(found.n.sum())
    return Calibration(round(100 * found.ece, 4), round(100 * mean, 4))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The T for which softmax(logits / T) gives `labels` [n] the highest likelihood; `logits` [n, classes] are finite.

    The loss is convex in 1 / T: Newton's steps on it, and halves of the interval where one would leave that or steps do
    not shrink. Between 1 / HOTTEST and HOTTEST.
    """
    low, high, inverse, last = 1 / HOTTEST, HOTTEST, 1.0, HOTTEST
    for _ in range(200):
        slope, curvature = slope_and_curvature(logits, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = -slope / curvature if curvature > 0 else 0.0
        if not (low < inverse + step < high and abs(step) < last / 2):
            step = (low + high) / 2 - inverse
        if abs(step) <= 1e-12 * inverse:
            break
        inverse, last = inverse + step, abs(step)
    return 1 / inverse


def slope_and_curvature(
    logits: NDArray[np.floating], labels: NDArray[np.integer], inverse: float
) -> tuple[float, float]:  # fmt: skip
    """First and second derivative of the mean cross-entropy of `inverse` * logits with respect to `inverse`."""
    slope, curvature, rows = 0.0, 0.0, max(1, CHUNK // logits.shape[1])
    for start in range(0, len(logits), rows):
        z = logits[start : start + rows].astype(np.float64)
        z -= z.max(1, keepdims=True)
        weights = np.exp(inverse * z)
        weights /= weights.sum(1, keepdims=True)
        mean = (weights * z).sum(1)
        slope += float((mean - z[np.arange(len(z)), labels[start : start + rows]]).sum())
        curvature += float(((weights * z * z).sum(1) - mean**2).sum())
    return slope / len(logits), curvature / len(logits)
