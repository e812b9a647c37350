"""Exact evaluation: every image of the split once, at any world size, and the paired interval of a gain."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from fixres_dist import distributed
from fixres_dist.data import plan
from fixres_dist.data.index import Index
from fixres_dist.features import Loaded


@dataclass(frozen=True)
class Predictions:
    """One row per image, in the index's order."""

    predicted: NDArray[np.int32]  # -1: the image could not be decoded (data.on_bad: skip) and counts nowhere
    correct1: NDArray[np.bool_]
    correct5: NDArray[np.bool_]
    loss: NDArray[np.float32]

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
        part = path.with_name(f".{path.name}.{os.getpid()}.npz")
        arrays = {"predicted": self.predicted, "correct1": self.correct1, "correct5": self.correct5, "loss": self.loss}
        np.savez_compressed(part, sample_list=np.frombuffer(sample_list.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
        os.replace(part, path)

    @staticmethod
    def read(path: Path) -> Predictions:
        with np.load(path, allow_pickle=False) as a:
            return Predictions(a["predicted"], a["correct1"], a["correct5"], a["loss"])


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
    rows = torch.zeros(models, n, 5, dtype=torch.float64)  # seen, predicted, correct1, correct5, loss
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
    return [
        Predictions(t[:, 1].astype(np.int32), t[:, 2] > 0, t[:, 3] > 0, t[:, 4].astype(np.float32))
        for t in rows.numpy()
    ]


def scored(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, 5]: seen (1), predicted class, top-1 hit, top-5 hit, cross-entropy, for logits [n, classes]."""
    top = scores.topk(min(5, scores.shape[1])).indices
    hits = top == labels[:, None]
    loss = F.cross_entropy(scores, labels, reduction="none")
    return torch.stack([torch.ones_like(loss), top[:, 0], hits[:, 0], hits.any(1), loss], 1)


def paired_gain(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """(gain, its 95 % interval) of top-1 in percentage points, paired image by image.

    The images are the same, so the interval is that of the mean difference; an unpaired one is several times wider.
    """
    difference = after.astype(np.float64) - before
    gain = 100 * float(difference.mean())
    half = 100 * 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return round(gain, 4), (round(gain - half, 4), round(gain + half, 4))
