"""Predictions per image, and what follows from them: accuracy, paired gains, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import whole

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """One row per image, in the index's order."""

    predicted: NDArray[np.int32]  # -1: the image could not be decoded (data.on_bad: skip) and counts nowhere
    correct1: NDArray[np.bool_]
    correct5: NDArray[np.bool_]
    loss: NDArray[np.float32]
    confidence: NDArray[np.float32]  # the predicted class's softmax; NaN in files written before it was kept

    @property
    def counted(self) -> NDArray[np.bool_]:
        return self.predicted >= 0

    def summary(self) -> dict[str, float]:
        """top1 and top5 in percent, mean loss (without label smoothing), n of them; how many were skipped."""
        kept = self.counted
        return {
            "top1": round(100 * float(self.correct1[kept].mean()), 4),
            "top5": round(100 * float(self.correct5[kept].mean()), 4),
            "loss": round(float(self.loss[kept].mean(dtype=np.float64)), 6),
            "n": int(kept.sum()),
            "skipped": int((~kept).sum()),
        }

    def save(self, path: Path, sample_list: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, sample_list=np.frombuffer(sample_list.encode(), np.uint8), **vars(self))

    @staticmethod
    def read(path: Path) -> Predictions:
        return Predictions.read_with_list(path)[0]

    @staticmethod
    def read_with_list(path: Path) -> tuple[Predictions, str]:
        """(predictions, fingerprint of the sample list they are of)."""
        try:
            with np.load(path, allow_pickle=False) as a:
                confidence = a["confidence"] if "confidence" in a else np.full(len(a["loss"]), np.nan, np.float32)
                found = Predictions(a["predicted"], a["correct1"], a["correct5"], a["loss"], confidence)
                return found, a["sample_list"].tobytes().decode()
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(
                f"{path} holds no predictions ({error}). Accepted: what `evaluate --predictions FILE` writes."
            ) from None

    def of_classes(self, columns: Sequence[int]) -> Predictions:
        """With `predicted` as the model's classes, where it was one of those restricted to `columns`."""
        return replace(self, predicted=np.array([*columns, -1], np.int32)[self.predicted])

    def gain_over(self, before: Predictions) -> dict[str, Any]:
        """{delta_top1, delta_ci95} over `before` on the same images, in points; images that one could not decode are out."""
        both = self.counted & before.counted
        gain, interval = paired_gain(before.correct1[both], self.correct1[both])
        return {"delta_top1": gain, "delta_ci95": list(interval)}


def paired_gain(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """(gain, its 95 % interval) of top-1 in percentage points, paired image by image.

    The images are the same, so the interval is that of the mean difference; an unpaired one is several times wider.
    One image tells nothing of the spread: the interval is all there is.
    """
    difference = after.astype(np.float64) - before
    gain = 100 * float(difference.mean())
    if len(difference) < 2:
        return round(gain, 4), (-100.0, 100.0)
    half = 100 * 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return round(gain, 4), (round(gain - half, 4), round(gain + half, 4))


def calibration(predictions: Predictions) -> dict[str, float]:
    """Mean confidence and expected calibration error in percentage points: the mean distance of accuracy and confidence
    over 15 equally wide bins of confidence, weighted by their images (Guo et al., arXiv 1706.04599). Empty without them.
    """
    kept = predictions.counted & np.isfinite(predictions.confidence)
    if not kept.any():
        return {}
    confidence, hits = predictions.confidence[kept].astype(np.float64), predictions.correct1[kept]
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.abs(np.bincount(place, hits - confidence, CALIBRATION_BINS))
    return {"ece": round(100 * gaps.sum() / len(hits), 4), "mean_confidence": round(100 * confidence.mean(), 4)}
