"""Decode every file of a data set, as training would, and say which ones cannot be."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from fixres_dist.data.index import Index
from fixres_dist.data.progress import Progress
from fixres_dist.data.torch_cpu import Bad, Undecodable, load, start_worker

CHUNK = 64  # samples a worker takes at a time


def verify(index: Index, workers: int, progress: Progress | None = None) -> list[Bad]:
    """Every sample of `index` that cannot be decoded, with the reason, in order."""
    found: list[Bad] = []
    parts = [range(start, min(len(index), start + CHUNK)) for start in range(0, len(index), CHUNK)]
    # Forked: the index is shared, not copied. A worker that is killed ends the command; multiprocessing.Pool would wait.
    with ProcessPoolExecutor(max(1, workers), get_context("fork"), begin, (index,)) as pool:
        for part, bad in zip(parts, pool.map(check, parts), strict=True):
            found += bad
            if progress:
                progress(part.stop, len(index))
    return found


def begin(index: Index) -> None:
    start_worker(0)
    global shared
    shared = index
    torch.set_num_threads(1)


shared: Index  # in a worker


def check(samples: range) -> list[Bad]:
    bad = []
    for sample in samples:
        try:
            load(shared, sample)
        except Undecodable as error:
            bad.append(Bad(sample, str(error)))
    return bad
