"""Exact evaluation: every image of the split once, at any world size; paired gains, calibration, parts of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.data.index import Index
from fixres_dist.training.predictions import Predictions, calibration


def top1_of_parts(place: NDArray[np.integer], predictions: dict[str, Predictions], parts: int) -> list[dict[str, Any]]:
    """[{n, LABEL: top-1, ..}] of the images whose `place` is 0, 1, .. parts - 1; None where a part has no image."""
    rows: list[dict[str, Any]] = [{"n": 0} for _ in range(parts)]
    for label, p in predictions.items():
        kept = p.counted & (place >= 0)
        counts = np.bincount(place[kept], minlength=parts)
        hits = np.bincount(place[kept], p.correct1[kept], parts)
        for row, n, hit in zip(rows, counts.tolist(), hits.tolist(), strict=True):
            row |= {"n": n, label: round(100 * hit / n, 4) if n else None}
    return rows


def real_accuracy(lists: list[list[int]], predictions: dict[str, Predictions]) -> dict[str, Any]:
    """Top-1 by ReaL labels (right if in the list; empty lists out): {n, LABEL: top-1, delta_top1, delta_ci95}."""
    listed, judged = np.array([bool(labels) for labels in lists]), {}
    found: dict[str, Any] = {}
    for label, p in predictions.items():
        hits = np.array([int(c) in labels for c, labels in zip(p.predicted, lists, strict=True)])
        judged[label] = replace(p, correct1=hits, predicted=np.where(listed, p.predicted, -1))
        summary = judged[label].summary()
        found |= {"n": summary["n"], label: summary["top1"]}
    return found | before_after(judged)


def before_after(predictions: dict[str, Predictions]) -> dict[str, Any]:
    """The gain where there are both; otherwise nothing."""
    if not {"before", "after"} <= set(predictions):
        return {}
    return predictions["after"].gain_over(predictions["before"])


def describe(
    name: str,
    res: int | None,
    index: Index,
    columns: Sequence[int],
    classes: Sequence[str],
    predictions: dict[str, Predictions],
    real: list[list[int]] | None = None,
) -> dict[str, Any]:
    """An evaluated set as evaluations/SET-RES.json keeps it; docs/method.md has the keys.

    `columns`: the model's class of each folder of `index`; `predictions`: by label, such as before and after.
    """
    found: dict[str, Any] = {"set": name, "res": res, "classes": {"of_set": len(columns), "of_model": len(classes)}}
    found |= {label: {**p.summary(), **calibration(p)} for label, p in predictions.items()}
    found |= before_after(predictions)
    if real is not None:
        found["real"] = real_accuracy(real, predictions)
    rows = top1_of_parts(index.labels, predictions, len(columns))
    found["by_class"] = {classes[column]: row for column, row in zip(columns, rows, strict=True)}
    return found
