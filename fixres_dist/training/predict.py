"""Every image of a split once, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from fixres_dist.base.errors import UserError
from fixres_dist.data import order
from fixres_dist.data.index import Index
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.ranks import Ranks


@torch.no_grad()
def predict(
    logits: Callable[[Loaded], list[torch.Tensor]],
    index: Index,
    batches: Iterator[Loaded],
    ranks: Ranks,
    models: int = 1,
    note: str = "",
) -> list[Predictions]:
    """`logits(batch)` of each of `models` models over this rank's batches, put together over all ranks.

    Raises RuntimeError should an image have been missed or repeated.
    """
    n = len(index)
    rows = torch.zeros(models, n, 6, dtype=torch.float64)  # as `scored` gives them
    start, stop = order.rank_part(0, n, ranks.rank, ranks.world_size)
    with tqdm(total=stop - start, desc=note, unit="img", leave=False, disable=None if ranks.is_main else True) as bar:
        for batch in batches:
            skipped = [bad.sample for bad in batch.skipped]
            rows[:, skipped, :2] += torch.tensor([1.0, -1.0], dtype=rows.dtype)  # seen, without a prediction
            for k, scores in enumerate(logits(batch)):
                rows[k].index_add_(0, batch.samples, scored(scores, batch.labels.to(scores.device)).double().cpu())
            bar.update(len(batch.labels) + len(skipped))
    ranks.total(rows)
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
