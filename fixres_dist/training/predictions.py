"""Predictions per image, and what follows from them: accuracy and the paired gain. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.checksums import load_arrays, save_arrays
from fixres_dist.base.commands import command
from fixres_dist.base.small_files import Damaged
from fixres_dist.runs.results import Gain, Summary


@dataclass(frozen=True)
class Predictions:
    """One model's prediction for every image of a split, all arrays [n], in the order of the split's index."""

    predicted: NDArray[np.int32]  # the class; -1: the image could not be decoded (data.on_bad: skip) and is not counted
    correct1: NDArray[np.bool_]
    correct5: NDArray[np.bool_]
    loss: NDArray[np.float32]  # cross-entropy without label smoothing
    confidence: NDArray[np.float32]  # softmax of the predicted class; NaN in files of older versions
    labels: NDArray[np.int32]  # the class it is of; -1 in files of older versions, which do not say

    @property
    def counted(self) -> NDArray[np.bool_]:
        return self.predicted >= 0

    def summary(self) -> Summary:
        kept = self.counted
        return Summary(
            top1=round(100 * float(self.correct1[kept].mean()), 4),
            top5=round(100 * float(self.correct5[kept].mean()), 4),
            loss=round(float(self.loss[kept].mean(dtype=np.float64)), 6),
            n=int(kept.sum()),
            skipped=int((~kept).sum()),
        )

    def gain_over(self, before: Predictions, of: int = 1) -> Gain:
        """Top-1 of these minus that of `before`, over the images that both could decode; `of` as in paired_gain."""
        both = self.counted & before.counted
        return paired_gain(before.correct1[both], self.correct1[both], of)

    def of_classes(self, columns: Sequence[int]) -> Predictions:
        """With classes of the model, for predictions made from logits restricted to the classes `columns`."""
        of_model = np.array([*columns, -1], np.int32)
        return replace(self, predicted=of_model[self.predicted], labels=of_model[self.labels])

    def save(self, path: Path, sample_list: str) -> None:
        path.parent.mkdir(exist_ok=True)
        arrays = {"sample_list": np.frombuffer(sample_list.encode(), np.uint8), **vars(self)}
        save_arrays(path, arrays, compressed=True)

    @staticmethod
    def read(path: Path) -> Predictions:
        return Predictions.read_with_list(path)[0]

    @staticmethod
    def read_with_list(path: Path) -> tuple[Predictions, str]:
        """(predictions, fingerprint of their index). Raises Damaged for a file that holds none, or others than were written."""
        accepted = f"give a file of `{command('evaluate')} --predictions FILE`"
        try:
            a, _ = load_arrays(path, accepted)
            confidence = a["confidence"] if "confidence" in a else np.full(len(a["loss"]), np.nan, np.float32)
            labels = a["labels"] if "labels" in a else np.full(len(a["loss"]), -1, np.int32)
            found = Predictions(a["predicted"], a["correct1"], a["correct5"], a["loss"], confidence, labels)
            sample_list = a["sample_list"].tobytes().decode()
            if {array.shape for array in vars(found).values()} != {(len(found.loss),)}:
                raise ValueError("its arrays are not of one length")
        except (FileNotFoundError, Damaged, KeyError, ValueError, TypeError) as error:
            why = error.why if isinstance(error, Damaged) else error
            raise Damaged(path, f"it holds no predictions ({why})", accepted) from None
        return found, sample_list


def paired_gain(before: NDArray[np.bool_], after: NDArray[np.bool_], of: int = 1) -> Gain:
    """Gain in top-1 from hits [n] of two models on the same images, paired image by image.

    The interval is that of the mean difference per image: 1.96 standard errors to each side. One that ignores the pairing
    is several times wider. One image tells nothing about the spread: its interval is -100 to 100. `of`: models on these
    images that `before` was picked from; the intervals over all of them hold together then (Bonferroni's correction).
    """
    difference = after.astype(np.float64) - before
    gain = 100 * float(difference.mean())
    if len(difference) < 2:
        return Gain(round(gain, 4), (-100.0, 100.0))
    errors = 1.96 if of == 1 else NormalDist().inv_cdf(1 - 0.025 / of)
    half = 100 * errors * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return Gain(round(gain, 4), (round(gain - half, 4), round(gain + half, 4)))
