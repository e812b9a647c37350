"""Whether predictions say that folders and weights have their classes in another order. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fixres_dist.data import class_maps, class_names
from fixres_dist.data.index import Index
from fixres_dist.training.predictions import Predictions

FILE = "data.class_map=FILE, with the weights' class names in their order, or lines of `folder index`"


def doubt(predictions: Predictions, index: Index, columns: Sequence[int], classes: Sequence[str]) -> str:
    """A warning with the next command where another order of the classes explains the predictions better, or where
    guessing would be as good; else empty.

    `columns`: the model's class of each class of `index`; `classes`: the model's, by name.
    """
    kept = predictions.counted
    predicted, hits = predictions.predicted[kept], predictions.correct1[kept]
    labels = np.array(columns)[index.labels[kept]]
    n, present = len(labels), np.unique(labels)
    if len(present) < 2:
        return ""
    top1, noise = float(hits.mean()), 3 * math.sqrt(0.25 / n)  # three standard errors of a share at most
    start = f"warning: top-1 is {100 * top1:.2f} %, and"
    for step, order in other_orders(classes).items():
        share = float((predicted == order[labels]).mean())
        if share > max(2 * top1, top1 + noise):
            return f"{start} {100 * share:.2f} % if the weights have the classes in another order. Next: {step}"
    first = np.arange(n) % 2 == 0  # of neighbours, which are of one class: what one half shows is tested on the other
    order = one_to_one(predicted[first], labels[first], len(classes))
    share = float((predicted[~first] == order[labels[~first]]).mean())
    if n >= 4 * len(present) and share > float(hits[~first].mean()) + 0.05 + math.sqrt(2) * noise:
        moved = [k for k in present.tolist() if order[k] not in (k, -1)]
        pairs = ", ".join(f"{classes[k]} is predicted as {classes[order[k]]}" for k in moved[:3])
        return f"{start} {100 * share:.2f} % if {len(moved)} of {len(present)} classes are exchanged ({pairs}). Next: {FILE}"
    if top1 * len(columns) <= 1:
        return (
            f"{start} guessing among {len(columns)} classes gives {100 / len(columns):.2f} %: if these weights are trained, "
            f"their classes may stand in another order. Next: {FILE}"
        )
    return ""


def other_orders(classes: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """By the setting that gives it, an order that weights of such folders may have: the number of each class in it."""
    orders = {
        "data.class_map=natural (the order of timm's scripts)": class_names.natural(classes),
        "leave out data.class_map (torchvision's order)": sorted(classes),
    }
    places = {step: {name: k for k, name in enumerate(order)} for step, order in orders.items()}
    if class_names.is_imagenet(classes):
        known = class_names.imagenet()
        numbers = class_maps.class_map(classes, known.names, Path("the data set"), known.aliases)
        places["data.class_map=imagenet"] = dict(zip(classes, numbers, strict=True))
    found = {step: np.array([place[name] for name in classes]) for step, place in places.items()}
    return {step: order for step, order in found.items() if (order != np.arange(len(classes))).any()}


def one_to_one(predicted: NDArray[np.integer], labels: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Of each label the class that is predicted for it most often, each class for one label; -1 where none is left."""
    pairs, counts = np.unique(labels.astype(np.int64) * classes + predicted, return_counts=True)
    order, taken = np.full(classes, -1), set()
    for pair in pairs[np.argsort(-counts, kind="stable")].tolist():
        label, guess = divmod(pair, classes)
        if order[label] < 0 and guess not in taken:
            order[label] = guess
            taken.add(guess)
    return order
