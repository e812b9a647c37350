"""What is measured on a set: accuracy, calibration, paired gain, accuracy by ReaL labels and by class. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.data.index import Index
from fixres_dist.runs.results import Gain, Summary
from fixres_dist.training import class_order
from fixres_dist.training.calibration import Calibration, calibration
from fixres_dist.training.predictions import Predictions


@dataclass(frozen=True)
class Real:
    """Top-1 in percent by ReaL labels, of each model by its label, over the `n` images that have such labels."""

    n: int
    top1: dict[str, float]
    gain: Gain | None


@dataclass(frozen=True)
class Evaluation:
    """One or several models on one set; models are named by label: before and after, checkpoint, or softmax."""

    set: str
    res: int | None  # None: scored from softmax files
    classes_of_set: int
    classes_of_model: int
    summaries: dict[str, Summary]
    calibrations: dict[str, Calibration]  # without those whose predictions have no confidence
    gain: Gain | None  # of after over before, where both were evaluated
    real: Real | None
    doubt: str  # a warning where the class order of weights and folders seems to differ
    by_class: dict[str, dict[str, float | None]]  # class name -> row of `top1_by_class`

    def record(self) -> dict[str, Any]:
        """As evaluations/SET-RES.json holds it; docs/method.md has the keys."""
        found: dict[str, Any] = {"set": self.set, "res": self.res}
        found["classes"] = {"of_set": self.classes_of_set, "of_model": self.classes_of_model}
        for label, summary in self.summaries.items():
            found[label] = asdict(summary) | (asdict(self.calibrations[label]) if label in self.calibrations else {})
        found |= asdict(self.gain) if self.gain else {}
        if self.real:
            gain = asdict(self.real.gain) if self.real.gain else {}
            found["real"] = {"n": self.real.n, **self.real.top1, **gain}
        return found | {"by_class": self.by_class}


def measure(
    name: str,
    res: int | None,
    index: Index,
    columns: Sequence[int],
    classes: Sequence[str],
    predictions: Mapping[str, Predictions],
    real: list[list[int]] | None = None,
) -> Evaluation:
    """The evaluation of the set `name` at `res` px from predictions by label.

    `columns`: the model's class of each folder of `index`. `classes`: the model's class names. `real`: the classes that
    are right for each image (`class_maps.real_labels`).
    """
    calibrations = {label: calibration(made) for label, made in predictions.items()}
    rows = top1_by_class(index.labels, predictions, len(columns))
    return Evaluation(
        set=name,
        res=res,
        classes_of_set=len(columns),
        classes_of_model=len(classes),
        summaries={label: made.summary() for label, made in predictions.items()},
        calibrations={label: found for label, found in calibrations.items() if found},
        gain=gain_of_fixing(predictions),
        real=None if real is None else real_accuracy(real, predictions),
        doubt=class_order.doubt(next(iter(predictions.values())), index, columns, classes),
        by_class={classes[column]: row for column, row in zip(columns, rows, strict=True)},
    )


def gain_of_fixing(predictions: Mapping[str, Predictions]) -> Gain | None:
    """None without predictions before and after."""
    if not {"before", "after"} <= set(predictions):
        return None
    return predictions["after"].gain_over(predictions["before"])


def real_accuracy(lists: list[list[int]], predictions: Mapping[str, Predictions]) -> Real:
    """Top-1 by ReaL labels (Beyer et al., arXiv 2006.07159): a prediction is right if it is in its image's list.

    An image whose list is empty is not counted.
    """
    listed, judged = np.array([bool(labels) for labels in lists]), {}
    for label, made in predictions.items():
        hits = np.array([int(c) in labels for c, labels in zip(made.predicted, lists, strict=True)])
        judged[label] = replace(made, correct1=hits, predicted=np.where(listed, made.predicted, -1))
    summaries = {label: made.summary() for label, made in judged.items()}
    n = list(summaries.values())[-1].n
    return Real(n, {label: summary.top1 for label, summary in summaries.items()}, gain_of_fixing(judged))


def top1_by_class(
    labels: NDArray[np.integer], predictions: Mapping[str, Predictions], classes: int
) -> list[dict[str, float | None]]:
    """A row per class of `labels` [n]: {"n": images, LABEL: top-1 in percent, or None without images}."""
    rows: list[dict[str, float | None]] = [{"n": 0} for _ in range(classes)]
    for label, made in predictions.items():
        kept = labels[made.counted]
        counts = np.bincount(kept, minlength=classes)
        hits = np.bincount(kept, made.correct1[made.counted], classes)
        for row, n, hit in zip(rows, counts.tolist(), hits.tolist(), strict=True):
            row |= {"n": n, label: round(100 * hit / n, 4) if n else None}
    return rows
