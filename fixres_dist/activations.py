"""Why fixing works, in numbers: the pooled features that enter the classifier, at training and test resolution.

The last map has more cells at a higher resolution, so its mean over them is distributed otherwise than in training: less
spread, and rarely near zero (arXiv 1906.06423). The classifier knows the one distribution; fixing tunes it to the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist import distributed, tuning
from fixres_dist.data import order, plan
from fixres_dist.extract import pooled
from fixres_dist.schedule import batch_per_device
from fixres_dist.session import Session

IMAGES = 2000  # spread evenly over the split; a sample is enough for distributions
NEAR_ZERO = 0.05  # of the reference's standard deviation

Features = dict[tuple[str, int], NDArray[np.float32]]  # (weights, resolution) -> [n, channels]


@torch.no_grad()
def collect(live: Session, parts: tuning.Split, split: str, res: int) -> NDArray[np.float32]:
    """Pooled features [n, channels] of up to 2,000 images of the split, the same ones for every call, on every rank."""
    index, ranks = live.splits[split], live.ranks
    chosen = np.unique(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).round().astype(np.int64))
    low, high = order.rank_part(0, len(chosen), ranks.rank, ranks.world_size)
    pictures = plan.Pictures("test", res, live.resize(res), 0)
    requests = (
        plan.request(index, pictures, p, 0) for p in plan.chunks(chosen[low:high], batch_per_device(live.config, res))
    )
    parts.model.eval()
    parts.head.eval()
    rows: list[torch.Tensor] = []
    with pooled(parts) as found:
        for batch in live.batches(index, requests, res):
            live.logits(parts, parts.head, live.inputs(parts, batch.images))
            rows.append(batch.samples)
    features = torch.cat(found).cpu()
    table = torch.zeros(len(chosen), features.shape[1] + 1)  # the last column: seen
    places = torch.from_numpy(np.searchsorted(chosen, torch.cat(rows).numpy()))
    table[places] = torch.cat([features, torch.ones(len(features), 1)], 1)
    distributed.total(ranks, table)
    return table[table[:, -1] == 1, :-1].numpy()


def statistics(features: Features, reference: tuple[str, int]) -> list[dict[str, Any]]:
    """Per (weights, resolution): mean, std, share near zero, and the distance to the `reference`'s distribution.

    The distance is the first Wasserstein distance of each channel's activations, averaged over the channels, in units of the
    reference's standard deviation: how far an activation has to move, on average.
    """
    base = np.sort(features[reference], axis=0)
    scale = float(base.std())
    rows = []
    for (label, res), values in features.items():
        moved = np.abs(np.sort(values, axis=0) - base).mean(dtype=np.float64)
        rows.append(
            {
                "weights": label,
                "res": res,
                "mean": round(float(values.mean(dtype=np.float64)), 6),
                "std": round(float(values.std(dtype=np.float64)), 6),
                "near_zero_percent": round(100 * float((np.abs(values) < NEAR_ZERO * scale).mean()), 4),
                "distance": round(float(moved) / scale, 6),
            }
        )
    return rows
