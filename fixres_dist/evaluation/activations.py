"""Why fixing works, in numbers: the inputs of the classifier at test time, against those that it was trained on.

Training crops enlarge objects, and the pooling averages over more cells at a higher resolution. So the statistics of the
pooled activations shift between training and test (Touvron et al., arXiv 1906.06423, section 3). Tuning the last BatchNorm
and the classifier repairs that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import order
from fixres_dist.data.requests import Pictures, chunks, make_request
from fixres_dist.models.build import preprocessing
from fixres_dist.models.parts import Parts, classifier_inputs
from fixres_dist.training.session import Session

IMAGES = 2000  # spread evenly over the split; a sample is enough for distributions
NEAR_ZERO = 0.05  # in standard deviations of the reference

REFERENCE = "training"  # label of the reference: the weights before fixing, on pictures as training transforms them

ClassifierInputs = dict[tuple[str, int], NDArray[np.float32]]  # (label, resolution) -> [n, channels]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one model's classifier inputs at one resolution; the last two compare them with the reference.

    `channel_shift`: how far a channel's mean is from its mean in the reference, in that channel's standard deviations there.
    `distance`: first Wasserstein distance between a channel's two distributions, in standard deviations of the whole
    reference. Both are means over the channels.
    """

    weights: str  # the model's label
    res: int
    mean: float
    std: float
    near_zero_percent: float
    channel_shift: float
    distance: float


def collect_all(session: Session, models: Mapping[str, Parts]) -> ClassifierInputs:
    """Of the reference, then of each model (by label) at training and at test resolution; on every rank."""
    stage, low = session.config.pretrain, training_resolution(session.config)
    transform = stage.train_transform if stage else "random_resized_crop"
    found = {(REFERENCE, low): collect(session, next(iter(models.values())), low, transform)}
    for label, parts in models.items():
        for res in dict.fromkeys((low, session.config.data.res)):
            found[label, res] = collect(session, parts, res, "test")
    return found


def training_resolution(config: Config) -> int:
    """Pixels that the weights before fixing were trained at: stage one's, else the recipe's, else timm's."""
    if config.pretrain:
        return config.pretrain.res
    facts = recipes.find(config.model.name).facts
    return facts.train_res if facts else preprocessing(config.model.timm_name).train_res


@torch.no_grad()
def collect(session: Session, parts: Parts, res: int, transform: str) -> NDArray[np.float32]:
    """Classifier inputs [n, channels] of the same 2,000 validation images (or all) in every call; on every rank."""
    index, ranks = session.val, session.ranks
    chosen = np.unique(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).round().astype(np.int64))
    low, high = order.rank_part(0, len(chosen), ranks.rank, ranks.world_size)
    pictures = Pictures(transform, res, session.resize(res), 0)
    size = session.batch_per_device(res)
    requests = (make_request(index, pictures, p, 0) for p in chunks(chosen[low:high], size))
    parts = session.parts_for_size(parts, res)
    parts.model.eval()
    parts.head.eval()
    rows: list[torch.Tensor] = []
    with classifier_inputs(parts) as found:
        for batch in ranks.together(session.batches(index, requests, res), lambda: None, math.inf):
            session.logits(parts, parts.head, session.inputs(parts, batch.images))
            rows.append(batch.samples)
    features = torch.cat(found).cpu()
    table = torch.zeros(len(chosen), features.shape[1] + 1)  # the last column marks the rows that are filled
    places = torch.from_numpy(np.searchsorted(chosen, torch.cat(rows).numpy()))
    table[places] = torch.cat([features, torch.ones(len(features), 1)], 1)
    ranks.total(table)
    filled: NDArray[np.float32] = table[table[:, -1] == 1, :-1].numpy()
    return filled


def statistics(inputs: ClassifierInputs) -> list[Statistics]:
    """One row per (label, resolution); the first entry of `inputs` is the reference."""
    base = next(iter(inputs.values()))
    ordered, scale, spread = np.sort(base, axis=0), float(base.std()), base.std(0)
    rows = []
    for (label, res), values in inputs.items():
        shift = np.abs(values.mean(0) - base.mean(0))[spread > 0] / spread[spread > 0]
        found = {
            "mean": values.mean(dtype=np.float64),
            "std": values.std(dtype=np.float64),
            "near_zero_percent": 100 * (np.abs(values) < NEAR_ZERO * scale).mean(),
            "channel_shift": shift.mean(),
            "distance": np.abs(np.sort(values, axis=0) - ordered).mean(dtype=np.float64) / scale,
        }
        rows.append(Statistics(label, res, **{key: round(float(value), 6) for key, value in found.items()}))
    return rows
