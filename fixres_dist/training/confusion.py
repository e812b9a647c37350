"""Which class is taken for which, and precision, recall and F1 of each: as scikit-learn has them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fixres_dist.training.predictions import Predictions


@dataclass(frozen=True)
class Macro:
    """Means over the classes in percent, each class counting alike. As in scikit-learn a class counts that has an image or
    a prediction, and a share of nothing is 0."""

    macro_precision: float
    macro_recall: float
    macro_f1: float


@dataclass(frozen=True)
class ByClass:
    """Of each class, arrays [classes]: shares from 0 to 1, 0 where they would be shares of nothing."""

    precision: NDArray[np.float64]  # of the images taken for the class, those of it
    recall: NDArray[np.float64]  # of the class's images, those taken for it
    f1: NDArray[np.float64]  # harmonic mean of the two
    images: NDArray[np.int64]
    predicted: NDArray[np.int64]  # images taken for the class

    def macro(self) -> Macro:
        counts = (self.images > 0) | (self.predicted > 0)
        means = (100 * float(share[counts].mean()) for share in (self.precision, self.recall, self.f1))
        return Macro(*(round(mean, 4) for mean in means))


def by_class(labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> ByClass:
    """Of labels and predictions [n], numbers of 0 .. classes - 1."""
    images, taken = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)

    def share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.divide(part, whole, out=np.zeros(classes), where=whole > 0)

    return ByClass(share(right, taken), share(right, images), share(2 * right, images + taken), images, taken)


def confusion_matrix(
    labels: NDArray[np.integer], predicted: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:  # fmt: skip
    """[classes, classes]: images of the row's class that are taken for the column's; arguments as of `by_class`."""
    cells = labels.astype(np.int64) * classes + predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def counted(predictions: Predictions) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """(labels, predicted classes) of the images that have a prediction; None for files of older versions, without labels."""
    labels, predicted = predictions.labels[predictions.counted], predictions.predicted[predictions.counted]
    return (labels, predicted) if (labels >= 0).all() else None


def macro(predictions: Predictions) -> Macro | None:
    """None where the predictions have no labels."""
    if (found := counted(predictions)) is None:
        return None
    return by_class(*found, classes=1 + int(max(map(np.max, found)))).macro()
