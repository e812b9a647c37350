"""Which samples a rank loads, in which views, request by request; both backends take the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fixres_dist.data import geometry, order
from fixres_dist.data.index import Index


class Request(NamedTuple):
    """One forward pass of one rank: at most `batch_per_device` pictures, possibly none."""

    samples: NDArray[np.int64]
    views: list[geometry.View]


@dataclass(frozen=True)
class Pictures:
    """How images of a split become res x res pictures."""

    transform: str  # test | test_flip | test_aug | random_resized_crop
    res: int
    resize: geometry.Resize
    seed: int
    augment: geometry.Augment | None = None  # RandAugment in the place of colour jitter


def make_request(
    index: Index, pictures: Pictures, samples: NDArray[np.int64], epoch: int | NDArray[np.int64]
) -> Request:
    sizes = np.maximum(index.sizes[samples], 1)  # 0: the header could not be read; the backend will skip it
    p = pictures
    views = geometry.train_views(p.transform, sizes, samples, p.res, p.resize, p.seed, epoch)
    if p.augment:
        keys = order.keyed(p.seed, 3, epoch, samples).tolist()
        plain = (1.0, 1.0, 1.0)
        views = [
            view._replace(jitter=plain, augment=p.augment._replace(seed=key))
            for view, key in zip(views, keys, strict=True)
        ]
    return Request(samples, views)


def micro_batches(images: int, world_size: int, batch_per_device: int, together: int = 1) -> int:
    """Forward passes that a step of `images` takes on every rank: the same number on each, since they share
    collectives. `together` as in order.rank_part."""
    units = -(-images // together)
    largest_part = together * -(-units // world_size)
    return max(1, -(-largest_part // batch_per_device))


def chunks(samples: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Parts of at most `size`; one empty part for no samples, since every rank takes part in every step."""
    return [samples[i : i + size] for i in range(0, len(samples), size)] or [samples]


def train_steps(
    index: Index,
    pictures: Pictures,
    global_batch: int,
    batch_per_device: int,
    first: int,
    stop: int,
    rank: int,
    world_size: int,
    repeats: int = 1,
    together: int = 1,
) -> Iterator[list[Request]]:
    """For each optimizer step `first` .. `stop - 1` of a stage, this rank's requests; the last ones may be empty.

    Every rank has `micro_batches` of them; `together` divides `batch_per_device`. Starting late costs nothing.
    """
    n = len(index)
    for step in range(first, stop):
        samples, views = order.train_draws(n, pictures.seed, step, global_batch, rank, world_size, repeats, together)
        images = min(global_batch, n - step % order.steps_per_epoch(n, global_batch) * global_batch)
        starts = (k * batch_per_device for k in range(micro_batches(images, world_size, batch_per_device, together)))
        parts = [slice(start, start + batch_per_device) for start in starts]
        yield [make_request(index, pictures, samples[part], views[part]) for part in parts]


def in_batches(index: Index, pictures: Pictures, samples: NDArray[np.int64], batch: int) -> Iterator[Request]:
    """These samples, `batch` at a time, in the views of epoch 0; nothing for no samples."""
    for start in range(0, len(samples), batch):
        yield make_request(index, pictures, samples[start : start + batch], 0)


def first_samples(
    index: Index, pictures: Pictures, count: int, batch: int, rank: int, world_size: int
) -> Iterator[Request]:
    """This rank's part of the first `count` samples of epoch 0's order: exact BN statistics are measured on them."""
    positions = np.arange(*order.rank_part(0, min(count, len(index)), rank, world_size))
    samples = order.positions_to_samples(len(index), pictures.seed, 0, positions)
    return in_batches(index, pictures, samples, batch)


def whole_batches(index: Index, pictures: Pictures, batch: int, rank: int, world_size: int) -> Iterator[Request]:
    """This rank's part of the split's batches, in file order: the same batches at any world size."""
    start, stop = order.rank_part(0, -(-len(index) // batch), rank, world_size)
    return in_batches(index, pictures, np.arange(start * batch, min(len(index), stop * batch)), batch)


def every_sample(index: Index, pictures: Pictures, batch: int, rank: int, world_size: int) -> Iterator[Request]:
    """This rank's part of the split in file order: over all ranks every sample exactly once, without padding."""
    return in_batches(index, pictures, np.arange(*order.rank_part(0, len(index), rank, world_size)), batch)
