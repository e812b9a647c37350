"""Which class is taken for which, and precision, recall and F1 of each: as scikit-learn has them. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import printable
from fixres_dist.base.files import write_text
from fixres_dist.runs.results import Measures
from fixres_dist.training.calibration import calibration
from fixres_dist.training.predictions import Predictions

MOST_CLASSES = 2000  # of a confusion matrix: its numbers grow with their square


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


def matrix_of(predictions: Predictions, classes: int) -> NDArray[np.int64]:
    """`confusion_matrix` of predictions that have labels, over the images with a prediction."""
    kept = predictions.counted
    return confusion_matrix(predictions.labels[kept], predictions.predicted[kept], classes)


def counted(predictions: Predictions) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """(labels, predicted classes) of the images that have a prediction; None for files of older versions, without labels."""
    labels, predicted = predictions.labels[predictions.counted], predictions.predicted[predictions.counted]
    return (labels, predicted) if (labels >= 0).all() else None


def macro(predictions: Predictions) -> Macro | None:
    """None where the predictions have no labels."""
    if (found := counted(predictions)) is None:
        return None
    return by_class(*found, classes=1 + int(max(map(np.max, found)))).macro()


def measures(predictions: Predictions) -> Measures | None:
    """None for files of older versions, which lack labels or confidence."""
    means, believed = macro(predictions), calibration(predictions)
    return Measures(**asdict(means), **asdict(believed)) if means and believed else None


def write_csv(matrix: NDArray[np.int64], names: Sequence[str], file: Path) -> None:
    """A row for each class, with the images of it that are taken for each class in a column; all classes in `names`."""
    text, named = io.StringIO(), [printable(name) for name in names]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["is \\ taken for", *named])
    writer.writerows([name, *row] for name, row in zip(named, matrix.tolist(), strict=True))
    write_text(file, text.getvalue())
