"""What is measured on a set: accuracy, macro means, calibration, paired gain, by ReaL labels and by class. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fixres_dist.data.index import Index
from fixres_dist.runs.results import Gain, Measures, Summary
from fixres_dist.training import class_order
from fixres_dist.training.confusion import by_class, measures
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
    measures: dict[str, Measures]
    gain: Gain | None  # of after over before, where both were evaluated
    real: Real | None
    doubt: str  # a warning where the class order of weights and folders seems to differ
    by_class: dict[str, dict[str, Any]]  # class name -> row of `scores_by_class`

    def record(self) -> dict[str, Any]:
        """As evaluations/SET-RES.json holds it; docs/method.md has the keys."""
        found: dict[str, Any] = {"set": self.set, "res": self.res}
        found["classes"] = {"of_set": self.classes_of_set, "of_model": self.classes_of_model}
        for label, summary in self.summaries.items():
            found[label] = asdict(summary) | (asdict(self.measures[label]) if label in self.measures else {})
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
    rows = scores_by_class(predictions, len(classes))
    return Evaluation(
        set=name,
        res=res,
        classes_of_set=len(columns),
        classes_of_model=len(classes),
        summaries={label: made.summary() for label, made in predictions.items()},
        measures={label: found for label, made in predictions.items() if (found := measures(made))},
        gain=gain_of_fixing(predictions),
        real=None if real is None else real_accuracy(real, predictions),
        doubt=class_order.doubt(next(iter(predictions.values())), index, columns, classes),
        by_class={classes[column]: rows[column] for column in columns},
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


def scores_by_class(predictions: Mapping[str, Predictions], classes: int) -> list[dict[str, Any]]:
    """A row per class of the model: {"n": images, LABEL: top-1 in percent (None without images), "precision": {LABEL: ..},
    "f1": {LABEL: ..}} for predictions by label, with labels. Top-1 of a class is its recall."""
    rows: list[dict[str, Any]] = [{"n": 0, "precision": {}, "f1": {}} for _ in range(classes)]
    for label, made in predictions.items():
        kept = made.counted
        found = by_class(made.labels[kept], made.predicted[kept], classes)
        for k, row in enumerate(rows):
            n = int(found.images[k])
            row |= {"n": n, label: round(100 * float(found.recall[k]), 4) if n else None}
            row["precision"][label] = round(100 * float(found.precision[k]), 4)
            row["f1"][label] = round(100 * float(found.f1[k]), 4)
    return rows
