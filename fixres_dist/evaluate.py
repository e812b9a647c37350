"""Exact evaluation: every image of the split once, at any world size; paired gains, calibration, parts of the split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from fixres_dist import distributed
from fixres_dist.data import plan
from fixres_dist.data.index import Index
from fixres_dist.errors import UserError
from fixres_dist.features import Loaded
from fixres_dist.files import whole

CALIBRATION_BINS = 15
SIZE_BINS = 5


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


@torch.no_grad()
def predict(
    logits: Callable[[Loaded], list[torch.Tensor]],
    index: Index,
    batches: Iterator[Loaded],
    ranks: distributed.Ranks,
    models: int = 1,
    note: str = "",
) -> list[Predictions]:
    """`logits(batch)` of each of `models` models over this rank's batches, put together over all ranks.

    Raises RuntimeError should an image have been missed or repeated.
    """
    n = len(index)
    rows = torch.zeros(models, n, 6, dtype=torch.float64)  # as `scored` gives them
    start, stop = plan.order.rank_part(0, n, ranks.rank, ranks.world_size)
    with tqdm(total=stop - start, desc=note, unit="img", leave=False, disable=None if ranks.is_main else True) as bar:
        for batch in batches:
            skipped = [bad.sample for bad in batch.skipped]
            rows[:, skipped, :2] += torch.tensor([1.0, -1.0], dtype=rows.dtype)  # seen, without a prediction
            for k, scores in enumerate(logits(batch)):
                rows[k].index_add_(0, batch.samples, scored(scores, batch.labels.to(scores.device)).double().cpu())
            bar.update(len(batch.labels) + len(skipped))
    distributed.total(ranks, rows)
    if not bool((rows[:, :, 0] == 1).all()):
        raise RuntimeError(f"evaluation saw {int(rows[0, :, 0].sum())} images of {n}, each should be seen once")
    return [from_rows(part, index) for part in rows]


def from_rows(rows: torch.Tensor, index: Index) -> Predictions:
    """Of rows as `scored` gives them, -1 for the class where there is no prediction; raises UserError if there is none at all."""
    t = rows.numpy()
    if not (t[:, 1] >= 0).any():
        raise UserError(
            f"none of the {len(index)} images of {index.folder} has a prediction, because none could be decoded. "
            f"Next: python -m fixres_dist data verify --data {index.folder.parent}"
        )
    loss, confidence = t[:, 4].astype(np.float32), t[:, 5].astype(np.float32)
    return Predictions(t[:, 1].astype(np.int32), t[:, 2] > 0, t[:, 3] > 0, loss, confidence)


def scored(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, 6]: seen (1), predicted class, top-1 hit, top-5 hit, cross-entropy, confidence, for logits [n, classes]."""
    top = scores.topk(min(5, scores.shape[1])).indices
    hits = top == labels[:, None]
    loss = F.cross_entropy(scores, labels, reduction="none")
    confidence = scores.softmax(1).amax(1)
    return torch.stack([torch.ones_like(loss), top[:, 0], hits[:, 0], hits.any(1), loss, confidence], 1)


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


def by_size(sizes: NDArray[np.float64], predictions: dict[str, Predictions]) -> list[dict[str, Any]]:
    """Top-1 in fifths of the images by apparent object size: [{from_px, to_px, n, LABEL: top-1}]."""
    known = np.isfinite(sizes)
    if not known.any():
        return []
    edges = np.unique(np.quantile(sizes[known], np.linspace(0, 1, SIZE_BINS + 1)))
    parts = max(1, len(edges) - 1)
    place = np.where(known, np.clip(np.searchsorted(edges, sizes, "right") - 1, 0, parts - 1), -1)
    rows = top1_of_parts(place, predictions, parts)
    spans = zip(edges[:parts], edges[-parts:], strict=True)
    return [{"from_px": round(a, 1), "to_px": round(b, 1), **row} for (a, b), row in zip(spans, rows, strict=True)]


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
    sizes: NDArray[np.float64] | None = None,
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
    if sizes is not None:
        found["by_size"] = by_size(sizes, predictions)
    rows = top1_of_parts(index.labels, predictions, len(columns))
    found["by_class"] = {classes[column]: row for column, row in zip(columns, rows, strict=True)}
    return found
