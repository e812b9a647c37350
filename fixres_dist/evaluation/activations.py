"""Why fixing works, in numbers: the pooled features that enter the classifier, against those it was trained on.

Training sees crops that enlarge objects, at the training resolution. Other apparent sizes, and another number of cells that
the pooling averages over, shift the features (arXiv 1906.06423); tuning the last BatchNorm and the classifier repairs that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist.data import order
from fixres_dist.data.requests import Pictures, chunks, make_request
from fixres_dist.evaluation.extract import pooled
from fixres_dist.models.parts import Parts
from fixres_dist.training.session import Session
from fixres_dist.training.stages import batch_per_device

IMAGES = 2000  # spread evenly over the split; a sample is enough for distributions
NEAR_ZERO = 0.05  # of the reference's standard deviation

REFERENCE = "training"  # the label of what training showed: the weights before fixing, in the training transform

Features = dict[tuple[str, int], NDArray[np.float32]]  # (label, resolution) -> [n, channels]


@torch.no_grad()
def collect(live: Session, parts: Parts, res: int, transform: str) -> NDArray[np.float32]:
    """Pooled features [n, channels] of up to 2,000 validation images, the same ones for every call, on every rank."""
    index, ranks = live.val, live.ranks
    chosen = np.unique(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).round().astype(np.int64))
    low, high = order.rank_part(0, len(chosen), ranks.rank, ranks.world_size)
    pictures = Pictures(transform, res, live.resize(res), 0)
    requests = (
        make_request(index, pictures, p, 0) for p in chunks(chosen[low:high], batch_per_device(live.config, res))
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
    ranks.total(table)
    return table[table[:, -1] == 1, :-1].numpy()


def statistics(features: Features) -> list[dict[str, Any]]:
    """Per (label, resolution): mean, std, share near zero, and what separates it from the first entry, the reference.

    `channel_shift`: how far a channel's mean is from its mean there, in units of the channel's standard deviation there;
    `distance`: first Wasserstein distance of a channel's distribution, in units of the overall one. Averages over channels.
    """
    base = next(iter(features.values()))
    ordered, scale, spread = np.sort(base, axis=0), float(base.std()), base.std(0)
    rows = []
    for (label, res), values in features.items():
        shift = np.abs(values.mean(0) - base.mean(0))[spread > 0] / spread[spread > 0]
        found = {
            "mean": values.mean(dtype=np.float64),
            "std": values.std(dtype=np.float64),
            "near_zero_percent": 100 * (np.abs(values) < NEAR_ZERO * scale).mean(),
            "channel_shift": shift.mean(),
            "distance": np.abs(np.sort(values, axis=0) - ordered).mean(dtype=np.float64) / scale,
        }
        rows.append({"weights": label, "res": res} | {key: round(float(value), 6) for key, value in found.items()})
    return rows
